"""Image references: the names by which people ask for images. Pure.

    reference    [registry "/"] repository [":" tag] ["@" digest]
    registry     host [":" port]; host is a DNS name, an IPv4 address, or an IPv6 address in brackets
    repository   component *("/" component), at most 255 characters
    component    [a-z0-9]+ *(("." | "_" | "__" | "-"+) [a-z0-9]+)
    tag          [A-Za-z0-9_] *127[A-Za-z0-9_.-]
    digest       "sha256:" 64 lower-case hex digits

The first component is the registry if it contains "." or ":" or is "localhost"; else the registry is docker.io, whose
repositories of one component live below "library/". Neither tag nor digest means the tag "latest"; where both are
given the digest decides and the tag is only shown. (OCI distribution specification, "Pulling manifests"; the defaults
are those of Docker's command line.)
"""

from __future__ import annotations

import ipaddress
import re

import msgspec

from dadi import digest as digests
from dadi.errors import InvalidRequest

DOCKER_HUB = "docker.io"
DEFAULT_TAG = "latest"

_MAX_LENGTH = 700
_MAX_REPOSITORY = 255
_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_HOST = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[(?P<v6>[0-9a-f:.]+)\])(?::(?P<port>[0-9]{{1,5}}))?")
_COMPONENT = re.compile(r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_HINT = "write it as [REGISTRY[:PORT]/]REPOSITORY[:TAG][@sha256:DIGEST]"


class Reference(msgspec.Struct, frozen=True):
    """One image (or index) in one registry; at least one of `tag` and `digest` is set. `str()` is canonical."""

    registry: str
    repository: str
    tag: str | None = None
    digest: str | None = None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Return the reference that `text` stands for; raise InvalidRequest (and say what is wrong) if it is none."""
        if not text or len(text) > _MAX_LENGTH:
            raise InvalidRequest(f"an image reference has 1 to {_MAX_LENGTH} characters, not {len(text)}", hint=_HINT)
        rest, at, digest = text.partition("@")
        if at:
            digests.parse(digest)
        registry, repository = _registry_of(rest)
        repository, colon, tag = repository.partition(":")
        if colon and not _TAG.fullmatch(tag):
            raise InvalidRequest(f"{text!r}: {tag!r} cannot be a tag", hint=_HINT)
        _check_repository(text, repository)
        if registry == DOCKER_HUB and "/" not in repository:
            repository = f"library/{repository}"
        default = None if at else DEFAULT_TAG
        return cls(registry, repository, tag if colon else default, digest if at else None)

    @property
    def identifier(self) -> str:
        """What the manifest is asked for by: the digest if there is one, else the tag."""
        return self.digest or self.tag or DEFAULT_TAG

    @property
    def name(self) -> str:
        """Registry and repository, without tag and digest."""
        return f"{self.registry}/{self.repository}"

    def at(self, digest: str) -> Reference:
        """Return this reference pinned to a digest; raise InvalidRequest if it is not one."""
        return msgspec.structs.replace(self, digest=digests.parse(digest))

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@{self.digest}" if self.digest else ""
        return f"{self.name}{tag}{digest}"


def parse_registry(text: str) -> str:
    """Return host[:port] in lower case; raise InvalidRequest if `text` is no such thing."""
    host = text.lower()
    match = _HOST.fullmatch(host)
    if match is None or len(host) > 255 or not 0 < int(match["port"] or 1) < 1 << 16:
        raise InvalidRequest(f"{text[:100]!r} cannot be a registry", hint="write it as HOST or HOST:PORT")
    if match["v6"] is not None:
        try:
            ipaddress.IPv6Address(match["v6"])
        except ValueError:
            raise InvalidRequest(f"{text[:100]!r} is not an IPv6 address in brackets") from None
    return DOCKER_HUB if host == "index.docker.io" else host


def _registry_of(text: str) -> tuple[str, str]:
    """Return the registry and what follows it."""
    first, slash, rest = text.partition("/")
    if slash and ("." in first or ":" in first or first.lower() == "localhost"):
        return parse_registry(first), rest
    return DOCKER_HUB, text


def _check_repository(text: str, repository: str) -> None:
    if len(repository) > _MAX_REPOSITORY:
        raise InvalidRequest(f"the repository of {text[:60]!r}… has more than {_MAX_REPOSITORY} characters")
    for component in repository.split("/"):
        if not _COMPONENT.fullmatch(component):
            hint = "repositories are in lower case" if component.lower() != component else _HINT
            raise InvalidRequest(f"{text!r}: {component!r} cannot be a part of a repository's name", hint=hint)
