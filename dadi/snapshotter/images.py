"""What the snapshotter asks of the node: lazy images. A contract, no code; the node implements it.

The snapshotter decides which mounts there are; the node makes them, and knows about bytes, devices and registries.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol


class LazyImage(NamedTuple):
    """An image that can be lazy. `key`: the digest of its image index; `chain_ids`: of each prefix of its layers."""

    key: str
    chain_ids: list[str]


class LazyImages(Protocol):
    """Lazy images of this machine.

    All methods may be called at any time and at once; callers may be cancelled. All raise DadiError and nothing else.
    """

    async def resolve(self, reference: str, manifest_digest: str | None, layer_digests: list[str]) -> LazyImage:
        """Return the image, with all kept that `mount` will need; raise DadiError if it cannot be lazy.

        `manifest_digest` (where the client says it) is the manifest that the client pulls: to be believed rather than
        what the reference's tag means by now. `layer_digests`: some of the image's layers, in order; a hint. Called for
        every layer of a pull, so a second call should be quick. What was resolved must be found again by `mount` after
        a restart and a reboot, without the registry when the bytes are here.
        """
        ...

    async def mount(
        self, key: str, layers: int, reference: str = "", manifest: str | None = None, chain_id: str = ""
    ) -> str:
        """Return the directory where the lowest `layers` layers of the image are mounted, read-only, as one EROFS.

        Made once however many ask, and found again after a restart. The path is absolute, always the same for one key
        and number, without ":" and ",", and short; it should lie beside `snapshots`, see overlay.py.

        `reference`, `manifest`: what the image was resolved from, to be resolved again if it is not known any more;
        what that leads to is used only if `chain_id` is that of its lowest `layers` layers. Never raises NotFound,
        which to containerd's clients means that the image is to be unpacked.
        """
        ...

    async def release(self, key: str, layers: int) -> None:
        """Unmount; nothing to do if it is not mounted. Conflict: still in use, to be tried again later."""
        ...

    async def usage(self, key: str, layer: int) -> int:
        """Return the bytes on disk of one layer (0: the lowest) of the image. Asked often: no I/O that takes time."""
        ...

    async def keep_only(self, keys: set[str]) -> None:
        """Forget all other images but those that were resolved a short time ago: their snapshots may be to come."""
        ...
