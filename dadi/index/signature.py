"""Detached signatures of index artifacts: Ed25519 (RFC 8032) over the artifact's digest. Pure.

    signed       "dadi index signature v1\\n" ‖ the artifact manifest's digest ("sha256:…") ‖ "\\n"
    a key        PEM, as `openssl genpkey -algorithm ed25519` and `openssl pkey -pubout` write it
    its ID       the first 16 hex digits of the SHA-256 of the raw public key

The digest covers the whole artifact: its subject (the image), and the digests of all layer indexes and seek tables.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from dadi import digest as digests
from dadi.errors import ConfigError

SIZE = 64
"""Bytes of a signature."""
_HINT = "make one with `openssl genpkey -algorithm ed25519`, and its public half with `openssl pkey -pubout`"


def private_key(pem: bytes, name: str) -> Ed25519PrivateKey:
    """Return the key in a PEM file; raise ConfigError, which names `name`, if it is none of ours."""
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{name} is not a private key without a password: {error}", hint=_HINT) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{name} is a key of another kind than Ed25519", hint=_HINT)
    return key


def public_key(pem: bytes, name: str) -> Ed25519PublicKey:
    """Return the key in a PEM file; raise ConfigError, which names `name`, if it is none of ours."""
    try:
        key = serialization.load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{name} is not a public key: {error}", hint=_HINT) from None
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(f"{name} is a key of another kind than Ed25519", hint=_HINT)
    return key


def key_id(key: Ed25519PublicKey) -> str:
    """Return how the key is called in logs and annotations."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()[:16]


def sign(key: Ed25519PrivateKey, digest: str) -> bytes:
    """Return the signature of the artifact whose manifest has this digest."""
    return key.sign(_signed(digest))


def signer(keys: Iterable[Ed25519PublicKey], digest: str, signature: bytes) -> str | None:
    """Return the ID of the first of the keys that made this signature; None if none of them did."""
    for key in keys:
        try:
            key.verify(signature, _signed(digest))
        except InvalidSignature:
            continue
        return key_id(key)
    return None


def _signed(digest: str) -> bytes:
    return b"dadi index signature v1\n" + digests.parse(digest).encode() + b"\n"
