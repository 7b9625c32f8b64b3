"""The registry client: from a reference to verified manifests and to the bytes of blobs, and back.

    resolve     HEAD manifests/<tag>; GET where HEAD does not say enough
    manifest    GET manifests/<tag or digest>, verified
    image       manifest → (index → entry for the platform →) manifest → config, each verified by its digest
    blob        GET blobs/<digest>, streamed, resumed (`download.py`)
    push_…      blobs and manifests (`push.py`), referrers (`referrers.py`), indexes under a tag (`tagged.py`)

(OCI distribution specification, "Pull", "Push".) Each call goes through three layers, one file each: `endpoints.py`
says whom to ask next and when, `auth.py` proves who we are, `transport.py` sends the request; where a request may go at
all is decided in `hosts.py`. How many calls run at once is the caller's business: nothing is queued here.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, contextmanager
from functools import partial
from typing import TypeVar

import msgspec

from dadi import digest as digests
from dadi.errors import DadiError, DigestMismatch, InvalidRequest, Malformed, NoSuchPlatform, TooLarge
from dadi.oci import manifest as manifests
from dadi.oci import media_types
from dadi.oci.answer import Answer
from dadi.oci.auth import Authenticator
from dadi.oci.config import RegistryConfig
from dadi.oci.credentials import CredentialSource, DockerCredentials
from dadi.oci.download import Downloads
from dadi.oci.endpoints import Endpoint, Endpoints
from dadi.oci.hosts import Hosts
from dadi.oci.lookups import Lookups, TagsPage
from dadi.oci.manifest import Descriptor, ImageConfig, Index, Manifest
from dadi.oci.platforms import Platform
from dadi.oci.push import Pushed, Pushes
from dadi.oci.reference import Reference
from dadi.oci.referrers import Referrers
from dadi.oci.retry import Clock
from dadi.oci.tagged import TaggedIndexes
from dadi.oci.transport import Transport

T = TypeVar("T")

_MAX_DEPTH = 3
"""Indexes within indexes."""
_MAX_CANDIDATES = 16
"""Entries of an index that are looked at because they do not name their platform."""
_INLINE = 256 << 10
"""Bytes up to which a document is hashed and parsed on the event loop (about 1 ms)."""


class ResolvedImage(msgspec.Struct, frozen=True):
    """One image for one platform, all of it verified against the digest by which it was found.

    `raw` and `config` are the manifest and the config byte for byte; `index_digest` is None if the reference led to
    the manifest directly; `diff_ids[n]` belongs to `manifest.layers[n]`. `platform` is what the config says.
    """

    reference: Reference
    index_digest: str | None
    descriptor: Descriptor
    raw: bytes
    manifest: Manifest
    config: bytes
    platform: Platform
    diff_ids: tuple[str, ...]

    def __repr__(self) -> str:
        short = digests.short(self.descriptor.digest)
        return f"ResolvedImage({self.reference}, {short}, {self.platform}, {len(self.manifest.layers)} layers)"


class RegistryClient:
    """Reads images from registries and pushes to them. Make it anywhere, use it in one event loop, close it (`close`).

    Every method raises RegistryNotAllowed before it contacts anybody if the configuration does not allow the
    registry; NotFound; AccessDenied; Unavailable once retries are used up (`retry_after` says what the registry
    asked for, if that was longer than we wait); DigestMismatch if what came is wrong twice; Malformed, TooLarge and
    Unsupported for documents that make no sense, are too large, or are of another kind. Raises ConfigError when made
    if the configuration makes no sense.

    What pushes, and what concerns referrers and indexes under a tag, goes to the registry itself and never to a
    mirror. A registry that does not want to be written to raises AccessDenied or Unsupported, one whose tag must not
    change Conflict; the hints say what to do instead.
    """

    def __init__(
        self,
        config: RegistryConfig | None = None,
        *,
        credentials: CredentialSource | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._config = config = config or RegistryConfig()
        clock = clock or Clock()
        credentials = credentials or DockerCredentials(config.docker_config, helper_timeout=config.helper_timeout)
        self._hosts = hosts = Hosts(config.allowed, config.plain_http, config.mirrors)
        self._clock = clock
        self._transport = Transport(config, hosts, clock)
        self._endpoints = Endpoints(config, hosts, clock, self._transport.counters)
        self._is_view = False
        self._show(credentials)

    def _show(self, credentials: CredentialSource) -> None:
        """Have all requests from now on prove who we are by these."""
        hosts = self._hosts
        self._auth = Authenticator(self._transport, hosts, credentials)
        self._lookups = Lookups(self._endpoints, self._auth, self._transport)
        self._downloads = Downloads(self._endpoints, self._auth, self._transport.counters)
        self._pushes = Pushes(self._endpoints, self._auth, hosts)
        self._tagged = TaggedIndexes(self._pushes, self._endpoints, self._auth, self._clock)
        self._referrers = Referrers(self._pushes, self._tagged, self._endpoints, self._auth, self.manifest)

    def __repr__(self) -> str:
        counters = self._transport.counters
        return f"RegistryClient({counters.requests} requests, {counters.bytes} bytes)"

    def as_caller(self, credentials: CredentialSource) -> RegistryClient:
        """Return a client that shows other credentials over the same connections; close it before this one.

        What it reads of manifests and tags comes from the registry itself and never from a mirror: whom a mirror
        answers says nothing about whom the registry would.
        """
        view = copy.copy(self)
        view._is_view = True
        view._show(credentials)
        return view

    def forget(self, ref: Reference) -> None:
        """Forget what was proved for a reference's repository: requests from now on prove it by what is known then."""
        self._auth.forget(ref.registry, ref.repository)

    async def close(self) -> None:
        """Close all connections (those of `as_caller` none: they are not its own); idempotent."""
        await self._auth.close()
        if not self._is_view:
            await self._transport.close()

    def statistics(self) -> dict[str, object]:
        """Return what was done so far (requests, body bytes, retries, tokens, …); under "hosts", what failed where."""
        return {**dataclasses.asdict(self._transport.counters), "hosts": self._endpoints.statistics()}

    async def resolve(self, ref: Reference) -> Descriptor:
        """Return digest, size and media type of what a reference leads to, as a rule without fetching it.

        For a tag the digest is the registry's word; `manifest` and `image` verify what they fetch by it.
        """
        return await self._ask(ref, lambda endpoint: self._resolve_at(endpoint, ref))

    async def manifest(self, ref: Reference, digest: str | None = None) -> tuple[Descriptor, bytes]:
        """Return a manifest or index, verified, as it is in the registry.

        It is found by `digest` if that is given, else by the reference's digest, else by its tag.
        """
        if digest is not None:
            ref = ref.at(digest)
        return await self._ask(ref, lambda endpoint: self._manifest_at(endpoint, ref))

    async def image(self, ref: Reference, platform: Platform) -> ResolvedImage:
        """Return the image for a platform; raise NoSuchPlatform, and say which there are, if there is none."""
        descriptor, raw = await self.manifest(ref)
        with _about(ref):
            document = await self._parse(raw, descriptor.media_type)
            if isinstance(document, Index):
                return await self._image_in(ref, descriptor.digest, document, platform, depth=1)
            return await self._image_of(ref, None, descriptor, raw, document, platform)

    def blob(
        self, ref: Reference, descriptor: Descriptor, *, offset: int = 0, mirrors: bool = True
    ) -> AsyncGenerator[bytes, None]:
        """Yield the bytes [offset, size) of a blob in pieces of what the socket has, exactly these or an error.

        A connection that breaks or stalls is taken up again where it stopped. The digest is *not* verified: the
        caller hashes what it reads, and when that is wrong throws it away and may ask again with mirrors=False. Wrap
        it in `contextlib.aclosing` if you may leave before the end.
        """
        if not 0 <= offset <= descriptor.size:
            raise InvalidRequest(f"offset {offset} of a blob of {descriptor.size} bytes")
        return self._downloads.stream(ref, descriptor, offset, mirrors=mirrors)

    async def blob_bytes(self, ref: Reference, descriptor: Descriptor, limit: int) -> bytes:
        """Return a small blob, verified; raise TooLarge if it has more than `limit` bytes."""
        if descriptor.size > limit:
            raise TooLarge(f"blob {descriptor.digest} has {descriptor.size} bytes; the limit is {limit}")
        return await self._ask(ref, lambda endpoint: self._blob_at(endpoint, ref, descriptor))

    async def blob_range(
        self, ref: Reference, descriptor: Descriptor, offset: int, length: int, *, mirrors: bool = True
    ) -> bytes:
        """Return the bytes [offset, offset + length) of a blob, exactly these, unverified.

        Raises Unsupported if the registry does not do ranges: the whole blob is not read for a part of it.
        """
        if offset < 0 or length < 0 or offset + length > descriptor.size:
            raise InvalidRequest(f"bytes {offset}+{length} of a blob of {descriptor.size} bytes")
        if length == 0:
            return b""
        return await self._downloads.range(ref, descriptor, offset, length, mirrors=mirrors)

    async def blob_size(self, ref: Reference, digest: str) -> int:
        """Return the bytes that a blob has, as the registry itself says: then the repository has it, and we may."""
        return await self._lookups.blob_size(ref, digest)

    async def tags(self, ref: Reference, parameters: Mapping[str, str]) -> TagsPage:
        """Return a page of the repository's tags; `parameters` are n and last, as the specification has them."""
        return await self._lookups.tags(ref, parameters)

    async def challenge(self, registry: str, ref: Reference | None = None) -> str | None:
        """Return the WWW-Authenticate with which the registry meets whom it does not know; None if it answers him.

        With `ref` for its manifest, else for the registry as a whole. It has a scheme that we know and is printable.
        """
        return await self._lookups.challenge(registry, ref)

    # ---- pushing

    async def has_blob(self, ref: Reference, digest: str) -> bool:
        """Whether the repository has a blob already."""
        return await self._pushes.has_blob(ref, digest)

    async def push_blob(
        self,
        ref: Reference,
        digest: str,
        size: int,
        source: bytes | Callable[[], AsyncIterator[bytes]],
        *,
        on_progress: Callable[[int], None] | None = None,
    ) -> bool:
        """Push a blob unless it is there; return whether it was sent.

        `source` is the bytes, or is called for them, anew for each attempt (and closed, if it can be); what it raises
        is raised as it is and not retried. `on_progress` hears how many bytes of this attempt are sent: it may go back
        to 0. Raises InvalidRequest if there are not `size` bytes, DigestMismatch if the registry finds another digest.
        """
        return await self._pushes.push_blob(ref, digest, size, source, on_progress)

    async def mount_blob(self, ref: Reference, digest: str, size: int, from_repository: str) -> bool:
        """Have a blob taken over from another repository of the registry; return False if it has to be pushed."""
        return await self._pushes.mount_blob(ref, digest, size, from_repository)

    async def push_manifest(self, ref: Reference, raw: bytes, media_type: str) -> Pushed:
        """Push a manifest or index under the reference's digest, which must be right, or else under its tag."""
        return await self._pushes.push_manifest(ref, raw, media_type)

    # ---- referrers, and indexes under a tag

    async def referrers(self, ref: Reference, digest: str, artifact_type: str = "") -> list[Descriptor]:
        """Return what has this manifest as its subject, of one artifact type if that is given; the registry's word."""
        return await self._referrers.of(ref, digest, artifact_type)

    async def push_referrer(self, ref: Reference, raw: bytes, media_type: str, subject: str) -> Descriptor:
        """Push a manifest with a subject (a digest) so that `referrers` of that finds it; return its descriptor.

        It is listed with the artifact type and the annotations that it has itself. Its blobs must be there already.
        """
        return await self._referrers.push(ref, raw, media_type, subject)

    async def tagged_index(self, ref: Reference, tag: str) -> list[Descriptor]:
        """Return the entries of the index under a tag of the repository, none if there is no such tag."""
        return await self._tagged.entries(ref, tag)

    async def update_index(
        self, ref: Reference, tag: str, change: Callable[[list[Descriptor]], list[Descriptor]]
    ) -> None:
        """Change the entries of the index under a tag, which others may change at the same time; see `tagged.py`.

        `change` is called several times; it must leave alone a list in which its change is already, or this ends in
        Conflict. Takes half a second at least if there is something to change.
        """
        await self._tagged.update(ref, tag, change)

    # ---- reading

    async def _ask(self, ref: Reference, attempt: Callable[[Endpoint], Awaitable[T]]) -> T:
        return await self._endpoints.ask(ref.registry, attempt, mirrors=not self._is_view)

    async def _resolve_at(self, endpoint: Endpoint, ref: Reference) -> Descriptor:
        async with self._open_manifest("HEAD", endpoint, ref) as answer:
            if answer.status not in (200, 400, 405, 501):
                raise await answer.error(f"{ref}", endpoint.host)
            told = _told(answer)
            if answer.status == 200 and told is not None and ref.digest in (None, told.digest):
                return told
        return (await self._manifest_at(endpoint, ref))[0]

    async def _manifest_at(self, endpoint: Endpoint, ref: Reference) -> tuple[Descriptor, bytes]:
        limit = self._config.max_manifest_size
        async with self._open_manifest("GET", endpoint, ref) as answer:
            if answer.status != 200:
                raise await answer.error(f"{ref}", endpoint.host)
            raw = await answer.body(limit, f"the manifest of {ref}")
        digest = await _digest_of(raw)
        for expected in (ref.digest, answer.digest):
            if expected not in (None, digest):
                raise DigestMismatch(f"{answer.host}: the manifest of {ref} has digest {digest}", source=endpoint.host)
        with _about(ref):
            document = await self._parse(raw, answer.headers.get("Content-Type", ""))
        return Descriptor(document.media_type, digest, len(raw)), raw

    async def _blob_at(self, endpoint: Endpoint, ref: Reference, descriptor: Descriptor) -> bytes:
        what = f"blob {descriptor.digest} of {ref.name}"
        url = endpoint.url(ref, f"blobs/{descriptor.digest}")
        async with self._auth.open("GET", endpoint.host, url, {}, endpoint.scope(ref)) as answer:
            if answer.status != 200:
                raise await answer.error(what, endpoint.host)
            data = await answer.body(descriptor.size, what)
        if len(data) != descriptor.size or await _digest_of(data) != descriptor.digest:
            raise DigestMismatch(f"{what} from {answer.host} is not what its digest says", source=endpoint.host)
        return data

    async def _image_in(
        self, ref: Reference, top: str, index: Index, platform: Platform, *, depth: int
    ) -> ResolvedImage:
        """Return the image that an index has for a platform; `top` is the digest of the outermost index."""
        if depth > _MAX_DEPTH:
            raise Malformed(f"indexes within indexes, more than {_MAX_DEPTH} deep")
        missing: NoSuchPlatform | None = None
        for entry in manifests.candidates(index, platform)[:_MAX_CANDIDATES]:
            descriptor, raw = await self.manifest(ref, entry.digest)
            if descriptor.size != entry.size:
                raise Malformed(f"manifest {entry.digest} has {descriptor.size} bytes, not {entry.size}")
            document = await self._parse(raw, descriptor.media_type, entry.media_type)
            try:
                if isinstance(document, Index):
                    return await self._image_in(ref, top, document, platform, depth=depth + 1)
                wanted = None if entry.platform else platform
                return await self._image_of(ref, top, descriptor, raw, document, wanted)
            except NoSuchPlatform as error:
                missing = error
        raise missing or manifests.no_such_platform(platform, ())

    async def _image_of(
        self,
        ref: Reference,
        index_digest: str | None,
        descriptor: Descriptor,
        raw: bytes,
        manifest: Manifest,
        wanted: Platform | None,
    ) -> ResolvedImage:
        """Return the image of a manifest; raise NoSuchPlatform if its config says that it is not for `wanted`."""
        manifest.check_is_image()
        data = await self.blob_bytes(ref, manifest.config, self._config.max_config_size)
        config: ImageConfig = manifests.parse_config(data, manifest)
        if wanted is not None and config.platform.known and not config.platform.runs_on(wanted):
            raise manifests.no_such_platform(wanted, (config.platform,))
        return ResolvedImage(ref, index_digest, descriptor, raw, manifest, data, config.platform, config.diff_ids)

    async def _parse(self, raw: bytes, content_type: str, expected: str = "") -> Manifest | Index:
        parse = partial(manifests.parse, raw, content_type, expected=expected, limit=self._config.max_manifest_size)
        return parse() if len(raw) <= _INLINE else await asyncio.to_thread(parse)

    def _open_manifest(self, method: str, endpoint: Endpoint, ref: Reference) -> AbstractAsyncContextManager[Answer]:
        url = endpoint.url(ref, f"manifests/{ref.identifier}")
        headers = {"Accept": media_types.ACCEPT}
        return self._auth.open(method, endpoint.host, url, headers, endpoint.scope(ref))


@contextmanager
def _about(ref: Reference) -> Iterator[None]:
    """Say in an error which image it is about."""
    try:
        yield
    except DadiError as error:
        if ref.name not in error.message:
            error.message = f"{ref}: {error.message}"
        raise


def _told(answer: Answer) -> Descriptor | None:
    """Return the descriptor that an answer's headers make, None if they do not make one."""
    digest = answer.digest
    media_type = media_types.bare(answer.headers.get("Content-Type", ""))
    if digest is None or not answer.length or media_type not in media_types.INDEXES | media_types.MANIFESTS:
        return None
    return Descriptor(media_type, digest, answer.length)


async def _digest_of(data: bytes) -> str:
    return digests.of(data) if len(data) <= _INLINE else await asyncio.to_thread(digests.of, data)
