"""Platforms: what a machine can run, and which of the platforms on offer suits it best. Pure.

    platform    os "/" architecture ["/" variant]       linux/amd64, linux/arm64, linux/arm/v7, linux/amd64/v3

Architectures are Go's names (OCI image index specification, "platform"); the names that uname gives are accepted too.
A variant is a level: a machine of level n runs images of every level up to n and wants the highest. Without a
variant the level is the one that every machine of the architecture has: amd64 v1, arm64 v8, arm v7.
"""

from __future__ import annotations

import re

import msgspec

from dadi.errors import InvalidRequest

_ALIASES = {
    "x86_64": "amd64",
    "x86-64": "amd64",
    "aarch64": "arm64",
    "armv7l": "arm",
    "armv8l": "arm",
    "armhf": "arm",
    "i386": "386",
    "i686": "386",
}
_BASE_LEVEL = {"amd64": (1, 0), "arm64": (8, 0), "arm": (7, 0)}
_LEVEL = re.compile(r"v?([0-9]{1,3})(?:\.([0-9]{1,3}))?")
_PART = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class Platform(msgspec.Struct, frozen=True):
    """`str()` is canonical: the base variant of an architecture is left out, except for arm."""

    os: str
    architecture: str
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)

    @property
    def known(self) -> bool:
        """False for what is not an image at all: attestations are listed as unknown/unknown."""
        return bool(self.os and self.architecture) and "unknown" not in (self.os, self.architecture)

    def runs_on(self, machine: Platform) -> bool:
        """Whether a machine of that platform can run what is made for this one."""
        return distance(self, machine) is not None


def normalized(os: str, architecture: str, variant: str = "") -> Platform:
    """Return the platform in its one spelling."""
    os, architecture, variant = os.lower(), architecture.lower(), variant.lower()
    architecture = _ALIASES.get(architecture, architecture)
    base = _BASE_LEVEL.get(architecture)
    if base is not None:
        level = _level(architecture, variant)
        if level is not None:
            minor = f".{level[1]}" if level[1] else ""
            variant = "" if level == base and architecture != "arm" else f"v{level[0]}{minor}"
    return Platform(os, architecture, variant)


def parse(text: str) -> Platform:
    """Return the platform that a person wrote; raise InvalidRequest if it is none."""
    parts = text.split("/")
    if not 2 <= len(parts) <= 3 or not all(_PART.fullmatch(part) for part in parts):
        raise InvalidRequest(f"{text[:100]!r} is not a platform", hint="write it as OS/ARCHITECTURE[/VARIANT]")
    return normalized(*parts)


def of_machine(machine: str, os: str = "linux") -> Platform:
    """Return the platform of a machine whose `uname -m` says `machine`."""
    return normalized(os, machine)


def distance(offered: Platform, wanted: Platform) -> tuple[int, int] | None:
    """Return how far an offer is from the wish: (0, 0) is exact, less is better, None means that it does not run."""
    if (offered.os, offered.architecture) != (wanted.os, wanted.architecture):
        return None
    if offered.variant == wanted.variant:
        return 0, 0
    want, offer = _level(wanted.architecture, wanted.variant), _level(offered.architecture, offered.variant)
    if want is None or offer is None:
        return (1 << 16, 0) if not offered.variant else None
    if offer > want:
        return None
    return (want[0] - offer[0], want[1] - offer[1]) if offer[0] == want[0] else (want[0] - offer[0], 1000 - offer[1])


def _level(architecture: str, variant: str) -> tuple[int, int] | None:
    """Return the variant as (major, minor), None if it has no levels."""
    if not variant:
        return _BASE_LEVEL.get(architecture)
    match = _LEVEL.fullmatch(variant)
    return (int(match[1]), int(match[2] or 0)) if match else None
