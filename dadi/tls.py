"""TLS between our own programs: who we are, whom we believe, and files that may be replaced while we run.

    listeners   show `certificate`; with `client_ca` they take only clients whose certificate it signed (mutual TLS)
    clients     verify by `ca` and by name; show `certificate` to listeners that want one

One section is one program's whole TLS: with it its listeners speak nothing but TLS and its clients ask nothing but
https. Verification cannot be switched off; names are checked against subjectAltName. TLS 1.2 is the oldest spoken.

How files are replaced: aiohttp keeps one `SSLContext` for ever, so it gets an empty one (`_Newest`) that hands each
handshake to the context made last. New connections have the new files, those that stand go on as they are. Files that
cannot be used change nothing: the old ones go on, said in the log, the fallbacks and the status, and are tried again.
What never lives here: how contexts are made of files (`certificates.py`); TLS to registries (`oci/transport.py`).
"""

from __future__ import annotations

import asyncio
import ipaddress
import ssl
import time
from collections.abc import Callable
from typing import Annotated, Any

import msgspec
import structlog

from dadi import certificates
from dadi.certificates import CountedHandshake, reason
from dadi.config import SECONDS, described
from dadi.errors import ConfigError
from dadi.fallbacks import Fallbacks

log = structlog.get_logger()
_LOG_EVERY = 10.0
_CERTIFICATE_HINT = "tls.ca says who must have signed it; it must name the URL's host (tls.peer_name for IP addresses)"
_LAST_PART = 0.1
"""A certificate of which less than this part of its life is left should have been replaced."""


class TlsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """TLS of one program: of all its TCP listeners and of its clients for other dadi programs."""

    certificate: Annotated[str, described("PEM file: what this program shows, its own certificate first")] = ""
    key: Annotated[str, described("PEM file with its key; empty: it is in the file of the certificate")] = ""
    ca: Annotated[
        str, described("PEM file: who must have signed the listeners that this program asks; empty: the system's")
    ] = ""
    client_ca: Annotated[
        str, described("PEM file: who must have signed the clients of this program's listeners; empty: anybody may ask")
    ] = ""
    peer_name: Annotated[
        str, described("the name in certificates of machines that are asked by IP address; empty: the address")
    ] = ""
    refresh: Annotated[float, described("how often the files are looked at", SECONDS, at_least=1)] = 10.0

    def __post_init__(self) -> None:
        for name in ("key", "client_ca"):
            if getattr(self, name) and not self.certificate:
                raise ValueError(f"tls.{name} without tls.certificate")
        if self.peer_name and not (self.certificate or self.ca):
            raise ValueError("tls.peer_name without tls.certificate or tls.ca")
        if self.peer_name and _is_address(self.peer_name):
            raise ValueError(f"tls.peer_name is a name, not an address like {self.peer_name}")

    @property
    def wanted(self) -> bool:
        """Whether the section says anything: without it all is plain HTTP."""
        return bool(self.certificate or self.ca)

    @property
    def files(self) -> list[str]:
        """The files that matter."""
        return [path for path in (self.certificate, self.key, self.ca, self.client_ca) if path]

    def load(self) -> certificates.Loaded:
        """Return contexts made of the files as they are now. Blocks. Raises ConfigError."""
        return certificates.load(self.certificate, self.key, self.ca, self.client_ca)


class Tls:
    """One program's TLS; `server` and `client` are for aiohttp and may be given away before `start`."""

    def __init__(self, config: TlsConfig, fallbacks: Fallbacks, clock: Callable[[], float] = time.time) -> None:
        self.config = config
        self.client: ssl.SSLContext = _Newest(self, server_side=False)
        self._server = _Newest(self, server_side=True)
        self._fallbacks = fallbacks
        self._clock = clock
        self._loaded: certificates.Loaded | None = None
        self._seen: list[tuple[int, ...] | None] = []
        self._error: str | None = None
        self._task: asyncio.Task[None] | None = None
        self._warned = ""
        self._reloads = 0
        self._handshakes = 0
        self._refused = 0
        self._refused_why = ""
        self._refused_logged = float("-inf")

    def __repr__(self) -> str:
        return f"Tls({', '.join(self.config.files)}; {self._reloads} reloads)"

    @classmethod
    def of(cls, config: TlsConfig, fallbacks: Fallbacks) -> Tls | None:
        """Return it for a section that says something, else None: plain HTTP."""
        return cls(config, fallbacks) if config.wanted else None

    @property
    def server(self) -> ssl.SSLContext:
        """The context for listeners. Raises ConfigError if there is no certificate to show."""
        if not self.config.certificate:
            hint = "a listener beside clients that use TLS must use it too: give it a certificate"
            raise ConfigError("tls.certificate is missing", hint=hint)
        return self._server

    def check_urls(self, key: str, urls: tuple[str, ...]) -> None:
        """Raise ConfigError if one of the URLs in the configuration's `key` is not encrypted."""
        for url in urls:
            if not url.partition("://")[0].endswith("https"):
                hint = "write https://, or take the section [tls] out"
                raise ConfigError(f"{key}: {url} is not encrypted, while tls is configured", hint=hint)

    async def start(self) -> None:
        """Read the files and begin to watch them. Raises ConfigError naming the file that cannot be used."""
        self._seen = await asyncio.to_thread(certificates.look, self.config.files)
        self._loaded = await asyncio.to_thread(self.config.load)
        self._task = asyncio.create_task(self._watch())
        self._mind_the_time()

    async def close(self) -> None:
        """Stop watching. Connections go on."""
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self.config.refresh)
            await self.refresh()

    async def refresh(self) -> bool:
        """Look at the files now; return whether new ones are in use. Files that cannot be used raise nothing."""
        seen = await asyncio.to_thread(certificates.look, self.config.files)
        if seen == self._seen and not self._error:
            self._mind_the_time()
            return False
        try:
            new = await asyncio.to_thread(self.config.load)
            if self.config.certificate and not new.not_before <= self._clock() < new.not_after and self._in_its_time():
                raise ConfigError(f"tls.certificate: {self.config.certificate} is {self._when(new)}")
        except ConfigError as error:
            if (seen, str(error)) != (self._seen, self._error):
                # Also while certificate and key are replaced one after the other: the next look finds them whole.
                self._fallbacks.note("certificates not reloaded", f"{error}; those of before stay in use")
                log.error("new TLS files cannot be used; those of before stay in use", why=str(error))
            self._seen, self._error = seen, str(error)
            return False
        self._seen, self._error, self._loaded, self._warned = seen, None, new, ""
        self._reloads += 1
        log.info("TLS files were reloaded", certificate=self.config.certificate, expires=_date(new.not_after))
        self._mind_the_time()
        return True

    def current(self, *, server_side: bool) -> ssl.SSLContext:
        """Return the context for a handshake that begins now."""
        loaded = self._loaded
        context = (loaded.server if server_side else loaded.client) if loaded else None
        if context is None:
            raise ssl.SSLError("TLS has not been started")
        return context

    def _in_its_time(self) -> bool:
        loaded = self._loaded
        return loaded is not None and loaded.not_before <= self._clock() < loaded.not_after

    def _when(self, loaded: certificates.Loaded) -> str:
        if self._clock() < loaded.not_before:
            return f"not valid before {_date(loaded.not_before)}"
        return f"expired since {_date(loaded.not_after)}"

    def _mind_the_time(self) -> None:
        """Say once for each certificate that it should have been replaced, before all others refuse it."""
        loaded = self._loaded
        if not self.config.certificate or loaded is None:
            return
        if not self._in_its_time():
            if self._warned != "out":
                self._warned = "out"
                why = f"{self.config.certificate} is {self._when(loaded)}: everybody refuses it"
                self._fallbacks.note("certificate out of its time", why)
        elif loaded.not_after - self._clock() < _LAST_PART * (loaded.not_after - loaded.not_before):
            if self._warned != "soon":
                self._warned = "soon"
                log.warning("certificate expires soon", certificate=self.config.certificate, at=_date(loaded.not_after))

    def shook_hands(self, error: ssl.SSLError | None) -> None:
        """Count a handshake at a listener."""
        self._handshakes += 1
        if error is None:
            return
        self._refused += 1
        self._refused_why = reason(error)
        now = time.monotonic()
        if now - self._refused_logged >= _LOG_EVERY:
            self._refused_logged = now
            log.warning("a TLS handshake failed", why=self._refused_why, failed=self._refused)

    def statistics(self) -> dict[str, Any]:
        """Return the certificate, when it expires (seconds since 1970), what is wrong with newer files; counts."""
        return {
            "certificate": self.config.certificate,
            "mutual": bool(self.config.client_ca),
            "expires": self._loaded.not_after if self._loaded else 0.0,
            "error": self._error,
            "reloads": self._reloads,
            "handshakes": self._handshakes,
            "refused": self._refused,
            "refused_why": self._refused_why,
        }


class _Newest(ssl.SSLContext):
    """Hands each handshake to the newest context of its `Tls`. By itself it trusts and shows nothing."""

    _tls: Tls
    _server_side: bool

    def __new__(cls, tls: Tls, *, server_side: bool) -> _Newest:
        self = super().__new__(cls, ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT)
        self._tls, self._server_side = tls, server_side
        return self

    def __init__(self, tls: Tls, *, server_side: bool) -> None:
        super().__init__()

    def wrap_bio(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,
        server_hostname: str | bytes | None = None,
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLObject:
        tls = self._tls
        context = tls.current(server_side=self._server_side)
        if self._server_side:
            wrapped = context.wrap_bio(incoming, outgoing, server_side=True)
            if isinstance(wrapped, CountedHandshake):
                wrapped.done = tls.shook_hands
            return wrapped
        if tls.config.peer_name and isinstance(server_hostname, str) and _is_address(server_hostname):
            server_hostname = tls.config.peer_name
        return context.wrap_bio(incoming, outgoing, server_hostname=server_hostname)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


def refusal(error: BaseException) -> tuple[str, str] | None:
    """Return what a client's failed handshake means and a hint; None for an error that is none of TLS."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is refused: {error.verify_message}", _CERTIFICATE_HINT
    if not isinstance(error, ssl.SSLError):
        return None
    said = getattr(error, "reason", None) or str(error)  # aiohttp's own subclasses have none
    if "ALERT" in said and any(word in said for word in ("CERTIFICATE", "UNKNOWN_CA", "ACCESS_DENIED")):
        return f"it refuses our certificate: {reason(error)}", "its tls.client_ca must have signed our tls.certificate"
    if said in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE"):
        return "it does not speak TLS", "is tls configured there too?"
    return f"TLS failed: {reason(error)}", "both sides' logs say more"


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(seconds))
