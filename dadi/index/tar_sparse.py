"""The maps of sparse tar members, and what of them a block device can show in place. Pure.

A sparse member holds only the pieces of the file that are not holes, one after the other; a map says where they belong.

    format  type  where the map is
    old     S     header at 386: 4 pairs (offset 12, length 12), at 482 one byte: more follow, at 483 (12) the file's
                  size; each further block: 21 pairs, at 504 one byte: more follow. Numbers as in `tar_header.py`.
    0.0     0     pax: GNU.sparse.size, and GNU.sparse.offset, GNU.sparse.numbytes again and again
    0.1     0     pax: GNU.sparse.size, GNU.sparse.name, GNU.sparse.map = "offset,length,offset,length,…"
    1.0     0     pax: GNU.sparse.major = 1, .minor = 0, .realsize, .name; the map stands before the data, padded to
                  512: decimal numbers, each with a newline: count of pairs, then offset and length of each

Source: GNU tar manual, "Storing Sparse Files".
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from dadi.errors import Malformed, TooLarge, Unsupported
from dadi.index import tar_header, tar_pax
from dadi.index.layer import Extent
from dadi.index.tar_header import BLOCK

Pair = tuple[int, int]
"""(offset in the file, length) of a piece, in bytes."""

_OLD_MAP, _OLD_MORE, _OLD_SIZE = slice(386, 482), 482, slice(483, 495)
_NEXT_MAP, _NEXT_MORE = slice(0, 504), 504
_PAIR = struct.Struct("12s12s")

ORDINARY = "this layer must be unpacked as an ordinary one"
"""The hint for what a tar may well have, but a block device cannot show."""


class MapReader:
    """Puts together a map that is spread over blocks of the tar: the old format's and that of 1.0.

    While `more`, `feed` it the next block; then `pairs` are all there. Raises Malformed, or TooLarge above `limit`
    bytes of blocks.
    """

    def __init__(self, *, old: bool, more: bool, limit: int) -> None:
        self.pairs: list[Pair] = []
        self.more = more
        self._old = old
        self._left = limit
        self._text = bytearray()
        self._lines = 0
        self._expected = 0

    @classmethod
    def of_old_header(cls, header: bytes, limit: int) -> MapReader:
        """Return the reader of a member of type S."""
        reader = cls(old=True, more=bool(header[_OLD_MORE]), limit=limit)
        reader._add(header[_OLD_MAP])
        return reader

    def feed(self, block: bytes) -> None:
        """Take the next block."""
        self._left -= BLOCK
        if self._left < 0:
            raise TooLarge("its sparse map is larger than the limit")
        if self._old:
            self._add(block[_NEXT_MAP])
            self.more = bool(block[_NEXT_MORE])
        else:
            self._take_text(block)

    def _add(self, pairs: bytes) -> None:
        for offset, length in _PAIR.iter_unpack(pairs):
            if length[0] == 0:
                break  # unused places at the end of a block
            self.pairs.append((tar_header.number(offset), tar_header.number(length)))

    def _take_text(self, block: bytes) -> None:
        self._text += block
        self._lines += block.count(b"\n")
        if not self._expected:
            count, newline, _ = self._text.partition(b"\n")
            if not newline:
                raise Malformed("its sparse map does not begin with a number")
            self._expected = 1 + 2 * tar_pax.decimal(bytes(count), "number of extents")
        self.more = self._lines < self._expected
        if not self.more:
            numbers = bytes(self._text).split(b"\n", self._expected)[1 : self._expected]
            self.pairs = _paired(numbers)


def old_size(header: bytes) -> int:
    """Return the size of the whole file (bytes) that the header of a member of type S gives."""
    return tar_header.number(header[_OLD_SIZE])


def of_records(records: tar_pax.Records, limit: int) -> tuple[MapReader, int] | None:
    """Return the map and the size of the whole file (bytes) of a pax member; None if it is not sparse."""
    major = records.get(b"GNU.sparse.major")
    if major is not None:
        if (major, records.get(b"GNU.sparse.minor")) != (b"1", b"0"):
            raise Unsupported(f"it is sparse in an unknown way ({major[:20]!r})", hint=ORDINARY)
        reader = MapReader(old=False, more=True, limit=limit)
        size = records.get(b"GNU.sparse.realsize", b"")
    elif b"GNU.sparse.size" in records or tar_pax.SPARSE_MAP in records:
        reader = MapReader(old=False, more=False, limit=limit)
        value = records.get(tar_pax.SPARSE_MAP)
        reader.pairs = _paired(value.split(b",") if value else [])
        size = records.get(b"GNU.sparse.size", b"")
    else:
        return None
    return reader, tar_pax.decimal(size, "sparse file's size")


def extents(pairs: Sequence[Pair], *, data: int, stored: int, size: int) -> tuple[Extent, ...]:
    """Return where each piece stands in the tar.

    `data`: offset in the tar of the first piece; `stored`: bytes of all pieces; `size`: bytes of the file. Raises
    Malformed if these and the pairs contradict each other, Unsupported if a piece cannot be shown in place by a
    device of 512-byte blocks.
    """
    found: list[Extent] = []
    end = total = 0
    for offset, length in pairs:
        if offset < end or length < 0 or offset + length > size:
            raise Malformed(f"its sparse map has {length} bytes at {offset} in a file of {size}")
        if length:
            if found and end == offset and end % BLOCK == 0:
                last = found.pop()
                found.append(Extent(last.file_offset, last.tar_offset, last.length + length))
            else:
                found.append(Extent(offset, data + total, length))
            total += length
        end = offset + length
    if total != stored:
        raise Malformed(f"its sparse map has {total} bytes, but {stored} are stored")
    for extent in found:
        tail = extent.file_offset + extent.length
        if extent.file_offset % BLOCK or extent.tar_offset % BLOCK or (tail % BLOCK and tail != size):
            raise Unsupported(
                f"its sparse map has {extent.length} bytes at {extent.file_offset}: not whole blocks of {BLOCK}",
                hint=ORDINARY,
            )
    return tuple(found)


def _paired(texts: list[bytes]) -> list[Pair]:
    if len(texts) % 2:
        raise Malformed("its sparse map has an offset without a length")
    numbers = [tar_pax.decimal(text, "sparse map") for text in texts]
    return list(zip(numbers[::2], numbers[1::2], strict=True))
