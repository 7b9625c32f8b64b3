"""Many nodes start the same image at once, each on a host of its own behind a link of 100 Mbit/s, and things go wrong.

Real processes, the real kernel, Debian's registry, in network namespaces. Thirty-two nodes where everything goes well;
where something goes wrong fifteen, as two processors have only so much time. No failed read and no wrong byte is
allowed in any of them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.lab.cleanup import Lab, leak_check
from tests.lab.crowd import SLOW_LINK, Crowd, Liar, Member, Setting
from tests.lab.crowd_image import Material, material

pytestmark = [
    pytest.mark.root,
    pytest.mark.programs("docker-registry", "skopeo", "ip", "tc", "nsenter", "unshare"),
    pytest.mark.timeout(180),
]

ALL, SOME = 32, 15
MIDDLE = 0.3
"""What every other node has of the image when something goes wrong."""
READ_ONLY = "[backfill]\nenabled = false\n"
EXACT = 0.01


@pytest.fixture(scope="module")
def base() -> Iterator[Path]:
    # not pytest's own: the path of a unix socket must not be longer than 107 bytes
    with tempfile.TemporaryDirectory(prefix="crowd") as directory:
        yield Path(directory)


@pytest.fixture(scope="module")
def image(base: Path) -> Iterator[Material]:
    with Lab("image", base) as lab:
        yield material(lab, size=16 << 20)


@contextmanager
def crowd(base: Path, image: Material, **settings: object) -> Iterator[Crowd]:
    """Enter with all daemons ready; afterwards nothing is left of them."""
    with leak_check(base) as leaks:
        with Lab("crowd", base) as lab, Crowd(lab, image, Setting(node_sections=READ_ONLY, **settings)) as started:
            yield started
    assert leaks.found == []


def apart(crowd: Crowd, which: slice) -> tuple[list[Member], list[Member]]:
    """Return the members that `which` names, and the others."""
    chosen = crowd.members[which]
    return chosen, [member for member in crowd.members if member not in chosen]


def from_peers(crowd: Crowd, members: list[Member]) -> int:
    """Return how many bytes of chunks these nodes have from other nodes, as they say."""
    return sum(member.status()["peers"]["asking"]["peer_bytes"] for member in members)


def test_one_copy_leaves_the_registry_and_a_few_the_superpeer(base: Path, image: Material) -> None:
    with crowd(base, image, nodes=ALL, racks=4) as started:
        started.go()
        readings = started.readings()
        assert started.wrong(readings) == []
        assert started.registry_copies() == pytest.approx(1.0, abs=EXACT)
        assert 1.0 <= started.superpeer_copies() <= 4.0
        assert from_peers(started, started.members) >= (ALL - 4) * image.size


def test_nodes_that_read_ahead_do_not_take_a_queue_for_a_slow_parent(base: Path, image: Material) -> None:
    with crowd(base, image, nodes=SOME, mounting=False) as started:
        started.go()
        assert started.wrong(started.readings()) == []
        assert started.registry_copies() <= 1.0 + EXACT
        assert started.superpeer_copies() * image.size <= 4.0 * image.startup_bytes


def test_a_fifth_of_the_nodes_dies_in_the_middle(base: Path, image: Material) -> None:
    with crowd(base, image, nodes=SOME) as started:
        dying, others = apart(started, slice(0, None, 5))
        started.go()
        started.wait_until_stored(MIDDLE)
        for member in dying:
            member.kill()
        assert all(member.reading() is None for member in dying), "they had not read all of it yet"
        assert started.wrong(started.readings(others)) == []
        assert started.registry_copies() == pytest.approx(1.0, abs=EXACT)
        assert started.superpeer_copies() <= 4.0


def test_a_fifth_of_the_nodes_gets_a_hundredth_of_its_speed(base: Path, image: Material) -> None:
    with crowd(base, image, nodes=SOME) as started:
        slow, others = apart(started, slice(0, None, 5))
        started.go()
        started.wait_until_stored(MIDDLE)
        for member in slow:
            member.host.shape(SLOW_LINK)
        assert started.wrong(started.readings(others)) == []
        assert all(member.reading() is None for member in slow), "they crawl as the others are done"
        assert started.superpeer_copies() <= 4.0
        for member in slow:
            member.host.shape(started.setting.rate)
        assert started.wrong(started.readings(slow)) == []
        assert started.registry_copies() == pytest.approx(1.0, abs=EXACT)


def test_peers_that_lie_are_found_out_and_nobody_reads_what_they_say(base: Path, image: Material) -> None:
    with crowd(base, image, nodes=SOME) as started:
        liars: list[Liar] = [started.liar(f"liar{number}") for number in range(3)]
        started.go()
        assert started.wrong(started.readings()) == []
        assert sum(liar.lies for liar in liars) > 0
        wrong = sum(member.status()["peers"]["asking"]["wrong"] for member in started.members)
        assert wrong == sum(liar.lies for liar in liars), "each lie was seen, and nothing else was taken for one"
        assert wrong <= len(liars) * SOME * 4, "who has lied is not asked again and again"


def test_the_superpeer_is_killed_in_the_middle_and_comes_back(base: Path, image: Material) -> None:
    with crowd(base, image, nodes=SOME) as started:
        started.go()
        started.wait_until_stored(MIDDLE)
        before = started.registry_copies()
        started.restart_superpeer()
        readings = started.readings()
        assert before < 1.0, "it was in the middle"
        assert started.wrong(readings) == []
        assert started.registry_copies() <= 1.3, "what was under way came again (ranges of a MiB, four at a time)"


def test_one_of_two_superpeers_is_killed_for_good(base: Path, image: Material) -> None:
    with crowd(base, image, nodes=SOME, superpeers=2) as started:
        started.go()
        started.wait_until_stored(MIDDLE)
        served = [superpeer.status()["served"]["bytes"] for superpeer in started.superpeers]
        started.superpeers[served.index(max(served))].kill()
        assert started.wrong(started.readings()) == []
        assert started.registry_copies() <= 2.0 + EXACT, "the one that is left fetches what the other had, once"
