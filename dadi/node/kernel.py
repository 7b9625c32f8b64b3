"""What the node asks of the kernel besides block devices: mount, umount2, what is mounted, and what this machine can.

`mount(2)` and `umount2(2)` come from the C library (man 2 mount, man 2 umount); the mount table is
/proc/self/mountinfo (man 5 proc_pid_mountinfo), a line a mount:

    36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue
    id parent dev root target options [optional …] - type source super-options

in which space, tab, newline and backslash are written as three octal digits. The calls here block, and a mount of
something lazy reads it: never call them on the event loop that has to deliver the bytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dadi.errors import Conflict, DadiError, InvalidRequest, Malformed, MissingFeature, NotFound, StoreFull, Unavailable
from dadi.node.loop import backing_file as loop_backing

__all__ = [
    "Feature", "Mount", "is_mounted", "loop_backing", "mount", "mount_erofs", "mounted_at", "mounts", "parse_mountinfo",
    "probe", "umount", "umount_all",
]  # fmt: skip

READ_ONLY, NO_SUID, NO_DEV, NO_EXEC, REMOUNT, NO_ATIME, BIND = 1, 2, 4, 8, 32, 1024, 4096
"""MS_* of sys/mount.h."""
_FORCE, _DETACH, _NO_FOLLOW = 1, 2, 8  # MNT_FORCE, MNT_DETACH, UMOUNT_NOFOLLOW
OLDEST_KERNEL = (6, 4)
"""EROFS with blocks of 512 bytes, which may refer to tar data in place."""
CAP_SYS_ADMIN = 21

_DATA_LIMIT = 4095
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)


class Mount(NamedTuple):
    """A line of the mount table; `device` is "major:minor", `options` are the mount's and then the file system's."""

    id: int
    parent: int
    device: str
    root: str
    target: str
    options: tuple[str, ...]
    kind: str
    source: str


class Feature(NamedTuple):
    """A row of `dadi doctor`: what dadi needs, whether this machine has it, what was seen, what to do if not."""

    name: str
    ok: bool
    detail: str
    hint: str


def mount(source: str, target: str | Path, kind: str, flags: int = 0, data: str = "") -> None:
    """Mount a file system of type `kind`; see mount(2).

    Raises NotFound, Conflict (busy), MissingFeature (no privilege, unknown type or option), Unavailable (its device
    could not be read), Malformed (not such a file system), or InvalidRequest.
    """
    encoded = [_path(text) for text in (source, os.fspath(target), kind, data)]
    if len(encoded[3]) > _DATA_LIMIT:
        raise InvalidRequest(
            f"mounting {target}: {len(encoded[3])} bytes of options, the kernel takes {_DATA_LIMIT}",
            hint="the image has too many layers",
        )
    if _libc.mount(encoded[0], encoded[1], encoded[2], flags, encoded[3] or None):
        raise _mount_error(ctypes.get_errno(), f"mounting {source} on {target} as {kind}")


def mount_erofs(device: str, target: str | Path, blobs: Sequence[str], flags: int = READ_ONLY | NO_ATIME) -> None:
    """Mount the EROFS on the block device `device`, whose extra devices 1, 2, … are `blobs`, in order.

    Raises as `mount` does.
    """
    if any("," in blob for blob in blobs):
        raise InvalidRequest(f"a block device's path with a comma in it cannot be an option: {blobs}")
    mount(device, target, "erofs", flags | READ_ONLY, ",".join(f"device={blob}" for blob in blobs))


def umount(target: str | Path, *, force: bool = False, detach: bool = False) -> None:
    """Unmount what is mounted last on `target`; see umount2(2).

    Raises NotFound if nothing is mounted there, Conflict if it is in use. With `detach` it never is: then it vanishes
    from the tree at once and ends when its last user has gone. With `force` a FUSE mount's readers get errors at once.
    """
    flags = _NO_FOLLOW | _FORCE * force | _DETACH * detach
    if _libc.umount2(_path(os.fspath(target)), flags):
        code = ctypes.get_errno()
        if code in (errno.EINVAL, errno.ENOENT):
            raise NotFound(f"nothing is mounted on {target}")
        if code == errno.EBUSY:
            hint = "`fuser -vm` names who uses it; or `dadi umount --force`"
            raise Conflict(f"unmounting {target}: it is in use", hint=hint)
        raise _mount_error(code, f"unmounting {target}")


def mounts(table: Path = Path("/proc/self/mountinfo")) -> list[Mount]:
    """Return everything that is mounted, in the order of mounting."""
    return parse_mountinfo(table.read_bytes())


def is_mounted(directory: str | Path) -> bool:
    """Say whether a directory (symbolic links above it resolved) is a mount point.

    Only the mount table is read, so a file system there that hangs or is dead does no harm.
    """
    path = os.path.join(os.path.realpath(os.path.dirname(directory) or "."), os.path.basename(directory))
    return any(mount.target == path for mount in mounts())


def mounted_at(directory: str | Path) -> Mount | None:
    """Return what is mounted last on a directory (see `is_mounted`); None if nothing is."""
    path = os.path.join(os.path.realpath(os.path.dirname(directory) or "."), os.path.basename(directory))
    return next((mount for mount in reversed(mounts()) if mount.target == path), None)


def umount_all(directory: str | Path, *, force: bool = False) -> None:
    """Detach whatever is mounted on a directory, one on top of the other; nothing happens if nothing is.

    With `force` the readers of a FUSE mount get errors, also while somebody else still has its /dev/fuse.
    """
    with contextlib.suppress(NotFound):
        while True:
            umount(directory, force=force, detach=True)


def parse_mountinfo(text: bytes) -> list[Mount]:
    """Return the mounts that a mountinfo table lists; raise Malformed if a line is no such line."""
    return [_parse_line(line) for line in text.split(b"\n") if line]


def probe(*, root: Path = Path("/"), release: str | None = None) -> list[Feature]:
    """Return what dadi needs of this machine, a row each. Mounts FUSE for a moment, and may make a module be loaded.

    `root` is where /proc, /dev and /lib are looked for, `release` stands in for `uname -r`.
    """
    release = release or os.uname().release
    return [
        _kernel(release),
        _privilege(root),
        _device(root / "dev/fuse", "FUSE device", "modprobe fuse; in a container pass the device in"),
        _protocol(),
        _device(root / "dev/loop-control", "loop devices", "modprobe loop; in a container pass /dev in"),
        _file_system(root, release, "erofs"),
        _file_system(root, release, "overlay"),
    ]


def _path(text: str) -> bytes:
    raw = os.fsencode(text)
    if b"\0" in raw:
        raise InvalidRequest(f"a NUL in a path or option: {text!r}")
    return raw


def _mount_error(code: int, what: str) -> DadiError:
    says = f"{what}: {os.strerror(code)}"
    match code:
        case errno.ENOENT | errno.ENOTDIR | errno.ENXIO:
            return NotFound(says, hint="the directory or the device is not there")
        case errno.EBUSY:
            return Conflict(says, hint="something is mounted there already, or the device is in use")
        case errno.EPERM | errno.EACCES:
            return MissingFeature(says, hint="mounting needs root (CAP_SYS_ADMIN)")
        case errno.ENODEV:
            return MissingFeature(says, hint="the kernel does not know this file system; see `dadi doctor`")
        case errno.EOPNOTSUPP:
            return MissingFeature(says, hint="the file system uses something that this kernel is too old for")
        case errno.EINVAL | errno.EUCLEAN:
            return Malformed(says, hint="not such a file system, or a bad option; `dmesg` says which")
        case errno.EIO:
            return Unavailable(says, hint="its first blocks could not be read")
        case errno.ENOSPC:
            return StoreFull(says, hint="too many mounts: see /proc/sys/fs/mount-max")
        case _:
            return DadiError(says)


_ESCAPE = re.compile(rb"\\([0-7]{3})")


def _text(field: bytes) -> str:
    return os.fsdecode(_ESCAPE.sub(lambda match: bytes([int(match[1], 8) & 255]), field))


def _parse_line(line: bytes) -> Mount:
    fields = line.split(b" ")
    try:
        dash = fields.index(b"-", 6)
        kind, source, super_options = fields[dash + 1 : dash + 4]
        options = tuple(_text(option) for option in fields[5].split(b",") + super_options.split(b","))
        device, root, target = (_text(field) for field in fields[2:5])
        return Mount(int(fields[0]), int(fields[1]), device, root, target, options, _text(kind), _text(source))
    except ValueError:
        raise Malformed(f"not a line of a mount table: {line[:200]!r}") from None


def _kernel(release: str) -> Feature:
    found = re.match(r"(\d+)\.(\d+)", release)
    ok = found is not None and (int(found[1]), int(found[2])) >= OLDEST_KERNEL
    oldest = ".".join(map(str, OLDEST_KERNEL))
    return Feature(f"Linux {oldest} or newer", ok, release, "" if ok else f"boot a kernel of at least {oldest}")


def _privilege(root: Path) -> Feature:
    try:
        status = (root / "proc/self/status").read_text()
        caps = int(re.findall(r"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)[0], 16)
    except (OSError, IndexError):
        return Feature("privilege to mount", False, "/proc is not readable", "mount /proc")
    ok = bool(caps >> CAP_SYS_ADMIN & 1)
    hint = "" if ok else "run as root, in a container with CAP_SYS_ADMIN"
    return Feature("privilege to mount", ok, f"CAP_SYS_ADMIN is {'held' if ok else 'missing'}", hint)


def _device(path: Path, name: str, hint: str) -> Feature:
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return Feature(name, False, f"{path}: {error.strerror}", hint)
    return Feature(name, True, f"{path} opens", "")


def _file_system(root: Path, release: str, kind: str) -> Feature:
    name = f"file system {kind}"
    try:
        known = (root / "proc/filesystems").read_text().split()
    except OSError:
        known = []
    if kind in known:
        return Feature(name, True, "in the kernel", "")
    for index in ("modules.dep", "modules.builtin"):
        try:
            listed = (root / "lib/modules" / release / index).read_text()
        except OSError:
            continue
        if re.search(rf"(^|/){kind}\.ko\b", listed, re.MULTILINE):
            return Feature(name, True, "a module that is loaded when it is needed", "")
    return Feature(name, False, "not in the kernel, and no module for it", f"a kernel with {kind} (CONFIG_*_FS)")


def _protocol() -> Feature:
    from fuse.connection import offered  # it imports this module

    try:
        major, minor = offered()
    except DadiError as error:
        return Feature("FUSE protocol", False, error.message, error.hint or "")
    return Feature("FUSE protocol", True, f"{major}.{minor}", "")
