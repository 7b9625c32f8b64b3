"""Which mounts a snapshot is, and with which options: containerd's overlay snapshotter's, so that everything that
reads them (the differ, buildkit, nerdctl) finds what it knows. Pure.

    no parent                bind   own directory       rw | ro, rbind
    view of one directory    bind   that directory      ro, rbind
    view of several          overlay                    lowerdir=TOP:…:BOTTOM, …
    active                   overlay                    workdir=…, upperdir=…, lowerdir=TOP:…:BOTTOM, …

A lazy image is one directory, the lowest, however many layers it has.

mount(2) takes one page of options. With more, containerd's mount code changes to the directory that all lower
directories have in common and names them from there. So image mounts should lie beside `snapshots`, under the same
parent: then 128 ordinary layers above a lazy image fit.
"""

from __future__ import annotations

from collections.abc import Sequence

from dadi.snapshotter.model import Kind, Mount


def mounts(kind: Kind, upper: str, work: str, lowers: Sequence[str], options: Sequence[str] = ()) -> list[Mount]:
    """Return the mounts of an active snapshot or a view. `lowers`: topmost first; `options`: for overlay mounts."""
    if not lowers:
        return [Mount("bind", upper, ("ro" if kind is Kind.VIEW else "rw", "rbind"))]
    if kind is Kind.VIEW and len(lowers) == 1:
        return [Mount("bind", lowers[0], ("ro", "rbind"))]
    own = () if kind is Kind.VIEW else (f"workdir={work}", f"upperdir={upper}")
    return [Mount("overlay", "overlay", (*own, f"lowerdir={':'.join(lowers)}", *options))]
