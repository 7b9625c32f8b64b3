"""EROFS metadata for a whole image: where each inode and directory stands, and the bytes. Pure.

What lives here: placing and encoding. What never does: what the tree is (`tree.py`), the tables (`layout.py`), file
data: those stay in the layers' tars, and each tar that some file refers to is one EROFS device.

1. Survey: directories in the order of a depth-first walk, names sorted; link counts; which layers become devices.
2. Place: behind superblock and device table comes the root's inode, then for each directory, in that order, its blocks
   (if they are not inline in its inode) and the inodes of all that it holds, next to each other: a listing, or
   a lookup and what follows it, touches few pages, and a subtree is in one piece.
3. Encode: superblock, device slots, inodes, directory blocks.

Nothing is read from the outside and nothing depends on hashing order: the same layers give the same bytes. The build
time is the most frequent mtime, so that as many inodes as possible can be compact; the uuid is derived from the
layers' diff IDs.

Mount with one read-only block device per element of `Metadata.devices`, in that order; the device behind a layer is
its tar, padded with zeros to a multiple of 4096 bytes, and its logical block size must be 512:

    mount -t erofs -o ro,device=DEVICE_1,device=DEVICE_2,… IMAGE DIRECTORY

(mount(2) takes 4,096 bytes of options, which is about 200 devices; fsconfig(2) takes each by itself.)
"""

from __future__ import annotations

import hashlib
import stat
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from dadi import digest as digests
from dadi.erofs import layout
from dadi.erofs.layout import BLOCK, BLOCK_BITS, SLOT, align
from dadi.erofs.tree import Node, merge
from dadi.errors import DadiError, Unsupported
from dadi.index.layer import Extent, Kind, LayerIndex

PAGE = 4096
"""Sizes of images and device files are multiples of it."""
MAX_INDEXES = 4 << 20
"""Chunk indexes in an image, 8 bytes each: a sparse file of 16 GiB with holes of 4 KiB needs as many."""
MAX_DEVICES = 10_000
"""More would push the root's inode beyond what the superblock can name."""
MAX_DEVICE = (2**32 - 1 << BLOCK_BITS) // PAGE * PAGE
"""Bytes of a device: block numbers have 32 bits, and one of them means a hole."""

_TYPES = {  # mode bits, file type in directories
    Kind.FILE: (stat.S_IFREG, 1),
    Kind.DIRECTORY: (stat.S_IFDIR, 2),
    Kind.CHARACTER: (stat.S_IFCHR, 3),
    Kind.BLOCK: (stat.S_IFBLK, 4),
    Kind.FIFO: (stat.S_IFIFO, 5),
    Kind.SYMLINK: (stat.S_IFLNK, 7),
}
_HIDDEN = frozenset({b"security.selinux", b"system.nfs4_acl"})
_HIDDEN_PREFIXES = (b"trusted.overlay.", b"user.overlay.")


class Metadata(NamedTuple):
    """An EROFS image without file data. EROFS device n is the tar of the layer `devices[n - 1]`."""

    image: bytes
    devices: tuple[int, ...]


def write(layers: Sequence[LayerIndex]) -> Metadata:
    """Return the metadata of the image that `layers` (bottom one first) make. CPU work: about 12 µs for each file.

    Raises Malformed or TooLarge for a tree that cannot be (see `tree.merge`), and Unsupported for what EROFS, or this
    writer, cannot hold: a sparse file whose holes are not at multiples of 512 bytes or need too many indexes, an
    extended attribute above 65,535 bytes, file data beyond the first 2 TiB of a tar.
    """
    return _Writer(layers).run()


class _Inode:
    """An inode that has its place. `word` and `tail` depend on the data layout: see `layout.py`."""

    __slots__ = ("compact", "layout", "node", "offset", "size", "tail", "word", "xattrs")

    def __init__(self, node: Node, offset: int, compact: bool, xattrs: bytes) -> None:
        self.node = node
        self.offset = offset
        self.compact = compact
        self.xattrs = xattrs
        self.layout, self.size, self.word, self.tail = layout.PLAIN, 0, 0, b""

    @property
    def head(self) -> int:
        """Bytes of the inode and its extended attributes."""
        return (32 if self.compact else 64) + len(self.xattrs)


class _Directory(NamedTuple):
    inode: _Inode
    parent: Node
    names: list[bytes]
    cuts: list[int]


class _Writer:
    def __init__(self, layers: Sequence[LayerIndex]) -> None:
        self._layers = layers
        self._device_of: dict[str, int] = {}  # diff ID → EROFS device
        self._devices: list[int] = []
        self._inodes: list[_Inode] = []
        self._indexes = 0
        self._bodies: dict[tuple[tuple[tuple[bytes, bytes], ...], bool], bytes] = {}
        self._build_time = 0
        self._end = 0

    def run(self) -> Metadata:
        root = merge(self._layers)
        directories = self._survey(root)
        placed = self._place(root, directories)
        return Metadata(self._encode(placed), tuple(self._devices))

    # -- 1

    def _survey(self, root: Node) -> list[Node]:
        """Sort all names, count links, choose devices; return the directories in the order of their places."""
        directories, todo = [], [root]
        times: Counter[int] = Counter()
        used: set[int] = set()
        while todo:
            node = todo.pop()
            directories.append(node)
            node.children = dict(sorted((node.children or {}).items()))
            times[node.entry.mtime] += 1
            node.links = 2
            below = []
            for child in node.children.values():
                if child.children is not None:
                    below.append(child)
                    continue
                child.links += 1
                if child.links == 1:
                    times[child.entry.mtime] += 1
                    if child.entry.kind is Kind.FILE and self._pieces(child):
                        used.add(child.layer)
            node.links += len(below)
            todo.extend(reversed(below))
        self._build_time = min(times, key=lambda time: (-times[time], time))
        first: dict[str, int] = {}
        for place, layer in enumerate(self._layers):
            first.setdefault(layer.diff_id, place)
        self._devices = sorted({first[self._layers[place].diff_id] for place in used})
        self._device_of = {self._layers[place].diff_id: n for n, place in enumerate(self._devices, start=1)}
        if len(self._devices) > MAX_DEVICES or any(self._layers[p].table.size > MAX_DEVICE for p in self._devices):
            raise Unsupported(f"more than {MAX_DEVICES} layers, or a layer whose tar has more than {MAX_DEVICE} bytes")
        return directories

    # -- 2

    def _place(self, root: Node, directories: Iterable[Node]) -> list[_Directory]:
        self._end = layout.DEVICE_TABLE_OFFSET + layout.DEVICE_SLOT.size * len(self._devices)
        placed, waiting = [], {root: self._add_directory(root, root)}
        for node in directories:
            directory = waiting.pop(node)
            placed.append(directory)
            self._place_blocks(directory.inode)
            long: list[_Inode] = []
            assert node.children is not None
            for child in node.children.values():
                if child.nid:  # a hard link whose inode has its place already
                    continue
                if child.children is not None:
                    waiting[child] = self._add_directory(child, node)
                elif child.entry.kind is Kind.SYMLINK:
                    long.append(self._add_symlink(child))
                else:
                    self._add_file(child)
            for inode in long:
                self._place_blocks(inode)
        return placed

    def _add(self, node: Node) -> _Inode:
        entry = node.entry
        compact = (
            entry.mtime == self._build_time
            and entry.uid < 1 << 16
            and entry.gid < 1 << 16
            and node.links < 1 << 16
            and entry.size < 1 << 32
        )
        inode = _Inode(node, align(self._end, SLOT), compact, self._xattrs(node))
        self._inodes.append(inode)
        return inode

    def _settle(self, inode: _Inode, length: int) -> None:
        """Give the inode its place for good: `length` bytes from its offset on."""
        self._end = inode.offset + length
        inode.node.nid = inode.offset // SLOT

    def _add_directory(self, node: Node, parent: Node) -> _Directory:
        inode = self._add(node)
        names = sorted([b".", b"..", *(node.children or ())])
        cuts, inode.size = layout.directory_cuts(names)
        self._add_data(inode)
        return _Directory(inode, parent, names, cuts)

    def _add_symlink(self, node: Node) -> _Inode:
        inode = self._add(node)
        inode.tail = node.entry.target
        inode.size = len(inode.tail)
        self._add_data(inode)
        return inode

    def _add_data(self, inode: _Inode) -> None:
        """Place an inode whose data are in this image: inline if inode, xattrs and data fit into one block."""
        length = inode.head + inode.size
        if length <= BLOCK:
            inode.layout = layout.INLINE
            if inode.offset // BLOCK != (inode.offset + length - 1) // BLOCK:
                inode.offset = align(inode.offset, BLOCK)
            self._settle(inode, length)
        else:
            self._settle(inode, inode.head)

    def _place_blocks(self, inode: _Inode) -> None:
        if inode.layout == layout.PLAIN:
            start = align(self._end, BLOCK)
            inode.word = start // BLOCK
            self._end = start + align(inode.size, BLOCK)

    def _add_file(self, node: Node) -> None:
        inode, entry = self._add(node), node.entry
        length = inode.head
        if entry.kind is Kind.FILE and entry.size:
            inode.size, inode.layout = entry.size, layout.CHUNKED
            bits, inode.tail = self._chunks(node)
            inode.word = layout.CHUNK_INDEXES | bits
            length = align(inode.head, layout.CHUNK_INDEX.size) + len(inode.tail)
        elif entry.kind is Kind.CHARACTER or entry.kind is Kind.BLOCK:
            inode.word = layout.device_number(entry.major, entry.minor)
        self._settle(inode, length)

    def _pieces(self, node: Node) -> Sequence[Extent]:
        try:
            return layout.pieces(node.entry)
        except DadiError as error:
            raise self._located(error, node) from None

    def _chunks(self, node: Node) -> tuple[int, bytes]:
        size, diff_id, pieces = node.entry.size, self._layers[node.layer].diff_id, self._pieces(node)
        try:
            bits = layout.chunk_bits(size, pieces)
            self._indexes += -(-size // (BLOCK << bits))
            if self._indexes > MAX_INDEXES:
                raise Unsupported(f"sparse files that need more than {MAX_INDEXES} chunk indexes in this image")
            return bits, layout.chunk_indexes(size, pieces, bits, self._device_of.get(diff_id, 0))
        except DadiError as error:
            raise self._located(error, node) from None

    def _xattrs(self, node: Node) -> bytes:
        if not node.entry.xattrs:
            return b""
        user = node.entry.kind in (Kind.FILE, Kind.DIRECTORY)
        key = (node.entry.xattrs, user)
        if key not in self._bodies:
            try:
                self._bodies[key] = layout.xattr_body(_kept(node.entry.xattrs, user))
            except DadiError as error:
                raise self._located(error, node) from None
        return self._bodies[key]

    def _located(self, error: DadiError, node: Node) -> DadiError:
        layer = f"layer {node.layer + 1} ({digests.short(self._layers[node.layer].diff_id)})"
        return type(error)(f"{layer}: {node.entry.path!r}: {error.message}", hint=error.hint)

    # -- 3

    def _encode(self, placed: Iterable[_Directory]) -> bytes:
        image = bytearray(align(self._end, PAGE))
        image[layout.SUPER_OFFSET : layout.DEVICE_TABLE_OFFSET] = layout.superblock(
            root=self._inodes[0].node.nid,
            inodes=len(self._inodes),
            mtime=self._build_time,
            blocks=len(image) // BLOCK,
            uuid=_uuid(self._layers),
            devices=len(self._devices),
        )
        at = layout.DEVICE_TABLE_OFFSET
        for place in self._devices:
            diff_id, size = self._layers[place].diff_id, self._layers[place].table.size
            slot = layout.device_slot(diff_id.removeprefix("sha256:"), align(size, PAGE) // BLOCK)
            image[at : at + len(slot)] = slot
            at += len(slot)
        for number, inode in enumerate(self._inodes, start=1):
            _encode_inode(image, inode, number)
        for directory in placed:
            _encode_directory(image, directory)
        return bytes(image)


def _encode_inode(image: bytearray, inode: _Inode, number: int) -> None:
    node, entry, at = inode.node, inode.node.entry, inode.offset
    mode = 0o777 if entry.kind is Kind.SYMLINK else entry.mode  # no other mode can be on a symlink
    mode |= _TYPES[entry.kind][0]
    count = (len(inode.xattrs) - 12) // 4 + 1 if inode.xattrs else 0
    # fmt: off
    if inode.compact:
        layout.COMPACT.pack_into(
            image, at, inode.layout << 1, count, mode, node.links, inode.size, 0, inode.word, number,
            entry.uid, entry.gid, 0,
        )
    else:
        layout.EXTENDED.pack_into(
            image, at, inode.layout << 1 | 1, count, mode, 0, inode.size, inode.word, number,
            entry.uid, entry.gid, *divmod(entry.mtime, 10**9), node.links,
        )
    # fmt: on
    behind = at + inode.head
    image[behind - len(inode.xattrs) : behind] = inode.xattrs
    if inode.layout == layout.CHUNKED:
        behind = align(behind, layout.CHUNK_INDEX.size)
    elif inode.layout == layout.PLAIN:
        behind = inode.word * BLOCK
    if inode.tail:
        image[behind : behind + len(inode.tail)] = inode.tail


def _encode_directory(image: bytearray, directory: _Directory) -> None:
    inode, node = directory.inode, directory.inode.node
    assert node.children is not None
    others = {b".": node, b"..": directory.parent}
    at = inode.offset + inode.head if inode.layout == layout.INLINE else inode.word * BLOCK
    start = 0
    for cut in directory.cuts:
        dirents = []
        for name in directory.names[start:cut]:
            child = node.children.get(name) or others[name]
            dirents.append((name, child.nid, _TYPES[child.entry.kind][1]))
        block = layout.directory_block(dirents)
        image[at : at + len(block)] = block
        at += BLOCK
        start = cut


def _kept(xattrs: Iterable[tuple[bytes, bytes]], user: bool) -> list[tuple[bytes, bytes]]:
    """Return the extended attributes that belong into the image.

    Left out, as by other unpackers: labels that belong to the machine (SELinux, NFSv4), and user.* on what cannot have
    it. Left out too: overlayfs' own marks, which it would obey instead of showing them.
    """
    return [
        (name, value)
        for name, value in xattrs
        if name not in _HIDDEN and not name.startswith(_HIDDEN_PREFIXES) and (user or not name.startswith(b"user."))
    ]


def _uuid(layers: Sequence[LayerIndex]) -> bytes:
    """Return 16 bytes derived from the diff IDs, marked as a custom UUID (version 8, RFC 9562)."""
    value = bytearray(hashlib.sha256("\n".join(layer.diff_id for layer in layers).encode()).digest()[:16])
    value[6] = value[6] & 0x0F | 0x80
    value[8] = value[8] & 0x3F | 0x80
    return bytes(value)
