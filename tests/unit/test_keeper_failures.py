"""A keeper that answers nonsense: no descriptor stays open here, since one of /dev/fuse keeps a mount from ending."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dadi.errors import Unavailable, Unreachable
from dadi.keeper import client
from dadi.keeper.client import KeeperProcess

Answer = Callable[[socket.socket, int], object]


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    near.settimeout(10)
    with near, far:
        yield near, far


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (lambda far, fd: socket.send_fds(far, [b"Xwhat\0text"], [fd]), "no such answer"),
        (lambda far, fd: far.send(b"Ename without a descriptor\0text"), "no such answer"),
        (lambda far, fd: far.shutdown(socket.SHUT_WR), "it hung up"),
    ],
    ids=["another kind", "no descriptor", "hung up"],
)
def test_an_answer_that_is_none_leaves_no_descriptor_open_and_the_connection_ended(
    ends: tuple[socket.socket, socket.socket], answer: Answer, told: str
) -> None:
    near, far = ends
    keeper = KeeperProcess(Path("/run/keeper.sock"), near)
    before = descriptors()
    null = os.open(os.devnull, os.O_RDONLY)
    socket.send_fds(far, [b"Efirst\0text"], [null])
    answer(far, null)
    os.close(null)
    with pytest.raises(Unreachable, match=f"does not answer: {told}"):
        keeper.take()
    assert descriptors() == before
    assert keeper.has_ended()


def test_a_refusal_is_told_and_the_connection_goes_on(ends: tuple[socket.socket, socket.socket]) -> None:
    near, far = ends
    keeper = KeeperProcess(Path("/run/keeper.sock"), near)
    far.send(b"!too many")
    far.send(b".")
    with pytest.raises(Unavailable, match="refuses: too many"):
        keeper.drop("one")
    keeper.drop("one")
    assert not keeper.has_ended()


@pytest.mark.parametrize(
    ("error", "kind"),
    [(TimeoutError(), Unreachable), (BlockingIOError(), Unreachable), (PermissionError(), Unavailable)],
)
def test_a_keeper_that_is_there_and_silent_is_told_from_one_that_cannot_be_had(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: OSError, kind: type[Unavailable]
) -> None:
    """The first may hold mounts: no second one may be started in its place."""

    def connected(path: Path) -> socket.socket:
        raise error

    monkeypatch.setattr(client, "_connected", connected)
    with pytest.raises(Unavailable) as told:
        KeeperProcess.connect(tmp_path / "keeper.sock")
    assert type(told.value) is kind


def test_where_no_program_can_be_started_the_error_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(client.sys, "executable", str(tmp_path / "no python"))
    with pytest.raises(Unavailable, match="dadi-keeper cannot be started"):
        KeeperProcess.connect(tmp_path / "keeper.sock")
