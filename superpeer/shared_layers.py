"""A layer is given to readers of a repository that has shown that it has it, whoever else has it.

Layers are kept once, by digest, whichever image they came with. Without a check, whoever knows the digests of a private
layer could write them into an image, or an index, of his own, at a registry that says yes to everything, and be given
the bytes. So tokens are signed, and renewed, for an image if of each of its layers one of these is so:

    the repository has shown it (`shown_layers.py`)
    no other repository is known to have it, or to say so
                                            nobody to protect: the claim is believed *for now*. Such tokens are loose:
                                            they are revoked when another repository shows that it has the layer
    anybody may read a repository that has shown it
                                            no secret
    it is known to be at the same registry  that registry is asked, with the caller's credentials, whether the blob is
                                            in the image's repository too (HEAD): its word decides who may anyhow
    else                                    the word of a registry is nothing: the layer is fetched from the image's
                                            repository, unpacked and hashed, once for all; nothing of it is kept

Nothing depends on whose image came first, or is still in the catalog: what was refused once leaves no trace there.
A layer has one fetch at a time, all layers together a few; what came of a failed one is remembered for a moment.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from functools import partial

import structlog

from dadi.errors import AccessDenied, DadiError, NotFound, RegistryNotAllowed, TokenRefused, Unavailable
from dadi.index import build
from dadi.index.image import ImageIndex, ImageLayer
from dadi.oci.manifest import Descriptor
from dadi.oci.reference import Reference
from dadi.oci.registry import RegistryClient
from dadi.peers import token as tokens
from superpeer.catalog import Catalog
from superpeer.shown_layers import Layer, Proof, ShownLayers
from superpeer.who_may import WhoMay

log = structlog.get_logger()
_FETCHES = 2
_MOST_WAITING = 256
_DEADLINE, _SLOWEST = 60.0, 1 << 20
"""A fetch may take so many seconds, and one more for each so many bytes."""
_FAILED_FOR = 15.0
_MOST_FAILED = 10_000
_PUBLIC_TRIES = 8


class SharedLayers:
    """See the head of this file. `registry`: the superpeer's own client, with its own credentials. `close` it.

    `learn` has an image, by its manifest, in the catalog if siblings know it.
    """

    def __init__(self, who_may: WhoMay, catalog: Catalog, shown: ShownLayers, registry: RegistryClient,
                 learn: Callable[[str], Awaitable[None]], *, limits: build.Limits) -> None:  # fmt: skip
        self._who_may = who_may
        self._catalog = catalog
        self._shown = shown
        self._registry = registry
        self._learn = learn
        self._limits = limits
        self._fetches: dict[Layer, asyncio.Task[None]] = {}
        self._slots = asyncio.Semaphore(_FETCHES)
        self._failed: OrderedDict[Layer, tuple[float, DadiError]] = OrderedDict()

    def __repr__(self) -> str:
        return f"SharedLayers({len(self._fetches)} being fetched)"

    async def check(self, reference: Reference, shown: str | None, index: ImageIndex) -> bool:
        """Return whether the image's tokens are not loose.

        Raises AccessDenied if the repository cannot show that it has the image's layers; Unavailable, NotFound.
        """
        if not self._who_may.asks:
            return True
        firm = True
        for layer in dict.fromkeys(index.layers):
            firm = await self._is_firm(reference, shown, layer) and firm
        return firm

    async def check_renewal(self, renewal: tokens.Token, shown: str | None) -> bool:
        """Do as `check`, for what a renewal names. Raises TokenRefused where it has to be asked for anew."""
        if not self._who_may.asks:
            return True
        reference = Reference.parse(renewal.reference)
        contested = self._known_of_others(reference.name, renewal.names)
        if contested:
            with contextlib.suppress(DadiError):
                await self._learn(reference.digest or "")
        record = self._catalog.by_manifest(reference.digest or "", reference.name, same=True)
        if record is not None:
            try:
                return await self.check(reference, shown, self._catalog.image(record))
            except NotFound as error:
                raise Unavailable(error.message, hint=error.hint) from None
        if contested:
            raise TokenRefused("layers that the token names are known of other images, and this one is not known here")
        return False

    def _known_of_others(self, repository: str, names: bytes) -> bool:
        for at in range(0, len(names), tokens.NAME):
            digest = "sha256:" + names[at : at + tokens.NAME].hex()
            hashed = self._shown.hashed(digest)
            known = [*hashed, *self._catalog.claims(digest)]
            own = any(each.repository == repository for each in hashed)
            if not own and any(each.repository != repository for each in known):
                return True
        return False

    async def _is_firm(self, reference: Reference, shown: str | None, layer: ImageLayer) -> bool:
        here = Layer(reference.name, layer.layer_digest, layer.diff_id)
        proof = self._shown.proof(here)
        if proof is not None and proof >= Proof.PUBLIC:
            return True
        hashed = {each for blob in here.blobs for each in self._shown.hashed(blob)}
        others = {each for blob in here.blobs for each in self._catalog.claims(blob)} | hashed
        others = {each for each in others if each.repository != reference.name}
        if not others:
            return False
        if await self._is_public(here, others, hashed):
            self._shown.add(reference, layer.layer_digest, layer.diff_id, Proof.PUBLIC)
            return True
        at_this = [each for each in others if each.registry == here.registry and each.is_same(here)]
        if len(at_this) == len(others) or any(each in hashed for each in at_this):
            if proof is None and not await self._who_may.has_blob(reference, shown, layer.layer_digest):
                raise _has_not(reference, layer)
            self._shown.add(reference, layer.layer_digest, layer.diff_id, Proof.TOLD)
            return True
        await self._fetched(reference, layer, here)
        return True

    async def _is_public(self, here: Layer, others: set[Layer], hashed: set[Layer]) -> bool:
        """Whether anybody may have all of the layer that others have too, from who has shown that he has it."""
        secret = set(here.blobs & frozenset(blob for each in others for blob in each.blobs))
        from_others = (each for each in hashed if each.repository != here.repository)
        ordered = sorted(from_others, key=lambda each: (not self._who_may.is_public(each.repository), each.repository))
        for each in ordered[:_PUBLIC_TRIES]:
            if not secret & each.blobs:
                continue
            with contextlib.suppress(AccessDenied, NotFound, Unavailable):
                await self._who_may.check(self._shown.reference(each), None)
                secret -= each.blobs
            if not secret:
                return True
        return False

    async def _fetched(self, reference: Reference, layer: ImageLayer, here: Layer) -> None:
        until, error = self._failed.get(here, (0.0, None))
        if error is not None and asyncio.get_running_loop().time() < until:
            raise error.with_traceback(None)
        task = self._fetches.get(here)
        if task is None:
            if len(self._fetches) >= _MOST_WAITING:
                raise Unavailable(f"too many layers wait to be looked at; not now: {layer.layer_digest}", retry_after=5)
            task = self._fetches[here] = asyncio.create_task(self._fetch(reference, layer))
            task.add_done_callback(partial(self._ended, here))
        await asyncio.shield(task)

    def _ended(self, here: Layer, task: asyncio.Task[None]) -> None:
        del self._fetches[here]
        if not task.cancelled() and isinstance(error := task.exception(), DadiError):
            self._failed[here] = (asyncio.get_running_loop().time() + _FAILED_FOR, error)
            self._failed.move_to_end(here)
            if len(self._failed) > _MOST_FAILED:
                self._failed.popitem(last=False)

    async def _fetch(self, reference: Reference, layer: ImageLayer) -> None:
        async with self._slots:
            log.info("a layer that others have is fetched to see that this repository has it", image=str(reference),
                     layer=layer.layer_digest, bytes=layer.layer_size)  # fmt: skip
            descriptor = Descriptor(media_type=layer.media_type, digest=layer.layer_digest, size=layer.layer_size)
            source = build.LayerSource(layer.layer_digest, layer.layer_size, layer.media_type, layer.diff_id)
            try:
                async with (
                    asyncio.timeout(_DEADLINE + layer.layer_size / _SLOWEST),
                    contextlib.aclosing(self._registry.blob(reference, descriptor, mirrors=False)) as pieces,
                ):
                    await build.build(pieces, source, _Nowhere(), limits=self._limits)
            except TimeoutError:
                what = f"{reference.registry} takes too long to give {layer.layer_digest}"
                raise Unavailable(what, hint="it is asked again when the image is asked for") from None
            except (Unavailable, RegistryNotAllowed):
                raise
            except DadiError as error:
                log.warning("a layer was not shown", image=str(reference), layer=layer.layer_digest, why=error.message)
                raise _has_not(reference, layer) from None
        self._shown.add(reference, layer.layer_digest, layer.diff_id, Proof.HASHED)

    async def close(self) -> None:
        """Break off what is under way."""
        tasks = list(self._fetches.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Nowhere:
    """Keeps nothing."""

    def write(self, data: bytes, /) -> None:
        """Forget it."""


def _has_not(reference: Reference, layer: ImageLayer) -> DadiError:
    hint = "push the image again, with all of its layers"
    return AccessDenied(f"{reference.name} does not show that it has layer {layer.layer_digest}", hint=hint)
