"""Who may read which repository, by the registry's own word, kept for a short time.

    1. what everybody may read, the caller may read: asked for once a repository, without credentials; not on behalf of
       who has shown his own already, and not for longer than `patience`
    2. else the registry is asked with the caller's credentials
    3. what it says is believed for `ttl` seconds, a refusal for a few
    4. while it is away, a permission that is not older than `stale` goes on, said aloud; a refusal never becomes one.
       Who has none is told so after some seconds, see `away.py`

The question (`probe`) is a request that only who may read the repository gets a 200 for, and as a rule one whose answer
is needed anyway. It goes to the registry itself, never to a mirror. Credentials are kept as hashes only, apart from the
clients that were used in the last minutes.
"""

from __future__ import annotations

import copy
import time
import weakref
from collections import OrderedDict
from collections.abc import Awaitable, Callable

from dadi.errors import AccessDenied, DadiError, LoginRequired, NotFound, Unavailable
from dadi.fallbacks import Fallbacks
from dadi.oci.credentials import FixedCredentials
from dadi.oci.reference import Reference
from dadi.oci.registry import RegistryClient
from dadi.originals.away import Away, CallerFlights
from dadi.originals.caller import ANYBODY, Caller
from dadi.originals.challenges import Challenges
from dadi.originals.config import OriginalsConfig
from dadi.originals.records import Records
from dadi.originals.remembered import Remembered

Probe = Callable[[RegistryClient], Awaitable[None]]
"""Asks the registry something; raises AccessDenied or NotFound if the one whose client it is may not."""
_REFUSED_FOR = 5.0
"""Seconds that a refusal is believed: long enough against a storm, short enough for who has just been let in."""
_MOST_CLIENTS = 256
_CLIENT_FOR = 300.0
"""Seconds that a client, with its caller's credentials and tokens, is kept after its last use: those of one pull."""
_MOST_VERDICTS, _MOST_REFUSED = 100_000, 10_000
_PUBLIC = "public "
_Key = tuple[str, str]
"""Repository with its registry, and the caller's key."""


class Access:
    """See the head of this file."""

    def __init__(self, registry: RegistryClient, config: OriginalsConfig, records: Records, away: Away,
                 fallbacks: Fallbacks, clock: Callable[[], float]) -> None:  # fmt: skip
        self._registry = registry
        self._config = config
        self._records = records
        self._away = away
        self._fallbacks = fallbacks
        self._clock = clock
        self._flights = CallerFlights()
        self._granted: OrderedDict[_Key, float] = OrderedDict()
        """When the registry last accepted whom."""
        self._refused: OrderedDict[_Key, tuple[float, DadiError]] = OrderedDict()
        """Until when a refusal is believed, and what it was: never raised itself, since tracebacks hold callers."""
        self._dropped: weakref.WeakSet[RegistryClient] = weakref.WeakSet()
        """Clients that somebody may still be using: closed at the end."""
        self._clients: Remembered[_Key, RegistryClient] = Remembered(
            _CLIENT_FOR, _MOST_CLIENTS, time.monotonic, gone=self._dropped.add
        )
        self._challenges = Challenges(config, away, clock)
        self.asked = 0
        self.refusals = 0

    def __repr__(self) -> str:
        return f"Access({len(self._granted)} granted)"

    def start(self) -> None:
        """Take up what everybody was allowed to read before a restart. Permissions of callers are in memory only."""
        for record in self._records.with_prefix(_PUBLIC):
            self._granted[record.key.removeprefix(_PUBLIC), ""] = record.checked_at

    def client(self, registry: str, caller: Caller) -> RegistryClient:
        """Return a client that shows the registry what the caller shows."""
        key = (registry, caller.key)
        client = self._clients.get(key)
        if client is None:
            if not caller.authorization and self._config.lend_credentials:
                return self._registry
            source = caller.for_registry(registry) if caller.authorization else FixedCredentials()
            client = self._registry.as_caller(source)
            self._clients.put(key, client)
        return client

    async def challenge(self, registry: str, ref: Reference | None = None) -> str | None:
        """Return the WWW-Authenticate of a registry, or of the repository of `ref`; see `challenges.py`."""
        name = registry if ref is None else ref.name
        return await self._challenges.get(registry, name, lambda: self._registry.challenge(registry, ref))

    def is_public(self, name: str) -> bool:
        """Whether everybody may read a repository (REGISTRY/REPOSITORY), as far as is known."""
        at = self._granted.get((name, ""))
        return at is not None and not self._config.lend_credentials and self._clock() - at <= self._config.stale

    def admit(self, ref: Reference, caller: Caller) -> None:
        """Remember that the registry has just answered the caller."""
        self._granted[ref.name, caller.key] = self._clock()
        self._granted.move_to_end((ref.name, caller.key))
        self._refused.pop((ref.name, caller.key), None)
        if len(self._granted) > _MOST_VERDICTS:
            self._granted.popitem(last=False)

    async def check(self, ref: Reference, caller: Caller, probe: Probe) -> None:
        """Return if the caller may read the repository of `ref`.

        Raises LoginRequired (or AccessDenied, where the registry does not say what it wants to see), and what the
        probe raises.
        """
        if self._is_granted(ref, ANYBODY, self._config.access_ttl):
            return
        if caller.authorization and self._asks_for_anybody(ref, caller):
            try:
                await self._verdict(ref, ANYBODY, probe, hasty=True)
                return
            except (AccessDenied, NotFound, Unavailable):
                pass  # not for everybody, as far as is known
        await self._verdict(ref, caller, probe)

    def _asks_for_anybody(self, ref: Reference, caller: Caller) -> bool:
        """Whether it is worth asking if somebody with credentials needs none: that is a second request."""
        if self._is_refused(ref, ANYBODY):
            return False
        if self._is_granted(ref, ANYBODY, self._config.stale):
            return True
        return not (self._is_granted(ref, caller, self._config.stale) or self._away.is_away(ref.registry))

    def _is_granted(self, ref: Reference, caller: Caller, age: float) -> bool:
        at = self._granted.get((ref.name, caller.key))
        return at is not None and self._clock() - at <= age

    def _is_refused(self, ref: Reference, caller: Caller) -> bool:
        until, _ = self._refused.get((ref.name, caller.key), (0.0, None))
        return self._clock() < until

    async def _verdict(self, ref: Reference, caller: Caller, probe: Probe, *, hasty: bool = False) -> None:
        """Return if the registry accepts the caller; `hasty`: what it says would only save a question."""
        key = (ref.name, caller.key)
        if self._is_granted(ref, caller, self._config.access_ttl):
            return
        if self._is_refused(ref, caller):
            raise copy.copy(self._refused[key][1])
        old = self._is_granted(ref, caller, self._config.stale)
        work = lambda: self._ask(ref, caller, probe)  # noqa: E731
        try:
            # By what is asked, too: that one thing is missing there says nothing to who wants another.
            await self._away.ask(self._flights, ref.registry, (*key, str(ref)), work, old=old, hasty=hasty)
        except Unavailable as error:
            if not old:
                raise
            self._fallbacks.note("registry away, an earlier permission holds", f"{ref.name}: {error.message}")

    async def _ask(self, ref: Reference, caller: Caller, probe: Probe) -> None:
        self.asked += 1
        client = self.client(ref.registry, caller)
        try:
            await probe(client)
        except Unavailable:
            self._away.failed(ref.registry)
            raise
        except AccessDenied as error:
            self._away.answered(ref.registry)
            raise await self.refused(ref, caller, error) from None
        self._away.answered(ref.registry)
        self.admit(ref, caller)
        if not caller.authorization and not self._config.lend_credentials:
            await self._records.learn(_PUBLIC + ref.name, "", 0)

    async def refused(self, ref: Reference, caller: Caller, error: AccessDenied) -> AccessDenied:
        """Return what the caller is told whom the registry has refused just now, and remember it for a moment."""
        if isinstance(error, LoginRequired):
            return error
        self.refusals += 1
        self._granted.pop((ref.name, caller.key), None)
        if caller.authorization:
            self._clients.drop((ref.registry, caller.key))
        else:  # its client stays: it has the tokens for what everybody may read
            await self._records.forget(_PUBLIC + ref.name)
        challenge = None
        if type(error) is AccessDenied:  # the registry's refusal, not our configuration's
            try:
                challenge = await self.challenge(ref.registry, ref)
            except DadiError as failed:
                self._fallbacks.note("no challenge to pass on", f"{ref.name}: {failed.message}")
        if challenge:
            error = LoginRequired(error.message, hint=error.hint, challenge=challenge)
        # While somebody's credentials are refused for a moment, that everybody is, is believed for longer.
        for_ = _REFUSED_FOR if caller.authorization else max(_REFUSED_FOR, self._config.access_ttl)
        now = self._clock()
        self._refused.pop((ref.name, caller.key), None)
        self._refused[ref.name, caller.key] = (now + for_, copy.copy(error))
        while len(self._refused) > _MOST_REFUSED or next(iter(self._refused.values()))[0] < now:
            self._refused.popitem(last=False)
        return error

    async def close(self) -> None:
        """Break off what is under way."""
        await self._flights.close()
        await self._challenges.close()
        self._clients.close()
        for client in [*self._dropped]:
            await client.close()
