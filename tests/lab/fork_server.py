"""The process that forks (`python -m tests.lab.fork_server`): imports our daemons once, becomes one for each wish.

What lives here: that process. Who talks to it, and how, is in tests/lab/forking.py. What never does: an import of the
lab, whose modules the daemons need not have.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import signal
import sys
import traceback
from typing import Any

PROGRAMS = ("dadi.node.main", "tests.lab.reading", "tests.lab.liar", "tests.lab.prefetching")
MORE = "DADI_LAB_PROGRAMS"
"""The environment's name for others that are to be imported, too."""
_CLONE_NEWNET = 0x40000000


def serve() -> None:
    """Fork what standard input asks for until it ends; then end what still runs by leaving it to the lab."""
    programs = (*PROGRAMS, *os.environ.get(MORE, "").split())
    modules = {name: importlib.import_module(name) for name in programs}
    gc.collect()
    gc.freeze()  # what is shared stays shared: no collection in a child touches it
    signal.signal(signal.SIGCHLD, lambda number, frame: _reap())
    _say({"ready": os.getpid()})
    for line in sys.stdin:
        wanted = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _become(modules.get(wanted["program"]), wanted)
        _say({"started": pid})


def _become(module: Any, wanted: dict[str, Any]) -> None:
    status = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        log = os.open(wanted["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        os.closerange(3, 1024)  # a forked process has no other descriptor of ours
        sys.stdin = open(0)  # the old one has read ahead
        os.environ.update(wanted["environment"])
        if wanted["namespace"] is not None:
            namespace = os.open(wanted["namespace"], os.O_RDONLY)
            if ctypes.CDLL(None, use_errno=True).setns(namespace, _CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), "setns", wanted["namespace"])
            os.close(namespace)
        module = module or importlib.import_module(wanted["program"])
        module.main(wanted["arguments"])
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _reap() -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        _say({"ended": pid, "status": os.waitstatus_to_exitcode(status)})


def _say(what: dict[str, Any]) -> None:
    os.write(1, json.dumps(what).encode() + b"\n")  # one write: a handler may come in between two


if __name__ == "__main__":
    serve()
