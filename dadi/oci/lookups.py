"""What else a reader asks a registry: how large a blob is, which tags there are, what it wants to see.

    blob_size   HEAD blobs/<digest>; only the registry itself is asked: its answer also says that the caller may have it
    tags        GET tags/list?n=…&last=…, one page
    challenge   GET /v2/ or HEAD manifests/…, without any proof; the WWW-Authenticate of the answer

(OCI distribution specification, "Pulling blobs", "Listing Tags"; RFC 9110, 11.6.1.)
"""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import parse_qs, urlencode, urlsplit

import msgspec

from dadi import digest as digests
from dadi.errors import Malformed
from dadi.oci import challenge as challenges
from dadi.oci import link, media_types
from dadi.oci.auth import Authenticator
from dadi.oci.endpoints import Endpoint, Endpoints
from dadi.oci.reference import Reference
from dadi.oci.transport import Transport

_MAX_TAGS_PAGE = 4 << 20
_MAX_CHALLENGE = 4 << 10


class TagsPage(msgspec.Struct, frozen=True):
    """One page of a repository's tags; `following` are the parameters (n, last) of the next one, empty after the last.

    `following` are the registry's words: percent-encode them before they go into a URL.
    """

    tags: tuple[str, ...]
    following: dict[str, str]


class _Tags(msgspec.Struct):
    tags: tuple[str, ...] | None = None


class Lookups:
    """Asks a registry itself, never a mirror."""

    def __init__(self, endpoints: Endpoints, auth: Authenticator, transport: Transport) -> None:
        self._endpoints = endpoints
        self._auth = auth
        self._transport = transport

    async def blob_size(self, ref: Reference, digest: str) -> int:
        """See `RegistryClient.blob_size`."""
        digests.parse(digest)

        async def attempt(endpoint: Endpoint) -> int:
            url = endpoint.url(ref, f"blobs/{digest}")
            what = f"blob {digest} of {ref.name}"
            async with self._auth.open("HEAD", endpoint.host, url, {}, endpoint.scope(ref)) as answer:
                if answer.status != 200:
                    raise await answer.error(what, endpoint.host)
                if answer.length is None:
                    raise Malformed(f"{what}: {answer.host} does not say how large it is")
                return answer.length

        return await self._endpoints.ask(ref.registry, attempt, mirrors=False)

    async def tags(self, ref: Reference, parameters: Mapping[str, str]) -> TagsPage:
        """See `RegistryClient.tags`."""

        async def attempt(endpoint: Endpoint) -> TagsPage:
            url = endpoint.url(ref, "tags/list") + (f"?{urlencode(parameters)}" if parameters else "")
            what = f"the tags of {ref.name}"
            async with self._auth.open("GET", endpoint.host, url, {}, endpoint.scope(ref)) as answer:
                if answer.status != 200:
                    raise await answer.error(what, endpoint.host)
                raw = await answer.body(_MAX_TAGS_PAGE, what)
                following = link.next_page(url, answer.headers.getall("Link", ()))
            try:
                tags = msgspec.json.decode(raw, type=_Tags).tags or ()
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                raise Malformed(f"{what}: {answer.host} answers something that is no list of tags") from None
            return TagsPage(tags, _page_of(following))

        return await self._endpoints.ask(ref.registry, attempt, mirrors=False)

    async def challenge(self, registry: str, ref: Reference | None) -> str | None:
        """See `RegistryClient.challenge`."""

        async def attempt(endpoint: Endpoint) -> str | None:
            if ref is None:
                method, url, headers = "GET", f"{endpoint.base}/v2/", {}
            else:
                method, url = "HEAD", endpoint.url(ref, f"manifests/{ref.identifier}")
                headers = {"Accept": media_types.ACCEPT}
            async with self._transport.open(method, url, headers) as answer:
                if answer.status == 429 or answer.status >= 500:  # it says nothing of who may
                    raise await answer.error(f"how {registry} meets strangers", endpoint.host)
                if answer.status != 401 or not answer.at_home:
                    return None
                said = answer.headers.getall("WWW-Authenticate", ())
            for one in said:
                if len(one) <= _MAX_CHALLENGE and one.isprintable() and challenges.choose(challenges.parse([one])):
                    return str(one)
            return None

        return await self._endpoints.ask(registry, attempt, mirrors=False)


def _page_of(url: str | None) -> dict[str, str]:
    if url is None:
        return {}
    query = parse_qs(urlsplit(url).query)
    return {name: query[name][0][:200] for name in ("n", "last") if name in query}
