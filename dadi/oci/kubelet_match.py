"""Kubelet's rules: which images a credential provider is for, and how long what it says is good. Pure.

    pattern      host ["." label]* [":" port] [path]
    label        matched by itself, part by part between the dots; "*" is any number of characters
    port         must be the same: none in the pattern means none in the image's name
    path         how the image's path begins, by characters: /team is for /team/a and for /teamwork too

    *.registry.io       is for a.registry.io/x, not for a.b.registry.io/x, nor for registry.io/x
    registry.io/team    is for registry.io/team/app

An image's name is registry/repository, without tag. (Kubernetes, "Configure a kubelet image credential provider",
"Configure image matching"; pkg/credentialprovider: URLsMatch, and BasicDockerKeyring for the answers' keys.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

from dadi.errors import InvalidRequest

T = TypeVar("T")

_PATTERN = re.compile(r"(?P<host>[a-z0-9._~*-]+|\[[0-9a-f:.]+\])(?::(?P<port>[0-9]*))?(?P<path>/[^?#\s]*)?", re.I)
_MAX_PATTERN = 1000
_DURATION = re.compile(r"[+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:ns|us|µs|μs|ms|s|m|h)")
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_HUB, _HUB_KEY = ("docker.io/", "index.docker.io/"), "index.docker.io"
_Parts = tuple[list[str], str, str]


def check(pattern: str) -> None:
    """Raise InvalidRequest for what can be no pattern."""
    _parts(pattern)


def matches(pattern: str, image: str) -> bool:
    """Whether a pattern is for an image; raise InvalidRequest for what can be no pattern."""
    labels, port, path = _parts(pattern)
    wanted, wanted_port, wanted_path = _parts(image)
    if port != wanted_port or len(labels) != len(wanted) or not wanted_path.startswith(path):
        return False
    return all(map(_glob, labels, wanted))


def find(answers: Mapping[str, T], image: str) -> T | None:
    """Return what the most special of the keys that are for an image leads to; keys that make no sense are for none."""
    keys: dict[str, T] = {}
    for spelt, value in answers.items():
        host, slash, path = re.sub(r"\Ahttps?://", "", spelt).partition("/")
        path = slash + path
        if path.startswith(("/v1/", "/v2/")):
            path = path[3:]
        keys[host + (path if path != "/" else "")] = value
    for key in sorted(keys, reverse=True):
        try:
            if matches(key, image):
                return keys[key]
        except InvalidRequest:
            continue
    return keys.get(_HUB_KEY) if image.startswith(_HUB) else None


def seconds(duration: str) -> float:
    """Return the seconds in Go's way to write them ("12h", "1h30m", "0"); raise InvalidRequest."""
    if duration in ("0", "+0", "-0"):
        return 0.0
    place, total = 0, 0.0
    while len(duration) <= 100 and (match := _DURATION.match(duration, place)):
        if place and match[0].startswith("+"):
            break
        unit = match[0].lstrip("+0123456789.")
        total += float(match[0].removesuffix(unit)) * _UNITS[unit]
        place = match.end()
        if place == len(duration):
            return total
    raise InvalidRequest(f"{duration[:40]!r} is not a duration", hint="write it as 30m, 12h, 1h30m")


def _parts(text: str) -> _Parts:
    """Return the host's labels, the port and the path."""
    match = _PATTERN.fullmatch(text) if len(text) <= _MAX_PATTERN else None
    if match is None:
        raise InvalidRequest(f"{text[:100]!r} cannot stand for images", hint="write it as *.registry.io[:PORT][/PATH]")
    host = match["host"].lower()
    return [host] if host.startswith("[") else host.split("."), match["port"] or "", match["path"] or ""


def _glob(pattern: str, label: str) -> bool:
    """Whether "*" in a pattern can stand for something that makes a label of it; without going back and forth."""
    first, *rest = pattern.split("*")
    if not rest:
        return pattern == label
    *middle, last = rest
    place, end = len(first), len(label) - len(last)
    if place > end or not label.startswith(first) or not label.endswith(last):
        return False
    for part in middle:
        place = label.find(part, place, end)
        if place < 0:
            return False
        place += len(part)
    return True
