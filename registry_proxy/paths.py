"""Request targets of the OCI distribution API: bytes from anybody in, what is meant out. Pure.

    /v2/                                        BASE
    /v2/NAME/manifests/TAG-or-DIGEST            MANIFEST
    /v2/NAME/blobs/DIGEST                       BLOB
    /v2/NAME/tags/list                          TAGS
    /v2/NAME/referrers/DIGEST                   REFERRERS
    /v2/NAME/blobs/uploads/…                    UPLOAD

Whose NAME it is: the registry of `?ns=` (containerd); else NAME's first part if it looks like a host, as in an image
reference (team/app is none, registry.example/app is one); else the configured upstream. HOST_PORT there stands for
HOST:PORT: podman's mirrors are names of images, which have no colon behind their first slash, and no host has a "_".
(OCI distribution specification, "Endpoints"; containerd, docs/hosts.md, "Registry Host Namespace";
containers-registries.conf(5), "location".)

Nothing is decoded but "%3A", with which some clients write a digest's colon: a name, a tag or a digest needs no other
escape, and what is not decoded cannot mean two things. The path is split as it came, never normalised.
"""

from __future__ import annotations

import enum
import re
from typing import NamedTuple

from dadi import digest as digests
from dadi.errors import InvalidRequest, NotFound
from dadi.oci.reference import Reference, parse_registry

_PATH = re.compile(r"/v2(?:/[A-Za-z0-9._~:@+=\[\]-]*)*")
_MAX_PATH = 2048
_HOST_MARK = re.compile(r"[.:]|^localhost(?:_[0-9]+)?$")
_WITH_PORT = re.compile(r"(?P<host>[^_]+)_(?P<port>[0-9]{1,5})")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


class Kind(enum.Enum):
    """What a path is about."""

    BASE = "base"
    MANIFEST = "manifest"
    BLOB = "blob"
    TAGS = "tags"
    REFERRERS = "referrers"
    UPLOAD = "upload"


class Route(NamedTuple):
    """A path, split; name and identifier are not checked yet."""

    kind: Kind
    name: str = ""
    identifier: str = ""


def split(path: str) -> Route:
    """Return what a path (without the query) is about; raise NotFound for one of another API, InvalidRequest."""
    path = path.replace("%3A", ":").replace("%3a", ":")
    if len(path) > _MAX_PATH or not _PATH.fullmatch(path):
        raise InvalidRequest(f"a path that no image has: {path[:80]!r}")
    parts = path.split("/")[2:]
    if "." in parts or ".." in parts:
        raise InvalidRequest(f"a path that would have to be normalised: {path[:80]!r}")
    if parts in ([], [""]):
        return Route(Kind.BASE)
    match parts:
        case [*name, "blobs", "uploads"] | [*name, "blobs", "uploads", _] if name:
            return Route(Kind.UPLOAD, "/".join(name), parts[-1] if parts[-1] != "uploads" else "")
        case [*name, "manifests", identifier] if name:
            return Route(Kind.MANIFEST, "/".join(name), identifier)
        case [*name, "blobs", identifier] if name:
            return Route(Kind.BLOB, "/".join(name), identifier)
        case [*name, "tags", "list"] if name:
            return Route(Kind.TAGS, "/".join(name))
        case [*name, "referrers", identifier] if name:
            return Route(Kind.REFERRERS, "/".join(name), identifier)
    raise NotFound(f"there is nothing at {path[:80]!r}")


def repository(name: str, ns: str | None, upstream: str) -> Reference:
    """Return the repository that is meant, as a reference with the tag "latest"; raise InvalidRequest."""
    if ns is not None:
        registry = parse_registry(ns)
    else:
        first, slash, rest = name.partition("/")
        registry = upstream
        if slash and _HOST_MARK.search(first):
            port = _WITH_PORT.fullmatch(first)
            registry, name = parse_registry(f"{port['host']}:{port['port']}" if port else first), rest
    if ":" in name or "@" in name:
        raise InvalidRequest(f"{name[:80]!r} cannot be the name of a repository")
    found = Reference.parse(f"{registry}/{name}")
    if found.registry != registry:
        raise InvalidRequest(f"{registry[:80]!r} cannot be told from a part of a repository's name", hint="use a port")
    return found


def identified(repository: Reference, identifier: str) -> Reference:
    """Return the reference of a manifest by its tag or digest; raise InvalidRequest if it is neither."""
    if ":" in identifier:
        return Reference(repository.registry, repository.repository, digest=digests.parse(identifier))
    if not _TAG.fullmatch(identifier):
        raise InvalidRequest(f"{identifier[:80]!r} cannot be a tag")
    return Reference(repository.registry, repository.repository, tag=identifier)
