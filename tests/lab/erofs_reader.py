"""A small EROFS reader and checker that shares no code with the writer: what an image of 512-byte blocks says.

What lives here: `read`, which decodes every inode that the root leads to and asserts that the image keeps the rules of
the format (kernel: fs/erofs/{super,inode,dir,data,xattr}.c), some of them more strictly than the kernel does. What
never does: compression, other block sizes, shared xattrs, what our writer does not write.
"""

from __future__ import annotations

import itertools
import os
import stat
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tests.lab.compare import KINDS, PIECE, Facts, content_digest

BLOCK = 512
PREFIXES = {
    1: "user.",
    2: "system.posix_acl_access",
    3: "system.posix_acl_default",
    4: "trusted.",
    6: "security.",
}
FILE_TYPES = {
    1: stat.S_IFREG,
    2: stat.S_IFDIR,
    3: stat.S_IFCHR,
    4: stat.S_IFBLK,
    5: stat.S_IFIFO,
    7: stat.S_IFLNK,
}


@dataclass
class Superblock:
    root: int
    inodes: int
    build_time: int
    blocks: int
    uuid: bytes
    device_tags: list[bytes] = field(default_factory=list)
    device_blocks: list[int] = field(default_factory=list)


@dataclass
class Inode:
    nid: int
    mode: int
    links: int
    size: int
    uid: int
    gid: int
    mtime: int
    layout: int
    word: int
    ino: int
    compact: bool
    behind: int
    """Where the xattrs end."""
    xattrs: tuple[tuple[str, bytes], ...]

    @property
    def kind(self) -> str:
        return KINDS[stat.S_IFMT(self.mode)]


class Image:
    """An image and what stands behind its devices; `devices[0]` is device 1."""

    def __init__(self, image: bytes, devices: Sequence[bytes] = ()) -> None:
        self.image = image
        self.devices = devices
        self.superblock = self._superblock()
        self.regions: list[tuple[int, int, str]] = [(0, 1152 + 128 * len(self.superblock.device_tags), "head")]
        self.inodes: dict[int, Inode] = {}

    def read(self) -> dict[bytes, Facts]:
        """Return the facts of every path; raise AssertionError if the image breaks a rule."""
        paths: dict[bytes, Inode] = {}
        names: dict[int, list[bytes]] = {}
        root = self.superblock.root
        todo = [(b"", root, root, stat.S_IFDIR)]
        while todo:
            path, nid, parent, kind = todo.pop()
            known = nid in self.inodes
            inode = self.inode(nid)
            assert stat.S_IFMT(inode.mode) == kind, f"{path!r}: file type of the dirent is not the inode's"
            paths[path] = inode
            names.setdefault(nid, []).append(path)
            if inode.kind == "directory":
                assert not known, f"{path!r}: a directory with two names"
                below = dict(self.directory(inode))
                assert below.pop(b".")[0] == nid, f"{path!r}: wrong ."
                assert below.pop(b"..")[0] == parent, f"{path!r}: wrong .."
                todo += [(os.path.join(path, n), child, nid, kind) for n, (child, kind) in below.items()]
                subdirectories = sum(kind == stat.S_IFDIR for _, kind in below.values())
                assert inode.links == 2 + subdirectories, f"{path!r}: wrong link count"
        for nid, links in names.items():
            if self.inodes[nid].kind != "directory":
                assert self.inodes[nid].links == len(links), f"{links}: wrong link count"
        self._check_regions()
        assert self.superblock.inodes == len(self.inodes)
        assert sorted(inode.ino for inode in self.inodes.values()) == list(range(1, len(self.inodes) + 1))
        return {path: self.facts(inode, names[inode.nid]) for path, inode in sorted(paths.items())}

    def facts(self, inode: Inode, links: Sequence[bytes]) -> Facts:
        kind = inode.kind
        device = (inode.word >> 8 & 0xFFF, inode.word & 0xFF | inode.word >> 12 & 0xFFF00)
        return Facts(
            kind=kind,
            mode=stat.S_IMODE(inode.mode),
            uid=inode.uid,
            gid=inode.gid,
            size=inode.size if kind in ("file", "symlink") else 0,
            mtime=inode.mtime,
            links=inode.links,
            first_link=min(links) if kind != "directory" and inode.links > 1 else b"",
            target=self.flat(inode) if kind == "symlink" else b"",
            device=device if kind.endswith("device") else (0, 0),
            xattrs=inode.xattrs,
            content=content_digest(self.pieces(inode)) if kind == "file" else "",
        )

    def inode(self, nid: int) -> Inode:
        if nid in self.inodes:
            return self.inodes[nid]
        at = nid * 32
        (form,) = struct.unpack_from("<H", self.image, at)
        assert form >> 4 == 0, "unknown bits in an inode's format"
        compact, layout = not form & 1, form >> 1 & 7
        if compact:
            _, count, mode, links, size, late, word, ino, uid, gid, zero = struct.unpack_from(
                "<HHHHIIIIHHI", self.image, at
            )
            assert late == zero == 0
            mtime = self.superblock.build_time
        else:
            _, count, mode, zero, size, word, ino, uid, gid, seconds, nano, links = struct.unpack_from(
                "<HHHHQIIIIqII", self.image, at
            )
            assert zero == 0
            assert nano < 10**9
            mtime = seconds * 10**9 + nano
        length = 12 + 4 * (count - 1) if count else 0
        start = at + (32 if compact else 64)
        xattrs = tuple(sorted(self._xattrs(start, length))) if count else ()
        inode = Inode(nid, mode, links, size, uid, gid, mtime, layout, word, ino, compact, start + length, xattrs)
        self.inodes[nid] = inode
        self._own(at, inode.behind, f"inode {nid}")
        self._own_data(inode)
        return inode

    def directory(self, inode: Inode) -> Iterator[tuple[bytes, tuple[int, int]]]:
        """Yield (name, (nid, type bits)), checking order and bounds."""
        before = b""
        data = self.flat(inode)
        for start in range(0, len(data), BLOCK):
            block = data[start : start + BLOCK]
            (first,) = struct.unpack_from("<H", block, 8)
            assert first % 12 == 0
            assert 0 < first < len(block)
            dirents = [struct.unpack_from("<QHBB", block, 12 * n) for n in range(first // 12)]
            for n, (nid, offset, kind, zero) in enumerate(dirents):
                end = dirents[n + 1][1] if n + 1 < len(dirents) else len(block)
                name = block[offset:end]
                if n + 1 == len(dirents):
                    name, _, rest = name.partition(b"\0")
                    assert not rest.strip(b"\0"), "something behind the last name of a directory block"
                assert 0 < len(name) <= 255
                assert b"\0" not in name
                assert b"/" not in name
                assert before < name, f"{before!r} before {name!r}"
                assert zero == 0
                before = name
                yield name, (nid, FILE_TYPES[kind])

    def flat(self, inode: Inode) -> bytes:
        """Return the data of a directory or symlink."""
        at = self._flat_start(inode)
        return self.image[at : at + inode.size]

    def _flat_start(self, inode: Inode) -> int:
        assert inode.layout in (0, 2)
        if inode.layout == 0:
            return inode.word * BLOCK
        first, last = inode.nid * 32 // BLOCK, (inode.behind + inode.size - 1) // BLOCK
        assert first == last, "inline data that are not in the inode's block"
        return inode.behind

    def indexes(self, inode: Inode) -> tuple[int, list[tuple[int, int] | None]]:
        """Return the chunk size in bytes and, for each chunk, (device, offset in bytes) or None for a hole."""
        assert inode.layout == 4
        assert inode.word & ~0x3F == 0
        assert inode.word & 0x20
        chunk = BLOCK << (inode.word & 0x1F)
        count = -(-inode.size // chunk)
        found: list[tuple[int, int] | None] = []
        start = -(-inode.behind // 8) * 8
        for zero, device, block in struct.iter_unpack("<HHI", self.image[start : start + 8 * count]):
            assert zero == 0
            found.append(None if block == 0xFFFFFFFF else (device, block * BLOCK))
        assert len(found) == count
        return chunk, found

    def pieces(self, inode: Inode) -> Iterator[tuple[int, bytes]]:
        """Yield a file's content in the form of `content_digest`."""
        if not inode.size:
            return
        chunk, indexes = self.indexes(inode)
        pieces: dict[int, bytearray] = {}
        for n, index in enumerate(indexes):
            if index is None:
                continue
            device, offset = index
            length = min(chunk, inode.size - n * chunk)
            data = self.devices[device - 1][offset : offset + length]
            assert len(data) == length, "file data beyond the end of a device"
            for at in range(n * chunk, n * chunk + length, BLOCK):
                start = at // PIECE * PIECE
                piece = pieces.setdefault(start, bytearray(min(PIECE, inode.size - start)))
                block = data[at - n * chunk : at - n * chunk + BLOCK]
                piece[at - start : at - start + len(block)] = block
        for start, piece in sorted(pieces.items()):
            yield start, bytes(piece)

    def _superblock(self) -> Superblock:
        fields = struct.unpack_from("<IIIBBHQqIIII16s16sIHHHBBIQB23s", self.image, 1024)
        magic, checksum, compat, bits, extra, root, inodes, seconds, nano, blocks, meta, xattr = fields[:12]
        uuid, volume, incompat, compression, devices, slot, directory_bits, *rest = fields[12:]
        assert (magic, checksum, compat, bits, extra) == (0xE0F5E1E2, 0, 2, 9, 0)
        assert (meta, xattr, compression, directory_bits) == (0, 0, 0, 0)
        assert not any(rest[:4])
        assert rest[4] == bytes(23)
        assert volume == bytes(16)
        assert incompat & ~0xC == 0
        assert bool(incompat & 8) == bool(devices)
        assert blocks * BLOCK == len(self.image)
        assert len(self.image) % 4096 == 0
        found = Superblock(root, inodes, seconds * 10**9 + nano, blocks, uuid)
        for n in range(devices):
            tag, count, mapped, reserved = struct.unpack_from("<64sII56s", self.image, slot * 128 + n * 128)
            assert mapped == 0
            assert reserved == bytes(56)
            found.device_tags.append(tag)
            found.device_blocks.append(count)
        return found

    def _xattrs(self, at: int, length: int) -> Iterator[tuple[str, bytes]]:
        _, shared, reserved = struct.unpack_from("<IB7s", self.image, at)
        assert (shared, reserved) == (0, bytes(7))
        end, at = at + length, at + 12
        while at < end:
            name, prefix, value = struct.unpack_from("<BBH", self.image, at)
            text = self.image[at + 4 : at + 4 + name].decode("utf-8", "surrogateescape")
            yield PREFIXES[prefix] + text, self.image[at + 4 + name : at + 4 + name + value]
            at += -(-(4 + name + value) // 4) * 4
        assert at == end

    def _own(self, start: int, end: int, what: str) -> None:
        assert 0 <= start <= end <= len(self.image), f"{what} is not inside the image"
        self.regions.append((start, end, what))

    def _own_data(self, inode: Inode) -> None:
        if inode.layout == 4:
            start = -(-inode.behind // 8) * 8
            count = -(-inode.size // (BLOCK << (inode.word & 0x1F)))
            self._own(start, start + 8 * count, f"chunk indexes of inode {inode.nid}")
        elif inode.size:
            start = self._flat_start(inode)
            length = inode.size if inode.layout == 2 else -(-inode.size // BLOCK) * BLOCK
            self._own(start, start + length, f"data of inode {inode.nid}")

    def _check_regions(self) -> None:
        regions = sorted(self.regions)
        for (_, end, what), (start, _, other) in itertools.pairwise(regions):
            assert end <= start, f"{what} overlaps {other}"


def read(image: bytes, devices: Sequence[bytes] = ()) -> dict[bytes, Facts]:
    """Return the facts of every path in the image; raise AssertionError if it breaks a rule."""
    return Image(image, devices).read()
