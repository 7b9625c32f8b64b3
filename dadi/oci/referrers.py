"""Referrers: the artifacts (indexes, signatures) whose `subject` an image is.

    listing    GET referrers/<digest>?artifactType=…, page after page; where the registry knows no such thing, the index
               under the tag "sha256-<hex>" that clients keep instead
    pushing    PUT manifests/<digest>; if the answer lacks OCI-Subject, the registry does not list it by itself, and it
               is added to that index (`tagged.py`)

All of a listing is somebody's word, and bounded: _MAX_PAGES pages, and MAX_ENTRIES entries and MAX_SIZE bytes in all of
them together; no page twice, none from another host. What an entry says is checked when its manifest is read. (OCI
distribution specification 1.1, "Listing Referrers", "Referrers Tag Schema", "Pushing Manifests with Subject".)
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from urllib.parse import urlencode

import msgspec

from dadi import digest as digests
from dadi.errors import DigestMismatch, InvalidRequest, Malformed, NotFound, TooLarge, Unsupported
from dadi.oci import index_document, link, media_types
from dadi.oci import manifest as manifests
from dadi.oci.auth import Authenticator
from dadi.oci.endpoints import Endpoint, Endpoints
from dadi.oci.manifest import MAX_ENTRIES, MAX_SIZE, Descriptor, Index, Manifest
from dadi.oci.push import Pushes
from dadi.oci.reference import Reference
from dadi.oci.tagged import TaggedIndexes

_MAX_PAGES = 50
_MAX_SILENT = 32
"""Entries without an artifact type whose manifests are read to learn it."""
_UNKNOWN = frozenset({400, 404, 405, 406, 501})
"""What means that there is no referrers API: 404 says the specification; the others answer no proper request."""
_HINT = "delete referrers that nobody needs any more"


ReadManifest = Callable[[Reference, str], Awaitable[tuple[Descriptor, bytes]]]
"""Returns a manifest by its digest: `RegistryClient.manifest`."""


def fallback_tag(digest: str) -> str:
    """Return the tag of the index that lists the referrers of a digest where the registry does not."""
    return digests.parse(digest).replace(":", "-")


class Referrers:
    """Lists and pushes referrers, at the registry itself; see `RegistryClient` for what the methods promise."""

    def __init__(
        self, pushes: Pushes, tagged: TaggedIndexes, endpoints: Endpoints, auth: Authenticator, read: ReadManifest
    ) -> None:
        self._read = read
        self._pushes = pushes
        self._endpoints = endpoints
        self._tagged = tagged
        self._auth = auth

    async def of(self, ref: Reference, digest: str, artifact_type: str) -> list[Descriptor]:
        """See `RegistryClient.referrers`."""
        digests.parse(digest)
        found = await self._endpoints.ask(
            ref.registry, lambda endpoint: self._listed(endpoint, ref, digest, artifact_type), mirrors=False
        )
        if found is None:
            found = await self._typed(ref, await self._tagged.entries(ref, fallback_tag(digest)))
        return [entry for entry in found if artifact_type in ("", entry.artifact_type)]

    async def _typed(self, ref: Reference, entries: list[Descriptor]) -> list[Descriptor]:
        """Return the entries, with the artifact types of those that name none: some tools lose them when they copy."""
        found: list[Descriptor] = []
        asked = 0
        for entry in entries:
            if not entry.artifact_type and entry.media_type in media_types.MANIFESTS and asked < _MAX_SILENT:
                asked += 1
                with contextlib.suppress(NotFound, Malformed, Unsupported, DigestMismatch):
                    document = manifests.parse((await self._read(ref, entry.digest))[1], expected=entry.media_type)
                    if isinstance(document, Manifest):
                        kind = document.artifact_type or document.config.media_type
                        entry = msgspec.structs.replace(entry, artifact_type=kind)
            found.append(entry)
        return found

    async def push(self, ref: Reference, raw: bytes, media_type: str, subject: str) -> Descriptor:
        """See `RegistryClient.push_referrer`."""
        document = manifests.parse(raw, media_type)
        if document.subject is None or document.subject.digest != subject:
            raise InvalidRequest(f"a referrer of {subject} whose subject is {document.subject}")
        # As the registry would list it: without a type of its own an artifact is what its config is.
        kind = "" if isinstance(document, Index) else document.artifact_type or document.config.media_type
        descriptor = Descriptor(
            document.media_type, digests.of(raw), len(raw), annotations=document.annotations, artifact_type=kind
        )
        pushed = await self._pushes.push_manifest(ref.at(descriptor.digest), raw, document.media_type)
        if not pushed.subject_known:

            def add(entries: list[Descriptor]) -> list[Descriptor]:
                there = any(entry.digest == descriptor.digest for entry in entries)
                return entries if there else [*entries, descriptor]

            await self._tagged.update(ref, fallback_tag(subject), add)
        return descriptor

    async def _listed(
        self, endpoint: Endpoint, ref: Reference, digest: str, artifact_type: str
    ) -> list[Descriptor] | None:
        """Return what the referrers API lists; None if there is no such API."""
        query = f"?{urlencode({'artifactType': artifact_type})}" if artifact_type else ""
        url: str | None = endpoint.url(ref, f"referrers/{digest}{query}")
        what = f"the referrers of {ref.name}@{digest}"
        seen: set[str] = set()
        found: list[Descriptor] = []
        entries = size = 0
        while url is not None:
            seen.add(url)
            page = await self._page(endpoint, ref, url, what, MAX_SIZE - size)
            if page is None:
                if len(seen) > 1:
                    raise Malformed(f"{what}: {endpoint.host} does not have the next page that it names")
                return None
            raw, content_type, following = page
            document = index_document.parse(raw, content_type)
            size, entries = size + len(raw), entries + len(document.entries)
            found += document.descriptors
            if entries > MAX_ENTRIES or (len(seen) >= _MAX_PAGES and following):
                raise TooLarge(f"{what}: more than {MAX_ENTRIES} of them or {_MAX_PAGES} pages", hint=_HINT)
            if following in seen:
                raise Malformed(f"{what}: {endpoint.host} names a page as the next that came before")
            url = following
        return found

    async def _page(
        self, endpoint: Endpoint, ref: Reference, url: str, what: str, limit: int
    ) -> tuple[bytes, str, str | None] | None:
        """Return a page, its Content-Type and the next page's URL; None if this is not a list of referrers."""
        headers = {"Accept": media_types.OCI_INDEX}
        async with self._auth.open("GET", endpoint.host, url, headers, endpoint.scope(ref)) as answer:
            if answer.status in _UNKNOWN:
                return None
            if answer.status != 200:
                raise await answer.error(what, endpoint.host)
            content_type = media_types.bare(answer.headers.get("Content-Type", ""))
            if content_type != media_types.OCI_INDEX:
                return None  # a page for people, from whatever answers paths that it does not know
            try:
                raw = await answer.body(limit, what)
            except TooLarge as error:
                error.hint = _HINT
                raise
            return raw, content_type, link.next_page(url, answer.headers.getall("Link", ()))
