"""What registries say of credentials: asked as seldom as can be, remembered by keyed hashes. Rules: `who_may.py`.

    yes                  believed for `ttl`; used for `stale` while the registry cannot say. On disk
    no, after a yes      kept as long: who has lost access does not get it back by hiding the credentials. On disk
    no                   believed for NO_FOR; apart from the others, so that strangers push out strangers only
    cannot say (away,    to who renews: for `ttl`, or NO_FOR if that is more, give or take a quarter; who comes for the
    not there)           first time has the registry asked

Anybody is asked for first, once a repository: what is public costs one question, whatever nodes show. All questions go
over one client's connections, `_PARALLEL` at a time to each registry. An address from which more than `_MOST_REFUSALS`
credentials a minute are refused has to wait: the registry must not be asked for passwords that somebody guesses.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from weakref import WeakValueDictionary

import msgspec
import structlog

from dadi.blobs.layout import write_durably
from dadi.errors import AccessDenied, DadiError, NotFound, RegistryNotAllowed, Unavailable
from dadi.fallbacks import Fallbacks
from dadi.oci.config import RegistryConfig
from dadi.oci.credentials import Credentials, FixedCredentials
from dadi.oci.reference import Reference
from dadi.oci.registry import RegistryClient
from dadi.peers import shown as shown_credentials
from superpeer.config import SuperpeerConfig
from superpeer.signing import SigningKeys

log = structlog.get_logger()
NO_FOR = 15.0
"""Seconds that a no is believed."""
_PATIENCE = 5.0
"""Seconds that a registry may take where an older yes would do."""
_REST = 10.0
"""Seconds after a failure for which an older yes is used without asking."""
_PARALLEL = 8
_MOST_VERDICTS = 20_000
_MOST_NOES = 4096
_MOST_SILENT = 10_000
_MOST_REFUSALS = 30
_REFUSALS_IN = 60.0
"""Seconds."""
_MOST_ADDRESSES = 4096
_SAVE_EVERY = 30.0


class Grant(msgspec.Struct, frozen=True):
    """A yes: for whom, by a keyed hash, and when the registry said it (seconds since 1970)."""

    grant: bytes
    authorized: int


class _Verdict(msgspec.Struct):
    """What the registry said last of who had a yes once; all in seconds since 1970, 0 for never."""

    yes_at: float = 0.0
    no_at: float = 0.0
    failed_at: float = 0.0

    @property
    def is_yes(self) -> bool:
        return self.yes_at > self.no_at


class Verdicts:
    """See the head of this file. `load` it, `start` it, `close` it."""

    def __init__(self, config: SuperpeerConfig, keys: SigningKeys, fallbacks: Fallbacks,
                 clock: Callable[[], float] = time.time) -> None:  # fmt: skip
        self._keys = keys
        self._ttl = config.authorization_ttl
        self._stale = config.authorization_stale
        # Mirrors: see above. Whoever waits for the answer would rather hear soon that there is none.
        registry: RegistryConfig = msgspec.structs.replace(
            config.registry, mirrors={}, retries=min(config.registry.retries, 2)
        )
        self._client = RegistryClient(registry)
        self._file = Path(config.state) / "keys" / "verdicts.json"
        self._fallbacks = fallbacks
        self._clock = clock
        self._verdicts: OrderedDict[bytes, _Verdict] = OrderedDict()
        self._noes: OrderedDict[bytes, float] = OrderedDict()
        self._silent: OrderedDict[tuple[bytes, str], tuple[float, DadiError]] = OrderedDict()
        """By grant, and what was asked for: until when it is believed that the registry cannot say, and why."""
        self._refusals: OrderedDict[tuple[str, str], list[float]] = OrderedDict()
        """By address and registry: when the minute began, and how many there were."""
        self._asking: dict[tuple[bytes, str], asyncio.Task[bool]] = {}
        self._slots: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        self.counts: Counter[str] = Counter()
        self._dirty = False
        self._saving: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"Verdicts({len(self._verdicts)})"

    # ---- asking

    async def check(self, reference: Reference, shown: str | None, address: str = "") -> Grant:
        """See `WhoMay.check`. `address`: where who asks comes from; "" to let him guess."""
        now = self._clock()
        credentials = shown_credentials.credentials(shown)
        anybody, grant = self._keys.grant("", reference.name), self._keys.grant(shown or "", reference.name)
        for each in (anybody, grant):
            verdict = self._verdicts.get(each)
            if verdict and verdict.is_yes and now - verdict.yes_at < self._ttl:
                return Grant(each, int(verdict.yes_at))
        if self.refused_at(grant) > now - NO_FOR:
            raise denied(reference, credentials)
        if credentials is not None and self._is_open_question(anybody, reference):
            try:
                return await self._ask(reference, None, anybody, first=True, hasty=self._older(grant))
            except RegistryNotAllowed:
                raise
            except (AccessDenied, NotFound, Unavailable) as error:
                self._believe_silent(anybody, "", error)
                if isinstance(error, Unavailable) and (verdict := self._verdicts.get(grant)):
                    verdict.failed_at = now
        self._check_not_guessing(address, reference)
        try:
            return await self._ask(reference, credentials, grant)
        except AccessDenied as error:
            if not isinstance(error, RegistryNotAllowed):
                self._count_refusal(address, reference)
            raise

    def _is_open_question(self, anybody: bytes, reference: Reference) -> bool:
        until, _ = self._silent.get((anybody, ""), (0.0, None))
        return self._clock() >= until

    def _older(self, grant: bytes) -> bool:
        verdict = self._verdicts.get(grant)
        return verdict is not None and verdict.is_yes and self._clock() - verdict.yes_at < self._stale

    async def check_again(self, reference: Reference, shown: str | None, before: bytes, address: str = "") -> Grant:
        """Do as `check` for who was granted `before` once. NotFound and Unavailable say that nobody can say."""
        grant = self._keys.grant(shown or "", reference.name)
        until, error = self._silent.get((grant, str(reference)), (0.0, None))
        if error is not None and self._clock() < until:
            raise error.with_traceback(None)
        try:
            return await self.check(reference, shown, "" if grant == before else address)
        except NotFound as error:
            # Registries that hide repositories say that also to who may not see them any more.
            if grant == before and await self._is_there(reference):
                self._learn_no(grant, keep=True)
                raise denied(reference, shown_credentials.credentials(shown)) from None
            self._believe_silent(grant, str(reference), error)
            raise
        except Unavailable as error:
            self._believe_silent(grant, str(reference), error)
            raise
        except AccessDenied:
            if grant == before:
                self._learn_no(grant, keep=True)
            raise

    async def _is_there(self, reference: Reference) -> bool:
        """Whether the superpeer's own credentials show it the manifest."""
        self.counts["asked_for_itself"] += 1
        try:
            async with self._slot(reference.registry):
                await self._client.resolve(reference)
        except DadiError:
            return False
        return True

    async def _ask(self, reference: Reference, credentials: Credentials | None, grant: bytes,
                   *, first: bool = False, hasty: bool = False) -> Grant:  # fmt: skip
        """`first`: before the credentials of somebody. `hasty`: who would rather not wait, even with no older yes."""
        now = self._clock()
        verdict = self._verdicts.get(grant, _Verdict())
        older = self._older(grant)
        try:
            if older and now - verdict.failed_at < _REST:
                raise Unavailable(f"{reference.registry} did not answer a moment ago")
            # By what is asked for, too: that one tag is missing says nothing to who wants another.
            key = (grant, str(reference))
            task = self._asking.get(key)
            if task is None:
                task = self._asking[key] = asyncio.create_task(self._ask_registry(reference, credentials, grant, first))
                task.add_done_callback(partial(self._asked, key))
            async with asyncio.timeout(_PATIENCE if older or hasty else None):
                yes = await asyncio.shield(task)
        except TimeoutError:
            late = Unavailable(f"{reference.registry} did not answer in {_PATIENCE:.0f} s")
            return self._as_it_was(grant, late, reference)
        except Unavailable as error:
            return self._as_it_was(grant, error, reference)
        if not yes:
            raise denied(reference, credentials)
        return Grant(grant, int(self._clock()))

    def _as_it_was(self, grant: bytes, error: Unavailable, reference: Reference) -> Grant:
        if not self._older(grant):
            raise error
        self._fallbacks.note("registry away, access as it was", f"{reference.name}: {error}")
        return Grant(grant, int(self._verdicts[grant].yes_at))

    async def _ask_registry(self, reference: Reference, credentials: Credentials | None, grant: bytes,
                            first: bool) -> bool:  # fmt: skip
        async with self._slot(reference.registry):
            self.counts["asked_first_for_anybody" if first else "asked"] += 1
            client = self._as_caller(reference, credentials)
            try:
                await client.resolve(reference)
                return self._learn_yes(grant)
            except RegistryNotAllowed:
                raise
            except AccessDenied:
                return self._learn_no(grant)
            except Unavailable:
                if verdict := self._verdicts.get(grant):
                    verdict.failed_at = self._clock()
                raise
            finally:
                await client.close()

    def _asked(self, key: tuple[bytes, str], task: asyncio.Task[bool]) -> None:
        self._asking.pop(key, None)
        if not task.cancelled():
            task.exception()  # looked at: every asker may have gone

    async def has_blob(self, reference: Reference, shown: str | None, digest: str) -> bool:
        """Whether the registry shows a blob of the repository to who has these credentials."""
        client = self._as_caller(reference, shown_credentials.credentials(shown))
        try:
            async with self._slot(reference.registry):
                return await client.has_blob(reference, digest)
        finally:
            await client.close()

    def _as_caller(self, reference: Reference, credentials: Credentials | None) -> RegistryClient:
        return self._client.as_caller(FixedCredentials({reference.registry: credentials} if credentials else {}))

    def _slot(self, registry: str) -> asyncio.Semaphore:
        slots = self._slots.get(registry)
        if slots is None:
            slots = self._slots[registry] = asyncio.Semaphore(_PARALLEL)
        return slots

    # ---- remembering

    def is_public(self, repository: str) -> bool:
        """Whether anybody could read a repository when that was last asked."""
        verdict = self._verdicts.get(self._keys.grant("", repository))
        return verdict is not None and verdict.is_yes

    def refused_at(self, grant: bytes) -> float:
        """Return when the registry said no, if that was its last word; else 0."""
        verdict = self._verdicts.get(grant)
        if verdict is not None:
            return 0.0 if verdict.is_yes else verdict.no_at
        return self._noes.get(grant, 0.0)

    def _learn_yes(self, grant: bytes) -> bool:
        self._noes.pop(grant, None)
        self._enter(grant, _Verdict(yes_at=self._clock()))
        self.counts["yes"] += 1
        return True

    def _learn_no(self, grant: bytes, *, keep: bool = False) -> bool:
        """`keep`: whose it is had a yes, even if that is not known here."""
        now = self._clock()
        if keep or grant in self._verdicts:
            self._enter(grant, _Verdict(no_at=now))
        else:
            self._noes[grant] = now
            self._noes.move_to_end(grant)
            if len(self._noes) > _MOST_NOES:
                self._noes.popitem(last=False)
        self.counts["no"] += 1
        return False

    def _enter(self, grant: bytes, verdict: _Verdict) -> None:
        self._verdicts[grant] = verdict
        self._verdicts.move_to_end(grant)
        while len(self._verdicts) > _MOST_VERDICTS:
            self._verdicts.popitem(last=False)
        self._dirty = True

    def _believe_silent(self, grant: bytes, asked: str, error: DadiError) -> None:
        seconds = max(NO_FOR, self._ttl) * random.uniform(0.75, 1.25)
        self._silent[grant, asked] = (self._clock() + seconds, error)
        self._silent.move_to_end((grant, asked))
        if len(self._silent) > _MOST_SILENT:
            self._silent.popitem(last=False)

    def _check_not_guessing(self, address: str, reference: Reference) -> None:
        began, count = self._refusals.get((address, reference.registry), (0.0, 0))
        left = began + _REFUSALS_IN - self._clock()
        if count >= _MOST_REFUSALS and left > 0:
            self._fallbacks.note("too many credentials refused", f"{address}, by {reference.registry}")
            what = f"too many credentials from {address} were refused by {reference.registry}; not now"
            raise Unavailable(what, retry_after=left)

    def _count_refusal(self, address: str, reference: Reference) -> None:
        if not address:
            return
        now, key = self._clock(), (address, reference.registry)
        began, count = self._refusals.pop(key, (now, 0))
        if now - began >= _REFUSALS_IN:
            began, count = now, 0
        self._refusals[key] = [began, count + 1]
        if len(self._refusals) > _MOST_ADDRESSES:
            self._refusals.popitem(last=False)

    # ---- state

    async def load(self) -> None:
        """Read what registries said to earlier runs."""
        await asyncio.to_thread(self._load)

    def _load(self) -> None:
        try:
            found = msgspec.json.decode(self._file.read_bytes(), type=list[tuple[bytes, float, float]])
        except FileNotFoundError:
            return
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            self._fallbacks.note("what registries said was lost", f"{self._file}: {type(error).__name__}")
            return
        for grant, yes_at, no_at in found[-_MOST_VERDICTS:]:
            self._verdicts[grant] = _Verdict(yes_at, no_at)

    def start(self) -> None:
        """Begin to write down what is learnt."""
        self._saving = asyncio.create_task(self._keep_saving())

    async def _keep_saving(self) -> None:
        while True:
            await asyncio.sleep(_SAVE_EVERY)
            await self._save()

    async def _save(self) -> None:
        if not self._dirty:
            return
        self._dirty = False
        oldest = self._clock() - self._stale
        kept = [(grant, v.yes_at, v.no_at) for grant, v in self._verdicts.items() if max(v.yes_at, v.no_at) > oldest]
        try:
            await asyncio.to_thread(write_durably, self._file, msgspec.json.encode(kept))
        except OSError as error:
            self._dirty = True  # a no must not be lost with it
            log.error("could not write what registries said", file=str(self._file), why=error.strerror)

    def statistics(self) -> dict[str, int]:
        """Return counts: questions to registries, what they said, how much of it is remembered."""
        names = ("asked", "asked_first_for_anybody", "asked_for_itself", "yes", "no")
        return {**{name: self.counts[name] for name in names}, "verdicts": len(self._verdicts)}

    async def close(self) -> None:
        """Break off what is asked, write what is known."""
        tasks = [*self._asking.values(), *([self._saving] if self._saving else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._save()
        await self._client.close()


def denied(reference: Reference, credentials: Credentials | None) -> DadiError:
    """Return what who may not read a repository is told."""
    if credentials is None:
        hint = f"the node needs credentials for {reference.registry}: `docker login {reference.registry}` on it"
        return AccessDenied(f"{reference.registry} does not let just anybody read {reference.name}", hint=hint)
    hint = "they may be wrong, or have run out"
    return AccessDenied(f"{reference.registry} refuses the node's credentials for {reference.name}", hint=hint)
