"""A tar, pushed through in pieces of any size, becomes entries with absolute offsets. Pure.

File data is never looked at: the next header's place is arithmetic. Only headers, and the bodies of extended headers,
are put together from pieces. Nothing here knows of compression, of digests or of other layers.

    type        member
    0 NUL 7     file (NUL with a final "/" in the name: a directory, in old tars)
    1 2 3 4     hard link, symbolic link, character device, block device
    5 6         directory, FIFO
    S           sparse file, GNU (`tar_sparse.py`)
    x X         pax records for the next member (`tar_pax.py`); X is the same from Solaris
    g           pax records for all that follow; of these only path, linkpath, size, uid, gid and mtime count
    L K         GNU: the next member's name or link target, with a NUL at the end

The next member's name is that of L, else of pax "path" (for a sparse file GNU.sparse.name), else of its header; L wins,
as in the tar readers of container engines. Links, directories, devices and FIFOs have no data whatever size they claim.
Two blocks of zeros end the archive, and so does the end of the tar where a header would stand; what follows the zeros
is padding. Other types are Unsupported: container engines refuse them too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import msgspec

from dadi.errors import DadiError, Malformed, TooLarge, Unsupported
from dadi.index import tar_header, tar_path, tar_pax, tar_sparse
from dadi.index.layer import Entry, Extent, Kind
from dadi.index.tar_header import BLOCK, ZEROS, Header, padded

MAX_TARGET = 4095
"""Bytes of a symbolic link's text on Linux."""

_KINDS = {
    b"0": Kind.FILE,
    b"\0": Kind.FILE,
    b"7": Kind.FILE,
    b"S": Kind.FILE,
    b"1": Kind.HARDLINK,
    b"2": Kind.SYMLINK,
    b"3": Kind.CHARACTER,
    b"4": Kind.BLOCK,
    b"5": Kind.DIRECTORY,
    b"6": Kind.FIFO,
}
_GLOBAL_KEYS = (b"path", b"linkpath", b"size", b"uid", b"gid", b"mtime")
_MAX_ID = (1 << 32) - 2  # one more is Linux's "no such id"
_MAX_MAJOR, _MAX_MINOR = (1 << 12) - 1, (1 << 20) - 1
_ITEM_COST = 64  # bytes of the metadata budget: what an attribute or an extent takes beside its content, roughly


class TarLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a tar may cost; more of it is TooLarge."""

    max_entries: int = 2_000_000
    """Members; each takes about 300 bytes of memory beside its name."""
    max_metadata_size: int = 256 << 20
    """Bytes of all names, link targets, extended attributes and sparse maps together."""
    max_header_size: int = 1 << 20
    """Bytes of one extended header or sparse map."""


class _Sparse(msgspec.Struct):
    """A sparse member whose map is still being read. `stored`: bytes in the tar; `size`: bytes of the file."""

    header: Header
    xattrs: tuple[tuple[bytes, bytes], ...]
    map: tar_sparse.MapReader
    map_in_data: bool
    stored: int
    size: int


class TarParser:
    """`feed` it the tar in order, then `finish`. After an error it is of no more use.

    Raises Malformed (also TooLarge) for what breaks tar's rules or Linux's, and Unsupported for what dadi does not
    handle; the message names the member and its place in the tar.
    """

    def __init__(self, limits: TarLimits | None = None) -> None:
        self._limits = limits or TarLimits()
        self._entries: list[Entry] = []
        self._metadata_left = self._limits.max_metadata_size
        self._fed = 0
        # Wanted next: `_want` bytes from `_next` (offset in the tar) on, for `_reader`; `_held` has the first of them.
        self._next = 0
        self._want = BLOCK
        self._reader: Callable[[bytes], None] = self._read_header
        self._held = bytearray()
        # The member that is being read, for messages; what extended headers said about the next one, and about all.
        self._header: Header | None = None
        self._padding = 0
        """Zeros behind its data, which some writers leave out behind the last of all."""
        self._long: dict[bytes, bytes] = {}
        self._records: tar_pax.Records = {}
        self._global_records: tar_pax.Records = {}
        self._sparse: _Sparse | None = None

    def __repr__(self) -> str:
        return f"TarParser({self._fed} bytes fed, {len(self._entries)} entries)"

    def feed(self, data: bytes | memoryview) -> None:
        """Take the next bytes of the tar."""
        base = self._fed
        self._fed += len(data)
        while (start := self._next + len(self._held) - base) < len(data):
            block = bytes(data[start : start + self._want - len(self._held)])
            if self._held or len(block) < self._want:
                self._held += block
                if len(self._held) < self._want:
                    break
                block = bytes(self._held)
                self._held.clear()
            at = self._next
            self._next += self._want
            try:
                self._reader(block)
            except DadiError as error:
                raise type(error)(f"{self._member_name()} at byte {at}: {error.message}", hint=error.hint) from None

    def finish(self) -> tuple[Entry, ...]:
        """Return the entries in the order of the tar; raise Malformed if it ends in the middle of a member."""
        ended = self._next == sys.maxsize
        between = self._reader in (self._read_header, self._read_last_zeros)
        at_edge = between and self._next - self._padding <= self._fed <= self._next
        if not ended and (not at_edge or self._long or self._records):
            hint = "it was pushed so: build and push the image again"
            raise Malformed(f"the tar breaks off at byte {self._fed}, in {self._member_name()}", hint=hint)
        return tuple(self._entries)

    def _member_name(self) -> str:
        name = self._long.get(b"L") or (self._header.name if self._header else None)
        return "tar header" if name is None else f"tar member {name[:200]!r}"

    # One method for each thing that can stand where `_next` points; `_next` has moved behind it when they run.

    def _read_header(self, block: bytes) -> None:
        if block == ZEROS:
            self._reader = self._read_last_zeros
            return
        self._header, self._padding = None, 0
        header = self._header = tar_header.parse(block)
        kind = _KINDS.get(header.type)
        if kind is not None:
            self._read_member(kind, header, block)
        elif header.type in b"xXgLK":
            if header.size > self._limits.max_header_size:
                raise TooLarge(f"its extended header has {header.size} bytes, above {self._limits.max_header_size}")
            if header.size:
                self._want, self._reader = header.size, self._read_body
        else:
            raise Unsupported(f"it is of type {header.type!r}", hint="no container engine unpacks such a member")

    def _read_last_zeros(self, block: bytes) -> None:
        if block != ZEROS:
            raise Malformed("a block of zeros stands in front of it")
        self._next = sys.maxsize

    def _read_body(self, body: bytes) -> None:
        header = self._header
        assert header is not None
        self._next += padded(len(body)) - len(body)
        self._want, self._reader = BLOCK, self._read_header
        if header.type in b"LK":
            self._long[header.type] = body.rstrip(b"\0")
        elif header.type == b"g":
            records = tar_pax.parse(body)
            self._global_records |= {key: records[key] for key in _GLOBAL_KEYS if key in records}
        else:
            self._records = tar_pax.parse(body)

    def _read_map(self, block: bytes) -> None:
        sparse = self._sparse
        assert sparse is not None
        if sparse.map_in_data:
            sparse.stored -= BLOCK
            if sparse.stored < 0:
                raise Malformed("its sparse map is longer than its data")
        sparse.map.feed(block)
        if not sparse.map.more:
            self._sparse, self._reader = None, self._read_header
            self._finish_sparse(sparse)

    def _read_member(self, kind: Kind, header: Header, block: bytes) -> None:
        xattrs: tuple[tuple[bytes, bytes], ...] = ()
        records: tar_pax.Records = {}
        if self._records or self._long or self._global_records:
            records = self._global_records | self._records
            tar_pax.apply(records, header)
            header.name = self._long.get(b"L", header.name)
            header.link = self._long.get(b"K", header.link)
            self._long, self._records = {}, {}
            xattrs = tar_pax.xattrs(records)
        if kind is not Kind.FILE or (header.type == b"\0" and header.name.endswith(b"/")):
            self._keep(Kind.DIRECTORY if kind is Kind.FILE else kind, header, xattrs)
            return
        sparse = self._sparse_member(header, records, block, xattrs)
        if sparse is None:
            offset = self._next
            self._next += padded(header.size)
            self._padding = padded(header.size) - header.size
            self._keep(kind, header, xattrs, header.size, offset)
        elif sparse.map.more:
            self._sparse, self._reader = sparse, self._read_map
        else:
            self._finish_sparse(sparse)

    def _sparse_member(
        self, header: Header, records: tar_pax.Records, block: bytes, xattrs: tuple[tuple[bytes, bytes], ...]
    ) -> _Sparse | None:
        limit = self._limits.max_header_size
        if header.type == b"S":
            if not header.gnu:
                raise Unsupported("it is sparse in the way of star", hint=tar_sparse.ORDINARY)
            reader, size = tar_sparse.MapReader.of_old_header(block, limit), tar_sparse.old_size(block)
        elif (pax := tar_sparse.of_records(records, limit)) is not None:
            reader, size = pax
        else:
            return None
        return _Sparse(header, xattrs, reader, header.type != b"S" and reader.more, header.size, size)

    def _finish_sparse(self, sparse: _Sparse) -> None:
        data, size = self._next, sparse.size
        extents = tar_sparse.extents(sparse.map.pairs, data=data, stored=sparse.stored, size=size)
        self._next += padded(sparse.stored)
        if size == 0 or (len(extents) == 1 and extents[0].length == size):  # no hole at all
            self._keep(Kind.FILE, sparse.header, sparse.xattrs, size, data)
        else:
            self._keep(Kind.FILE, sparse.header, sparse.xattrs, size, 0, extents)

    def _keep(
        self,
        kind: Kind,
        header: Header,
        xattrs: tuple[tuple[bytes, bytes], ...],
        size: int = 0,
        offset: int = 0,
        extents: tuple[Extent, ...] | None = None,
    ) -> None:
        path = tar_path.normal(header.name)
        target = b""
        major = minor = 0
        if b".wh." in path:
            special, path = tar_path.whiteout(path)
            if special is not None:
                self._append(Entry(path, special))
            if special is not None or not path:
                return
        if kind is Kind.SYMLINK:
            target, size = _symlink_target(header.link), len(header.link)
        elif kind is Kind.HARDLINK:
            target = tar_path.normal(header.link, "link target")
        elif kind is Kind.CHARACTER or kind is Kind.BLOCK:
            major, minor = header.major, header.minor
            if not (0 <= major <= _MAX_MAJOR and 0 <= minor <= _MAX_MINOR):
                raise Malformed(f"it is device {major}:{minor}")
        mode, uid, gid = header.mode & 0o7777, header.uid, header.gid
        if not (0 <= uid <= _MAX_ID and 0 <= gid <= _MAX_ID):
            raise Malformed(f"its owner is {uid}:{gid}")
        if not path and kind is not Kind.DIRECTORY:
            raise Malformed("it is in the place of the root directory, but is no directory")
        self._append(
            Entry(path, kind, mode, uid, gid, header.mtime, size, offset, target, major, minor, xattrs, extents)
        )

    def _append(self, entry: Entry) -> None:
        if len(self._entries) >= self._limits.max_entries:
            raise TooLarge(f"the tar has more than {self._limits.max_entries} members")
        cost = len(entry.path) + len(entry.target)
        if entry.xattrs:
            cost += sum(len(name) + len(value) + _ITEM_COST for name, value in entry.xattrs)
        if entry.extents:
            cost += 2 * _ITEM_COST * len(entry.extents)
        self._metadata_left -= cost
        if self._metadata_left < 0:
            limit = self._limits.max_metadata_size
            raise TooLarge(f"the names, attributes and sparse maps of the tar are larger than {limit} bytes")
        self._entries.append(entry)


def _symlink_target(link: bytes) -> bytes:
    if not 0 < len(link) <= MAX_TARGET or b"\0" in link:
        raise Malformed(f"its link target is {link[:100]!r}, of {len(link)} bytes")
    return link
