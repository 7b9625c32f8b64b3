"""Turns (file, offset, length) into a hit or a miss, and errors into errno: here, and nowhere else.

    hit     every chunk of the range is marked present, and the kernel has the bytes of the local file in its page
            cache: answered at once, by the thread that read the request
    cold    present, but the local disk has to be asked: a blocking read, for another thread
    miss    a chunk is absent: the file's own `read`, on the event loop (`LazyFile` in `dadi/node/devices.py`)

A hit never waits for anything, so one thread can serve all of them. Nothing here talks to /dev/fuse (`session.py` does,
and owns the threads), and nothing here fetches. Where a file is shorter than it promised, readers get an error: never
zeros.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
from collections.abc import Callable
from typing import Protocol

from dadi.errors import Conflict, DadiError, InvalidRequest, Malformed
from fuse import wire

CACHED_SECONDS = 24 * 3600
"""How long the kernel may believe names and attributes; a removed name is taken back by notification."""

FAILED, INTERRUPTED, AGAIN, GONE = errno.EIO, errno.EINTR, errno.EAGAIN, errno.ESTALE
# No FLUSH: a process that is being killed would wait for its answer, which only its successor can give.
_OPENED = wire.FOPEN_DIRECT_IO | wire.FOPEN_NOFLUSH
_CHANGES = (
    wire.SETATTR, wire.SYMLINK, wire.MKNOD, wire.MKDIR, wire.UNLINK, wire.RMDIR, wire.RENAME, wire.LINK, wire.WRITE,
    wire.SETXATTR, wire.REMOVEXATTR, wire.CREATE, wire.FALLOCATE, wire.RENAME2,
)  # fmt: skip


class BackedFile(Protocol):
    """A file of the mount: some of its bytes are in a local sparse file, the others can be asked for."""

    @property
    def name(self) -> str:
        """Its name in the mount."""
        ...

    @property
    def size(self) -> int:
        """Bytes; a multiple of 4096."""
        ...

    @property
    def fd(self) -> int:
        """The local sparse file, open for reading; exactly `size` bytes. It is duplicated by `Device.add`."""
        ...

    @property
    def present(self) -> bytearray:
        """One byte a chunk: not 0 if its verified bytes are in the local file. The same object for ever."""
        ...

    @property
    def touched(self) -> bytearray:
        """One byte a chunk: set to 1 whenever a hit reads of the chunk; the file's owner may clear it."""
        ...

    @property
    def chunk_shift(self) -> int:
        """log2 of the chunk size in bytes; at least 12."""
        ...

    async def read(self, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes, fetching what is missing; called on the event loop, may be cancelled.

        Raises an error of the tree in `dadi/errors.py`.
        """
        ...


class ServedFile:
    """A file as the kernel knows it. Closes its descriptor when the last user is gone."""

    __slots__ = ("failed", "fd", "file", "flags", "id", "name", "present", "shift", "size", "touched")

    def __init__(self, node_id: int, file: BackedFile) -> None:
        self.fd = -1
        self.id, self.file, self.name, self.size, self.failed = node_id, file, file.name, file.size, False
        self.present, self.touched, self.shift = file.present, file.touched, file.chunk_shift
        self.fd = os.dup(file.fd)
        self.flags = _flags(self.fd)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if self.fd >= 0:
            close(self.fd)

    def clip(self, offset: int, length: int) -> int:
        """Return how many of `length` bytes at `offset` the file has."""
        return max(0, min(length, self.size - offset))

    def has(self, offset: int, length: int) -> bool:
        """Say whether every chunk of a range (clipped, not empty) is present."""
        return self.present.find(0, offset >> self.shift, (offset + length - 1 >> self.shift) + 1) < 0


class Device:
    """The files of one mount. Changed on one thread; `answer`, `find` and readers may run on any other meanwhile."""

    def __init__(self, max_read: int) -> None:
        self.max_read = max_read
        self._nodes: dict[int, ServedFile] = {}
        self._names: dict[str, ServedFile] = {}

    def __repr__(self) -> str:
        return f"Device({len(self._nodes)} files)"

    def __len__(self) -> int:
        return len(self._names)

    def add(self, file: BackedFile) -> ServedFile:
        """Make a file readable; a name that was failed or removed works again, also for those who still have it open.

        Raises InvalidRequest for a file that is not what `BackedFile` says, Conflict for a name or id that is taken.
        """
        _check(file)
        old = self._names.get(file.name)
        if old is not None and (not old.failed or old.size != file.size):
            raise Conflict(f"the FUSE mount has a file {file.name} already", hint="remove it first")
        node_id = id_of(file.name)
        other = self._nodes.get(node_id)
        if other is not None and other.name != file.name:
            raise Conflict(f"the FUSE mount has {other.name}, whose node id is that of {file.name}",
                           hint="unmount the image that has it first")  # fmt: skip
        node = ServedFile(node_id, file)
        self._nodes[node.id] = self._names[node.name] = node
        return node

    def fail(self, name: str) -> ServedFile | None:
        """Let reads that miss fail from now on; hits go on. None if there is no such file."""
        node = self._names.get(name)
        if node is not None:
            node.failed = True
        return node

    def remove(self, name: str) -> ServedFile | None:
        """Forget a file; None if there is none. A read that has begun may still take bytes from the local file."""
        node = self._names.pop(name, None)
        if node is not None:
            node.failed = True
            del self._nodes[node.id]
        return node

    def ids(self) -> list[int]:
        """Return the ids of all files."""
        return list(self._nodes)

    def find(self, node_id: int) -> ServedFile | None:
        """Return the file that has this id; None if it was removed."""
        return self._nodes.get(node_id)

    def reader(self) -> Callable[[int, int, int], memoryview | None]:
        """Return a function (node id, offset, length) for one thread that reads hits into a buffer of its own.

        It gives the whole reply, with room for its header at the start, valid until the next call; or None if this
        is no hit. The one hot path of the package: closures instead of attributes, no allocation, one system call.
        """
        nodes, max_read, preadv = self._nodes, self.max_read, os.preadv
        data = wire.PAGE  # page-aligned; the header stands right before it
        buffer = memoryview(mmap.mmap(-1, data + max_read))
        views: dict[int, tuple[list[memoryview], memoryview]] = {}

        def view(length: int) -> tuple[list[memoryview], memoryview]:
            if length > max_read:
                raise InvalidRequest(f"a read of {length} bytes, but at most {max_read} were agreed")
            pair = [buffer[data : data + length]], buffer[data - wire.REPLY_HEADER_SIZE : data + length]
            if len(views) < 1024:
                views[length] = pair
            return pair

        def hit(node_id: int, offset: int, length: int) -> memoryview | None:
            node = nodes.get(node_id)
            if node is None:
                return None
            if offset + length > node.size:
                length = node.clip(offset, length)
                if not length:
                    return view(0)[1]
            shift = node.shift
            first, last = offset >> shift, offset + length - 1 >> shift
            if first == last:
                if not node.present[first]:
                    return None
                node.touched[first] = 1
            elif node.present.find(0, first, last + 1) >= 0:
                return None
            else:
                node.touched[first : last + 1] = b"\1" * (last + 1 - first)
            into, reply = views.get(length) or view(length)
            try:
                return reply if preadv(node.fd, into, offset, node.flags) == length else None
            except OSError:  # not in memory, or not readable: others find out
                return None

        return hit

    def answer(self, request: wire.Request) -> bytes | int:
        """Return the payload that answers a request about names and attributes, or the errno that refuses it."""
        match request.opcode:
            case wire.LOOKUP:
                node = self._names.get(wire.parse_name(request.body)) if request.node == wire.ROOT else None
                return errno.ENOENT if node is None else wire.entry(wire.Attr(node.id, node.size), CACHED_SECONDS)
            case wire.GETATTR:
                attr = self._attr(request.node)
                return GONE if attr is None else wire.attributes(attr, CACHED_SECONDS)
            case wire.OPEN:
                if wire.parse_open(request.body) & os.O_ACCMODE != os.O_RDONLY:
                    return errno.EROFS
                return wire.opened(_OPENED) if self.find(request.node) else GONE
            case wire.READDIR:
                offset, size = wire.parse_read(request.body)
                return wire.directory((e for e in self._entries() if e[0] > offset), min(size, self.max_read))
            case wire.STATFS:
                nodes = list(self._nodes.values())
                return wire.statfs(len(nodes), sum(node.size for node in nodes))
            case wire.OPENDIR:
                return wire.opened()
            case wire.RELEASE | wire.RELEASEDIR | wire.FLUSH | wire.FSYNC | wire.FSYNCDIR | wire.ACCESS | wire.DESTROY:
                return b""
            case opcode if opcode in _CHANGES:
                return errno.EROFS
            case _:
                return errno.ENOSYS

    def _attr(self, node_id: int) -> wire.Attr | None:
        if node_id == wire.ROOT:
            return wire.Attr(wire.ROOT, 0, directory=True)
        node = self.find(node_id)
        return wire.Attr(node.id, node.size) if node else None

    def _entries(self) -> list[tuple[int, int, str, bool]]:
        """Entries in the order of their cookies, which come from the ids: they stay as other files come and go."""
        dots = [(1, wire.ROOT, ".", True), (2, wire.ROOT, "..", True)]
        return dots + sorted((node.id + 1, node.id, node.name, False) for node in list(self._nodes.values()))


def id_of(name: str) -> int:
    """Return the node id of a file: the same in every process, so that a successor knows what the kernel has open.

    Names are digests of the content. From 2**61 to 2**62: never the root's, and one more still fits a signed offset.
    """
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big") >> 3 | 1 << 61


async def fetch(node: ServedFile, offset: int, length: int) -> bytes:
    """Return a range of a file (clipped, not empty) some of whose chunks are missing; raise a DadiError."""
    data = await node.file.read(offset, length)
    if len(data) != length:
        raise Malformed(f"{node.name}: {len(data)} bytes came for the {length} at {offset}")
    return data


def read_cold(node: ServedFile, offset: int, length: int) -> bytearray:
    """Return a range that is present (clipped, not empty), waiting for the disk; raise Malformed if it is short."""
    data, got = bytearray(length), 0
    view = memoryview(data)
    while got < length:
        n = os.preadv(node.fd, [view[got:]], offset + got)
        if not n:
            raise Malformed(f"{node.name}: the local file ends at {offset + got}, before its {node.size} bytes")
        got += n
    return data


def errno_of(error: BaseException) -> int:
    """Return what the kernel is told about an error."""
    return error.errno if isinstance(error, DadiError) else FAILED


def _check(file: BackedFile) -> None:
    name, size, chunks = file.name, file.size, -(-file.size >> file.chunk_shift)
    if not 0 < len(os.fsencode(name)) <= 255 or name in (".", "..") or "/" in name or "\0" in name:
        raise InvalidRequest(f"not a name for a file in the FUSE mount: {name!r}")
    if size <= 0 or size % wire.PAGE or file.chunk_shift < 12:
        raise InvalidRequest(f"{name}: {size} bytes in chunks of 2^{file.chunk_shift} cannot be a block device")
    if len(file.present) != chunks:
        raise InvalidRequest(f"{name}: {len(file.present)} presence marks for {chunks} chunks")
    if os.fstat(file.fd).st_size != size:
        raise InvalidRequest(f"{name}: the local file has {os.fstat(file.fd).st_size} bytes, not {size}")
    if len(file.touched) != chunks:
        raise InvalidRequest(f"{name}: {len(file.touched)} marks of touched chunks for {chunks} chunks")


def _flags(fd: int) -> int:
    """Return the preadv2 flag for "from memory or not at all", 0 where the file system does not know it."""
    try:
        os.preadv(fd, [bytearray(1)], 0, os.RWF_NOWAIT)
    except BlockingIOError:
        pass
    except OSError:
        return 0
    return os.RWF_NOWAIT
