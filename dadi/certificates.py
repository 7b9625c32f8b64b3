"""TLS contexts out of PEM files, and what is wrong with those files. All of it blocks; `tls.py` says when to do it."""

from __future__ import annotations

import contextlib
import os
import ssl
from collections.abc import Callable
from pathlib import Path

import msgspec
from cryptography import x509

from dadi.errors import ConfigError

_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"  # of TLS 1.2; those of 1.3 are all of this kind


class Loaded(msgspec.Struct, frozen=True):
    """What one look at the files gave. `server` is None without a certificate; times: seconds since 1970."""

    server: ssl.SSLContext | None
    client: ssl.SSLContext
    not_before: float = 0.0
    not_after: float = 0.0


class CountedHandshake(ssl.SSLObject):
    """A listener's side of a connection; `done` is told how the handshake went: asyncio says nothing of it."""

    done: Callable[[ssl.SSLError | None], None] | None = None

    def do_handshake(self) -> None:
        try:
            super().do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError as error:
            self._tell(error)
            raise
        self._tell(None)

    def _tell(self, error: ssl.SSLError | None) -> None:
        if self.done:
            self.done(error)


def load(certificate: str, key: str, ca: str, client_ca: str) -> Loaded:
    """Return contexts made of the files at these paths ("": none; see `TlsConfig`).

    Raises ConfigError naming the file and what to do.
    """
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # verifies chain and name
    _set_up(client)
    if ca:
        _trust(client, ca, "ca")
    else:
        client.load_default_certs(ssl.Purpose.SERVER_AUTH)
    if not certificate:
        return Loaded(None, client)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.sslobject_class = CountedHandshake
    server.num_tickets = 0  # each connection shows its certificate anew: a ticket would outlive it
    _set_up(server)
    if client_ca:
        server.verify_mode = ssl.CERT_REQUIRED
        _trust(server, client_ca, "client_ca")
    not_before, not_after = _times(certificate)
    for context in (server, client):
        _show(context, certificate, key)
    return Loaded(server, client, not_before, not_after)


def _set_up(context: ssl.SSLContext) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(_CIPHERS)
    context.set_alpn_protocols(["http/1.1"])
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION | ssl.OP_NO_TICKET
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # `ca` may be an authority below the root


def _trust(context: ssl.SSLContext, path: str, name: str) -> None:
    hint = "a PEM file with the certificates of authorities"
    try:
        _read(path, name)
        context.load_verify_locations(path)
    except OSError as error:  # ssl.SSLError among them
        raise ConfigError(f"tls.{name}: {path} cannot be used: {reason(error)}", hint=hint) from None


def _show(context: ssl.SSLContext, certificate: str, key: str) -> None:
    name, holder = ("key", key) if key else ("certificate", certificate)
    if b"PRIVATE KEY" not in _read(holder, name):
        raise ConfigError(f"tls.{name}: {holder} has no private key", hint="a PEM file; tls.key if it is another file")

    def passphrase() -> str:
        hint = "a daemon cannot ask for its passphrase: openssl pkey -in FILE -out NEW writes one without"
        raise ConfigError(f"tls.{name}: the key in {holder} is encrypted", hint=hint)

    try:
        context.load_cert_chain(certificate, key or None, passphrase)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            text = f"tls.key: the key in {holder} is not that of the certificate in {certificate}"
            raise ConfigError(text, hint="were both replaced?") from None
        raise ConfigError(f"tls: {certificate} with {holder} cannot be used: {reason(error)}") from None
    except OSError as error:
        raise ConfigError(f"tls: {certificate} with {holder} cannot be read: {error.strerror}") from None


def _times(path: str) -> tuple[float, float]:
    """Return between which times (seconds since 1970) the certificate, the first in the file, is valid."""
    try:
        first = x509.load_pem_x509_certificates(_read(path, "certificate"))[0]
    except ValueError as error:
        hint = "a PEM file: the program's own certificate, then those between it and the authority"
        raise ConfigError(f"tls.certificate: {path} cannot be used: {error}", hint=hint) from None
    return first.not_valid_before_utc.timestamp(), first.not_valid_after_utc.timestamp()


def _read(path: str, name: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        hint = "does the file exist, and may this program's user read it?"
        raise ConfigError(f"tls.{name}: {path} cannot be read: {error.strerror}", hint=hint) from None


def look(paths: list[str]) -> list[tuple[int, ...] | None]:
    """Return what changes when the files do, also where a symbolic link on their way is swapped."""
    seen: list[tuple[int, ...] | None] = []
    for path in paths:
        found = None
        with contextlib.suppress(OSError):
            stat = os.stat(path)
            found = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        seen.append(found)
    return seen


def reason(error: Exception) -> str:
    """Return what OpenSSL says, without the place in its source."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    reason = getattr(error, "reason", None) or str(error)
    return str(reason).lower().replace("_", " ")
