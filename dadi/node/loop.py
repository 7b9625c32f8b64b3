"""Loop devices: a read-only block device over a file, re-pointed to another file while it is mounted.

Source: linux/loop.h and Documentation/admin-guide/blockdev/loop in the kernel tree. `LOOP_CONFIGURE` (Linux 5.8) binds
and sets up in one step:

    loop_config   0 u32 fd   4 u32 block_size   8 loop_info64 (232 bytes)   240 reserved (64 bytes)
    loop_info64   0 u64 device, inode, rdevice  24 u64 offset  32 u64 sizelimit (0: all)  40 u32 number, encrypt_type,
                  encrypt_key_size  52 u32 flags  56 file_name[64]  120 crypt_name[64]  184 encrypt_key[32]  216 init[2]

Direct I/O, always: the kernel then keeps up to 128 reads of a device under way, and one whose bytes are missing holds
up none of the others. A buffered loop device reads one piece after the other, so that every hit would stand behind
the first miss; it would also keep each block in memory twice. AUTOCLEAR, always: the device ends with its last user,
the mount or our descriptor, so nothing is left behind if our process is killed.

Everything here blocks, and some of it waits for reads that are under way: call it in threads.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from dadi.errors import Conflict, DadiError, InvalidRequest, MissingFeature, NotFound

LOOP_CHANGE_FD, LOOP_SET_DIRECT_IO, LOOP_CONFIGURE, LOOP_CTL_GET_FREE = 0x4C06, 0x4C08, 0x4C0A, 0x4C82
READ_ONLY, AUTOCLEAR, DIRECT_IO = 1, 4, 16
BLOCK_SIZE = 512
"""Bytes: tar data begins at multiples of it, and EROFS refers to it in such blocks."""

_CONFIG = struct.Struct("=II 5Q4I 64s64s32s2Q 64x")
_MAJOR = 7
_TRIES = 200
"""How often a free device is looked for while others take the one that was found."""


class LoopStatus(NamedTuple):
    """How the kernel has a loop device: the path of the file below it, and how it is read. `size` in bytes."""

    path: str
    backing_file: str
    direct_io: bool
    read_only: bool
    autoclear: bool
    size: int


class LoopDevice:
    """An attached device that we hold open; `close` it, also after a failed `swap`."""

    __slots__ = ("_fd", "path")

    def __init__(self, path: str, fd: int) -> None:
        self.path = path
        """/dev/loopN."""
        self._fd = fd

    def __repr__(self) -> str:
        return f"LoopDevice({self.path}, {backing_file(self.path)})"

    def swap(self, path: str | Path) -> bool:
        """Re-point the device to a file of the same size, which must have the same bytes; it may be mounted.

        Returns whether it reads that by direct I/O; buffered is slower, not wrong.

        Waits for the reads that are under way. Raises NotFound, InvalidRequest (another size, not read-only).
        """
        backing = _open(path)
        try:
            fcntl.ioctl(self._fd, LOOP_CHANGE_FD, backing)
        except OSError as error:
            what = f"re-pointing {self.path} to {path}: {error.strerror}"
            if error.errno == errno.EINVAL:
                raise InvalidRequest(what, hint="both files must have the same size") from None
            raise _translated(error, what) from None
        finally:
            os.close(backing)
        try:
            fcntl.ioctl(self._fd, LOOP_SET_DIRECT_IO, 1)
        except OSError:
            return False
        return True

    def status(self) -> LoopStatus:
        """Return how the kernel has it; raise NotFound if it is not attached (any more)."""
        return status(self.path)

    def close(self) -> None:
        """Let go of the device; it ends as soon as nothing else, such as a mount, uses it. Idempotent.

        If we are the last user this waits for the reads that are under way.
        """
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def attach(path: str | Path, *, direct_io: bool = True) -> LoopDevice:
    """Return a free loop device, now attached to a file, read-only, with blocks of 512 bytes.

    Raises NotFound (no such file), MissingFeature (no loop devices, no privilege), Conflict (none is free).
    """
    backing = _open(path)
    try:
        for attempt in range(_TRIES):
            device = _free()
            try:
                if _configure(device._fd, backing, str(path), direct_io):
                    return device
            except BaseException:
                device.close()
                raise
            device.close()
            time.sleep(min(attempt, 10) * 0.001)  # somebody was faster: let them finish
    finally:
        os.close(backing)
    raise Conflict(f"attaching {path}: no loop device was free in {_TRIES} tries", hint="see losetup --list")


def adopt(path: str) -> LoopDevice:
    """Return a device that is attached already, by an earlier process say; raise NotFound if it is not."""
    fd = _open_device(path)
    try:
        status(path)
    except NotFound:
        os.close(fd)
        raise
    return LoopDevice(path, fd)


def backing_file(path: str) -> str | None:
    """Return the path of the file that a loop device is over (" (deleted)" at its end if it is); None if it is free.

    The file itself is not touched.
    """
    try:
        return _attribute(path, "loop/backing_file")
    except NotFound:
        return None


def status(path: str) -> LoopStatus:
    """Return how the kernel has the loop device `path`; raise NotFound if it is not attached."""
    backing, size = _attribute(path, "loop/backing_file"), int(_attribute(path, "size")) * 512
    direct_io, read_only, autoclear = (_attribute(path, name) == "1" for name in ("loop/dio", "ro", "loop/autoclear"))
    return LoopStatus(path, backing, direct_io, read_only, autoclear, size)


def attached() -> list[LoopStatus]:
    """Return all loop devices that are attached, whoever did it."""
    found = []
    for directory in sorted(Path("/sys/block").glob("loop*/loop")):
        with suppress(NotFound):  # it went away meanwhile
            found.append(status(f"/dev/{directory.parent.name}"))
    return found


def _free() -> LoopDevice:
    try:
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        hint = "run as root; modprobe loop; see `dadi doctor`"
        raise MissingFeature(f"opening /dev/loop-control: {error.strerror}", hint=hint) from None
    try:
        number = fcntl.ioctl(control, LOOP_CTL_GET_FREE)
    except OSError as error:
        raise _translated(error, f"asking for a free loop device: {error.strerror}") from None
    finally:
        os.close(control)
    path = f"/dev/loop{number}"
    with suppress(FileExistsError):
        if not os.path.exists(path):  # no devtmpfs, as in many containers
            os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(_MAJOR, number))
    return LoopDevice(path, _open_device(path))


def _configure(device: int, backing: int, name: str, direct_io: bool) -> bool:
    """Bind a device to a file; False if somebody else has taken it meanwhile."""
    flags = READ_ONLY | AUTOCLEAR | DIRECT_IO * direct_io
    config = _CONFIG.pack(
        backing, BLOCK_SIZE, 0, 0, 0, 0, 0, 0, 0, 0, flags, os.fsencode(name)[-63:], b"", b"", 0, 0
    )  # fmt: skip
    try:
        fcntl.ioctl(device, LOOP_CONFIGURE, config)
    except OSError as error:
        if error.errno == errno.EBUSY:
            return False
        raise _translated(error, f"attaching {name} to a loop device: {error.strerror}") from None
    return True


def _open(path: str | Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise _translated(error, f"opening {path} for a loop device: {error.strerror}") from None


def _open_device(path: str) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise _translated(error, f"opening {path}: {error.strerror}") from None
    if not stat.S_ISBLK(os.fstat(fd).st_mode) or os.major(os.fstat(fd).st_rdev) != _MAJOR:
        os.close(fd)
        raise InvalidRequest(f"{path} is no loop device")
    return fd


def _attribute(path: str, name: str) -> str:
    try:
        return Path("/sys/block", os.path.basename(path), name).read_text().rstrip("\n")
    except OSError:
        raise NotFound(f"{path} is not an attached loop device") from None


def _translated(error: OSError, message: str) -> DadiError:
    match error.errno:
        case errno.ENOENT | errno.ENXIO | errno.ENODEV:
            return NotFound(message)
        case errno.EPERM | errno.EACCES:
            return MissingFeature(message, hint="run as root, with access to /dev/loop*")
        case errno.EBUSY:
            return Conflict(message)
        case errno.EINVAL | errno.EBADF:
            return InvalidRequest(message)
        case _:
            return DadiError(message)
