"""Tokens: what a superpeer signs so that others serve blobs to a node without asking anybody. Pure.

There are three kinds. A *read* token opens the blobs that it names at superpeers and peers; it says nothing of who
carries it, and lives for minutes. A *renewal* is shown to superpeers only, never to peers, and opens nothing: it buys
new read tokens for the same blobs. It says which image it is for, when the registry last said yes, and by a keyed hash
to which credential (rules: `superpeer/who_may.py`). A *sibling* token opens nothing either: superpeers show it to each
other where what they say is for no node.

    bytes          what
    0              version: 1
    1              kind: 1 read, 2 renewal, 3 sibling
    2..9           key: the first 8 bytes of the SHA-256 of the raw public key
    10..25         id: random, what it is revoked by; of a renewal that of the one it was given for, if it was renewed
    26..33         not before, in seconds since 1970 (all integers: unsigned, big-endian)
    34..41         expires, in seconds since 1970
    42..43         n: how many blobs
    44..           n times the first 16 bytes of a blob's SHA-256
    next           a renewal only: when the registry said yes (8), grant (16), length of the reference (2), reference
    last 64        signature: Ed25519 (RFC 8032) over "dadi peer token v1\\n" and all the bytes before

The text is base64url without padding (RFC 4648), at most MAX_TEXT characters; it travels as `Authorization: Bearer`.
"""

from __future__ import annotations

import base64
import binascii
import enum
import hashlib
import re
import struct
from collections.abc import Callable, Iterable

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from dadi import digest as digests
from dadi.errors import AccessDenied, TokenRefused

VERSION = 1
MAX_TEXT = 6 << 10
MAX_BLOBS = 220
"""Blobs that one token can name; who needs more gets several."""
NAME = 16
"""Bytes by which a token names a blob: finding another blob of that name takes 2**128 tries."""
ID_SIZE = GRANT_SIZE = 16
KEY_SIZE = 8
LEEWAY = 60.0
"""Seconds by which clocks may differ."""

_HEAD = struct.Struct(f">BB{KEY_SIZE}s{ID_SIZE}sQQH")
_TAIL = struct.Struct(f">Q{GRANT_SIZE}sH")
_SIGNATURE = 64
_MAX_REFERENCE = 800
_SIGNED = b"dadi peer token v1\n"
_TEXT = re.compile(r"[A-Za-z0-9_-]+")
_BEARER = re.compile(r"[Bb]earer +([A-Za-z0-9_-]+) *")
_HINT = "the node gets a new one from its superpeer by itself; if it does not, look into its log"


class Kind(enum.IntEnum):
    """What a token is good for; see the head of this file."""

    READ = 1
    RENEWAL = 2
    SIBLING = 3


class Token(msgspec.Struct, frozen=True):
    """What a token says. `key` and `id` in hex; times in seconds since 1970; `names`: NAME bytes a blob, joined.

    `reference`, `authorized` (when the registry last said yes) and `grant` are a renewal's.
    """

    kind: Kind
    key: str
    id: str
    not_before: int
    expires: int
    names: bytes
    reference: str = ""
    authorized: int = 0
    grant: bytes = bytes(GRANT_SIZE)

    def __repr__(self) -> str:
        return f"Token({self.kind.name}, {self.id}, {len(self.names) // NAME} blobs)"

    def opens(self, digest: str) -> bool:
        """Whether it names this blob."""
        name = name_of(digest)
        at = self.names.find(name)
        while at % NAME and at != -1:  # found across the border of two names
            at = self.names.find(name, at + 1)
        return at != -1

    def check_time(self, now: float) -> None:
        """Raise TokenRefused unless it holds at `now`, give or take LEEWAY."""
        if now < self.not_before - LEEWAY:
            raise TokenRefused("the token is not valid yet", hint="do the clocks of these machines agree?")
        if now >= self.expires + LEEWAY:
            raise TokenRefused("the token has expired", hint=_HINT)


def key_id(key: Ed25519PublicKey) -> str:
    """Return how a key is called in tokens, in hex."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()[: 2 * KEY_SIZE]


def name_of(digest: str) -> bytes:
    """Return how a token names a blob; raise InvalidRequest for what is no digest."""
    return digests.raw(digest)[:NAME]


def names_of(blobs: Iterable[str]) -> bytes:
    """Return the names of blobs, as `Token.names` has them."""
    return b"".join(map(name_of, blobs))


def sign(key: Ed25519PrivateKey, token: Token) -> str:
    """Return the text of a token; its `key` must be the id of this one. Raises ValueError for what does not fit."""
    reference = token.reference.encode()
    count, rest = divmod(len(token.names), NAME)
    if rest or count > MAX_BLOBS or len(reference) > _MAX_REFERENCE or len(token.grant) != GRANT_SIZE:
        raise ValueError(f"a token cannot hold {count} blobs, or a reference of {len(reference)} bytes")
    body = _HEAD.pack(VERSION, token.kind, bytes.fromhex(token.key), bytes.fromhex(token.id),
                      token.not_before, token.expires, count) + token.names  # fmt: skip
    if token.kind is Kind.RENEWAL:
        body += _TAIL.pack(token.authorized, token.grant, len(reference)) + reference
    return base64.urlsafe_b64encode(body + key.sign(_SIGNED + body)).rstrip(b"=").decode()


def parse(text: str) -> Token:
    """Return what a token says, *not* verified; raise TokenRefused for what is none."""
    return _parse(_decode(text))[0]


def verify(text: str, find: Callable[[str], Ed25519PublicKey | None]) -> Token:
    """Return what a token says that one of our keys has signed; `find` gives the key for an id.

    Raises TokenRefused. Whether it is in time, revoked, and opens what is asked for is the caller's to check.
    """
    data = _decode(text)
    token, body = _parse(data)
    key = find(token.key)
    if key is None:
        raise TokenRefused("the token was signed with a key that is not known here", hint=_HINT)
    try:
        key.verify(data[len(body) :], _SIGNED + body)
    except InvalidSignature:
        raise TokenRefused("the token's signature is not right", hint="damaged, or made by somebody else") from None
    return token


def bearer(authorization: str | None) -> str:
    """Return the token's text in an Authorization header; raise TokenRefused if there is none."""
    if not authorization:
        raise TokenRefused("a token is needed, and none was shown", hint="nodes get one when they resolve the image")
    match = _BEARER.fullmatch(authorization) if len(authorization) <= MAX_TEXT + 16 else None
    if match is None:
        raise TokenRefused("the Authorization header is not `Bearer` and a token")
    return match[1]


def require(token: Token, blobs: Iterable[str]) -> None:
    """Raise AccessDenied unless a read token names all these blobs."""
    if token.kind is not Kind.READ:
        what = "renewing only" if token.kind is Kind.RENEWAL else "superpeers only"
        raise TokenRefused(f"this token is for {what}; it opens nothing")
    for digest in blobs:
        if not token.opens(digest):
            raise AccessDenied(f"the token does not name blob {digest}", hint="it belongs to another image")


def require_sibling(token: Token) -> None:
    """Raise TokenRefused unless a superpeer made the token for another one."""
    if token.kind is not Kind.SIBLING:
        raise TokenRefused("this is for superpeers of the same datacenter only")


def _decode(text: str) -> bytes:
    if len(text) > MAX_TEXT or not _TEXT.fullmatch(text):
        raise TokenRefused("this is not a token")
    try:
        data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except (binascii.Error, ValueError):
        raise TokenRefused("this is not a token") from None
    # One text for one token: other spellings of the last bits are refused.
    if base64.urlsafe_b64encode(data).rstrip(b"=").decode() != text:
        raise TokenRefused("this is not a token")
    return data


def _parse(data: bytes) -> tuple[Token, bytes]:
    """Return the token, and the bytes that are signed."""
    if len(data) < _HEAD.size + _SIGNATURE:
        raise TokenRefused("the token is too short")
    body = data[:-_SIGNATURE]
    version, kind, key, ident, not_before, expires, count = _HEAD.unpack_from(body)
    if version != VERSION or kind not in tuple(Kind):
        raise TokenRefused(f"a token of version {version} and kind {kind}; this dadi knows version {VERSION}")
    end = _HEAD.size + count * NAME
    names, rest = body[_HEAD.size : end], body[end:]
    if count > MAX_BLOBS or len(names) != count * NAME:
        raise TokenRefused("the token contradicts itself")
    token = Token(Kind(kind), key.hex(), ident.hex(), not_before, expires, names)
    if kind != Kind.RENEWAL:
        if rest:
            raise TokenRefused("the token contradicts itself")
        return token, body
    try:
        authorized, grant, length = _TAIL.unpack_from(rest)
        reference = rest[_TAIL.size :].decode()
    except (struct.error, UnicodeDecodeError):
        raise TokenRefused("the token contradicts itself") from None
    if len(rest) - _TAIL.size != length:
        raise TokenRefused("the token contradicts itself")
    return msgspec.structs.replace(token, reference=reference, authorized=authorized, grant=grant), body
