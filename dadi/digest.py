"""SHA-256 digests in the OCI form `sha256:<64 lower-case hex digits>`. Pure.

OCI image specification, "Descriptors > Digests". Only sha256 is accepted: no registry in the field uses another
for images, and everything on our disks and wires is keyed by it.
"""

from __future__ import annotations

import hashlib
import re

from dadi.errors import InvalidRequest

SIZE = 32
"""Bytes of a raw SHA-256."""

_FORM = re.compile(r"sha256:[0-9a-f]{64}")


def parse(text: str) -> str:
    """Return `text` if it is a digest of the only form we use; raise InvalidRequest otherwise."""
    if not _FORM.fullmatch(text):
        raise InvalidRequest(f"not a sha256 digest: {text[:100]!r}", hint="sha256: and 64 hexadecimal digits")
    return text


def of(data: bytes | bytearray | memoryview) -> str:
    """Return the digest of `data`. For more than a few MiB call it in a thread: OpenSSL releases the GIL."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def raw(digest: str) -> bytes:
    """Return the 32 bytes that `digest` stands for; raise InvalidRequest if it is not a digest."""
    return bytes.fromhex(parse(digest)[7:])


def from_raw(data: bytes) -> str:
    """Return the digest whose 32 raw bytes are `data`."""
    if len(data) != SIZE:
        raise InvalidRequest(f"a raw SHA-256 has 32 bytes, not {len(data)}")
    return "sha256:" + data.hex()


def short(digest: str) -> str:
    """Return the 12 hex digits that people recognise a digest by in logs and tables."""
    return digest[7:19]
