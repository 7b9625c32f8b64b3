"""Which superpeers there are, and in which order to ask them for something; who is away is asked last.

A superpeer is its name: a URL, as configured. `dns+http://NAME:PORT` stands for all addresses that NAME has; they are
asked for again every `refresh` seconds, and what was known stays when nobody answers. Everybody must use the same
names: the order in which superpeers are responsible for a blob is a hash of them (`owners.py`).

One that did not answer is away: for a second at first, for longer each time, 15 s at most; then one request at a time
tries it again. It is asked all the same when nobody else is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from urllib.parse import urlsplit

from dadi.errors import ConfigError, DadiError, DigestMismatch, Unavailable, Unreachable
from dadi.fallbacks import Fallbacks
from dadi.peers.health import Event, Health, Settings, State
from dadi.peers.owners import owners

_DNS = "dns+"
SETTINGS = Settings(dropped=1.0, dropped_most=15.0)
_MOST = 256
"""Addresses of one name that are used."""

Resolver = Callable[[str, int], Awaitable[list[str]]]
"""(host, port) → IP addresses. Raises OSError."""


async def addresses_of(host: str, port: int) -> list[str]:
    """Return the IP addresses of a name, by the machine's resolver. Raises OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, proto=6)
    return sorted({str(address[4][0]) for address in found})


class Superpeers:
    """See the head of this file. `health` is who is away; a node may use the same for its peers."""

    def __init__(self, configured: Sequence[str], fallbacks: Fallbacks, *, refresh: float = 30.0,
                 resolver: Resolver = addresses_of, health: Health | None = None,
                 clock: Callable[[], float] = time.monotonic) -> None:  # fmt: skip
        """Raises ConfigError for what is no URL."""
        self._static = [_checked(url) for url in configured if not url.startswith(_DNS)]
        self._dns = {url: _checked(url.removeprefix(_DNS)) for url in configured if url.startswith(_DNS)}
        self._found: dict[str, list[str]] = {}
        self._fallbacks = fallbacks
        self._refresh = refresh
        self._resolver = resolver
        self.clock = clock
        self.health = health if health is not None else Health(SETTINGS)
        self.names: tuple[str, ...] = ()
        """Those that are known now, sorted. Empty until `ready` if all are DNS names."""
        self._learning = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._update()

    def __repr__(self) -> str:
        return f"Superpeers({', '.join(self.names) or 'none known'})"

    # ---- who there is

    async def ready(self) -> None:
        """Have DNS names asked for, if none was yet. Raises Unavailable if nobody is known."""
        if self._dns and self._task is None:
            async with self._learning:
                if self._task is None:
                    await self._ask_all()
                    self._task = asyncio.create_task(self._keep_asking())
        if not self.names:
            names = ", ".join(self._dns) or "none is configured"
            raise Unavailable(f"no superpeer is known: {names}", hint="check `superpeers` and the name service")

    async def ask_names(self) -> None:
        """Ask for the addresses of the DNS names now."""
        async with self._learning:
            await self._ask_all()

    async def _keep_asking(self) -> None:
        while True:
            # With nobody known, or nobody there, an answer is worth more.
            now = self.clock()
            well = any(self.health.state(name, now) is State.GOOD for name in self.names)
            await asyncio.sleep(self._refresh if well else min(self._refresh, 1.0))
            await self.ask_names()

    async def _ask_all(self) -> None:
        for configured, url in self._dns.items():
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
            try:
                async with asyncio.timeout(10):
                    found = await self._resolver(host, port)
                names = sorted({f"{parts.scheme}://{_in_url(address)}:{port}" for address in found[:_MOST]})
            except (OSError, ValueError) as error:
                self._fallbacks.note("superpeers' name not resolved", f"{host}: {str(error) or type(error).__name__}")
                continue
            if not names:
                self._fallbacks.note("superpeers' name not resolved", f"{host}: it has no address")
                continue
            self._found[configured] = names
        self._update()

    def _update(self) -> None:
        found = [name for names in self._found.values() for name in names]
        self.names = tuple(sorted({*self._static, *found}))
        self.health.trust(self.names)

    # ---- whom to ask

    def order(self, key: str) -> list[str]:
        """Return who is responsible for `key` (a digest, a reference), then the stand-ins, whoever is away."""
        return owners(key, self.names)

    def to_ask(self, key: str, health: Health | None = None) -> list[str]:
        """Return all in the order in which to ask them now: those that are away, by `health`, last."""
        health = health or self.health
        now = self.clock()
        order = self.order(key)
        here = [name for name in order if health.may_ask(name, now)]
        if here and here[0] != order[0]:
            self._fallbacks.note("superpeer away, its stand-in asked", f"{order[0]}: {here[0]} is asked for {key}")
        away = [name for name in order if name not in here]
        return here + away

    @contextlib.asynccontextmanager
    async def asking(self, name: str, health: Health | None = None) -> AsyncIterator[None]:
        """Around a request to a superpeer: learn from how it ends whether it is away; `health` if not for all."""
        health = health or self.health
        health.trust((name,))
        health.asked(name)
        try:
            yield
        except (Unreachable, DigestMismatch):
            health.happened(name, Event.FAILED, self.clock())
            raise
        except DadiError:
            health.happened(name, Event.ANSWERED, self.clock())
            raise
        else:
            health.happened(name, Event.ANSWERED, self.clock())
        finally:
            health.ended(name)

    def passed_over(self, name: str, error: DadiError) -> None:
        """Note that somebody else is asked because of an error."""
        self._fallbacks.note("superpeer passed over", f"{name}: {error}")

    def state(self, name: str) -> str:
        """Return "good", "dropped" or "probing"."""
        return self.health.state(name, self.clock()).value

    async def close(self) -> None:
        """Stop asking for names."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)


def most_hopeful(errors: Sequence[DadiError]) -> DadiError:
    """Return the error to raise when all have been asked: a retryable one if there was any, else the last."""
    return next((error for error in errors if error.retryable), errors[-1])


def _checked(url: str) -> str:
    url = url.rstrip("/")
    try:
        parts = urlsplit(url)
        port_is_one = parts.port is None or parts.port > 0
    except ValueError:
        port_is_one = False
    if not port_is_one or parts.scheme not in ("http", "https") or not parts.hostname or parts.path or parts.query:
        hint = "write it as http://HOST:PORT, https://HOST:PORT or dns+http://NAME:PORT"
        raise ConfigError(f"{url[:200]!r} is not the URL of a superpeer", hint=hint)
    return url


def _in_url(address: str) -> str:
    """Return an IP address as it stands in a URL; raise ValueError if it is none."""
    ip = ipaddress.ip_address(address)
    return f"[{ip}]" if ip.version == 6 else str(ip)
