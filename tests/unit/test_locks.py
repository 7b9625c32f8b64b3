"""One process at a time in a directory, and the next one although those before it cannot end yet."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dadi import locks
from dadi.errors import Conflict
from tests.lab.waiting import wait_until


def test_a_lock_is_had_by_one_and_by_the_next_after_it(tmp_path: Path) -> None:
    lock = locks.take(tmp_path, "hint")
    with pytest.raises(Conflict, match="used by another process"):
        locks.take(tmp_path, "hint")
    assert not lock.predecessor_is_dying
    lock.release()
    locks.take(tmp_path, "hint").release()


DYING = """
import os, signal, subprocess, sys, threading, time
from pathlib import Path
from dadi import locks
lock = locks.take(Path(sys.argv[1]), "")
threading.Thread(target=lambda: (time.sleep(0.1), print("ready", flush=True), time.sleep(1000))).start()
import ctypes
ctypes.CDLL(None).pthread_exit(None)
"""


HOLDS = """
import sys, time
from pathlib import Path
from dadi import locks
lock = locks.take(Path(sys.argv[1]), "")
print(lock.predecessor_is_dying, flush=True)
time.sleep(1000)
"""


def test_a_process_that_is_dead_but_for_a_stuck_thread_does_not_keep_the_next_one_waiting(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", DYING, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        wait_until(lambda: Path(f"/proc/{holder.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z")
        lock = locks.take(tmp_path, "hint")
        assert lock.predecessor_is_dying
        with pytest.raises(Conflict):
            locks.take(tmp_path, "hint")
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    wait_until(lambda: not lock.predecessor_is_dying)
    lock.release()
    locks.take(tmp_path, "hint").release()


def test_after_two_deaths_in_a_row_both_are_watched(tmp_path: Path) -> None:
    """The one killed last is gone at once; the one before it hangs in the kernel, and may yet do something."""
    hangs = subprocess.Popen([sys.executable, "-c", DYING, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert hangs.stdout is not None
        hangs.stdout.readline()
        wait_until(lambda: Path(f"/proc/{hangs.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z")
        gone = subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE)
        assert gone.stdout is not None
        assert gone.stdout.readline() == b"True\n"
        gone.send_signal(signal.SIGKILL)
        gone.wait()
        gone.stdout.close()
        lock = locks.take(tmp_path, "hint")
        assert lock.predecessor_is_dying
    finally:
        hangs.kill()
        hangs.wait()
        hangs.stdout.close()
    wait_until(lambda: not lock.predecessor_is_dying)
    lock.release()
    locks.take(tmp_path, "hint").release()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", "lock.holder"]
