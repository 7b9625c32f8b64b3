"""The image index: all that a node needs to mount one image for one platform. Pure.

It names the image (manifest and config digest), its layers with the chunk tables of their uncompressed tars, the
merged EROFS metadata, and which layer each EROFS device is: device n of the metadata is `devices[n - 1]`, a place in
`layers`; device 0 is the metadata itself. A block read goes kernel → device file (named by diff ID, see
`device_blobs`) → chunks of that blob.

    bytes        what
    0..7         magic "DADIIMG1"
    8..          MessagePack of `ImageIndex`: arrays of fields in the order below
"""

from __future__ import annotations

import msgspec

from dadi import digest as digests
from dadi.errors import DadiError, Malformed, Unsupported
from dadi.index.chunks import OTHER_VERSION, Blob, ChunkTable

MAGIC = b"DADIIMG1"
VERSION = 1
MAX_LAYERS = 1000
FIRST_SIGHT, REFERRER, CONVERTED = "first sight", "referrer", "converted"
ORIGINS = (FIRST_SIGHT, REFERRER, CONVERTED)
"""Where an index comes from: made by a superpeer; by `dadi index`; by `dadi convert`."""


class ImageLayer(msgspec.Struct, frozen=True, array_like=True):
    """One layer: the blob as the registry has it (`layer_digest`, `layer_size` bytes, `media_type`), its uncompressed
    tar (`diff_id`, `table`), and its layer index, a blob too (`index_digest`, `index_size` bytes).

    A layer whose index was made at build time has a seek table as well (`seek_digest`, `seek_size` bytes,
    `seek_points`); others have "", 0 and 0.
    """

    layer_digest: str
    layer_size: int
    media_type: str
    diff_id: str
    table: ChunkTable
    index_digest: str
    index_size: int
    seek_digest: str = ""
    seek_size: int = 0
    seek_points: int = 0

    @property
    def blob(self) -> Blob:
        """The uncompressed tar."""
        return Blob(self.diff_id, self.table)

    @property
    def found_index(self) -> tuple[str, str]:
        """What names an index that was found in a registry: the digests of its layer index and of its seek table."""
        return self.index_digest, self.seek_digest


class ImageIndex(msgspec.Struct, frozen=True, array_like=True):
    """See the head of this file. `config` is the image's config, byte for byte.

    `origin` is one of ORIGINS; where the index was found in the registry, `artifact` is the digest of the artifact and
    `signer` the ID of the trusted key that signed it ("" where no signature was asked for).
    """

    version: int
    manifest_digest: str
    config_digest: str
    platform: str
    config: bytes
    layers: tuple[ImageLayer, ...]
    metadata: Blob
    devices: tuple[int, ...]
    origin: str = FIRST_SIGHT
    artifact: str = ""
    signer: str = ""

    @property
    def layers_size(self) -> int:
        """Bytes of all layers as the registry has them."""
        return sum(layer.layer_size for layer in self.layers)

    @property
    def unpacked_size(self) -> int:
        """Bytes of all uncompressed tars."""
        return sum(layer.table.size for layer in self.layers)

    def device_blobs(self) -> list[Blob]:
        """Return the blob behind each EROFS device, device 1 first."""
        return [self.layers[place].blob for place in self.devices]

    def __repr__(self) -> str:
        return f"ImageIndex({digests.short(self.manifest_digest)}, {self.platform}, {len(self.layers)} layers)"


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(ImageIndex)


def encode(index: ImageIndex) -> bytes:
    """Return the bytes of the index; deterministic."""
    return MAGIC + _encoder.encode(index)


def decode(data: bytes) -> ImageIndex:
    """Return the index; raise Malformed if it contradicts itself, Unsupported if it is of another version."""
    if data[: len(MAGIC)] != MAGIC:
        raise Malformed("not an image index: wrong magic")
    try:
        index = _decoder.decode(memoryview(data)[len(MAGIC) :])
        if index.version != VERSION:
            text = f"an image index of version {index.version}; this dadi knows version {VERSION}"
            raise Unsupported(text, hint=OTHER_VERSION)
        for digest in (index.manifest_digest, index.config_digest, index.metadata.digest):
            digests.parse(digest)
        index.metadata.table.check()
        for layer in index.layers:
            for digest in (layer.layer_digest, layer.diff_id, layer.index_digest):
                digests.parse(digest)
            if layer.seek_digest:
                digests.parse(layer.seek_digest)
            layer.table.check()
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Malformed(f"not an image index: {error}") from None
    except DadiError as error:
        if isinstance(error, Unsupported | Malformed):
            raise
        raise Malformed(f"not an image index: {error}") from None
    if len(index.layers) > MAX_LAYERS:
        raise Malformed(f"an image index of {len(index.layers)} layers; the limit is {MAX_LAYERS}")
    if index.origin not in ORIGINS:
        raise Malformed(f"an image index of origin {index.origin[:40]!r}")
    if any(not 0 <= place < len(index.layers) for place in index.devices):
        raise Malformed("an image index whose devices name layers that it does not have")
    return index
