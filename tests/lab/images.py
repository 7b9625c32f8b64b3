"""Images to try things with: real ones (Debian, this machine's Python) and generated ones, as OCI layouts.

What lives here: which layers each image has, and the cache. What never does: how a layout is written
(tests/lab/oci_layout.py) and how the trees are made (tests/lab/debian.py, tests/lab/host.py).

`debian_python` and `host_python` are kept below their cache directory under a hash of the sources that make them, so
that only the first run builds.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import platform
import random
import shutil
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from tests.lab import debian, host, oci_layout, program, tree
from tests.lab.cleanup import Lab
from tests.lab.oci_layout import Compression, Image, Layer, Layout

ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
CACHE = Path(__file__).resolve().parents[2] / ".cache" / "lab"
ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LC_ALL": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"}
_PIECE = 64 << 20  # random.randbytes cannot make 256 MiB at once

Report = Callable[[str], None]
"""Called with one sentence whenever a step that takes seconds begins."""


def debian_python(cache: Path = CACHE, report: Report = lambda text: None, *, zstd: bool = True) -> Image:
    """Debian with Python: four layers, more than 150 MB unpacked; the third deletes and replaces.

    With `zstd`, the last layer is compressed by zstd; without, all are gzip, for programs that know nothing else
    (umoci). Both are tags of one layout. Needs root and, at first, Debian's packages and a minute or two.
    """

    def build(layout: Path, lab: Lab) -> None:
        made = debian.DebianTree(lab.root / "tree", lab.root, cache / "downloads", lab.environment)
        made.root.mkdir()
        steps = Steps(layout, made.root)
        report("installing Debian's minimal system and Python (debootstrap)")
        made.bootstrap()
        steps.layer()
        report("installing more Debian packages on top (apt)")
        made.install()
        steps.layer()
        report("deleting and replacing files of the layers below")
        made.reshape()
        steps.layer()
        _add_program(made.root)
        steps.layer()
        steps.image("gzip", ["/usr/bin/python3", "/app/main.py"])
        steps.layers[-1] = steps.layout.recompress(steps.layers[-1], "zstd")
        steps.image("latest", ["/usr/bin/python3", "/app/main.py"])

    directory = cached(cache, "debian-python", [debian.codename(), *sources(debian)], build)
    return oci_layout.load(directory, "latest" if zstd else "gzip")


def host_python(cache: Path = CACHE) -> Image:
    """This machine's own Python with the libraries it needs and a shell: three layers, made in seconds."""

    def build(layout: Path, lab: Lab) -> None:
        root = lab.root / "tree"
        root.mkdir()
        steps = Steps(layout, root, "fast-gzip")
        host.copy_shell(root)
        steps.layer()
        interpreter = host.copy_python(root)
        steps.layer()
        host.reshape(root)
        _add_program(root)
        steps.layer()
        steps.image("latest", [interpreter, "/app/main.py"])

    directory = cached(cache, "host-python", [sys.base_prefix, sys.version, *sources(host)], build)
    return oci_layout.load(directory, "latest")


def synthetic(
    directory: Path,
    *,
    layers: int = 3,
    files: int = 40,
    size: int = 4 << 20,
    compressible: float = 0.5,
    compression: Compression | Sequence[Compression] = "fast-gzip",
    whiteouts: bool = True,
    seed: int = 0,
    tag: str = "latest",
) -> Image:
    """Generate an image: in each layer `files` files of `size` bytes together, of which `compressible` are repetitive.

    Deterministic: the same arguments give the same digests. With `whiteouts`, every layer but the first deletes a
    file, hides a directory and replaces a file of those below. `compression` may name one for each layer in turn.
    """
    layout = Layout(directory)
    each = [compression] if isinstance(compression, str) else list(compression)
    made: list[Layer] = []
    merged: dict[str, int] = {}
    for number in range(layers):
        with layout.layer(each[number % len(each)]) as writer:
            source = random.Random(f"{seed} {number}")
            _synthetic_layer(writer.tar, source, number, files, size, compressible, whiteouts, merged)
        made.append(writer.result)
    image = layout.add_image(
        tag,
        made,
        command=["/bin/true"],
        environment={},
        unpacked_size=sum(merged.values()),
        files=len(merged),
        architecture=ARCHITECTURE,
    )
    oci_layout.save([image])
    return image


def _synthetic_layer(
    tar: tarfile.TarFile,
    source: random.Random,
    number: int,
    files: int,
    size: int,
    compressible: float,
    whiteouts: bool,
    merged: dict[str, int],
) -> None:
    def add(name: str, data: bytes, kind: bytes = tarfile.REGTYPE) -> None:
        info = tarfile.TarInfo(name)
        info.type, info.size, info.mtime = kind, len(data), 1_700_000_000 + number
        info.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
        tar.addfile(info, io.BytesIO(data))
        if not os.path.basename(name).startswith(tree.WHITEOUT):
            merged[name] = len(data)

    def content(length: int) -> bytes:
        repeated = int(length * compressible)
        line = b"layer %d says %d\n" % (number, source.randrange(10**9))
        pieces = [source.randbytes(min(_PIECE, length - at)) for at in range(repeated, length, _PIECE)]
        return (line * (repeated // len(line) + 1))[:repeated] + b"".join(pieces)

    if whiteouts and number:
        below = number - 1
        add(f"data/{below}", b"", tarfile.DIRTYPE)
        add(f"data/{below}/{tree.WHITEOUT}1", b"")
        merged.pop(f"data/{below}/1", None)
        add("shared", b"", tarfile.DIRTYPE)
        add(f"shared/{tree.OPAQUE}", b"")
        for name in [n for n in merged if n.startswith("shared/")]:
            del merged[name]
        if files > 2:
            add(f"data/{below}/2", content(777))
    if not whiteouts or not number:
        add("shared", b"", tarfile.DIRTYPE)
    add(f"shared/{number}", content(100))
    add(f"data/{number}", b"", tarfile.DIRTYPE)
    for index in range(files):
        share = size // files + (size % files if index == 0 else 0)
        add(f"data/{number}/{index}", content(share))


class Steps:
    """Turns the states of a growing tree into layers."""

    def __init__(self, directory: Path, root: Path, compression: Compression = "gzip") -> None:
        self.layout = Layout(directory)
        self._compression: Compression = compression
        self.layers: list[Layer] = []
        self._root = root
        self._started = time.time()
        self._before: tree.Tree = {}

    def layer(self) -> None:
        """Add what has changed in the tree since the last call."""
        after = tree.scan(self._root)
        with self.layout.layer(self._compression) as writer:
            tree.write_difference(writer.tar, self._root, self._before, after, started=self._started)
        self.layers.append(writer.result)
        self._before = after

    def image(self, tag: str, command: list[str], *, first_line: str = "") -> None:
        """Tag the layers so far. `first_line`: what the program says first; without, as tests/lab/program.py does."""
        size, files = tree.size_and_count(self._before)
        image = self.layout.add_image(
            tag,
            self.layers,
            command=command,
            environment=ENVIRONMENT,
            unpacked_size=size,
            files=files,
            architecture=ARCHITECTURE,
            facts={"first_line": first_line or program.first_line()},
        )
        oci_layout.save([image])


def _add_program(root: Path) -> None:
    app = root / "app"
    app.mkdir()
    shutil.copy(program.__file__, app / "main.py")
    (app / "rows.csv").write_text("".join(f"{program.row(n)}\n" for n in range(1, program.ROWS + 1)))


def cached(cache: Path, name: str, key: Sequence[str], build: Callable[[Path, Lab], None]) -> Path:
    """Return the directory of the layout that `build` makes from what `key` says; builds it when there is none yet."""
    digest = hashlib.sha256("\0".join(key).encode()).hexdigest()[:12]
    cache.mkdir(parents=True, exist_ok=True)
    directory = cache.resolve() / f"{name}-{digest}"
    with (cache / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not directory.exists():
            # the lab is below the cache, on one file system with it: the layout is renamed into place when whole
            with Lab("build", cache) as lab:
                build(lab.root / "layout", lab)
                (lab.root / "layout").rename(directory)
            for other in cache.glob(f"{name}-*"):
                if other.is_dir() and other.name != directory.name:
                    shutil.rmtree(other)
    return directory


def sources(*modules: ModuleType) -> list[str]:
    """Return the source texts that decide what an image holds."""
    files = [__file__, *(str(m.__file__) for m in (oci_layout, tree, program, *modules))]
    return [Path(file).read_text() for file in files]
