"""One reader, a process of its own: reads files of a mount in one manner, and compares each byte with the known one.

    python -I reader.py BOARD NUMBER MANNER SEED PACE FILES

FILES names JSON: [[path, path of the same bytes elsewhere], …]. PACE: seconds between two reads: the processors
are for others too. What lives here: that process, which imports nothing of ours (it must start in a moment).
What never does: judging. It counts, in its part of BOARD, a file that its parent maps too:

    0      stop      not 0: end after this read
    64·n   NUMBER=n-1: reads tried, failed, bytes wrong, bytes right, ns stalled in all, ns of the longest read,
           when the read under way began (0: none; ns, monotonic), 0

Manners: "random" preads here and there, past the page cache; "walk" reads all, piece by piece, without readahead;
"mmap" maps; "direct" uses O_DIRECT; "whole" reads whole files through the page cache, with readahead.
"""

import json
import mmap
import os
import random
import struct
import sys
import time

SLOT, FIELDS = 64, struct.Struct("<8Q")
STALL = 1_000_000_000
"""ns; a read that takes longer counts as stalled, all of it."""


class Counts:
    def __init__(self, board, number):
        self.board, self.at, self.fields = board, SLOT * (number + 1), [0] * 8

    def begin(self):
        self.fields[0] += 1
        self.fields[6] = time.monotonic_ns()
        self.write()

    def end(self, failed, wrong, right):
        took = time.monotonic_ns() - self.fields[6]
        for field, value in ((1, failed), (2, wrong), (3, right), (4, took if took > STALL else 0)):
            self.fields[field] += value
        self.fields[5], self.fields[6] = max(took, self.fields[5]), 0
        self.write()

    def write(self):
        FIELDS.pack_into(self.board, self.at, *self.fields)


def pread(path, offset, length, advice):
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(fd, 0, 0, advice)
        return os.pread(fd, length, offset)
    finally:
        os.close(fd)


def mapped(path, offset, length):
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as memory:
            return memory[offset : offset + length]
    finally:
        os.close(fd)


BUFFER = mmap.mmap(-1, 256 << 10)


def direct(path, offset, length):
    """Offset and length are whole pages; at the end of the file fewer bytes come."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        return BUFFER[: os.preadv(fd, [memoryview(BUFFER)[:length]], offset)]
    finally:
        os.close(fd)


def reads(manner, files, chance):
    """Yield (number of the file, offset, length) for ever."""
    places = [(n, at) for n, (_, known) in enumerate(files) for at in range(0, len(known), 64 << 10)]
    while True:
        if manner in ("walk", "direct", "whole"):
            chance.shuffle(places)
            for n, at in places:
                if manner == "whole":
                    at = 0
                yield n, at, min(64 << 10 if manner != "whole" else 1 << 20, len(files[n][1]) - at)
        else:
            n = chance.randrange(len(files))
            size = len(files[n][1])
            at = chance.randrange(size)
            yield n, at, min(size - at, chance.choice((10, 5000, 48 << 10)))


def read(manner, path, offset, length):
    if manner == "direct":
        return direct(path, offset, -(-length // 4096) * 4096)
    if manner == "mmap":
        return mapped(path, offset, length)
    return pread(path, offset, length, os.POSIX_FADV_NORMAL if manner == "whole" else os.POSIX_FADV_RANDOM)


def pairs_in(path):
    with open(path, encoding="utf-8") as file:
        return [(path, known_bytes(known)) for path, known in json.load(file)]


def known_bytes(path):
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)


def main(board_path, number, manner, seed, pace, files):
    with open(board_path, "r+b") as file:
        board = mmap.mmap(file.fileno(), 0)
    counts, pairs = Counts(board, int(number)), pairs_in(files)
    told = 0
    for n, offset, length in reads(manner, pairs, random.Random(seed)):
        if board[0]:
            return
        path, known = pairs[n]
        counts.begin()
        try:
            data = read(manner, path, offset, length)
        except OSError as error:
            counts.end(1, 0, 0)
            if told < 20:
                told += 1
                sys.stderr.write(f"{time.time():.3f} {manner} {path} at {offset}, {length} bytes: {error}\n")
                sys.stderr.flush()
        else:
            want = known[offset : offset + length]
            if data == want:
                counts.end(0, 0, length)
            elif len(data) < len(want) and want.startswith(data):  # what follows could not be read
                counts.end(1, 0, len(data))
                sys.stderr.write(f"{manner} {path} at {offset}: {len(data)} of {length} bytes came\n")
                sys.stderr.flush()
            else:
                wrong = sum(map(int.__ne__, data, want)) + abs(len(data) - len(want))
                counts.end(0, wrong, length - wrong)
                sys.stderr.write(f"{manner} {path} at {offset}: {wrong} of {length} bytes are wrong\n")
                sys.stderr.flush()
        time.sleep(float(pace))


if __name__ == "__main__":
    main(*sys.argv[1:])
