"""This machine's own Python as a tree that one can chroot into: shell, interpreter, standard library, shared libraries.

What lives here: what is copied, found by asking sysconfig and ldd, so that Debian's Python and one built by hand both
work. What never does: layers (tests/lab/images.py).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

PROGRAMS = ("sh", "cat", "ls", "env", "sha256sum")
LEFT_OUT = {
    "config", "dist-packages", "ensurepip", "idlelib", "lib2to3", "site-packages", "test", "tests",
    "tkinter", "turtledemo",
}  # fmt: skip


def copy_shell(root: Path) -> None:
    """Copy a shell and a few programs with their libraries, and make what a root directory has."""
    found = [path for name in PROGRAMS if (path := shutil.which(name, path="/bin:/usr/bin"))]
    for path in [*found, *_libraries(found)]:
        _copy(root, path)
    for name in ("tmp", "proc", "dev", "etc", "var", "var/log", "opt"):
        (root / name).mkdir(exist_ok=True)
    (root / "tmp").chmod(0o1777)
    (root / "etc/passwd").write_text("root:x:0:0:root:/:/bin/sh\n")
    (root / "etc/old.conf").write_text("deleted by a later layer\n")
    (root / "var/log/first").write_text("hidden by a later layer\n")


def copy_python(root: Path) -> str:
    """Copy interpreter and standard library; returns the interpreter's path inside the tree."""
    interpreter = os.path.join(sys.base_prefix, "bin", f"python{sys.version_info.major}.{sys.version_info.minor}")
    library = sysconfig.get_path("stdlib", vars={"installed_base": sys.base_prefix, "base": sys.base_prefix})
    modules: list[str] = []
    for directory, names, files in os.walk(library):
        names[:] = sorted(n for n in names if n not in LEFT_OUT and not n.startswith("config-"))
        for name in sorted(files):
            path = os.path.join(directory, name)
            _copy(root, path)
            if name.endswith(".so"):
                modules.append(path)
    for path in [interpreter, *_libraries([interpreter, *modules])]:
        _copy(root, path)
    return interpreter


def reshape(root: Path) -> None:
    """Delete, hide and replace files of the trees that the other functions made."""
    (root / "etc/old.conf").unlink()
    (root / "etc/passwd").write_text("root:x:0:0:root:/app:/bin/sh\n")
    fresh = root / "var/log.new"  # another directory in the same place: what was below must not show through
    fresh.mkdir()
    (fresh / "second").write_text("in a fresh directory\n")
    shutil.rmtree(root / "var/log")
    fresh.rename(root / "var/log")
    (root / "opt").rmdir()
    (root / "opt").symlink_to("app")


def _copy(root: Path, path: str) -> None:
    """Copy `path` and every symlink on the way to it, as they are on this machine."""
    place = "/"
    parts = [p for p in path.split("/") if p]
    while parts:
        name = parts.pop(0)
        if name == "..":
            place = os.path.dirname(place)
            continue
        place = os.path.join(place, name)
        inside = root / place[1:]
        if os.path.islink(place):
            target = os.readlink(place)
            if not os.path.lexists(inside):
                inside.symlink_to(target)
            steps = [p for p in target.split("/") if p not in ("", ".")]
            place, parts = ("/" if target.startswith("/") else os.path.dirname(place)), [*steps, *parts]
        elif parts:
            inside.mkdir(exist_ok=True)
        elif not inside.exists():
            shutil.copy2(place, inside)


def _libraries(files: Iterable[str]) -> list[str]:
    """Return what the dynamic linker loads for `files`, itself included."""
    done = subprocess.run(["ldd", *files], capture_output=True, text=True, check=False, env={"LC_ALL": "C"})
    return sorted(set(re.findall(r"(?:=> |^\s+)(/\S+)(?= \(0x)", done.stdout, re.MULTILINE)))
