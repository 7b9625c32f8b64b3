"""Which superpeer owns a blob, and who stands in for it: rendezvous hashing. Pure.

    weight(superpeer, digest) = xxh3_64(digest + "\\0" + superpeer)     the highest is the owner, the next stands in

Each superpeer and each node computes the same order from the same names, without asking anybody. When one superpeer
goes, only its own blobs move, each to the next in its order; when one comes, it takes its share from all the others
alike. ("A Name-Based Mapping Scheme for Rendezvous", Thaler and Ravishankar, 1996.)
"""

from __future__ import annotations

from collections.abc import Iterable

from xxhash import xxh3_64_intdigest


def owners(digest: str, superpeers: Iterable[str]) -> list[str]:
    """Return the superpeers in the order in which they are responsible for a blob: the owner, then its stand-ins.

    `superpeers` are names that everybody knows them by (URLs as configured); their order and repetitions do not matter.
    """
    return sorted(set(superpeers), key=lambda name: (-_weight(digest, name), name))


def _weight(digest: str, name: str) -> int:
    return xxh3_64_intdigest(f"{digest}\0{name}".encode())
