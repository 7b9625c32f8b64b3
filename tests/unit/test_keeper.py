"""`dadi-keeper`: descriptors go in and come back; and what a successor knows of a mount that was left to it."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dadi.errors import Malformed, Unavailable, Unreachable, Unsupported
from dadi.fallbacks import Fallbacks
from dadi.keeper import client, process
from dadi.keeper.client import KeeperProcess
from dadi.keeper.store import close_all
from dadi.node.handover import Handover
from fuse import device, state, wire
from tests.lab.waiting import wait_until


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "keeper.sock"


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for fd in ends:
        with contextlib.suppress(OSError):
            os.close(fd)


def pid_at(place: Path) -> int:
    """Return the process that listens; SO_PEERCRED would name the one that has gone into the background."""
    found = subprocess.run(["pgrep", "-f", str(place)], capture_output=True, text=True, check=False).stdout.split()
    return int(found[0]) if found else 0


def test_what_is_held_outlives_its_owner_and_the_keeper_ends_when_it_holds_nothing(
    place: Path, pipe: tuple[int, int]
) -> None:
    first = KeeperProcess.connect(place)
    first.put("pipe", pipe[0], b'{"version": 1}')
    os.close(pipe[0])
    os.write(pipe[1], b"hello")
    first.close()
    second = KeeperProcess.connect(place)
    taken = second.take()
    fd, text = taken["pipe"]
    assert (os.read(fd, 10), text) == (b"hello", b'{"version": 1}')
    assert not os.get_inheritable(fd)
    close_all(taken)
    again = second.take()
    assert list(again) == ["pipe"], "what was taken stays held"
    close_all(again)
    keeper = pid_at(place)
    second.drop("pipe")
    second.drop("pipe")
    assert not second.has_ended()
    second.close()
    wait_until(lambda: not os.path.exists(f"/proc/{keeper}"))
    assert not place.exists()
    with pytest.raises(BrokenPipeError):
        os.write(pipe[1], b"nobody has the other end")


def test_the_same_name_replaces_what_was_held(place: Path, pipe: tuple[int, int]) -> None:
    keeper = KeeperProcess.connect(place)
    keeper.put("it", pipe[0], b"one")
    keeper.put("it", pipe[1], b"two")
    taken = keeper.take()
    assert [text for _, text in taken.values()] == [b"two"]
    close_all(taken)
    keeper.drop("it")
    keeper.close()


def test_a_keeper_that_is_killed_is_noticed_and_another_one_can_be_had(place: Path, pipe: tuple[int, int]) -> None:
    keeper = KeeperProcess.connect(place)
    keeper.put("it", pipe[0], b"")
    assert not keeper.has_ended()
    os.kill(pid_at(place), 9)
    wait_until(keeper.has_ended)
    with pytest.raises(Unavailable, match="does not answer"):
        keeper.take()
    keeper.close()
    another = KeeperProcess.connect(place)
    assert another.take() == {}
    another.close()


def test_nobody_else_can_reach_it_and_no_signal_for_our_group_does(place: Path, pipe: tuple[int, int]) -> None:
    keeper = KeeperProcess.connect(place)
    assert place.stat().st_mode & 0o777 == 0o600
    assert os.getsid(pid_at(place)) not in (os.getsid(0), 0)
    assert os.getpgid(pid_at(place)) != os.getpgid(0)
    keeper.close()


@pytest.mark.parametrize("packet", [b"?", b"S", b"Sname\0text", b"S\0text", b"L" * 50_000])
def test_what_makes_no_sense_is_refused_and_harms_nobody(place: Path, packet: bytes) -> None:
    keeper = KeeperProcess.connect(place)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
        stranger.connect(str(place))
        stranger.send(packet)
        assert stranger.recv(100).startswith(b"!")
    assert keeper.take() == {}
    keeper.close()


def test_it_is_bounded_small_and_started_at_once(place: Path, pipe: tuple[int, int]) -> None:
    began = time.monotonic()
    keeper = KeeperProcess.connect(place)
    took = time.monotonic() - began
    for number in range(process.MAX_HELD):
        keeper.put(f"fd{number}", pipe[0], b"x" * (32 << 10))
    with pytest.raises(Unavailable, match="too much"):
        keeper.put("one more", pipe[0], b"")
    status = Path(f"/proc/{pid_at(place)}/status").read_text()
    (memory,) = [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")]
    assert memory < 24 << 10, "KiB"
    assert took < 5, "seconds; 0.05 on a machine that does nothing else"
    for number in range(process.MAX_HELD):
        keeper.drop(f"fd{number}")
    keeper.close()


def test_where_it_cannot_listen_the_error_says_why(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="dadi-keeper did not start"):
        KeeperProcess.connect(tmp_path / "none" / "keeper.sock")


def test_after_a_question_without_an_answer_none_is_taken_for_that_of_another(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_PATIENCE", 0.2)
    go_on = threading.Event()
    heard = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(place))
        listener.listen()

        def stopped_for_a_while() -> None:
            peer, _ = listener.accept()
            with peer, contextlib.suppress(OSError):
                heard.append(peer.recv(100))
                go_on.wait(10)
                peer.send(b"!no room")
                while packet := peer.recv(100):
                    heard.append(packet)

        thread = threading.Thread(target=stopped_for_a_while)
        thread.start()
        keeper = KeeperProcess.connect(place)
        with pytest.raises(Unreachable, match="does not answer"):
            keeper.take()
        go_on.set()
        with pytest.raises(Unreachable, match="does not answer"):
            keeper.drop("fuse")
        assert keeper.has_ended(), "who watches it looks for another one"
        keeper.close()
        thread.join()
    assert heard == [b"L"]


async def test_where_nothing_is_mounted_a_silent_keeper_does_not_keep_a_node_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_PATIENCE", 0.1)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "keeper.sock"))
        listener.listen()
        fallbacks = Fallbacks()
        handover = Handover(tmp_path, fallbacks, {})
        assert await handover.take(tmp_path / "fuse") is None
        assert [row["kind"] for row in fallbacks.statistics()] == ["FUSE mount not kept over a restart"]
        await handover.close()


# ---- what a successor knows


OFFERED = wire.Init(7, 41, 8 << 20, wire.HAS_RESEND | 5)


def test_a_state_comes_back_as_it_was() -> None:
    back = state.decode(state.encode(OFFERED, 1 << 20, "0:55"))
    assert (back.offered, back.max_read, back.device, back.version) == (OFFERED, 1 << 20, "0:55", state.VERSION)


def test_a_newer_version_is_refused_and_keys_that_it_adds_are_not() -> None:
    text = state.encode(OFFERED, 1 << 20, "0:55")
    with pytest.raises(Unsupported, match="has version 2; this dadi knows version 1"):
        state.decode(b'{"version": 2, "all": "else"}')
    with pytest.raises(Unsupported, match="has version 3, for version 2 or newer; this dadi knows version 1"):
        state.decode(b'{"version": 3, "since": 2, "all": "else"}')
    assert state.decode(text[:-1] + b', "more": [1]}') == state.decode(text)


@pytest.mark.parametrize("text", [b"", b"\xff", b"[]", b"{}", b'{"version": 1}', b'{"version": "1"}',
                                  state.encode(OFFERED, 4097, "0:55"), state.encode(OFFERED, 0, "0:55")])  # fmt: skip
def test_a_damaged_state_is_an_error_that_says_what_follows(text: bytes) -> None:
    with pytest.raises(Malformed) as error:
        state.decode(text)
    assert "mounted anew" in (error.value.hint or "")


def test_ids_are_the_same_in_every_process_and_fit_a_cookie() -> None:
    assert device.id_of("a" * 64) == 4610571800015542637
    for number in range(1000):
        assert 1 << 61 <= device.id_of(f"{number:064x}") < 1 << 62
