"""What superpeers want this node to have before anybody starts it: `dadi prefetch --nodes`.

    every few seconds  GET /v1/prefetch/wanted?node=…&zone=…&rack=…    → what is to be brought; of private images of a
                       registry only to who shows credentials for it: those that we have for the registry as a whole
    each wish          resolve (with our own credentials), join the trees, read what is missing, in runs, as a prefetch:
                       behind every program that reads; then POST /v1/prefetch/{id}/nodes what has become of it

What is brought stays in the store like everything else; it is evicted when room is needed and nobody uses it, unless it
is pinned. Pins are in memory: after a restart the superpeers ask again, for what we do not say that we have.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable

import msgspec
import structlog

from dadi import http
from dadi.blobs.chain import Chain
from dadi.blobs.disk import DiskBlobs
from dadi.blobs.single_flight import runs
from dadi.blobs.source import Urgency
from dadi.errors import AccessDenied, DadiError, Malformed, StoreFull, TokenRefused, Unavailable
from dadi.fallbacks import Fallbacks
from dadi.index import image as image_index
from dadi.index.chunks import Blob
from dadi.index.image import ImageIndex
from dadi.node.demand import Demand
from dadi.oci.reference import Reference
from dadi.peers.superpeer import SuperpeerClient, Upstream, image_answer
from dadi.prefetch import plan
from dadi.prefetch.messages import MOST_HELD, NodeReport, Wish, Wishes, decode_wishes
from dadi.prefetch.rate import Bucket

log = structlog.get_logger()
EVERY = 15.0
_RUN = 2 << 20
_LOOK = 0.05
_YIELDS = 2.0
_EXPECT_EVERY = 30.0
_MAX_ANSWER = 16 << 20

Place = tuple[str, str, str]
"""This node's id, zone and rack."""


class Warmer:
    """See the head of this file. `expect` is told of an image that is about to be read."""

    def __init__(self, client: SuperpeerClient, upstream: Upstream, store: DiskBlobs, chain: Chain, demand: Demand,
                 fallbacks: Fallbacks, *, place: Callable[[], Place], platform: str,
                 expect: Callable[[ImageIndex], None], every: float = EVERY, clock: Callable[[], float] = time.time,
                 sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:  # fmt: skip
        self._client = client
        self._upstream = upstream
        self._store = store
        self._chain = chain
        self._demand = demand
        self._fallbacks = fallbacks
        self._place = place
        self._platform = platform
        self._expect = expect
        self._every = every
        self._task: asyncio.Task[None] | None = None
        self._again = 0.0
        self._clock = clock
        self._sleep = sleep
        self._pins: dict[str, tuple[float, contextlib.ExitStack]] = {}
        """By job: until when its image is kept (seconds since 1970)."""
        self._manifests: dict[str, str] = {}
        """Of those the images' manifests: their tokens are shown to hear whether they are pinned still."""
        self.warmed = 0
        self.bytes = 0

    def start(self) -> None:
        """Begin to ask."""
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Stop."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._unpin(list(self._pins))

    def statistics(self) -> dict[str, int]:
        """Return images that were warmed, bytes that were fetched for them, and images that are pinned."""
        return {"warmed": self.warmed, "bytes": self.bytes, "pinned": len(self._pins)}

    async def _run(self) -> None:
        while True:
            # Not all nodes at once, though all may have been started at once.
            await asyncio.sleep(max(self._every, self._again) * random.uniform(0.5, 1.0))
            try:
                await self.once()
            except DadiError as error:
                log.debug("superpeers were not asked what to prefetch", why=error.message)
            except Exception as error:  # a mistake of ours must not end it for good
                await asyncio.to_thread(log.error, "prefetching failed", exc_info=error)

    async def once(self) -> None:
        """Ask, and do what is wanted. Raises Unavailable if no superpeer answers."""
        self._unpin([job for job, (until, _) in self._pins.items() if until <= self._clock()])
        for url, wish in await self._wanted():
            node = self._place()[0]
            if wish.platform != self._platform:
                continue
            try:
                manifest = await self._warm(wish)
                report = NodeReport(node, "ready")
                self.warmed += 1
            except DadiError as error:
                self._fallbacks.note("prefetch failed", f"{wish.reference}: {error}")
                manifest = Reference.parse(wish.reference).digest or ""
                report = NodeReport(node, "failed", str(error)[:300])
            await self._tell(url, wish, manifest, report)

    async def _wanted(self) -> list[tuple[str, Wish]]:
        await self._client.superpeers.ready()
        found: dict[str, tuple[str, Wish]] = {}
        pinned: set[str] = set()
        away = False
        told = list(self._pins)[:MOST_HELD]  # of those beyond no superpeer can say anything
        self._again = 0.0
        for url in self._client.superpeers.names:
            try:
                for wishes in await self._told_by(url):
                    self._again = max(self._again, wishes.again)
                    pinned.update(wishes.pinned)
                    away = away or wishes.unsure
                    for wish in wishes.wishes:
                        found.setdefault(wish.job, (url, wish))
            except DadiError as error:
                log.debug("a superpeer was not asked what to prefetch", superpeer=url, why=error.message)
                away = True
        if not away:
            self._unpin([job for job in told if job not in pinned and job not in found])
        return list(found.values())

    async def _told_by(self, url: str) -> list[Wishes]:
        """Return what a superpeer tells anybody, and what it tells who has our credentials, or our tokens."""
        try:
            told = [await self._ask(url, self._any_token())]
        except TokenRefused:  # it has run out: then as anybody
            told = [await self._ask(url, {})]
        for registry in told[0].registries:
            try:
                caller = await self._client.access.caller(f"{registry}/prefetch")  # for the registry as a whole
                if caller.headers:
                    told.append(await self._ask(url, caller.headers, registry))
            except DadiError as error:
                log.debug("credentials were not shown", superpeer=url, registry=registry, why=error.message)
        for job, manifest in list(self._manifests.items()):
            known = {name for each in told for name in (*each.pinned, *(wish.job for wish in each.wishes))}
            if job not in known and self._client.tokens.headers(manifest):
                told += await self._shown(url, manifest)
        return told

    async def _shown(self, url: str, manifest: str) -> list[Wishes]:
        """Return what a superpeer tells who has an image's token."""
        tokens = self._client.tokens
        try:
            shown = tokens.text(manifest)
            try:
                return [await self._ask(url, tokens.headers(manifest))]
            except TokenRefused:
                return [await self._ask(url, tokens.headers(manifest))] if await tokens.renewed(manifest, shown) else []
        except (AccessDenied, TokenRefused):
            return []
        except Unavailable:  # who renews it is away: what this superpeer has told holds all the same
            return [Wishes(unsure=True)]

    async def _ask(self, url: str, headers: dict[str, str], registry: str = "") -> Wishes:
        node, zone, rack = self._place()
        where, parameters = f"{url}/v1/prefetch/wanted", {"node": node, "zone": zone, "rack": rack}
        if registry:
            parameters["registry"] = registry
        if self._pins:
            parameters["have"] = ",".join(list(self._pins)[:MOST_HELD])
        async with (
            self._client.superpeers.asking(url),
            http.request(self._client.session, "GET", where, "asking what to prefetch", params=parameters,
                         headers=headers) as response,
        ):  # fmt: skip
            data = bytearray()
            async for piece in response.content.iter_any():
                data += piece
                if len(data) > _MAX_ANSWER:
                    raise Malformed(f"{url} wants more than {_MAX_ANSWER} bytes can say")
        return decode_wishes(data)

    def _any_token(self) -> dict[str, str]:
        for digest in self._store.digests():
            if headers := self._client.tokens.headers(digest):
                return headers
        return {}

    async def _warm(self, wish: Wish) -> str:
        """Bring what is wanted; return the manifest's digest."""
        answer = None
        resolving = self._upstream.resolve(wish.reference, wish.platform)
        async with contextlib.aclosing(resolving) as events:
            async for event in events:
                if event.get("event") == "image":
                    answer = image_answer(event)
        if answer is None:
            raise Unavailable(f"no superpeer said what {wish.reference} is")
        raw = await self._upstream.whole(answer.index_digest, answer.index_size)
        index = await asyncio.to_thread(image_index.decode, raw)
        wanted: dict[Blob, list[range]] = {index.metadata: [range(index.metadata.table.count)]}
        for blob in index.device_blobs():
            named = ((0, blob.table.count),) if wish.chunks is None else wish.chunks.get(blob.digest, ())
            wanted[blob] = [plan.bounded(range(*run), blob) for run in named]
        await self._check_room(wish, wanted)
        self._expect(index)
        with contextlib.ExitStack() as holds:
            for blob in wanted:
                await self._store.prepare(blob)
                holds.enter_context(self._store.hold(blob))
            await self._bring(wish, index, wanted)
            if wish.pin_until > self._clock():
                self._unpin([wish.job])
                self._pins[wish.job] = wish.pin_until, holds.pop_all()
                self._manifests[wish.job] = answer.manifest_digest
        return answer.manifest_digest

    async def _bring(self, wish: Wish, index: ImageIndex, wanted: dict[Blob, list[range]]) -> None:
        loop = asyncio.get_running_loop()
        expected, bucket = loop.time(), Bucket(wish.rate, self._clock())
        for blob, parts in wanted.items():
            for step in (step for part in parts for step in plan.steps(part, blob, _RUN)):
                for run in runs(await self._store.missing(blob, step)):
                    await self._stand_aside()
                    size = blob.table.span(run)[1]
                    if (pause := bucket.take(size, self._clock())) > 0:
                        await self._sleep(pause)
                    if loop.time() - expected > _EXPECT_EVERY:
                        self._expect(index)
                        expected = loop.time()
                    await self._chain.read(blob, run, Urgency.PREFETCH)
                    self.bytes += size
                if await self._store.missing(blob, step):
                    raise StoreFull(f"the store does not keep {blob}", hint="raise store.limit")

    def _unpin(self, jobs: list[str]) -> None:
        for job in jobs:
            self._manifests.pop(job, None)
            if (pin := self._pins.pop(job, None)) is not None:
                pin[1].close()

    async def _check_room(self, wish: Wish, wanted: dict[Blob, list[range]]) -> None:
        needed = 0
        for blob, parts in wanted.items():
            for part in parts:
                needed += plan.size_of(blob, runs(await self._store.missing(blob, part)))
        room = await self._store.room(needed, {blob.digest for blob in wanted})
        if not room.enough:
            raise StoreFull(f"{wish.reference} needs {needed} bytes here, and {room.free} are free",
                            hint="raise store.limit, or end the pins of images that are not needed")  # fmt: skip

    async def _stand_aside(self) -> None:
        waited = 0.0
        while self._demand.quiet_for() < _LOOK and waited < _YIELDS:
            await asyncio.sleep(_LOOK)
            waited += _LOOK

    async def _tell(self, url: str, wish: Wish, manifest: str, report: NodeReport) -> None:
        try:
            headers = self._client.tokens.headers(manifest) if manifest else {}
            if not headers:
                headers = (await self._client.access.caller(wish.reference)).headers
            async with http.request(
                self._client.session, "POST", f"{url}/v1/prefetch/{wish.job}/nodes", "telling of a prefetch",
                data=msgspec.json.encode(report), headers=headers,
            ):  # fmt: skip
                return
        except DadiError as error:
            log.debug("a superpeer was not told of a prefetch", superpeer=url, why=error.message)
