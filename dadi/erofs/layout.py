"""The bytes of an EROFS image, as far as we write them: tables, structs, and what is encoded by itself. Pure.

From the kernel's fs/erofs/erofs_fs.h (the names are its own) and Documentation/filesystems/erofs.rst; little-endian.
Blocks have 512 bytes (`blkszbits` 9, Linux 6.4 and newer), so that what stands at a multiple of 512 in a tar can be
referred to in place. Only features of 6.4 are used. `meta_blkaddr` is 0, so an inode number (nid) is the byte offset
of the inode divided by 32, and never 0.

    image       what
    0           zeros, for boot sectors
    1024        superblock
    1152        device table: one slot for each device but the first, which is this image itself
    …           inodes in slots of 32 bytes, directory blocks and long symlinks between them (`writer.py` says where)
    …           zeros up to a multiple of 4096

    superblock, 128 bytes                                       device slot, 128 bytes
     0  u32  magic 0xE0F5E1E2                                    0  64   tag: hex digits of the tar's SHA-256
     4  u32  checksum: 0, feature not used (see below)          64  u32  blocks
     8  u32  feature_compat: MTIME                              68  u32  mapped_blkaddr: 0, not mapped
    12  u8   blkszbits: 9                                       72  56   reserved
    13  u8   sb_extslots: 0
    14  u16  root_nid                                           extended inode, 64 bytes
    16  u64  inos: number of inodes                              0  u16  format: bit 0 set, bits 1..3 data layout
    24  s64  build_time, seconds: mtime of compact inodes        2  u16  xattr_icount
    32  u32  build_time_nsec                                     4  u16  mode, with file type
    36  u32  blocks of this image                                6  u16  reserved
    40  u32  meta_blkaddr: 0                                     8  u64  size, bytes
    44  u32  xattr_blkaddr: 0, no shared xattrs                 16  u32  by data layout, see below
    48  16   uuid                                               20  u32  ino, for 32-bit stat only
    64  16   volume_name: zeros                                 24  u32  uid
    80  u32  feature_incompat: CHUNKED_FILE, DEVICE_TABLE       28  u32  gid
    84  u16  compression: 0                                     32  s64  mtime, seconds since 1970, negative before
    86  u16  extra_devices                                      40  u32  mtime, nanoseconds
    88  u16  devt_slotoff: 9, in units of 128 bytes             44  u32  nlink
    90  u8   dirblkbits: 0                                      48  16   reserved
    91  u8   xattr_prefix_count: 0
    92  u32  xattr_prefix_start: 0                              compact inode, 32 bytes: mtime is the build time
    96  u64  packed_nid: 0                                       0  u16  format: bit 0 clear, bits 1..3 data layout
   104  u8   xattr_filter_reserved: 0                            2  u16  xattr_icount
   105  23   reserved                                            4  u16  mode, with file type
                                                                 6  u16  nlink
    data layouts                   u32 at 16 or 12               8  u32  size, bytes
     0  FLAT_PLAIN   first block (device number for devices)    12  u32  mtime: 0 (6.15 and newer add it to build_time)
     2  FLAT_INLINE  unused; data follow inode and xattrs,      16  u32  by data layout
                     in one block with it                       20  u32  ino, for 32-bit stat only
     4  CHUNK_BASED  u16 chunk format, u16 0                    24  u16  uid
                                                                26  u16  gid
    chunk format: bits 0..4 log2(chunk size / 512),             28  u32  reserved
    bit 5 set: an array of chunk indexes follows inode and
    xattrs, at a multiple of 8                                  xattr body, behind the inode if xattr_icount is not 0
                                                                 0  u32  name filter: 0, feature not used
    chunk index, 8 bytes                                         4  u8   number of shared xattrs: 0
     0  u16  0                                                   5  7    reserved
     2  u16  device: 1 is the first slot of the table           12  entries, 12 + 4·(xattr_icount - 1) bytes in all
     4  u32  first block there; 0xFFFFFFFF is a hole
                                                                xattr entry, padded to a multiple of 4
    directory block: dirents, then their names; zeros if         0  u8   length of the name without its prefix
    it is not full. Sorted by name, "." and ".." too             1  u8   prefix: 1 user. 2 system.posix_acl_access
                                                                         3 system.posix_acl_default 4 trusted.
    dirent, 12 bytes                                                     6 security.
     0  u64  nid                                                 2  u16  length of the value
     8  u16  offset of the name in the block; that of the        4  name, value
             first one is 12 times the number of dirents
    10  u8   file type: 1 file, 2 directory, 3 character
             device, 4 block device, 5 FIFO, 7 symlink
    11  u8   reserved

The superblock checksum (crc32c) is left out: the standard library has no crc32c, and every chunk of the image is
verified by SHA-256 before the kernel sees it. Shared xattrs are left out: few files of an image have any.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Iterable, Sequence

from dadi.errors import Malformed, Unsupported
from dadi.index.layer import Entry, Extent

BLOCK_BITS = 9
BLOCK = 1 << BLOCK_BITS
SLOT = 32
"""Bytes of an inode slot: the unit of a nid."""
SUPER_OFFSET = 1024
DEVICE_TABLE_OFFSET = 1152
MAGIC = 0xE0F5E1E2
COMPAT_MTIME = 0x2
INCOMPAT_CHUNKED_FILE, INCOMPAT_DEVICE_TABLE = 0x4, 0x8
PLAIN, INLINE, CHUNKED = 0, 2, 4
CHUNK_INDEXES = 0x20
MAX_CHUNK_BITS = 31
"""The highest log2(chunk size / 512) that a chunk format can say: chunks of 1 TiB."""
MAX_ADDRESS = 2**32 - 1
"""Blocks of a device that an index can name; also the address of a hole."""
MAX_XATTRS = 12 + 4 * 65534
"""Bytes of an xattr body, its header included."""

SUPERBLOCK = struct.Struct("<3I2BHQqI3I16s16sI3H2BIQB23x")
DEVICE_SLOT = struct.Struct("<64sII56x")
COMPACT = struct.Struct("<4H4I2HI")
EXTENDED = struct.Struct("<4HQ4Iq2I16x")
XATTR_HEADER = struct.Struct("<IB7x")
XATTR_ENTRY = struct.Struct("<2BH")
CHUNK_INDEX = struct.Struct("<2HI")
DIRENT = struct.Struct("<QH2B")

_PREFIXES = ((b"user.", 1), (b"trusted.", 4), (b"security.", 6))
_WHOLE = {b"system.posix_acl_access": 2, b"system.posix_acl_default": 3}


def align(offset: int, unit: int) -> int:
    """Return the first multiple of `unit` (a power of two) that is not below `offset`."""
    return (offset + unit - 1) & -unit


def superblock(*, root: int, inodes: int, mtime: int, blocks: int, uuid: bytes, devices: int) -> bytes:
    """Return the superblock. `root` is a nid, `mtime` (of compact inodes) in ns since 1970, `blocks` of this image."""
    features = INCOMPAT_CHUNKED_FILE | (INCOMPAT_DEVICE_TABLE if devices else 0)
    seconds, nanoseconds = divmod(mtime, 10**9)
    head = (MAGIC, 0, COMPAT_MTIME, BLOCK_BITS, 0, root, inodes, seconds, nanoseconds, blocks, 0, 0, uuid, bytes(16))
    return SUPERBLOCK.pack(*head, features, 0, devices, DEVICE_TABLE_OFFSET // DEVICE_SLOT.size, 0, 0, 0, 0, 0)


def device_slot(hex_digest: str, blocks: int) -> bytes:
    """Return the slot of a device of that many blocks whose tar has that SHA-256."""
    return DEVICE_SLOT.pack(hex_digest.encode(), blocks, 0)


def device_number(major: int, minor: int) -> int:
    """Return a device number as the kernel's `new_encode_dev` packs it: 12 bits of major, 20 of minor."""
    return (minor & 0xFF) | major << 8 | (minor & ~0xFF) << 12


def xattr_prefix(name: bytes) -> tuple[int, bytes] | None:
    """Return prefix number and rest of the name of an extended attribute; None if EROFS cannot hold its namespace."""
    if name in _WHOLE:
        return _WHOLE[name], b""
    for prefix, number in _PREFIXES:
        if name.startswith(prefix) and len(name) > len(prefix):
            return number, name[len(prefix) :]
    return None


def xattr_body(xattrs: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return the xattr body of an inode; b"" if none of the attributes can be held.

    Raises Malformed for a name that Linux does not allow, Unsupported for values that are too large for the format.
    """
    parts = [XATTR_HEADER.pack(0, 0)]
    for name, value in sorted(dict(xattrs).items()):
        if (split := xattr_prefix(name)) is None:
            continue
        if len(name) > 255 or b"\0" in name:
            raise Malformed(f"not a name for an extended attribute: {name[:300]!r}")
        if len(value) > 65535:
            raise Unsupported(f"the extended attribute {name!r} has {len(value)} bytes; EROFS holds up to 65535")
        number, rest = split
        entry = XATTR_ENTRY.pack(len(rest), number, len(value)) + rest + value
        parts.append(entry.ljust(align(len(entry), 4), b"\0"))
    body = b"".join(parts)
    if len(body) > MAX_XATTRS:
        raise Unsupported(f"extended attributes of {len(body)} bytes; EROFS holds up to {MAX_XATTRS} for one file")
    return body if len(parts) > 1 else b""


def pieces(entry: Entry) -> list[Extent]:
    """Return the pieces of a file that are in the tar: in order, not empty, neighbours joined.

    Raises Malformed if they overlap, are out of order or reach beyond the file's size.
    """
    if entry.extents is None:
        return [Extent(0, entry.offset, entry.size)] if entry.size else []
    joined: list[Extent] = []
    end = tar_end = 0
    for extent in entry.extents:
        if extent.file_offset < end or extent.file_offset + extent.length > entry.size:
            raise Malformed("the pieces of a sparse file overlap, are out of order or do not fit its size")
        if not extent.length:
            continue
        if joined and (extent.file_offset, extent.tar_offset) == (end, tar_end):
            extent = Extent(joined[-1].file_offset, joined[-1].tar_offset, joined.pop().length + extent.length)
        joined.append(extent)
        end = extent.file_offset + extent.length
        tar_end = extent.tar_offset + extent.length
    return joined


def chunk_bits(size: int, extents: Sequence[Extent]) -> int:
    """Return log2(chunk size / 512) of the largest chunks that can represent a file of `size` bytes.

    `extents` come from `pieces`. A chunk is either a hole or in one piece on a device: so each border between two of
    them, or between one and a hole, must be at a multiple of the chunk size. Raises Unsupported if it cannot be.
    """
    borders = 0
    for extent in extents:
        end = extent.file_offset + extent.length
        borders |= extent.file_offset | (end if end != size else 0)
        if extent.tar_offset % BLOCK:
            raise Unsupported("its data are not at a multiple of 512 bytes")
    if borders % BLOCK:
        raise Unsupported("its holes do not begin and end at multiples of 512 bytes")
    enough = max(0, (size - 1).bit_length() - BLOCK_BITS)  # one chunk for the whole file
    largest = (borders & -borders).bit_length() - 1 - BLOCK_BITS if borders else enough
    return min(largest, enough, MAX_CHUNK_BITS)


def chunk_indexes(size: int, extents: Sequence[Extent], bits: int, device: int) -> bytes:
    """Return the chunk indexes of a file whose data are at `extents` of `device`; see `chunk_bits`."""
    chunk = BLOCK << bits
    if len(extents) == 1 and size <= chunk and extents[0].tar_offset >> BLOCK_BITS < MAX_ADDRESS:
        return CHUNK_INDEX.pack(0, device, extents[0].tar_offset >> BLOCK_BITS)  # nearly every file
    hole = array("Q", [MAX_ADDRESS << 32])
    indexes = array("Q")
    for extent in extents:
        indexes.extend(hole * (extent.file_offset // chunk - len(indexes)))
        first, step = extent.tar_offset >> BLOCK_BITS, 1 << bits
        last = first + (-(-extent.length // chunk) - 1) * step
        if last >= MAX_ADDRESS:
            raise Unsupported(f"its data end beyond {MAX_ADDRESS * BLOCK} bytes of the layer's tar")
        indexes.extend(range(first << 32 | device << 16, (last << 32 | device << 16) + 1, step << 32))
    indexes.extend(hole * (-(-size // chunk) - len(indexes)))
    if sys.byteorder == "big":
        indexes.byteswap()
    return indexes.tobytes()


def directory_cuts(names: Sequence[bytes]) -> tuple[list[int], int]:
    """Return how a directory is cut into blocks: the index of the name behind each block's last; and its size in bytes.

    `names` are sorted. Each block but the last counts as full.
    """
    cuts, used = [], 0
    for place, name in enumerate(names):
        need = DIRENT.size + len(name)
        if used + need > BLOCK:
            cuts.append(place)
            used = 0
        used += need
    return [*cuts, len(names)], len(cuts) * BLOCK + used


def directory_block(dirents: Sequence[tuple[bytes, int, int]]) -> bytes:
    """Return the used bytes of one directory block; a dirent is (name, nid, file type)."""
    parts = []
    at = DIRENT.size * len(dirents)
    for name, nid, kind in dirents:
        parts.append(DIRENT.pack(nid, at, kind, 0))
        at += len(name)
    parts += [name for name, _, _ in dirents]
    return b"".join(parts)
