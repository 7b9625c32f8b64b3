"""The keys that this superpeer signs tokens with: made, kept, rotated, revoked.

    STATE/keys/keys.json    0600: the private key in use, the public keys before it until the last token that they
                            signed has expired, and the secret by which credentials are hashed
    STATE/keys/revoked      written by people: a renewal's id (the log has it: "access granted") a line, which ends all
                            that come of it, or a token's; "before SECONDS" (since 1970) revokes every token
                            that was signed earlier; a key's id, also another superpeer's, all that it ever signed;
                            "#" begins a comment. Read again when it changes
    peers_key               a PEM file with an Ed25519 key, if superpeers are to sign with one key; read again likewise

A new key is made when the one in use is older than `key_lifetime`. There is no built-in key.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from dadi.blobs.files import full_or_broken
from dadi.blobs.layout import write_durably
from dadi.errors import ConfigError, DadiError, TokenRefused
from dadi.index.signature import private_key
from dadi.peers import token as tokens
from dadi.peers.keys import REVOKED, PublicKey, PublicKeys
from dadi.peers.token import Kind, Token

log = structlog.get_logger()
_LOOK_EVERY = 5.0
_MAX_FILE = 1 << 20
_MOST_TOLD = 1000
"""Tokens revoked by ourselves that others are told of; we know more, and those live for minutes."""
_ID = re.compile(r"[0-9a-f]{32}|[0-9a-f]{16}")
"""Of a token, or of a key: GET /v1/keys names these."""
_SECONDS = re.compile(r"[0-9]{1,15}")


class _Previous(msgspec.Struct):
    """A key that signs no more; `retired` in seconds since 1970."""

    public: str
    retired: float


class _File(msgspec.Struct):
    """`keys.json`; keys in base64 of the raw 32 bytes, `made` in seconds since 1970."""

    private: str
    made: float
    secret: str
    previous: list[_Previous] = []

    def __repr__(self) -> str:
        return "_File(hidden)"


class SigningKeys:
    """See the head of this file. `load` it, `start` it, `close` it. A `KeySource` of its own keys."""

    def __init__(self, directory: Path, *, peers_key: str = "", lifetime: float = 7 * 86400.0,
                 keep: float = 86400.0 + 600, clock: Callable[[], float] = time.time) -> None:  # fmt: skip
        """`lifetime` of a key, `keep`: for how long what it signed may be valid; both in seconds."""
        self._directory = directory
        self._peers_key = peers_key
        self._lifetime = lifetime
        self._keep = keep
        self._clock = clock
        self._private: Ed25519PrivateKey | None = None
        self._file: _File | None = None
        self._public: dict[str, Ed25519PublicKey] = {}
        """By id; the one in use first."""
        self._secret = b""
        self._revoked: frozenset[str] = frozenset()
        self._not_before = 0
        self._withdrawn: dict[str, float] = {}
        """Tokens that were revoked by ourselves, until they have expired."""
        self._stamps: dict[str, tuple[int, int, int] | None] = {}
        self._task: asyncio.Task[None] | None = None
        self.rotations = 0

    def __repr__(self) -> str:
        return f"SigningKeys({len(self._public)} public keys)"

    # ---- keys

    async def load(self) -> None:
        """Read the keys, or make them. Raises ConfigError if there are some that cannot be used."""
        await asyncio.to_thread(self._load)
        await self.look()

    def _load(self) -> None:
        path = self._directory / "keys.json"
        try:
            self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            if path.exists():
                path.chmod(0o600)
                self._file = msgspec.json.decode(path.read_bytes(), type=_File)
                self._use(self._file)
        except OSError as error:
            raise full_or_broken(path, error) from None
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, binascii.Error, ValueError):
            # What is in it is not repeated.
            hint = "remove it to begin with a new key: nodes get new tokens by themselves"
            raise ConfigError(f"{path} is damaged", hint=hint) from None

    def _use(self, file: _File) -> None:
        private = Ed25519PrivateKey.from_private_bytes(_raw(file.private))
        keys = [private.public_key(), *(Ed25519PublicKey.from_public_bytes(_raw(p.public)) for p in file.previous)]
        self._secret = _raw(file.secret)
        self._private = private
        self._public = {tokens.key_id(key): key for key in keys}

    async def look(self) -> None:
        """Read again what has changed, and have a new key if it is time. Raises ConfigError."""
        await asyncio.to_thread(self._look)

    def _look(self) -> None:
        shared = self._read_shared()
        now = self._clock()
        old = self._file
        private = shared
        if private is None and (old is None or (not self._peers_key and now - old.made >= self._lifetime)):
            private = Ed25519PrivateKey.generate()
        kept = [each for each in old.previous if now - each.retired < self._keep] if old else []
        if private is None or (old and old.private == _text(private.private_bytes_raw())):
            if old is None or len(kept) == len(old.previous):
                self._read_revoked()
                return
            file = msgspec.structs.replace(old, previous=kept)
        else:
            if shared is not None:  # superpeers that share a key know each other's hashes of credentials too
                raw = shared.private_bytes_raw()
                secret = _text(hashlib.blake2b(raw, digest_size=32, person=b"dadi secret").digest())
            else:  # credentials that were hashed with the secret stay known when the key changes
                secret = old.secret if old else _text(secrets.token_bytes(32))
            if old:
                public = Ed25519PrivateKey.from_private_bytes(_raw(old.private)).public_key()
                kept = [_Previous(_text(public.public_bytes_raw()), now), *kept]
                kept = [p for p in kept if p.public != _text(private.public_key().public_bytes_raw())]
                self.rotations += 1
            file = _File(_text(private.private_bytes_raw()), now, secret, kept)
        path = self._directory / "keys.json"
        try:
            write_durably(path, msgspec.json.encode(file))
        except OSError as error:
            raise full_or_broken(path, error) from None
        self._file = file
        self._use(file)
        log.info("tokens are signed with", key=next(iter(self._public)), before=len(file.previous))
        self._read_revoked()

    def _read_shared(self) -> Ed25519PrivateKey | None:
        """Return the shared key if it has changed since the last look."""
        if not self._peers_key:
            return None
        try:
            data = _changed(Path(self._peers_key), self._stamps)
        except OSError as error:
            raise ConfigError(f"peers_key: {self._peers_key} cannot be read: {error.strerror}") from None
        if data is not None:
            try:
                return private_key(data, f"peers_key: {self._peers_key}")
            except ConfigError:
                self._stamps.pop(self._peers_key)  # it may be half written: looked at again
                raise
        return None

    def _read_revoked(self) -> None:
        path = self._directory / "revoked"
        try:
            data = _changed(path, self._stamps)
        except FileNotFoundError:
            self._revoked, self._not_before = frozenset(), 0
            self._stamps.pop(str(path), None)
            return
        except OSError as error:
            log.error("revoked tokens cannot be read; those known stay revoked", file=str(path), why=error.strerror)
            return
        if data is None:
            return
        ids, before = set(), 0
        for number, line in enumerate(data.decode(errors="replace").splitlines(), 1):
            words = line.partition("#")[0].split()
            if len(words) == 1 and _ID.fullmatch(words[0]):
                ids.add(words[0])
            elif len(words) == 2 and words[0] == "before" and _SECONDS.fullmatch(words[1]):
                before = max(before, int(words[1]))
            elif words:
                log.error("a line that revokes nothing", file=str(path), line=number)
        self._revoked, self._not_before = frozenset(ids), before
        log.info("tokens revoked", ids=len(ids), before=before)

    def start(self) -> None:
        """Begin to look every few seconds."""
        self._task = asyncio.create_task(self._keep_looking())

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_EVERY)
            try:
                await self.look()
            except DadiError as error:
                log.error("signing keys not renewed; the one in use goes on", why=str(error))

    async def close(self) -> None:
        """Stop looking."""
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    # ---- signing

    def sign(self, kind: Kind, names: bytes, lifetime: float, *, reference: str = "", authorized: int = 0,
             grant: bytes = bytes(tokens.GRANT_SIZE), expires: int | None = None,
             ident: str | None = None) -> str:  # fmt: skip
        """Return a token that is valid from now, for `lifetime` seconds or until `expires`; `ident`: else a new one."""
        assert self._private is not None, "loaded"
        now = int(self._clock())
        until = now + int(lifetime) if expires is None else expires
        key = next(iter(self._public))
        ident = ident or secrets.token_hex(tokens.ID_SIZE)
        token = Token(kind, key, ident, now, until, names, reference, authorized, grant)
        return tokens.sign(self._private, token)

    def grant(self, shown: str, repository: str) -> bytes:
        """Return what stands for credentials (a header's text, "" for none) at a repository; nobody can go back."""
        data = f"{repository}\0{shown}".encode()
        return hashlib.blake2b(data, key=self._secret, digest_size=tokens.GRANT_SIZE, person=b"dadi grants").digest()

    # ---- verifying

    def public(self) -> PublicKeys:
        """Return the answer to GET /v1/keys."""
        keys = (PublicKey(name, _text(key.public_bytes_raw()), self._not_before) for name, key in self._public.items())
        now = self._clock()
        self._withdrawn = {ident: until for ident, until in self._withdrawn.items() if until > now}
        withdrawn = sorted(self._withdrawn, key=self._withdrawn.__getitem__)[-_MOST_TOLD:]
        return PublicKeys(tuple(keys), tuple(sorted(self._revoked.union(withdrawn))))

    def revoke(self, token: Token) -> None:
        """Revoke a token of ours until it has expired; not over a restart."""
        self._withdrawn[token.id] = token.expires + tokens.LEEWAY

    def find(self, key: str) -> Ed25519PublicKey | None:
        """See `KeySource`."""
        return self._public.get(key)

    def check_not_revoked(self, token: Token) -> None:
        """See `KeySource`."""
        is_old = token.key in self._public and token.not_before < self._not_before
        if is_old or {token.id, token.key} & self._revoked or token.id in self._withdrawn:
            raise TokenRefused("the token was revoked", hint=REVOKED)

    async def ask_for(self, key: str) -> None:
        """See `KeySource`: nobody knows better."""


def _changed(path: Path, stamps: dict[str, tuple[int, int, int] | None]) -> bytes | None:
    """Return a file's bytes if it is another than at the last look, else None. Raises OSError."""
    status = path.stat()
    stamp = (status.st_ino, status.st_size, status.st_mtime_ns)
    if stamps.get(str(path)) == stamp:
        return None
    with open(path, "rb") as file:
        data = file.read(_MAX_FILE)
    stamps[str(path)] = stamp
    return data


def _raw(text: str) -> bytes:
    data = base64.b64decode(text, validate=True)
    if len(data) != 32:
        raise ValueError("a key has 32 bytes")
    return data


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode()
