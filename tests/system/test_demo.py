"""The demo runs to its end, and however it ends, nothing of it is left."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import images
from tests.lab.cleanup import leak_check

pytestmark = [
    pytest.mark.root,
    pytest.mark.programs("docker-registry", "skopeo", "containerd", "ctr", "runc", "tc", "nsenter"),
    pytest.mark.timeout(300),
]
REPOSITORY = Path(__file__).parents[2]
WHOLE = ("-m", "demo")
SHORT = ("-c", """
import sys
from demo import __main__ as demo, story
from tests.lab.starts import Start
story.Story._first_sight = story.Story._indexed = lambda *arguments: Start(1.0, 1.0, "", 1, 1)
demo.main(sys.argv[1:])
""")  # fmt: skip
"""Without acts 2 and 3, which take half of the time and have cleared away their own when act 4 begins."""


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a short name: it ends up in the paths of unix sockets."""
    images.host_python()  # made here, so that no test's time goes into it
    return tmp_path_factory.mktemp("d")


@contextlib.contextmanager
def demo(place: Path, story: tuple[str, ...] = WHOLE) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, *story, "--image", "host", "--rate", "1gbit"]
    environment = {**os.environ, "TMPDIR": str(place)}
    with subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_it_tells_the_whole_story_and_clears_away(place: Path) -> None:
    with leak_check(place) as leaks, demo(place) as process:
        told, _ = process.communicate()
    assert process.returncode == 0, told
    for part in (
        "pulled and unpacked", "First sight", "Indexed", "mounted:", "the program says: ready:", "times sooner",
        "local: the daemon is no longer in the read path", "all of it read", "namespace is left",
    ):  # fmt: skip
        assert part in told
    assert leaks.found == []


@pytest.mark.parametrize(
    ("moment", "number", "story"),
    [
        ("pushing the image", signal.SIGTERM, WHOLE),
        ("containerd pulls", signal.SIGINT, WHOLE),
        ("dadi mount", signal.SIGTERM, WHOLE),
        ("mounted:", signal.SIGINT, WHOLE),
        ("4  From then on", signal.SIGHUP, SHORT),
        ("The rest arrives", signal.SIGINT, SHORT),
        ("dadi-node is dead", signal.SIGTERM, SHORT),
    ],
    ids=lambda value: ("" if value is WHOLE else "short") if isinstance(value, tuple) else None,
)
def test_interrupted_at_any_moment_it_leaves_nothing(
    place: Path, moment: str, number: signal.Signals, story: tuple[str, ...]
) -> None:
    with leak_check(place) as leaks, demo(place, story) as process:
        assert process.stdout is not None
        told = ""
        for line in process.stdout:
            told += line
            if moment in line:
                break
        process.send_signal(number)
        told += process.stdout.read()
        process.wait()
    assert "Interrupted" in told, told
    assert process.returncode == (130 if number == signal.SIGINT else 128 + number), told
    assert leaks.found == []
