"""A real systemd, as process 1 of namespaces of its own, that runs units of a directory and nothing else.

What lives here: booting it and asking it. What never does: units. It sees the machine's files and network; its mounts,
processes, /run and what it keeps below `hidden` directories nobody else does. Mounts of others come and go there as
they do outside (slave propagation), or it would keep them from being freed. It is never shut down, only killed, and
everything in it with it: a shutdown would detach the loop devices of the whole machine.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.lab.cleanup import Lab
from tests.lab.processes import LabFailed
from tests.lab.waiting import wait_until

PROGRAM = "/lib/systemd/systemd"
_TARGETS = ("sysinit", "basic", "shutdown", "lab")
_CGROUPS = ("/sys/fs/cgroup", "/sys/fs/cgroup/unified")
_INNER = """\
set -e
umount -l /sys/fs/cgroup
mount -t cgroup2 none /sys/fs/cgroup
mount -t tmpfs tmpfs /run
mount --bind /proc/sys /proc/sys
mount -o remount,bind,ro /proc/sys
{hidden}
exec env -i container=lab PATH=/usr/sbin:/usr/bin:/sbin:/bin SYSTEMD_UNIT_PATH={units} SYSTEMD_PROC_CMDLINE= \
SYSTEMD_LOG_TARGET=console {program} --system --unit=lab.target --show-status=no
"""


def lacking() -> str:
    """Return what this machine lacks for it; empty if nothing."""
    if not Path(PROGRAM).exists():
        return f"{PROGRAM} is missing (Debian's systemd)"
    for program in ("unshare", "nsenter", "systemctl"):
        if shutil.which(program) is None:
            return f"{program} is missing"
    return "" if _cgroup2() else "no cgroup2 is mounted"


def _cgroup2() -> Path | None:
    return next((Path(each) for each in _CGROUPS if (Path(each) / "cgroup.procs").exists()), None)


class Systemd:
    """See the head of this file; a context manager. `hidden`: directories of its own, by where it has them."""

    def __init__(self, lab: Lab, units: Mapping[str, str], hidden: Mapping[str, Path]) -> None:
        self._lab, self._hidden = lab, hidden
        self._units, self._log = lab.root / "units", lab.root / "systemd.log"
        self._units.mkdir()
        targets = {f"{name}.target": "[Unit]\nDefaultDependencies=no\n" for name in _TARGETS}
        for name, text in {**targets, **units}.items():
            (self._units / name).write_text(text)
        cgroup = _cgroup2()
        assert cgroup is not None, lacking()
        self._cgroup = cgroup / lab.root.name
        self.pid = 0

    def __enter__(self) -> Systemd:
        binds = "\n".join(f"mount --bind {source} {place}" for place, source in self._hidden.items())
        inner = self._lab.root / "inner"
        inner.write_text(_INNER.format(hidden=binds, units=self._units, program=PROGRAM))
        self._cgroup.mkdir()
        command = (f"echo $$ > {self._cgroup}/cgroup.procs; exec unshare --cgroup --pid --mount --uts --ipc "
                   f"--propagation slave --fork --kill-child --mount-proc sh {inner}")  # fmt: skip
        with self._log.open("wb") as log:
            self._popen = subprocess.Popen(["sh", "-c", command], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                           env=self._lab.environment, start_new_session=True)  # fmt: skip
        self._lab.children.append(self._popen)
        try:
            wait_until(self._booted, 20)
        except BaseException as error:
            self.__exit__()
            if isinstance(error, TimeoutError):
                raise LabFailed(f"systemd does not boot: {self._log.read_text(errors='replace')[-2000:]}") from None
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._popen.kill()  # --kill-child: and with it process 1, and with that all others
        self._popen.wait()
        with contextlib.suppress(TimeoutError):
            wait_until(self._is_gone, 20)

    def _is_gone(self) -> bool:
        for directory, _, _ in os.walk(self._cgroup, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(directory)
        return not self._cgroup.exists()

    def _booted(self) -> bool:
        children = Path(f"/proc/{self._popen.pid}/task/{self._popen.pid}/children")
        with contextlib.suppress(OSError):
            found = children.read_text().split()
            self.pid = int(found[0]) if found else 0
        if self._popen.poll() is not None:
            raise TimeoutError
        return bool(self.pid) and self.run("systemctl", "is-active", "lab.target", check=False) == "active"

    def inside(self, path: Path | str) -> Path:
        """Return the path by which this process sees what is there inside."""
        return Path(f"/proc/{self.pid}/root{path}")

    def run(self, *command: str, check: bool = True) -> str:
        """Run a command inside; return what it printed. Raises LabFailed if it fails (`check`)."""
        done = subprocess.run(["nsenter", "-t", str(self.pid), "-m", "-p", "-C", *command], capture_output=True,
                              text=True, check=False, timeout=120, env=self._lab.environment)  # fmt: skip
        if check and done.returncode:
            raise LabFailed(f"{' '.join(command)}: {done.stderr.strip()}\n{self.log()}")
        return done.stdout.strip()

    def log(self) -> str:
        return self._log.read_text(errors="replace")[-3000:]
