"""Detached Ed25519 signatures of index artifacts."""

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from dadi import digest as digests
from dadi.errors import ConfigError, InvalidRequest
from dadi.index import signature

DIGEST = digests.of(b"an artifact")


def pem_of(key: Ed25519PrivateKey) -> tuple[bytes, bytes]:
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return private, public


def test_what_a_key_has_signed_its_public_half_accepts() -> None:
    private, public = pem_of(Ed25519PrivateKey.generate())
    signed = signature.sign(signature.private_key(private, "k"), DIGEST)
    key = signature.public_key(public, "k.pub")
    assert len(signed) == signature.SIZE
    assert signature.signer([key], DIGEST, signed) == signature.key_id(key)


def test_other_keys_other_digests_and_damaged_signatures_are_not_accepted() -> None:
    ours, other = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    signed = signature.sign(ours, DIGEST)
    assert signature.signer([other.public_key()], DIGEST, signed) is None
    assert signature.signer([ours.public_key()], digests.of(b"another"), signed) is None
    assert signature.signer([ours.public_key()], DIGEST, signed[:-1] + bytes([signed[-1] ^ 1])) is None
    assert signature.signer([ours.public_key()], DIGEST, b"") is None
    assert signature.signer([], DIGEST, signed) is None
    assert signature.signer([other.public_key(), ours.public_key()], DIGEST, signed) is not None


def test_the_bare_digest_is_not_what_is_signed() -> None:
    """A signature that was got for something else in the same form must not count."""
    ours = Ed25519PrivateKey.generate()
    assert signature.signer([ours.public_key()], DIGEST, ours.sign(DIGEST.encode())) is None


def test_keys_of_other_kinds_and_other_files_are_told_apart() -> None:
    elliptic = generate_private_key(SECP256R1())
    pem = elliptic.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with pytest.raises(ConfigError, match=r"sign\.key is a key of another kind"):
        signature.private_key(pem, "sign.key")
    with pytest.raises(ConfigError, match=r"x\.pem is not a public key"):
        signature.public_key(b"nonsense", "x.pem")
    private, public = pem_of(Ed25519PrivateKey.generate())
    with pytest.raises(ConfigError, match="is not a private key"):
        signature.private_key(public, "k")
    with pytest.raises(ConfigError, match="is not a public key"):
        signature.public_key(private, "k")


def test_only_digests_are_signed() -> None:
    with pytest.raises(InvalidRequest):
        signature.sign(Ed25519PrivateKey.generate(), "latest")
