"""The load of plain pulls: container engines that pull whole images again and again through proxies, and check them.

What lives here: clients that know HTTP and digests and nothing of dadi, each in a thread, and what they count. What
never does: what may be counted (frame.py), what is done to whom they ask (pulls.py).

    a pull    manifest by tag, config, layers, one connection; each body against its digest, the manifest against what
              the registry itself has. Right if all of it came; failed at its first request that was not answered
    wrong     bytes that came as a whole, with the length that was announced, and are not what was asked for: an
              engine would find out too, but it is what a proxy must never say
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from urllib.parse import quote

from tests.faults.load import Counts
from tests.lab.pulling import ACCEPT
from tests.lab.registry import DockerRegistry

Door = Callable[[], str]
"""Where a proxy listens now, as HOST:PORT; raises OSError while it does not."""
_STALL = 1.0
_AGAIN = 0.1
"""Seconds until an engine that failed tries again; a real one goes to the registry first."""


@dataclass(frozen=True)
class PulledImage:
    """An image in the registry: how it is asked for, and what must come."""

    name: str
    tag: str
    registry: str
    """As the proxy is told it: through the door."""
    manifest: str
    blobs: tuple[tuple[str, int], ...]
    """Digest and size of config and layers."""

    @property
    def size(self) -> int:
        return sum(size for _, size in self.blobs)


def image_at(registry: DockerRegistry, reference: str) -> PulledImage:
    """Return what the registry itself has behind HOST/NAME:TAG."""
    host, _, rest = reference.partition("/")
    name, _, tag = rest.rpartition(":")
    connection = http.client.HTTPConnection(registry.host, timeout=20)
    with contextlib.closing(connection):
        connection.request("GET", f"/v2/{name}/manifests/{tag}", headers={"Accept": ACCEPT})
        raw = connection.getresponse().read()
    manifest = json.loads(raw)
    blobs = tuple((wanted["digest"], wanted["size"]) for wanted in (manifest["config"], *manifest["layers"]))
    return PulledImage(name, tag, host, f"sha256:{sha256(raw).hexdigest()}", blobs)


class _Failed(Exception):
    """A request that was not answered as it should be; the text is counted."""


class _Wrong(Exception):
    """A whole answer with other bytes."""


class Engines:
    """Some engines for each door, on the same images; a context manager. What they count is as of `load.Load`.

    `once`: each pulls each image until it has had it once, then rests; else again and again.
    """

    def __init__(self, doors: Sequence[Door], images: Sequence[PulledImage], *, engines: int = 2, pace: float = 0.02,
                 patience: float = 60.0, once: bool = False) -> None:  # fmt: skip
        self.images = list(images)
        self.reasons: Counter[str] = Counter()
        """What went wrong, how often: a status with its code, "cut", "refused" …"""
        self.lost = 0
        """Pulls that failed of what the same engine had had before from the same proxy."""
        self.longest_failure = 0.0
        self._once, self._pace, self._patience = once, pace, patience
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._counts = Counts()
        self._began: dict[int, float] = {}
        self._said: list[str] = []
        self._threads = [
            threading.Thread(target=self._run, args=(number, door), name=f"engine {number}", daemon=True)
            for number, door in enumerate(door for door in doors for _ in range(engines))
        ]
        self._done = [0] * len(self._threads)
        self._had: list[set[str]] = [set() for _ in self._threads]

    def __enter__(self) -> Engines:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Let each end with the pull that it is at."""
        self._stop.set()
        deadline = time.monotonic() + self._patience
        for thread in self._threads:
            thread.join(max(0.1, deadline - time.monotonic()))
            if thread.is_alive():
                with self._lock:
                    self._counts += Counts(failed=1)
                    self._said.append(f"{thread.name} waits for ever")

    @property
    def running(self) -> bool:
        return not self._stop.is_set() and not self._once

    @property
    def have_all(self) -> bool:
        """Whether each engine has had each image."""
        return all(len(had) == len(self.images) for had in self._had)

    def done(self) -> list[int]:
        """Return for each engine how many pulls it has behind it."""
        return list(self._done)

    def counts(self) -> Counts:
        """Return what has been counted so far; a pull under way counts for `longest` and `stalled` too."""
        now = time.monotonic()
        with self._lock:
            total = self._counts
            for began in self._began.values():
                took = now - began
                total += Counts(longest=took, stalled=took if took > _STALL else 0.0)
        return total

    def errors(self) -> str:
        """Return what was said of pulls that failed."""
        return "\n".join(self._said[-20:])

    def _run(self, number: int, door: Door) -> None:
        turns = itertools.cycle(self.images[number % len(self.images) :] + self.images[: number % len(self.images)])
        while not self._stop.is_set() and not (self._once and len(self._had[number]) == len(self.images)):
            image = next(turns)
            if self._once and image.name in self._had[number]:
                continue
            self._began[number] = began = time.monotonic()
            failed = wrong = ""
            try:
                _pull(door(), image, self._patience)
            except _Wrong as error:
                wrong = str(error)
            except (_Failed, OSError, http.client.HTTPException) as error:
                failed = str(error) if isinstance(error, _Failed) else _kind(error)
            took = time.monotonic() - began
            with self._lock:
                del self._began[number]
                self._count(number, image, failed, wrong, took)
            self._stop.wait(_AGAIN if failed or wrong else self._pace)

    def _count(self, number: int, image: PulledImage, failed: str, wrong: str, took: float) -> None:
        self._counts += Counts(tried=1, failed=bool(failed), wrong=bool(wrong), right=not (failed or wrong),
                               stalled=took if took > _STALL else 0.0, longest=took)  # fmt: skip
        self._done[number] += 1
        if failed or wrong:
            self.reasons[failed.partition(":")[0] or "wrong"] += 1
            self._said.append(f"engine {number}, {image.name}, after {took:.1f} s: {failed or wrong}")
            self.lost += image.name in self._had[number]
            self.longest_failure = max(self.longest_failure, took)
        else:
            self._had[number].add(image.name)


def _pull(address: str, image: PulledImage, patience: float) -> None:
    connection = http.client.HTTPConnection(address, timeout=patience)
    ns = f"?ns={quote(image.registry)}"
    with contextlib.closing(connection):
        raw = _get(connection, f"/v2/{image.name}/manifests/{image.tag}{ns}", {"Accept": ACCEPT})
        if f"sha256:{sha256(raw).hexdigest()}" != image.manifest:
            raise _Wrong(f"another manifest: {raw[:200]!r}")
        for digest, size in image.blobs:
            data = _get(connection, f"/v2/{image.name}/blobs/{digest}{ns}", {})
            if len(data) != size or f"sha256:{sha256(data).hexdigest()}" != digest:
                raise _Wrong(f"{len(data)} other bytes for {digest}")


def _get(connection: http.client.HTTPConnection, path: str, headers: dict[str, str]) -> bytes:
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    data = answer.read()  # IncompleteRead where it is shorter than announced
    if answer.status == 200:
        return data
    try:
        (error,) = json.loads(data)["errors"]
        told = f"{error['code']}: {error['message']} ({error['detail']})"
        helps = error["code"] and error["message"] and error["detail"]
    except (ValueError, KeyError, TypeError):
        told, helps = repr(data[:200]), False
    raise _Failed(f"{answer.status} {told}" if helps else f"{answer.status} WITHOUT A HINT: {told}")


def _kind(error: Exception) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "refused"
    if isinstance(error, TimeoutError):
        return "silence"
    return f"cut: {type(error).__name__} {error}"[:200]
