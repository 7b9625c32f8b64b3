"""How many starts of an image superpeers want to hear of: a few in a minute, however many nodes start it. Pure.

    a window    `_LENGTH` seconds from the first question on, for each image by itself
    asked       a node that asks for the trace hears whether its start is to be told of: the first 2 × `most`, as some
                of them never start, or have all of the image already
    taken       of the recordings that come then `most`; the rest is answered and thrown away

The 10,000th node of a flash crowd tells nothing new, and to merge a recording takes milliseconds.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import msgspec

_LENGTH = 60.0
_MOST_IMAGES = 4096


class _Window(msgspec.Struct):
    begun: float
    asked: int = 0
    taken: int = 0


class Sampling:
    """See the head of this file. `most`: recordings of an image in a window; `clock`: seconds."""

    def __init__(self, most: int, clock: Callable[[], float]) -> None:
        self._most = most
        self._clock = clock
        self._windows: OrderedDict[str, _Window] = OrderedDict()

    def __repr__(self) -> str:
        return f"Sampling({len(self._windows)} images)"

    def ask(self, image: str) -> bool:
        """Say whether a node that is about to start an image should tell of it."""
        window = self._window(image)
        window.asked += 1
        return window.asked <= 2 * self._most and window.taken < self._most

    def take(self, image: str) -> bool:
        """Say whether a recording that has come is taken."""
        window = self._window(image)
        window.taken += 1
        return window.taken <= self._most

    def _window(self, image: str) -> _Window:
        now = self._clock()
        window = self._windows.get(image)
        if window is None or now - window.begun >= _LENGTH:
            window = self._windows[image] = _Window(now)
            self._windows.move_to_end(image)
            if len(self._windows) > _MOST_IMAGES:
                self._windows.popitem(last=False)
        return window
