"""The layers of an image merged into one tree of inodes. Pure.

What lives here: what a later layer does to the earlier ones, and the refusal of what no unpacker could make. What never
does: bytes of a file system (`layout.py`, `writer.py`) or of a tar (`dadi/index/tar.py`).

For each layer, bottom first, twice over its entries (OCI image specification, "Layer > Applying Changesets"):

    1. whiteouts and opaque marks take away what the layers below have put there; they never touch this layer's own
       entries, wherever they stand in the tar
    2. the other entries are put into the tree in the order of the tar

    the path is …       the entry is …          then
    free                anything                it is put there; missing parents are made: 0755, root, time 0
    a directory         a directory             it takes the entry's attributes (all of them) and keeps its children
    anything else       anything else           it is replaced, with all that is below it
    anything            a hard link             its name refers to the inode that `target` names at that moment; the
                                                entry's own attributes mean nothing

A parent that is a symlink is followed inside the tree, as containerd and umoci do: an absolute target begins at the
tree's root and ".." ends there, so nothing can lead out of it. A directory entry *at* a symlink replaces it. An inode
lives as long as a name refers to it: a link whose target a later layer deletes keeps its content.

Nothing recurses, so that depth costs memory only; the limits below bound what a hostile layer can make of few bytes.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

from dadi import digest as digests
from dadi.errors import Malformed, TooLarge
from dadi.index.layer import Entry, Kind, LayerIndex

MAX_NAMES = 4_000_000
"""Names that the merging may make, hard links too. The largest images in the field have about a million."""
MAX_STEPS = 50_000_000
"""Path components that may be walked because of symlinks among the parents, in the whole image."""
MAX_HOPS = 255
"""Symlinks followed for one path, as in containerd and umoci."""
NAME_MAX, PATH_MAX = 255, 4096
"""Bytes of a name and of a path, as in Linux (`limits.h`)."""

_HINT = "the layer is damaged or was made to do harm: build it again"
_MARKS = frozenset({Kind.WHITEOUT, Kind.OPAQUE})
_IDS = 2**32 - 1  # the highest of 32 bits means "no id" to the kernel
_MAJORS, _MINORS = 1 << 12, 1 << 20


class Node:
    """An inode. Only a directory has `children` (by name; everything else has None).

    `entry` gives the attributes; `layer` is the place, in the image, of the layer that holds a file's data. `links`
    and `nid` belong to the writer.
    """

    __slots__ = ("children", "entry", "layer", "links", "nid")

    def __init__(self, entry: Entry, layer: int, children: dict[bytes, Node] | None) -> None:
        self.entry = entry
        self.layer = layer
        self.children = children
        self.links = 0
        self.nid = 0

    def __repr__(self) -> str:
        return f"Node({self.entry.kind.name}, layer {self.layer}, of {self.entry.path!r})"


def merge(layers: Sequence[LayerIndex]) -> Node:
    """Return the root of the tree that the layers, bottom one first, make together.

    Raises Malformed for a path, link or attribute that no file system could hold, and for an entry below something
    that is not a directory; TooLarge beyond the limits above. Both name layer and path.
    """
    merging = _Merging()
    for place, layer in enumerate(layers):
        merging.apply(place, layer)
    return merging.root


def _implicit(path: bytes) -> Entry:
    return Entry(path, Kind.DIRECTORY, 0o755)


class _Merging:
    def __init__(self) -> None:
        self.root = Node(_implicit(b""), 0, {})
        self._place = 0
        self._name = ""
        self._names = 0
        self._steps = 0
        self._last: tuple[bytes, Node] = (b"", self.root)  # the directory of the entry before; most share it

    def apply(self, place: int, layer: LayerIndex) -> None:
        self._place, self._name = place, f"layer {place + 1} ({digests.short(layer.diff_id)})"
        marks = [entry for entry in layer.entries if entry.kind in _MARKS]
        if marks:
            self._hide(marks, {entry.path for entry in layer.entries if entry.kind is Kind.DIRECTORY})
        for entry in layer.entries:
            if entry.kind not in _MARKS:
                self._add(entry)

    # -- step 1: what the layers below lose

    def _hide(self, marks: Sequence[Entry], own: Container[bytes]) -> None:
        """Apply whiteouts and opaque marks; all are looked up before the first acts. `own`: see `_resolve`."""
        self._last = (b"", self.root)
        hidden: list[tuple[dict[bytes, Node], bytes | None]] = []
        for mark in marks:
            path, name = mark.path, None
            if mark.kind is Kind.WHITEOUT:
                path, name = self._split(mark.path, mark)
            trail = self._resolve(path, mark, own)
            directory = trail[-1][1] if trail else None
            if directory is not None and directory.children is not None:
                hidden.append((directory.children, name))
        for children, name in hidden:
            if name is None:
                children.clear()
            else:
                children.pop(name, None)

    # -- step 2: what this layer brings

    def _add(self, entry: Entry) -> None:
        self._check(entry)
        if not entry.path:
            if entry.kind is not Kind.DIRECTORY:
                raise self._malformed(entry, "the root can only be a directory")
            self.root.entry, self.root.layer = entry, self._place
            return
        path, name = self._split(entry.path, entry)
        siblings = self._directory(path, entry)
        old = siblings.get(name)
        if entry.kind is Kind.DIRECTORY and old is not None and old.children is not None:
            old.entry, old.layer = entry, self._place
            return
        if old is not None:
            del siblings[name]
            self._last = (b"", self.root)
        if entry.kind is Kind.HARDLINK:
            self._count()
            siblings[name] = self._target(entry)
        else:
            siblings[name] = self._node(entry, {} if entry.kind is Kind.DIRECTORY else None)

    def _node(self, entry: Entry, children: dict[bytes, Node] | None) -> Node:
        self._count()
        return Node(entry, self._place, children)

    def _count(self) -> None:
        self._names += 1
        if self._names > MAX_NAMES:
            raise TooLarge(f"{self._name}: the image has more than {MAX_NAMES} files and directories")

    def _target(self, entry: Entry) -> Node:
        path, name = self._split(entry.target, entry)
        parent = self._resolve(path, entry)[-1][1]
        node = parent.children.get(name) if parent is not None and parent.children is not None else None
        if node is None or node.children is not None:
            what = "is a directory" if node is not None else "does not exist there"
            raise self._malformed(entry, f"a hard link to {entry.target[:PATH_MAX]!r}, which {what}")
        return node

    def _directory(self, path: bytes, entry: Entry) -> dict[bytes, Node]:
        """Return the children of the directory that `path` leads to; make what is missing of it."""
        if path == self._last[0]:
            node = self._last[1]
        else:
            node = self._known(path) or self._made(path, entry)
            self._last = (path, node)
        assert node.children is not None
        return node.children

    def _known(self, path: bytes) -> Node | None:
        """Return the directory at `path` if it and all of its parents are there and none is a symlink."""
        node = self.root
        for name in path.split(b"/") if path else ():
            assert node.children is not None
            child = node.children.get(name)
            if child is None or child.children is None:
                return None
            node = child
        return node

    def _made(self, path: bytes, entry: Entry) -> Node:
        node = self.root
        for name, known in self._resolve(path, entry)[1:]:
            assert node.children is not None
            if known is None:
                self._check_name(name, entry)
                known = node.children[name] = self._node(_implicit(path), {})
            elif known.children is None:
                raise self._malformed(entry, f"{name!r} among its parents is not a directory")
            node = known
        return node

    # -- both

    def _resolve(self, path: bytes, entry: Entry, own: Container[bytes] = ()) -> list[tuple[bytes, Node | None]]:
        """Follow `path` and the symlinks on it from the root.

        Returns the names and inodes that it really leads through, the root first; None stands for what does not
        exist. Returns nothing if the first of the symlinks is among `own`: this layer puts a directory in its place, so
        nothing of the layers below is behind that path.
        """
        todo = self._components(path, entry)[::-1]
        trail: list[tuple[bytes, Node | None]] = [(b"", self.root)]
        hops = 0
        while todo:
            name = todo.pop()
            if name in (b"", b"."):  # only in the targets of symlinks
                continue
            if name == b"..":
                if len(trail) > 1:
                    trail.pop()
                continue
            here = trail[-1][1]
            child = here.children.get(name) if here is not None and here.children is not None else None
            if child is None or child.entry.kind is not Kind.SYMLINK:
                trail.append((name, child))
                continue
            if not hops and b"/".join([*(name for name, _ in trail[1:]), name]) in own:
                return []
            hops += 1
            todo.extend(reversed(child.entry.target.split(b"/")))
            self._steps += len(todo)
            if hops > MAX_HOPS or self._steps > MAX_STEPS:
                raise self._malformed(entry, "its parents lead through too many symlinks", TooLarge)
            if child.entry.target.startswith(b"/"):
                del trail[1:]
        return trail

    def _components(self, path: bytes, entry: Entry) -> list[bytes]:
        names = path.split(b"/") if path else []
        for name in names:
            self._check_name(name, entry)
        return names

    def _split(self, path: bytes, entry: Entry) -> tuple[bytes, bytes]:
        """Return the path of the directory and the name in it."""
        directory, slash, name = path.rpartition(b"/")
        self._check_name(name if directory or not slash else b"", entry)
        return directory, name

    def _check_name(self, name: bytes, entry: Entry) -> None:
        if name in (b"", b".", b"..") or b"\0" in name:
            raise self._malformed(entry, f"{name!r} is not a name")
        if len(name) > NAME_MAX:
            raise self._malformed(entry, f"a name has at most {NAME_MAX} bytes")

    def _check(self, entry: Entry) -> None:
        """Raise Malformed if no file system could hold the entry's attributes."""
        if len(entry.path) > PATH_MAX or len(entry.target) > PATH_MAX:
            raise self._malformed(entry, f"a path has at most {PATH_MAX} bytes")
        if not (0 <= entry.uid < _IDS and 0 <= entry.gid < _IDS and 0 <= entry.mode <= 0o7777):
            raise self._malformed(entry, f"impossible owner or mode: {entry.uid}:{entry.gid} {entry.mode:o}")
        if entry.kind is Kind.SYMLINK:
            if not entry.target or len(entry.target) >= PATH_MAX or b"\0" in entry.target:
                raise self._malformed(entry, "not a target for a symlink")
        elif entry.kind is Kind.CHARACTER or entry.kind is Kind.BLOCK:
            if not (0 <= entry.major < _MAJORS and 0 <= entry.minor < _MINORS):
                raise self._malformed(entry, f"impossible device number: {entry.major}:{entry.minor}")

    def _malformed(self, entry: Entry, reason: str, kind: type[Malformed] = Malformed) -> Malformed:
        return kind(f"{self._name}: {entry.path[:PATH_MAX]!r}: {reason}", hint=_HINT)
