"""Whom what is here of a blob may be given to: those whose registry has proved that it has the bytes.

    it came from that very registry, or from a repository that everybody may read   yes
    it came from a private repository of another registry                           no: this one sends it all once first

A registry's word that one of its repositories has a blob is no proof: a registry of somebody's own would name the
digests of others' blobs, and be given their bytes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

from dadi.originals.access import Access
from dadi.originals.records import Records

_CAME = "came "
_MOST_NAMES = 64
"""Repositories that are remembered as sources of one blob."""
Known = Callable[[str], Iterable[str]]
"""Returns the repositories, with their registries, that have sent all of a layer, by its digest."""


class Proven:
    """See the head of this file. At most `most` blobs; the oldest go first. `known`: what others have learned."""

    def __init__(self, records: Records, access: Access, known: Known, most: int) -> None:
        self._records = records
        self._access = access
        self._known = known
        self._most = most
        self._came: OrderedDict[str, OrderedDict[str, None]] = OrderedDict()
        """By digest: repositories (with their registries) from which all of a blob has come."""

    def __repr__(self) -> str:
        return f"Proven({len(self._came)} blobs)"

    def start(self) -> None:
        """Take up what earlier runs left in the records."""
        for record in self._records.with_prefix(_CAME):
            self.came(record.digest, record.key.removeprefix(_CAME).rpartition("@")[0])

    def came(self, digest: str, name: str) -> None:
        """All of a blob has come from a repository (REGISTRY/REPOSITORY), and was what its digest says."""
        names = self._came.setdefault(digest, OrderedDict())
        names[name] = None
        self._came.move_to_end(digest)
        if len(names) > _MOST_NAMES:
            names.popitem(last=False)
        if len(self._came) > self._most:
            self._came.popitem(last=False)

    async def record(self, digest: str, name: str, size: int) -> None:
        """Write that down."""
        await self._records.learn(f"{_CAME}{name}@{digest}", digest, size)

    def to(self, registry: str, digest: str) -> bool:
        """Whether what is here may be given to who may read a repository of `registry` that has the blob."""
        return any(self.shares(registry, name) for name in self.names(digest))

    def names(self, digest: str) -> list[str]:
        """Return repositories, with their registries, that have proved that they have a blob."""
        return [*self._came.get(digest, ()), *self._known(digest)]

    def shares(self, registry: str, name: str) -> bool:
        """Whether what comes from a repository (REGISTRY/REPOSITORY) is for who may read those of `registry`."""
        return registry_of(name) == registry or self._access.is_public(name)


def registry_of(name: str) -> str:
    """Return the registry of REGISTRY/REPOSITORY."""
    return name.partition("/")[0]
