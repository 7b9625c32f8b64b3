"""Indexing throughput against isa-l gunzip piped into SHA-256 of the same layer.

Ours does more in its one pass: digests of the compressed bytes, of the tar and of every chunk, the tar's members, and
it writes the uncompressed bytes into the store. The baseline is a gunzip in one process, a pipe, and SHA-256 in
another: two cores, as ours has. Throughput is in uncompressed bytes.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

from bench.harness import Bench, Row, alternately
from dadi.blobs.disk import DiskBlobs
from dadi.index import build
from tests.lab import images
from tests.lab.cleanup import Lab
from tests.lab.oci_layout import Image, Layer

_PIECE = 1 << 16
_GUNZIP = """
import sys
from isal import igzip
sys.stdin.buffer.read(1)  # imports are done: the clock starts
with igzip.open(sys.argv[1], "rb") as source:
    while data := source.read(1 << 20):
        sys.stdout.buffer.write(data)
"""
_SHA256 = """
import hashlib, sys
digest = hashlib.sha256()
sys.stdout.write("ready\\n")
sys.stdout.flush()
while data := sys.stdin.buffer.read(1 << 20):
    digest.update(data)
sys.stdout.write("sha256:" + digest.hexdigest() + "\\n")
"""


def run(bench: Bench) -> None:
    """Measure the largest layers of the Debian image, and a generated one of many small files."""
    bench.ours, bench.theirs = "index", "gunzip, SHA-256"
    times = 2 if bench.quick else 5
    image = images.debian_python(report=bench.say)
    with Lab("bench", images.CACHE) as lab:
        many = images.synthetic(lab.root / "many", layers=1, files=20_000, size=100 << 20, whiteouts=False)
        for what, source, layer in (
            ("Debian and Python, gzip", image, image.layers[0]),
            ("more packages, gzip", image, image.layers[1]),
            ("20,000 files of 5 KiB, gzip", many, many.layers[0]),
        ):
            blob_path(source, layer).read_bytes()  # into the page cache: both sides read it from there
            ours, theirs = alternately(
                times,
                partial(_index, lab.root / "store", source, layer),
                partial(_baseline, layer, blob_path(source, layer)),
            )
            bench.add(Row(what, "MB/s", ours, theirs, target=0.6))
    bench.note("Ours writes the uncompressed layer into a fresh store while it indexes; the baseline keeps nothing.")


def blob_path(image: Image, layer: Layer) -> Path:
    """Return the file of a layer's blob."""
    return image.layout / "blobs" / "sha256" / layer.blob.digest.removeprefix("sha256:")


def _index(directory: Path, image: Image, layer: Layer) -> float:
    """Return the megabytes a second of one pass into a fresh store."""

    async def pieces() -> AsyncIterator[bytes]:
        with blob_path(image, layer).open("rb") as file:
            while data := file.read(_PIECE):
                yield data

    async def one_pass() -> float:
        source = build.LayerSource(layer.blob.digest, layer.blob.size, layer.blob.media_type, layer.diff_id)
        store = DiskBlobs(directory)
        ingest = store.ingest()
        try:
            start = time.perf_counter()
            index = await build.build(pieces(), source, ingest)
            seconds = time.perf_counter() - start
        finally:
            ingest.abort()
            await store.close()
        assert index.table.size == layer.tar_size
        return layer.tar_size / seconds / 1e6

    return asyncio.run(one_pass())


def _baseline(layer: Layer, blob: Path) -> float:
    """Return the megabytes a second of two processes and a pipe, without the time that they need to start."""
    gunzip_command, sha256_command = [[sys.executable, "-c", code] for code in (_GUNZIP, _SHA256)]
    with (
        subprocess.Popen([*gunzip_command, str(blob)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as gunzip,
        subprocess.Popen(sha256_command, stdin=gunzip.stdout, stdout=subprocess.PIPE, text=True) as sha256,
    ):
        assert gunzip.stdin is not None
        assert gunzip.stdout is not None
        assert sha256.stdout is not None
        gunzip.stdout.close()  # the other process has it
        assert sha256.stdout.readline() == "ready\n"
        start = time.perf_counter()
        gunzip.stdin.write(b"!")
        gunzip.stdin.close()
        answer = sha256.stdout.readline()
        seconds = time.perf_counter() - start
    assert answer.strip() == layer.diff_id
    return layer.tar_size / seconds / 1e6
