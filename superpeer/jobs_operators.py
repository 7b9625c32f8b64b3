"""Who may begin, cancel and retry prefetch jobs: to read an image is no right to fill a store, to pin, to set rates.

    no file (`prefetch.operators` is "")    who comes over loopback: somebody on this machine, or a proxy there that
                                            lets in whom it wants to. With `authorization = "open"`: whoever reaches us
    a file                                  who it names, and nobody else, from wherever he comes:
        token sha256:HEX [name]             he shows a token (header OPERATOR) with this SHA-256
        client NAME                         his TLS certificate, which `client_ca` has signed, is for this name

A line that begins with "#" is a comment. The file is looked at with each request, and read when it has changed; one
that cannot be used then changes nothing, and is noted. Tokens are compared by their hashes; no log or error has them.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import structlog

from dadi.errors import AccessDenied, ConfigError
from dadi.fallbacks import Fallbacks
from dadi.prefetch.messages import OPERATOR

log = structlog.get_logger()
_TOKEN = re.compile(r"sha256:(?P<hex>[0-9a-f]{64})")
_MOST = 1 << 20
_LINES = "a line is `token sha256:HEX [name]` or `client NAME`"
SHORTEST = 16
"""Characters of a token: hashes of short ones could be guessed by who sees the file."""


class Named(msgspec.Struct, frozen=True):
    """What a file says. `tokens`: SHA-256 and the name behind it; `clients`: names in certificates."""

    tokens: tuple[tuple[str, str], ...] = ()
    clients: frozenset[str] = frozenset()


def parse(text: str, where: str) -> Named:
    """Return what a file says; raise ConfigError with the line that is wrong."""
    tokens: list[tuple[str, str]] = []
    clients: set[str] = set()
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        match = _TOKEN.fullmatch(words[1]) if len(words) > 1 and words[0] == "token" else None
        if match is not None:
            tokens.append((match["hex"], " ".join(words[2:])[:100]))
        elif words[0] == "client" and len(words) == 2:
            clients.add(words[1].lower())
        else:
            raise ConfigError(f"{where}, line {number} names no operator", hint=_LINES)
    return Named(tuple(tokens), frozenset(clients))


class Operators:
    """See the head of this file. `file`: "" for none; `open_to_all`: where the network decides."""

    def __init__(self, file: str, fallbacks: Fallbacks, *, open_to_all: bool) -> None:
        self._file = file
        self._fallbacks = fallbacks
        self._open = open_to_all
        self._named = Named()
        self._stamp: tuple[int, int, int] | None = None

    def __repr__(self) -> str:
        return f"Operators({self._file or 'loopback'})"

    @property
    def are_named(self) -> bool:
        """Whether a file says who they are."""
        return bool(self._file)

    async def load(self) -> None:
        """Read the file. Raises ConfigError."""
        if self._file:
            await asyncio.to_thread(self._load)

    def _load(self) -> None:
        try:
            status = os.stat(self._file)
            stamp = (status.st_ino, status.st_size, status.st_mtime_ns)
            if stamp == self._stamp:
                return
            if status.st_size > _MOST:
                raise ConfigError(f"prefetch.operators: {self._file} has more than {_MOST} bytes", hint=_LINES)
            self._named = parse(Path(self._file).read_text(), self._file)
            self._stamp = stamp
        except OSError as error:
            hint = 'give a file that the superpeer may read; "" lets in who comes over loopback'
            raise ConfigError(f"prefetch.operators: {self._file} cannot be read: {error.strerror}", hint=hint) from None
        except UnicodeDecodeError:
            raise ConfigError(f"prefetch.operators: {self._file} is no text", hint=_LINES) from None

    async def check(self, headers: Mapping[str, str], address: str, certificate: Mapping[str, Any] | None) -> None:
        """Raise AccessDenied unless an operator asks. `certificate`: as `ssl.SSLSocket.getpeercert` gives it."""
        if not self._file:
            if self._open or _is_loopback(address):
                return
            hint = ("name operators: prefetch.operators in its configuration, the only way with several "
                    "superpeers; or run it on the machine of the only one, with --superpeer http://127.0.0.1:PORT")
            raise AccessDenied("prefetch jobs here are for operators, who come over loopback", hint=hint)
        try:
            await self.load()
        except ConfigError as error:
            self._fallbacks.note("operators as they were", str(error))
        shown = headers.get(OPERATOR, "")
        if shown and len(shown) >= SHORTEST and self._knows(shown):
            return
        if certificate and self._named.clients & names_in(certificate):
            return
        hint = "--operator-token-file, or a client certificate that prefetch.operators names"
        what = "the token that was shown is no operator's" if shown else "prefetch jobs here are for operators"
        raise AccessDenied(what, hint=hint)

    def _knows(self, shown: str) -> bool:
        hashed = hashlib.sha256(shown.encode(errors="surrogateescape")).hexdigest()
        for known, name in self._named.tokens:
            if hmac.compare_digest(known, hashed):
                log.info("an operator asks", name=name)
                return True
        return False


def _is_loopback(address: str) -> bool:
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return (mapped or ip).is_loopback


def names_in(certificate: Mapping[str, Any]) -> set[str]:
    """Return the names that a certificate is for: DNS names and e-mail addresses, else the common name."""
    alternatives = certificate.get("subjectAltName", ())
    found = {value.lower() for kind, value in alternatives if kind in ("DNS", "email")}
    common = (value for part in certificate.get("subject", ()) for kind, value in part if kind == "commonName")
    return found or {str(value).lower() for value in common}
