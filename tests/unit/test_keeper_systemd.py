"""systemd's descriptor store, by a socket that stands in for systemd: nothing is lost, whenever somebody is killed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dadi.errors import Unavailable
from dadi.fallbacks import Fallbacks
from dadi.keeper.store import close_all
from dadi.keeper.systemd import SystemdStore
from dadi.node.handover import Handover


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for fd in ends:
        with contextlib.suppress(OSError):
            os.close(fd)


class Systemd:
    """Holds descriptors as systemd does: a name may be there twice, what is held already is not held again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.held: list[tuple[str, int]] = []
        self.told: list[str] = []
        self.environment = {"NOTIFY_SOCKET": str(path), "FDSTORE": "8"}
        self.fewest = 99
        """The least that was held under one name since there was any."""

    def __enter__(self) -> Systemd:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self.path))
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
            end.connect(str(self.path))
            end.send(b"END=1")
        self._thread.join()
        self._socket.close()
        self.path.unlink()

    def _run(self) -> None:
        while True:
            message, fds, _, _ = socket.recv_fds(self._socket, 1000, 4)
            fields = dict(line.split("=", 1) for line in message.decode().split("\n"))
            if "END" in fields:
                return
            name = fields.get("FDNAME", "")
            self.told.append(" ".join([next(iter(fields)), name]).strip())
            if "FDSTOREREMOVE" in fields:
                for each, fd in [pair for pair in self.held if pair[0] == name]:
                    self.held.remove((each, fd))
                    os.close(fd)
                self.fewest = min(self.fewest, sum(not each.endswith(".text") for each, _ in self.held))
            elif "FDSTORE" in fields and not any(fcntl.fcntl(fd, 1027, fds[0]) for _, fd in self.held):
                self.held.insert(0, (name, fds.pop()))
            for fd in fds:
                os.close(fd)

    def next_process(self, first: int = 200) -> dict[str, str]:
        """Put what is held where the next process finds it; return its environment."""
        for number, (_, fd) in enumerate(self.held, first):
            os.dup2(fd, number)
        names = ":".join(name for name, _ in self.held)
        return {**self.environment, "LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(self.held)),
                "LISTEN_FDNAMES": names}  # fmt: skip

    def let_go(self) -> None:
        for _, fd in self.held:
            os.close(fd)


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Systemd]:
    with Systemd(tmp_path / "notify") as systemd:
        yield systemd
    systemd.let_go()


def test_systemd_holds_the_descriptor_and_its_text(systemd: Systemd, pipe: tuple[int, int]) -> None:
    assert SystemdStore.offered(systemd.environment)
    store = SystemdStore(systemd.environment)
    assert store.take() == {}
    store.put("fuse", pipe[0], b"text")
    store.close()
    assert systemd.told == ["FDSTORE dadi-fuse.1.text", "FDSTORE dadi-fuse.1", "BARRIER"]
    after = SystemdStore(systemd.next_process(), 200)
    taken = after.take()
    assert taken["fuse"][1] == b"text"
    os.write(pipe[1], b"hello")
    assert os.read(taken["fuse"][0], 10) == b"hello"
    close_all(taken)
    after.drop("fuse")
    assert systemd.held == []


def test_what_systemd_holds_is_not_let_go_of_to_be_held_again(systemd: Systemd, pipe: tuple[int, int]) -> None:
    """It says that it has it at each start and stop; whoever is killed then must not lose it."""
    store = SystemdStore(systemd.environment)
    store.put("fuse", pipe[0], b"text")
    told = list(systemd.told)
    store.put("fuse", pipe[0], b"text")
    store.close()
    after = SystemdStore(systemd.next_process(), 200)
    taken = after.take()
    after.put("fuse", taken["fuse"][0], b"text")
    after.put("fuse", taken["fuse"][0], b"new")
    close_all(taken)
    assert systemd.told == told
    taken = after.take()
    assert [text for _, text in taken.values()] == [b"new"]
    close_all(taken)
    after.close()
    again = SystemdStore(systemd.next_process(), 200)
    taken = again.take()
    assert [text for _, text in taken.values()] == [b"new"], "the text is replaced where it is held"
    close_all(taken)
    again.close()


def test_at_every_moment_systemd_holds_the_old_one_or_the_new_one(systemd: Systemd, pipe: tuple[int, int]) -> None:
    store = SystemdStore(systemd.environment)
    store.put("fuse", pipe[0], b"old")
    store.put("fuse", pipe[1], b"new")
    assert systemd.fewest == 1
    assert sorted(name for name, _ in systemd.held) == ["dadi-fuse.2", "dadi-fuse.2.text"]
    store.close()


def test_of_what_a_killed_process_left_twice_the_last_that_is_whole_is_meant(
    systemd: Systemd, pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SystemdStore(systemd.environment)
    store.put("fuse", pipe[0], b"old")
    monkeypatch.setattr(SystemdStore, "_forget", lambda self: None)  # it is killed before it gets there
    store.put("fuse", pipe[1], b"new")
    store.close()
    monkeypatch.undo()
    systemd.held.insert(0, ("dadi-fuse.3.text", os.memfd_create("half")))
    after = SystemdStore(systemd.next_process(), 200)
    taken = after.take()
    assert [text for _, text in taken.values()] == [b"new"]
    after.put("fuse", taken["fuse"][0], b"new")
    close_all(taken)
    assert sorted(name for name, _ in systemd.held) == ["dadi-fuse.2", "dadi-fuse.2.text"]
    after.close()


def test_what_could_not_be_said_is_said_again_under_the_same_name(tmp_path: Path, pipe: tuple[int, int]) -> None:
    systemd = Systemd(tmp_path / "notify")
    store = SystemdStore(systemd.environment)
    with pytest.raises(Unavailable, match="notification socket"):
        store.put("fuse", pipe[0], b"text")
    with systemd:
        store.put("fuse", pipe[0], b"text")
    assert systemd.told == ["FDSTORE dadi-fuse.1.text", "FDSTORE dadi-fuse.1", "BARRIER"]
    systemd.let_go()
    store.close()


def test_what_systemd_gave_is_given_once_and_never_closed_when_the_numbers_mean_something_else(
    systemd: Systemd, pipe: tuple[int, int], tmp_path: Path
) -> None:
    store = SystemdStore(systemd.environment)
    store.put("fuse", pipe[0], b"text")
    store.close()
    environment = systemd.next_process()
    SystemdStore(environment, 200).close()
    assert not any(name.startswith("LISTEN") for name in environment)
    others = [os.dup2(pipe[1], number) for number in (200, 201)]
    try:
        again = SystemdStore(environment, 200)
        assert again.take() == {}
        again.drop("fuse")
        again.close()
        for fd in others:
            os.fstat(fd)
    finally:
        for fd in others:
            os.close(fd)


def test_descriptors_that_are_not_there_are_none_that_were_held(tmp_path: Path) -> None:
    environment = {"NOTIFY_SOCKET": str(tmp_path / "n"), "LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "2",
                   "LISTEN_FDNAMES": "dadi-fuse.1:dadi-fuse.1.text"}  # fmt: skip
    assert SystemdStore(environment, 900).take() == {}


async def test_a_systemd_that_does_not_hear_us_for_a_moment_is_not_asked_anew_what_it_gave(
    systemd: Systemd, pipe: tuple[int, int], tmp_path: Path
) -> None:
    handover = Handover(tmp_path, Fallbacks(), systemd.environment)
    store = await handover._open()
    handover._hang_up()
    assert await handover._open() is store
    await handover.close()


@pytest.mark.parametrize("environment", [{}, {"NOTIFY_SOCKET": "/x"}, {"NOTIFY_SOCKET": "/x", "FDSTORE": "0"},
                                         {"FDSTORE": "9"}, {"NOTIFY_SOCKET": "/x", "FDSTORE": "yes"},
                                         {"NOTIFY_SOCKET": "/x", "FDSTORE": "3"}])  # fmt: skip
def test_systemd_is_used_only_where_it_offers_to_hold(environment: dict[str, str]) -> None:
    assert not SystemdStore.offered(environment)


def test_systemd_that_is_gone_is_said(tmp_path: Path, pipe: tuple[int, int]) -> None:
    store = SystemdStore({"NOTIFY_SOCKET": str(tmp_path / "gone"), "FDSTORE": "8"})
    with pytest.raises(Unavailable, match="notification socket"):
        store.put("fuse", pipe[0], b"")
    store.close()
