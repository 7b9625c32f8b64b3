"""The writing side: blobs and manifests go to the registry itself, never to a mirror.

    has_blob        HEAD blobs/<digest>
    push_blob       HEAD; POST blobs/uploads/ → Location; PUT Location?digest=… with all the bytes
    mount_blob      POST blobs/uploads/?mount=…&from=… → 201, or 202: an upload that nobody asked for, taken back
    push_manifest   PUT manifests/<tag or digest>

The POST comes before any byte is sent, and proves who we are. An upload that breaks, or that the registry forgets,
starts anew from the HEAD. The Location's query string is kept as it is; it may lead to another host, as a redirect may
(`hosts.py`), and gets no credentials there. (OCI distribution specification, "Push".)

What a registry says when it does not want to be written to is as varied as registries are; `refusal` is the one place
that knows, and its errors say what to do instead.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar
from urllib.parse import urlencode

import msgspec

from dadi import digest as digests
from dadi.errors import (
    AccessDenied,
    Conflict,
    DadiError,
    DigestMismatch,
    InvalidRequest,
    Malformed,
    NotFound,
    RegistryNotAllowed,
    TooLarge,
    Unavailable,
    Unsupported,
)
from dadi.oci.answer import Answer
from dadi.oci.auth import Authenticator
from dadi.oci.endpoints import Endpoint, Endpoints
from dadi.oci.hosts import Hosts
from dadi.oci.manifest import MAX_SIZE
from dadi.oci.outgoing import Body, Source, SourceFailed
from dadi.oci.reference import Reference

T = TypeVar("T")

INSTEAD = "write the result to a directory with `--output DIR`"
"""What hints offer where a registry refuses to be written; whoever has something else to offer replaces it."""
_BYTES = {"Content-Type": "application/octet-stream"}


class Pushed(msgspec.Struct, frozen=True):
    """A manifest that the registry has taken; `subject_known`: it will itself list it as its subject's referrer."""

    digest: str
    subject_known: bool


class Changed(Conflict):
    """What was to be replaced is not what it was any more (the registry checks If-Match)."""


class Pushes:
    """Writes to registries; see `RegistryClient` for what the methods promise."""

    def __init__(self, endpoints: Endpoints, auth: Authenticator, hosts: Hosts) -> None:
        self._endpoints = endpoints
        self._auth = auth
        self._hosts = hosts

    async def has_blob(self, ref: Reference, digest: str) -> bool:
        """See `RegistryClient.has_blob`."""
        digests.parse(digest)
        return await self.ask(ref, lambda endpoint: self._has_blob_at(endpoint, ref, digest))

    async def push_blob(
        self, ref: Reference, digest: str, size: int, source: Source, on_progress: Callable[[int], None] | None
    ) -> bool:
        """See `RegistryClient.push_blob`."""
        digests.parse(digest)
        body = Body(size, source, on_progress)
        sent = False

        async def attempt(endpoint: Endpoint) -> bool:
            nonlocal sent
            if await self._has_blob_at(endpoint, ref, digest):
                return sent  # if we have sent it, then this says that it arrived, though we were not told
            location = await self._begin_upload(endpoint, ref)
            sent = True
            await self._upload(endpoint, ref, location, digest, body)
            return True

        try:
            return await self.ask(ref, attempt)
        except SourceFailed as failed:
            raise failed.error from None

    async def mount_blob(self, ref: Reference, digest: str, size: int, from_repository: str) -> bool:
        """See `RegistryClient.mount_blob`."""
        digests.parse(digest)
        try:
            return await self.ask(ref, lambda endpoint: self._mount_at(endpoint, ref, digest, size, from_repository))
        except RegistryNotAllowed:
            raise
        except (AccessDenied, NotFound, InvalidRequest, Unsupported, Malformed):
            return False  # mounting spares an upload; who may not mount, or cannot, uploads

    async def push_manifest(self, ref: Reference, raw: bytes, media_type: str) -> Pushed:
        """See `RegistryClient.push_manifest`."""
        digest = await asyncio.to_thread(digests.of, raw)
        if ref.digest not in (None, digest):
            raise InvalidRequest(f"the manifest to push as {ref} has digest {digest}")
        if len(raw) > MAX_SIZE:
            raise TooLarge(f"a manifest of {len(raw)} bytes; registries take up to {MAX_SIZE}")
        try:
            return await self.ask(ref, lambda endpoint: self.put_manifest(endpoint, ref, digest, raw, media_type))
        except Conflict:
            # A tag that cannot be changed need not be, if it is what it should be.
            if ref.digest is None and await self.ask(ref, lambda endpoint: self._digest_at(endpoint, ref)) == digest:
                return Pushed(digest, subject_known=False)
            raise

    async def ask(self, ref: Reference, attempt: Callable[[Endpoint], Awaitable[T]]) -> T:
        """Return what `attempt` gives at the registry itself; if we may not write there, say what to do instead."""
        try:
            return await self._endpoints.ask(ref.registry, attempt, mirrors=False)
        except RegistryNotAllowed:
            raise
        except AccessDenied as error:
            error.hint = f"{error.hint}; or {INSTEAD}" if error.hint else INSTEAD
            raise

    async def put_manifest(
        self,
        endpoint: Endpoint,
        ref: Reference,
        digest: str,
        raw: bytes,
        media_type: str,
        conditions: Mapping[str, str] | None = None,
    ) -> Pushed:
        """Put a manifest in one request; raise Changed if one of the `conditions` (headers) does not hold."""
        url = endpoint.url(ref, f"manifests/{ref.identifier}")
        headers = {"Content-Type": media_type, **(conditions or {})}
        body, scope = Body(len(raw), raw), endpoint.push_scope(ref)
        async with self._auth.open("PUT", endpoint.host, url, headers, scope, body=body) as answer:
            if answer.status not in (200, 201, 202, 204):
                error = await refusal(answer, f"the manifest {ref}", endpoint)
                if answer.status == 412 and conditions and "immutable" not in answer.said.lower():
                    raise Changed(error.message)
                raise error
            _check_digest(answer, digest)
            return Pushed(digest, subject_known=bool(answer.headers.get("OCI-Subject")))

    async def _has_blob_at(self, endpoint: Endpoint, ref: Reference, digest: str, size: int | None = None) -> bool:
        url = endpoint.url(ref, f"blobs/{digest}")
        async with self._auth.open("HEAD", endpoint.host, url, {}, endpoint.push_scope(ref)) as answer:
            if answer.status == 200:
                return size is None or answer.length in (None, size)
            if answer.status == 404:
                return False
            raise await answer.error(f"blob {digest} of {ref.name}", endpoint.host)

    async def _digest_at(self, endpoint: Endpoint, ref: Reference) -> str | None:
        url = endpoint.url(ref, f"manifests/{ref.identifier}")
        async with self._auth.open("HEAD", endpoint.host, url, {}, endpoint.push_scope(ref)) as answer:
            return answer.digest if answer.status == 200 else None

    async def _begin_upload(self, endpoint: Endpoint, ref: Reference) -> str:
        """Return where the bytes are to go."""
        url = endpoint.url(ref, "blobs/uploads/")
        async with self._auth.open("POST", endpoint.host, url, {}, endpoint.push_scope(ref)) as answer:
            if answer.status != 202:
                error = await refusal(answer, f"an upload to {ref.name}", endpoint)
                if isinstance(error, NotFound):
                    error.hint = f"the registry may want the repository {ref.repository} to be made first"
                raise error
            return self._location(answer)

    async def _upload(self, endpoint: Endpoint, ref: Reference, location: str, digest: str, body: Body) -> None:
        url = f"{location}{'&' if '?' in location else '?'}{urlencode({'digest': digest})}"
        what, scope = f"the upload of blob {digest} to {ref.name}", endpoint.push_scope(ref)
        async with self._auth.open("PUT", endpoint.host, url, _BYTES, scope, body=body) as answer:
            if answer.status not in (200, 201, 204):
                error = await refusal(answer, what, endpoint)
                if answer.status in (404, 409, 416):
                    raise Unavailable(f"{error.message}: it has lost it")
                if answer.status == 400 and ("DIGEST_INVALID" in answer.said or "SIZE_INVALID" in answer.said):
                    raise DigestMismatch(error.message, source=answer.host)
                raise error
            _check_digest(answer, digest)

    async def _mount_at(
        self, endpoint: Endpoint, ref: Reference, digest: str, size: int, from_repository: str
    ) -> bool:
        scope = f"{endpoint.push_scope(ref)} repository:{from_repository}:pull"
        query = urlencode({"mount": digest, "from": from_repository})
        url = endpoint.url(ref, f"blobs/uploads/?{query}")
        async with self._auth.open("POST", endpoint.host, url, {}, scope) as answer:
            if answer.status == 202:
                location = self._location(answer)
            elif answer.status != 201:
                raise await refusal(answer, f"a mount into {ref.name}", endpoint)
            else:
                location = ""
        if not location:
            return await self._has_blob_at(endpoint, ref, digest, size)
        async with self._auth.open("DELETE", endpoint.host, location, {}, endpoint.push_scope(ref)):
            return False  # if it does not take the upload back, it will forget it in its own time

    def _location(self, answer: Answer) -> str:
        location = answer.headers.get("Location")
        if not location:
            raise Malformed(f"{answer.host} begins an upload and does not say where it is to go: no Location")
        return self._hosts.redirected(answer.url, location, 1)


async def refusal(answer: Answer, what: str, endpoint: Endpoint) -> DadiError:
    """Return the error that an answer to a request for writing means."""
    error = await answer.error(what, endpoint.host)
    said = answer.said
    if answer.status in (405, 501) or (answer.status < 500 and "UNSUPPORTED" in said):
        hint = f"the registry takes no pushes (read-only, or a cache of another one): {INSTEAD}"
        return Unsupported(error.message, hint=hint)
    if answer.status in (409, 412) or (answer.status < 500 and ("TAG_INVALID" in said or "immutable" in said.lower())):
        return Conflict(error.message, hint=f"the tag may be one that must not change: use another, or {INSTEAD}")
    if answer.status == 413:
        return TooLarge(error.message, hint=f"the registry takes nothing that large: {INSTEAD}")
    return error


def _check_digest(answer: Answer, digest: str) -> None:
    if answer.digest not in (None, digest):
        raise DigestMismatch(f"{answer.host} was given {digest} and calls it {answer.digest}", source=answer.host)
