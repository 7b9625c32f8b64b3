"""Where a registry's images can be had, in which order, and who is left alone for a while.

    a round      the mirrors in their order, the registry itself last; the first that can answers
    a failure    of a mirror leads to the next in the round, and the mirror rests; when the registry has failed too, the
                 operation's patience decides whether there is another round, in which resting mirrors are asked as well
    Retry-After  holds for everybody who wants something from that host, not only for the request that was told

The registry's word is final: what a failed round raises is what the registry said, with the mirrors' errors as a hint.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog

from dadi.errors import DadiError, DigestMismatch, Unavailable
from dadi.oci.answer import Counters
from dadi.oci.config import RegistryConfig
from dadi.oci.hosts import Hosts
from dadi.oci.reference import Reference
from dadi.oci.retry import Clock, Patience

T = TypeVar("T")

_MAX_REGISTRIES = 1000

_log = structlog.get_logger(__name__)


@dataclasses.dataclass(slots=True, eq=False)
class Endpoint:
    """One host that speaks the distribution protocol: the registry itself, or a mirror of it."""

    registry: str
    """What the reference names."""
    host: str
    """host[:port] that credentials are looked up for."""
    base: str
    prefix: str = ""
    is_mirror: bool = False
    resting_until: float = 0.0
    """Monotonic seconds; our own choice."""
    quiet_until: float = 0.0
    """Monotonic seconds; what it asked for."""
    failures: int = 0
    last_error: str = ""

    def repository(self, ref: Reference) -> str:
        """Return what the repository is called here."""
        return f"{self.prefix}/{ref.repository}" if self.prefix else ref.repository

    def url(self, ref: Reference, rest: str) -> str:
        """Return the URL of something in the repository; a mirror is told whose image is meant."""
        namespace = f"?ns={self.registry}" if self.is_mirror else ""
        return f"{self.base}/v2/{self.repository(ref)}/{rest}{namespace}"

    def scope(self, ref: Reference) -> str:
        """Return the scope of a token for reading."""
        return f"repository:{self.repository(ref)}:pull"

    def push_scope(self, ref: Reference) -> str:
        """Return the scope of a token for writing."""
        return f"repository:{self.repository(ref)}:pull,push"


class Endpoints:
    """All registries that were asked for, and the state of their hosts."""

    def __init__(self, config: RegistryConfig, hosts: Hosts, clock: Clock, counters: Counters) -> None:
        self._config = config
        self._hosts = hosts
        self._clock = clock
        self._counters = counters
        self._registries: dict[str, tuple[Endpoint, ...]] = {}

    def turns(self, registry: str, *, mirrors: bool = True) -> EndpointTurns:
        """Return the turns of one operation; raise RegistryNotAllowed if the registry is not to be contacted."""
        self._hosts.check_registry(registry)
        endpoints = self._registries.get(registry)
        if endpoints is None:
            if len(self._registries) >= _MAX_REGISTRIES:
                self._registries.clear()
            endpoints = self._registries[registry] = (
                *(
                    Endpoint(registry, host, self._hosts.base_url(host), prefix, is_mirror=True)
                    for host, prefix in self._hosts.mirrors_of(registry)
                ),
                Endpoint(registry, registry, self._hosts.base_url(registry)),
            )
        config = self._config
        patience = Patience(
            self._clock,
            retries=config.retries,
            first=config.backoff,
            most=config.max_backoff,
            max_retry_after=config.max_retry_after,
        )
        return EndpointTurns(endpoints if mirrors else endpoints[-1:], patience, self)

    async def ask(
        self, registry: str, attempt: Callable[[Endpoint], Awaitable[T]], *, mirrors: bool = True
    ) -> T:
        """Return what the first endpoint that can answers, each tried as often as patience lasts."""
        turns = self.turns(registry, mirrors=mirrors)
        while True:
            endpoint = await turns.next()
            try:
                return await attempt(endpoint)
            except DadiError as error:
                turns.failed(error)

    def is_awake(self, endpoint: Endpoint, *, first_round: bool) -> bool:
        """Whether an endpoint takes part in a round; the registry itself always does."""
        now = self._clock.monotonic()
        if not endpoint.is_mirror:
            return True
        return endpoint.quiet_until <= now and (endpoint.resting_until <= now or not first_round)

    async def wait_for(self, endpoint: Endpoint) -> None:
        """Wait until the endpoint may be asked again; raise Unavailable if that is too long."""
        pause = endpoint.quiet_until - self._clock.monotonic()
        if pause > self._config.max_retry_after:
            raise Unavailable(f"{endpoint.host} asks to be left alone for {pause:.0f} s", retry_after=pause)
        if pause > 0:
            await self._clock.sleep(pause)

    def failed(self, endpoint: Endpoint, error: DadiError) -> None:
        """Remember that an endpoint could not do what it was asked for."""
        now = self._clock.monotonic()
        endpoint.failures += 1
        endpoint.last_error = error.message
        if isinstance(error, Unavailable) and error.retry_after is not None:
            endpoint.quiet_until = max(endpoint.quiet_until, now + error.retry_after)
        if endpoint.is_mirror:
            self._counters.mirror_failures += 1
            if isinstance(error, Unavailable | DigestMismatch):
                if endpoint.resting_until <= now:
                    _log.warning("mirror failed", mirror=endpoint.host, registry=endpoint.registry, error=str(error))
                endpoint.resting_until = now + self._config.mirror_rest

    def retried(self) -> None:
        """Count a round after the first."""
        self._counters.retries += 1

    def statistics(self) -> list[dict[str, object]]:
        """Return what failed where, and for how long (seconds) that host is left alone."""
        now = self._clock.monotonic()
        return [
            {
                "host": endpoint.host,
                "mirror_of": endpoint.registry if endpoint.is_mirror else None,
                "failures": endpoint.failures,
                "last_error": endpoint.last_error,
                "left_alone": round(max(0.0, endpoint.resting_until - now, endpoint.quiet_until - now), 3),
            }
            for endpoints in self._registries.values()
            for endpoint in endpoints
        ]


class EndpointTurns:
    """Whose turn it is, for one operation.

    Call `next`, try there, and say `failed` if that went wrong; `next` then gives the next endpoint, after a wait if
    one is due, or raises the error once there is nobody left and no patience either.
    """

    def __init__(self, endpoints: tuple[Endpoint, ...], patience: Patience, table: Endpoints) -> None:
        self._endpoints = endpoints
        self._patience = patience
        self._table = table
        self._round: list[Endpoint] = []
        self._current: Endpoint | None = None
        self._error: DadiError | None = None
        self._mirror_errors: dict[str, str] = {}

    async def next(self) -> Endpoint:
        """Return the endpoint to ask now; see the class."""
        if not self._round:
            if self._error is not None:
                await self._spend(self._error)
            first = self._error is None
            self._round = [e for e in self._endpoints if self._table.is_awake(e, first_round=first)]
        self._current = self._round.pop(0)
        await self._table.wait_for(self._current)
        return self._current

    def failed(self, error: DadiError) -> None:
        """Say that the endpoint whose turn it was could not do it."""
        assert self._current is not None
        self._error = error
        self._table.failed(self._current, error)
        if self._current.is_mirror:
            self._mirror_errors[self._current.host] = error.message

    def restored(self) -> None:
        """Say that the operation got on before it failed: patience begins anew."""
        self._patience.restored()

    async def _spend(self, error: DadiError) -> None:
        try:
            await self._patience.spend(error)
        except DadiError as final:
            said = [f"mirror {host}: {what}" for host, what in self._mirror_errors.items()]
            if said and said[0] not in (final.hint or ""):
                final.hint = "; ".join(([final.hint] if final.hint else []) + said)
            raise
        self._table.retried()
