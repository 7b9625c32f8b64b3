"""How a FUSE connection begins: /dev/fuse, mount(2), and the agreement on version, flags and sizes (INIT).

The mount is made first; the kernel then sends INIT, and holds everything else back until that is answered.
"""

from __future__ import annotations

import os
import select
import tempfile
from pathlib import Path

from dadi.errors import Malformed, MissingFeature, Unavailable
from dadi.node import kernel
from fuse import wire

BACKGROUND = 4096
"""Asynchronous requests under way before the kernel holds further ones back, hits too: as many as 32 loop devices can
have waiting (128 each), since a hit must not stand behind reads that hang."""

# ASYNC_DIO: direct I/O on a loop device over one of our files has many reads under way, and none waits for another.
_FLAGS = wire.ASYNC_READ | wire.ASYNC_DIO | wire.PARALLEL_DIROPS | wire.MAX_PAGES | wire.INIT_EXT | wire.HAS_RESEND
# Files have mode 0400 and the kernel checks it: `allow_other` lets root in, whatever its groups are, and no one else.
_OPTIONS = "fd={},rootmode=40500,user_id=0,group_id=0,allow_other,default_permissions,max_read={}"
_PATIENCE = 10
"""Seconds until the kernel must have sent INIT; it does so at once."""


def connect(directory: Path, max_read: int) -> tuple[int, wire.Init]:
    """Mount on `directory`, agree on reads of up to `max_read` bytes; return /dev/fuse and what the kernel offered.

    Raises MissingFeature (no /dev/fuse, no privilege, kernel too old), NotFound (no such directory), Unavailable.
    """
    try:
        fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise MissingFeature(f"opening /dev/fuse: {error.strerror}", hint="run as root; modprobe fuse") from None
    try:
        flags = kernel.READ_ONLY | kernel.NO_SUID | kernel.NO_DEV | kernel.NO_EXEC
        kernel.mount("dadi", directory, "fuse.dadi", flags, _OPTIONS.format(fd, max_read))
        try:
            return fd, _negotiate(fd, max_read)
        except BaseException:
            kernel.umount(directory, force=True, detach=True)
            raise
    except BaseException:
        os.close(fd)
        raise


def offered() -> tuple[int, int]:
    """Return the version of the FUSE protocol that this kernel speaks, by mounting and unmounting at once.

    Raises as `connect` does.
    """
    with tempfile.TemporaryDirectory(prefix="dadi-fuse-") as directory:
        fd, init = connect(Path(directory), wire.PAGE)
        kernel.umount(directory, force=True, detach=True)
        os.close(fd)
        return init.major, init.minor


def _negotiate(fd: int, max_read: int) -> wire.Init:
    while True:
        if not select.select([fd], [], [], 10)[0]:
            raise Unavailable("the kernel did not begin to speak FUSE within 10 s", hint="very busy? see `dmesg`")
        request = wire.parse_request(os.read(fd, wire.REQUEST_SIZE))
        if request.opcode != wire.INIT:
            raise Malformed(f"the kernel began to speak FUSE with opcode {request.opcode}, not INIT")
        init = wire.parse_init(request.body)
        if init.major > wire.MAJOR:
            os.write(fd, wire.reply(request.unique, wire.major_reply()))
            continue
        if (init.major, init.minor) < (wire.MAJOR, wire.OLDEST_MINOR):
            raise MissingFeature(f"the kernel speaks FUSE {init.major}.{init.minor}, dadi needs 7.{wire.OLDEST_MINOR}",
                                 hint="boot a newer kernel; see `dadi doctor`")  # fmt: skip
        answer = wire.init_reply(init, flags=_FLAGS, max_readahead=max_read, max_read=max_read, background=BACKGROUND)
        os.write(fd, wire.reply(request.unique, answer))
        return init
