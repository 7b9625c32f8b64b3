"""The FUSE kernel protocol, version 7, as bytes: what the kernel sends, and what it wants back. Pure.

Source: linux/fuse.h (protocol 7.45 at the time of writing) and Documentation/filesystems/fuse in the kernel tree. One
read(2) of /dev/fuse gives exactly one request; one write(2) is exactly one reply or notification. All integers are in
the byte order of the machine. Only what a read-only directory of regular files needs is here.

    request          0 u32 len    4 u32 opcode   8 u64 unique   16 u64 nodeid  24 u32 uid   28 u32 gid
      (40 bytes)    32 u32 pid   36 u16 extlen  38 u16 pad      then `len` - 40 bytes, by opcode:
      LOOKUP         name, NUL
      OPEN, OPENDIR  0 u32 flags (open(2))       4 u32 open_flags
      READ, READDIR  0 u64 fh     8 u64 offset  16 u32 size     20 u32 read_flags  24 u64 lock_owner  32 u32 flags, pad
      INTERRUPT      0 u64 unique of the request that nobody waits for any more
      INIT           0 u32 major  4 u32 minor    8 u32 max_readahead  12 u32 flags  16 u32 flags2 (since 7.36), reserved
      FORGET, BATCH_FORGET   counts that we do not keep (an id means the same bytes for ever); these have no reply
      NOTIFY_REPLY   what RETRIEVE asked for; it has no reply

    reply            0 u32 len    4 i32 -errno   8 u64 unique   then, unless there is an error:
      LOOKUP         0 u64 nodeid 8 u64 generation 16 u64 name_valid  24 u64 attr_valid  32 u32 nsec, u32 nsec  40 attr
      GETATTR        0 u64 attr_valid 8 u32 nsec 12 u32 pad  16 attr
      attr           0 u64 ino    8 u64 size    16 u64 blocks   24 u64 atime   32 u64 mtime   40 u64 ctime
        (88 bytes)  48 u32 nsec  52 u32 nsec    56 u32 nsec     60 u32 mode    64 u32 nlink   68 u32 uid  72 u32 gid
                    76 u32 rdev  80 u32 blksize 84 u32 flags
      OPEN, OPENDIR  0 u64 fh     8 u32 FOPEN_*  12 i32 backing_id
      READ           the bytes; fewer than asked for is the end of the file
      READDIR        entries: 0 u64 ino  8 u64 cookie of the next  16 u32 namelen  20 u32 type  24 name, NULs up to 8·n
      STATFS         0 u64 blocks 8 u64 bfree   16 u64 bavail   24 u64 files   32 u64 ffree   40 u32 bsize
        (80 bytes)  44 u32 namelen  48 u32 frsize  52 pad
      INIT           0 u32 major  4 u32 minor    8 u32 max_readahead  12 u32 flags  16 u16 max_background
        (64 bytes)  18 u16 congestion_threshold 20 u32 max_write  24 u32 time_gran  28 u16 max_pages
                    30 u16 map_alignment        32 u32 flags2     36 u32 max_stack_depth  40 reserved

    notification     0 u32 len    4 i32 code     8 u64 0        then:
      INVAL_ENTRY    0 u64 parent 8 u32 namelen 12 u32 flags    16 name, NUL
      RETRIEVE       0 u64 unique 8 u64 nodeid  16 u64 offset   24 u32 size   28 pad: the kernel sends NOTIFY_REPLY
      RESEND         nothing (since 7.40): what was read from this descriptor and not answered comes again, before all
                     else, with bit 63 of its `unique` set; it is answered by that `unique` as it stands
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterable
from typing import Final, NamedTuple

from dadi.errors import Malformed

LOOKUP, FORGET, GETATTR, SETATTR, READLINK, SYMLINK, MKNOD, MKDIR, UNLINK, RMDIR, RENAME, LINK = (
    1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13,
)  # fmt: skip
OPEN, READ, WRITE, STATFS, RELEASE, FSYNC, SETXATTR, GETXATTR, LISTXATTR, REMOVEXATTR, FLUSH, INIT = (
    14, 15, 16, 17, 18, 20, 21, 22, 23, 24, 25, 26,
)  # fmt: skip
OPENDIR, READDIR, RELEASEDIR, FSYNCDIR, ACCESS, CREATE, INTERRUPT, DESTROY, NOTIFY_REPLY, BATCH_FORGET = (
    27, 28, 29, 30, 34, 35, 36, 38, 41, 42,
)  # fmt: skip
FALLOCATE, RENAME2 = 43, 45

MAJOR: Final = 7
MINOR: Final = 40
"""The newest minor version whose messages this module knows (Linux 6.9)."""
OLDEST_MINOR: Final = 36
"""Linux 5.17; older kernels have no `flags2`."""

ASYNC_READ, ASYNC_DIO, PARALLEL_DIROPS, MAX_PAGES, INIT_EXT = 1 << 0, 1 << 15, 1 << 18, 1 << 22, 1 << 30
HAS_RESEND = 1 << 39
"""A successor that holds the same /dev/fuse can ask for unanswered requests again (Linux 6.9)."""

RESENT = 1 << 63
"""In `unique`: this request was sent before, and not answered."""

FOPEN_DIRECT_IO, FOPEN_KEEP_CACHE, FOPEN_NOFLUSH = 1 << 0, 1 << 1, 1 << 5
NOTIFY_INVAL_ENTRY, NOTIFY_RETRIEVE, NOTIFY_RESEND = 3, 5, 7
ROOT = 1
"""The node id of the mount's own directory."""
PAGE = 4096
REQUEST_SIZE: Final = 8192
"""FUSE_MIN_READ_BUFFER: what read(2) on /dev/fuse must offer at least. We announce the smallest max_write, so it is
enough for every request; the kernel itself fails one that is longer."""
REPLY_HEADER_SIZE: Final = 16

READ_REQUEST = struct.Struct("=IIQQ16x8xQI")
"""len, opcode, unique, nodeid, then offset and size as READ has them: all that the hot path needs, in one go."""
READ_REQUEST_SIZE: Final = 80
REPLY = struct.Struct("=IiQ")
"""len, -errno, unique."""

_HEADER = struct.Struct("=IIQQ16x")
_READ = struct.Struct("=8xQI20x")
_OPEN = struct.Struct("=I4x")
_U32, _U64 = struct.Struct("=I"), struct.Struct("=Q")
_INIT = struct.Struct("=4I")
_INIT_REPLY = struct.Struct("=IIIIHHIIHHII24x")
_ATTR = struct.Struct("=6Q10I")
_ENTRY = struct.Struct("=4Q2I")
_ATTR_REPLY = struct.Struct("=QI4x")
_OPEN_REPLY = struct.Struct("=QIi")
_STATFS = struct.Struct("=5Q3I28x")
_DIRENT = struct.Struct("=QQII")
_INVAL_ENTRY = struct.Struct("=QII")
_RETRIEVE = struct.Struct("=QQQI4x")

Bytes = bytes | bytearray | memoryview


class Request(NamedTuple):
    """A request's header and what follows it (a view, valid until the buffer is read into again)."""

    opcode: int
    unique: int
    node: int
    body: memoryview


class Init(NamedTuple):
    """What the kernel offers: version, bytes of readahead, and all its flags (0..63)."""

    major: int
    minor: int
    max_readahead: int
    flags: int


class Attr(NamedTuple):
    """A file (`size` bytes) or directory. Modes are for root alone; times are 0: blobs have none."""

    node: int
    size: int
    directory: bool = False


def parse_request(message: Bytes) -> Request:
    """Return the request that `message`, all that one read(2) gave, is; raise Malformed if it is none."""
    view = memoryview(message)
    if len(view) < _HEADER.size:
        raise Malformed(f"a FUSE request has at least {_HEADER.size} bytes, not {len(view)}")
    length, opcode, unique, node = _HEADER.unpack_from(view)
    if length != len(view):
        raise Malformed(f"a FUSE request of {len(view)} bytes says that it has {length}")
    return Request(opcode, unique, node, view[_HEADER.size :])


def parse_name(body: Bytes) -> str:
    """Return the name in a LOOKUP; raise Malformed unless it is one name of a directory entry.

    Bytes that are not UTF-8 come as surrogates, as everywhere in `os`.
    """
    name, nul, rest = bytes(body).partition(b"\0")
    if not nul or rest or not name or b"/" in name:
        raise Malformed(f"a FUSE lookup of something that is no name: {bytes(body)[:64]!r}")
    return name.decode("utf-8", "surrogateescape")


def parse_read(body: Bytes) -> tuple[int, int]:
    """Return (offset, size) of a READ or READDIR: bytes, or a cookie and bytes; raise Malformed if it is short."""
    offset, size = _unpack(_READ, body, "read")
    return offset, size


def parse_open(body: Bytes) -> int:
    """Return the open(2) flags of an OPEN or OPENDIR; raise Malformed if it is short."""
    return int(_unpack(_OPEN, body, "open")[0])


def parse_interrupt(body: Bytes) -> int:
    """Return the `unique` of the request that is interrupted; raise Malformed if it is short."""
    return int(_unpack(_U64, body, "interrupt")[0])


def parse_init(body: Bytes) -> Init:
    """Return what the kernel offers; raise Malformed if it is short. Only `major` means anything if it is not 7."""
    major, minor, readahead, flags = _unpack(_INIT, body, "init")
    if flags & INIT_EXT and len(body) >= _INIT.size + 4:
        flags |= int(_U32.unpack_from(body, _INIT.size)[0]) << 32
    return Init(major, minor, readahead, flags)


def reply(unique: int, payload: Bytes = b"") -> bytes:
    """Return the message that answers the request `unique` with `payload`."""
    return REPLY.pack(REPLY.size + len(payload), 0, unique) + payload


def error_reply(unique: int, errno: int) -> bytes:
    """Return the message that fails the request `unique` with `errno` (positive)."""
    return REPLY.pack(REPLY.size, -errno, unique)


def init_reply(offered: Init, *, flags: int, max_readahead: int, max_read: int, background: int) -> bytes:
    """Return INIT's answer: of `flags` those that the kernel offers, requests of up to `max_read` bytes.

    `background` is how many asynchronous requests the kernel may have under way before it holds further ones back.
    """
    flags &= offered.flags
    return _INIT_REPLY.pack(
        MAJOR, min(offered.minor, MINOR), min(offered.max_readahead, max_readahead), flags & 0xFFFFFFFF,
        background, background, PAGE, 1, max_read // PAGE, 0, flags >> 32, 0,
    )  # fmt: skip


def major_reply() -> bytes:
    """Return INIT's answer to a kernel with a newer major version: it then sends an INIT of ours."""
    return _INIT_REPLY.pack(MAJOR, MINOR, *(0,) * 10)


def entry(attr: Attr, valid: int) -> bytes:
    """Return LOOKUP's answer: name and attributes may be cached for `valid` seconds."""
    return _ENTRY.pack(attr.node, 0, valid, valid, 0, 0) + _attr(attr)


def attributes(attr: Attr, valid: int) -> bytes:
    """Return GETATTR's answer: the attributes may be cached for `valid` seconds."""
    return _ATTR_REPLY.pack(valid, 0) + _attr(attr)


def opened(flags: int = 0) -> bytes:
    """Return the answer of OPEN and OPENDIR; the file handle is always 0, the node id says it all."""
    return _OPEN_REPLY.pack(0, flags, 0)


def statfs(files: int, size: int) -> bytes:
    """Return STATFS's answer: `files` names, `size` bytes in all, nothing free."""
    return _STATFS.pack(-(-size // PAGE), 0, 0, files, 0, PAGE, 255, PAGE)


def directory(entries: Iterable[tuple[int, int, str, bool]], size: int) -> bytes:
    """Return READDIR's answer: as many of `entries` (cookie, node, name, is directory) as fit `size` bytes.

    The kernel goes on reading after the cookie of the last entry that it took.
    """
    parts = []
    for cookie, node, name, is_directory in entries:
        raw = name.encode("utf-8", "surrogateescape")
        kind = stat.S_IFDIR >> 12 if is_directory else stat.S_IFREG >> 12
        part = (_DIRENT.pack(node, cookie, len(raw), kind) + raw).ljust((_DIRENT.size + len(raw) + 7) & ~7, b"\0")
        size -= len(part)
        if size < 0:
            break
        parts.append(part)
    return b"".join(parts)


def invalidate_entry(parent: int, name: str) -> bytes:
    """Return the notification after which the kernel looks `name` up again."""
    raw = name.encode("utf-8", "surrogateescape")
    body = _INVAL_ENTRY.pack(parent, len(raw), 0) + raw + b"\0"
    return REPLY.pack(REPLY.size + len(body), NOTIFY_INVAL_ENTRY, 0) + body


def retrieve(node: int) -> bytes:
    """Return the notification after which the kernel sends one NOTIFY_REPLY (of nothing): it wakes one reader up.

    `node` must be a file that the kernel knows; a directory will not do.
    """
    return REPLY.pack(REPLY.size + _RETRIEVE.size, NOTIFY_RETRIEVE, 0) + _RETRIEVE.pack(0, node, 0, 0)


def resend() -> bytes:
    """Return the notification after which the kernel sends every unanswered request again (Linux 6.9)."""
    return REPLY.pack(REPLY.size, NOTIFY_RESEND, 0)


def _unpack(form: struct.Struct, body: Bytes, what: str) -> tuple[int, ...]:
    if len(body) < form.size:
        raise Malformed(f"a FUSE {what} request has at least {form.size} bytes after its header, not {len(body)}")
    return form.unpack_from(body)


def _attr(attr: Attr) -> bytes:
    mode, links = (stat.S_IFDIR | 0o500, 2) if attr.directory else (stat.S_IFREG | 0o400, 1)
    blocks = -(-attr.size // 512)
    return _ATTR.pack(attr.node, attr.size, blocks, 0, 0, 0, 0, 0, 0, mode, links, 0, 0, 0, PAGE, 0)
