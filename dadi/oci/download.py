"""Blobs as streams and as ranges: broken downloads go on where they stopped, and never with wrong bytes in between.

    asked for            answered with     what follows
    bytes 0..            200               the body, if its announced length is the blob's size
    bytes n..            206               the body, if Content-Range says exactly what was asked for
    bytes n..            200               it does not do ranges: the first n bytes are thrown away
    anything             other             an error (`Answer.error`)

A body that ends too soon is a broken download; one that goes on too long, or that announces another size than the
descriptor's, is another blob than the one we want (DigestMismatch), and the next endpoint is asked. (RFC 9110, 14;
OCI distribution specification, "Pulling blobs".)
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncGenerator

from dadi.errors import DadiError, DigestMismatch, Unavailable, Unsupported
from dadi.oci.answer import Answer, Counters
from dadi.oci.auth import Authenticator
from dadi.oci.endpoints import Endpoint, Endpoints
from dadi.oci.manifest import Descriptor
from dadi.oci.reference import Reference

_MIN_PROGRESS = 64 << 10
"""Bytes that must have come for a broken connection to count as progress; a trickle must not go on for ever."""
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19}|\*)")


class Downloads:
    """Reads blobs from a registry's endpoints."""

    def __init__(self, endpoints: Endpoints, auth: Authenticator, counters: Counters) -> None:
        self._endpoints = endpoints
        self._auth = auth
        self._counters = counters

    async def stream(
        self, ref: Reference, descriptor: Descriptor, offset: int, *, mirrors: bool
    ) -> AsyncGenerator[bytes, None]:
        """Yield the bytes [offset, size) of a blob, exactly these or an error; see `RegistryClient.blob`."""
        at, size = offset, descriptor.size
        turns = self._endpoints.turns(ref.registry, mirrors=mirrors)
        while at < size:
            endpoint = await turns.next()
            began = at
            try:
                async with contextlib.aclosing(self._pieces(endpoint, ref, descriptor, at, size)) as pieces:
                    async for piece in pieces:
                        at += len(piece)
                        yield piece
            except DadiError as error:
                if at - began >= min(_MIN_PROGRESS, size - began):
                    turns.restored()
                if at > began:
                    self._counters.resumed += 1
                turns.failed(error)

    async def range(
        self, ref: Reference, descriptor: Descriptor, offset: int, length: int, *, mirrors: bool
    ) -> bytes:
        """Return the bytes [offset, offset + length) of a blob; see `RegistryClient.blob_range`."""
        turns = self._endpoints.turns(ref.registry, mirrors=mirrors)
        while True:
            endpoint = await turns.next()
            try:
                pieces = self._pieces(endpoint, ref, descriptor, offset, offset + length, needs_range=True)
                return b"".join([piece async for piece in pieces])
            except DadiError as error:
                turns.failed(error)

    async def _pieces(
        self,
        endpoint: Endpoint,
        ref: Reference,
        descriptor: Descriptor,
        at: int,
        end: int,
        *,
        needs_range: bool = False,
    ) -> AsyncGenerator[bytes, None]:
        """Yield the bytes [at, end) from one endpoint in one request, exactly these or an error."""
        whole = at == 0 and end == descriptor.size
        headers = {} if whole else {"Range": f"bytes={at}-{end - 1}"}
        url = endpoint.url(ref, f"blobs/{descriptor.digest}")
        async with self._auth.open("GET", endpoint.host, url, headers, endpoint.scope(ref)) as answer:
            if answer.status not in (200, 206) or (whole and answer.status == 206):
                raise await answer.error(f"blob {descriptor.digest} of {ref.name}", endpoint.host)
            if needs_range and not whole and answer.status == 200:
                raise Unsupported(f"{answer.host} answers a request for a range with the whole blob")
            skip = _bytes_to_skip(answer, descriptor, at, end)
            missing = end - at
            while piece := await answer.piece():
                wanted = piece[skip:] if skip else piece
                skip = max(0, skip - len(piece))
                missing -= len(wanted)
                if missing < 0:
                    raise _other_blob(answer, descriptor, "that is longer")
                if wanted:
                    yield wanted
            if missing:
                raise Unavailable(f"{answer.host} cut blob {descriptor.digest} off {missing} bytes before its end")


def _bytes_to_skip(answer: Answer, descriptor: Descriptor, at: int, end: int) -> int:
    """Return how many bytes of the body come before those wanted; raise DigestMismatch if it is not our blob."""
    announced = answer.length
    if answer.status == 200:
        if announced not in (None, descriptor.size):
            raise _other_blob(answer, descriptor, f"of {announced} bytes")
        return at
    text = answer.headers.get("Content-Range", "")
    match = _CONTENT_RANGE.fullmatch(text.strip())
    if match is None or (int(match[1]), int(match[2])) != (at, end - 1) or announced not in (None, end - at):
        # Refusing is safe, guessing which bytes these are is not.
        raise Unavailable(f"{answer.host} was asked for bytes {at}-{end - 1} and sent {text[:60]!r}")
    if match[3] not in ("*", str(descriptor.size)):
        raise _other_blob(answer, descriptor, f"of {match[3]} bytes")
    return 0


def _other_blob(answer: Answer, descriptor: Descriptor, what: str) -> DigestMismatch:
    return DigestMismatch(
        f"{answer.host} has a blob {what} where {descriptor.digest} has {descriptor.size} bytes", source=answer.host
    )
