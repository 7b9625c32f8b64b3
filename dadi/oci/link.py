"""Link headers: where the next page of a list is. Pure.

    header   link *("," link)
    link     "<" URL ">" *(";" name ["=" (token | quoted-string)])

RFC 8288, 3; OCI distribution specification, "Listing Referrers".
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from urllib.parse import urljoin

from dadi.errors import DadiError, Malformed
from dadi.oci.hosts import origin_of

_PARAM = r'[ \t]*;[ \t]*[A-Za-z0-9_*-]+(?:[ \t]*=[ \t]*(?:"(?:[^"\\]|\\.)*"|[^\s",;]*))?'
_LINK = re.compile(rf"[ \t,]*<([^>]*)>((?:{_PARAM})*)")
_REL = re.compile(r';[ \t]*rel[ \t]*=[ \t]*(?:"([^"]*)"|([^\s",;]*))', re.IGNORECASE)
_MAX_HEADER = 16 << 10


def next_page(url: str, headers: Iterable[str]) -> str | None:
    """Return the URL of the page after `url`, None after the last.

    Raises Malformed for one of another origin (scheme, host, port) than `url`: a list has no reason to go on elsewhere.
    """
    for header in headers:
        at, header = 0, header[:_MAX_HEADER]
        while (link := _LINK.match(header, at)) is not None:
            rel = _REL.search(link[2])
            if rel is not None and "next" in (rel[1] or rel[2] or "").lower().split():
                return _beside(url, link[1])
            at = link.end()
    return None


def _beside(url: str, target: str) -> str:
    host = origin_of(url)[1]
    try:
        found = urljoin(url, target.strip()).partition("#")[0]
        same = origin_of(found) == origin_of(url)
    except (ValueError, DadiError):
        raise Malformed(f"{host} gives a next page that is no proper URL") from None
    if not same:
        raise Malformed(f"{host} gives a next page that is on another host, or of another scheme")
    return found
