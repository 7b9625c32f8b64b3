"""A daemon's command line: what cannot be is a sentence on standard error and exit status 1, never a trace."""

from __future__ import annotations

import pytest
from click.testing import CliRunner, Result

from dadi import program
from dadi.errors import Conflict
from registry_proxy.config import ProxyConfig


def run_into(error: Exception, monkeypatch: pytest.MonkeyPatch) -> Result:
    async def until_stopped(*arguments: object) -> None:
        raise error

    async def serve(*arguments: object) -> None: ...

    monkeypatch.setattr(program, "_until_stopped", until_stopped)  # it changes limits and signals of this process
    monkeypatch.setattr(program.log, "configure", lambda *arguments: None)
    return CliRunner().invoke(program.daemon("dadi-lab", "For tests.", ProxyConfig, serve), [])


def test_an_error_of_ours_is_said_with_its_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    done = run_into(Conflict("the port is taken", hint="name another"), monkeypatch)
    assert (done.exit_code, done.output) == (1, "dadi-lab: the port is taken (name another)\n")


def test_who_may_not_use_its_directories_is_told_which_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    done = run_into(PermissionError(13, "Permission denied", "/run/dadi"), monkeypatch)
    assert done.exit_code == 1
    assert done.output.startswith("dadi-lab: /run/dadi: Permission denied (run it as root, or as who owns its dir")
