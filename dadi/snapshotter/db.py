"""What is kept of snapshots: one SQLite file. Each method is one transaction; blocking, for one thread only.

    ROOT/metadata.db     write-ahead log, synchronous FULL, locked by the one process that uses it
    ROOT/snapshots       directories by number, see directories.py; kept in step with the file by the caller

    snapshots    id       also the name of its directory; never given twice
                 name     containerd's backend key; any characters
                 kind, parent (an id), created, updated (nanoseconds), labels (JSON)
                 size, inodes                                            of a committed ordinary one
                 image, depth, chain_id, reference, manifest, layer      of a lazy one: see `LazyLayer`; else NULL
    mounts       image, layers: written before an image is mounted, removed after it was released
    compatible   since: only where a newer version says that older ones may go on, see `dadi/versions.py`

A file that is damaged, or gone while directories are there, is never replaced silently: containers that run now have
their files below `snapshots`. `replace_damaged` moves both aside, and that is the way back.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from dadi import versions
from dadi.errors import (
    AlreadyExists,
    Conflict,
    DadiError,
    InvalidRequest,
    Malformed,
    NotFound,
    StoreFull,
    Unavailable,
)
from dadi.snapshotter.model import Info, Kind, LazyLayer, Usage, updated_labels

VERSION = 1
_APPLICATION = 0x44414449  # "DADI"
_SMALLEST = 512
"""Bytes of the smallest page: SQLite takes a shorter file for a new one."""
_SCHEMA = """
CREATE TABLE snapshots (
    id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, kind INTEGER NOT NULL,
    parent INTEGER REFERENCES snapshots (id), created INTEGER NOT NULL, updated INTEGER NOT NULL,
    labels TEXT NOT NULL, size INTEGER NOT NULL DEFAULT 0, inodes INTEGER NOT NULL DEFAULT 0,
    image TEXT, depth INTEGER, chain_id TEXT, reference TEXT, manifest TEXT, layer TEXT
);
CREATE INDEX children ON snapshots (parent);
CREATE INDEX lazy ON snapshots (chain_id) WHERE chain_id IS NOT NULL;
CREATE TABLE mounts (image TEXT NOT NULL, layers INTEGER NOT NULL, PRIMARY KEY (image, layers)) WITHOUT ROWID;
"""
_WAY_BACK = (
    "start once with `replace_damaged`: the file and the directories are moved aside, running containers go on, "
    "and containerd has to pull its images again"
)
_SELECT = """
SELECT s.id, s.name, coalesce(p.name, ''), s.kind, s.created, s.updated, s.labels, s.size, s.inodes,
       s.image, s.depth, s.chain_id, s.reference, s.manifest, s.layer
FROM snapshots s LEFT JOIN snapshots p ON p.id = s.parent
"""
_UP = """
WITH RECURSIVE up (id, parent, image, depth, far) AS (
    SELECT id, parent, image, depth, 0 FROM snapshots WHERE id = ?
    UNION ALL
    SELECT s.id, s.parent, s.image, s.depth, far + 1 FROM up JOIN snapshots s ON s.id = up.parent WHERE up.image IS NULL
) SELECT id, image, depth FROM up ORDER BY far
"""
_MOUNTS = """
WITH RECURSIVE up (parent, image, depth) AS (
    SELECT parent, image, depth FROM snapshots WHERE kind != 3
    UNION
    SELECT s.parent, s.image, s.depth FROM up JOIN snapshots s ON s.id = up.parent WHERE up.image IS NULL
)
SELECT m.image, m.layers,
       EXISTS (SELECT 1 FROM up WHERE up.image = m.image AND up.depth = m.layers),
       EXISTS (SELECT 1 FROM snapshots s WHERE s.image = m.image AND s.depth = m.layers)
FROM mounts m
"""


class Stored(NamedTuple):
    """A snapshot with all that is kept of it."""

    id: int
    info: Info
    usage: Usage
    lazy: LazyLayer | None


class Lineage(NamedTuple):
    """What a snapshot stands on: `ordinary` ids, topmost first, then `image` with its lowest `depth` layers (or None).

    `id` and `kind` are the snapshot's own. Ancestors below a lazy one do not matter: its image holds them.
    """

    id: int
    kind: Kind
    ordinary: tuple[int, ...]
    image: str | None
    depth: int


class NotedMount(NamedTuple):
    """A mount of an image. `used`: an active snapshot or a view stands on it; `wanted`: its lazy snapshot is there."""

    image: str
    layers: int
    used: bool
    wanted: bool


def open_database(root: Path, *, replace_damaged: bool = False) -> Database:
    """Open ROOT/metadata.db, or make it. Raises Malformed if it is damaged (unless `replace_damaged`), Conflict if
    another process has it, Unsupported if a newer dadi wrote it, StoreFull, Unavailable.
    """
    path, directories = root / "metadata.db", root / "snapshots"
    try:
        # One that was cut off to nothing SQLite takes for a new one, and the next sweep would delete all directories.
        gone = not path.exists() or path.stat().st_size < _SMALLEST
        if gone and directories.is_dir() and any(directories.iterdir()):
            what = "is damaged: it is empty" if path.exists() else "is gone"
            raise Malformed(f"{path} {what}, but {directories} holds snapshots", hint=_WAY_BACK)
        return Database(path)
    except Malformed:
        if not replace_damaged:
            raise
    suffix = time.strftime(".damaged-%Y%m%d-%H%M%S")
    for old in (path, path.with_name(path.name + "-wal"), path.with_name(path.name + "-shm"), directories):
        if old.exists():
            old.rename(old.with_name(old.name + suffix))
    return Database(path)


class Database:
    """The open file. Raises, besides what the methods say, StoreFull, Unavailable and Malformed (damaged)."""

    def __init__(self, path: Path, clock: Callable[[], int] = time.time_ns) -> None:
        self._path = path
        self._clock = clock
        with self._translated():
            self._db = sqlite3.connect(path, timeout=0, isolation_level=None)
        try:
            with self._translated():
                self._set_up()
                self.counts = self._count()
                """Snapshots by kind; committed ones as "committed" (ordinary) and "lazy". Any thread may look."""
        except BaseException:
            self._db.close()
            raise

    def __repr__(self) -> str:
        return f"Database({self._path})"

    def _set_up(self) -> None:
        run = self._db.execute
        run("PRAGMA locking_mode = EXCLUSIVE")
        run("PRAGMA journal_mode = WAL")
        run("PRAGMA synchronous = FULL")
        run("PRAGMA foreign_keys = ON")
        run("BEGIN EXCLUSIVE")  # from now on the lock is ours until we close
        application, version = run("PRAGMA application_id").fetchone()[0], run("PRAGMA user_version").fetchone()[0]
        if (application, version) == (0, 0) and not run("SELECT 1 FROM sqlite_schema").fetchone():
            for statement in _SCHEMA.split(";\n"):
                run(statement)
            run(f"PRAGMA application_id = {_APPLICATION}")
            run(f"PRAGMA user_version = {VERSION}")
        elif application != _APPLICATION:
            raise Malformed(f"{self._path} is not a file of dadi's snapshotter", hint=_WAY_BACK)
        else:
            since = None
            if version > VERSION and run("SELECT 1 FROM sqlite_schema WHERE name = 'compatible'").fetchone():
                (since,) = run("SELECT max(since) FROM compatible").fetchone()
            versions.check(str(self._path), version, since, known=VERSION, hint="start the version that wrote it")
        run("COMMIT")
        found = run("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise Malformed(f"{self._path} is damaged: {found}", hint=_WAY_BACK)

    def close(self) -> None:
        """Close the file; harmless when called again."""
        self._db.close()

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._error(error) from None

    def _error(self, error: sqlite3.Error) -> DadiError:
        match getattr(error, "sqlite_errorcode", 0) & 0xFF:
            case sqlite3.SQLITE_FULL:
                return StoreFull(f"no space left on the disk of {self._path}", hint="free some space")
            case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
                return Conflict(f"{self._path} is used by another process", hint="two nodes need two `state`s")
            case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
                return Malformed(f"{self._path} is damaged: {error}", hint=_WAY_BACK)
            case _:
                return Unavailable(f"{self._path}: {error}", hint="check the disk and the kernel's log")

    def _count(self) -> dict[str, int]:
        result = {"view": 0, "active": 0, "committed": 0, "lazy": 0}
        query = "SELECT kind, image IS NOT NULL, count(*) FROM snapshots GROUP BY 1, 2"
        for kind, lazy, count in self._db.execute(query):
            result["lazy" if lazy else Kind(kind).name.lower()] = count
        return result

    @contextlib.contextmanager
    def _transaction(self, *, changes: bool = False) -> Iterator[Callable[..., sqlite3.Cursor]]:
        with self._translated():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db.execute
                self._db.execute("COMMIT")
                if changes:
                    self.counts = self._count()
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    # ---- reading

    def get(self, name: str) -> Stored:
        """Return a snapshot; raise NotFound."""
        with self._transaction() as run:
            return _stored(self._row(run, name))

    def all(self) -> list[Info]:
        """Return all, oldest first."""
        with self._transaction() as run:
            return [_stored(row).info for row in run(f"{_SELECT} ORDER BY s.id")]

    def lineage(self, name: str) -> Lineage:
        """Return what a snapshot stands on; raise NotFound."""
        with self._transaction() as run:
            return self._lineage(run, name)

    def find_lazy(self, chain_id: str, parent: str) -> Info | None:
        """Return the lazy snapshot of this layer on this parent ("": none), if there is one."""
        with self._transaction() as run:
            rows = run(f"{_SELECT} WHERE s.chain_id = ? AND coalesce(p.name, '') = ? ORDER BY s.id", (chain_id, parent))
            row = rows.fetchone()
            return _stored(row).info if row else None

    def lazy_layer(self, image: str, depth: int) -> LazyLayer | None:
        """Return what was kept of the layer at this depth of an image; rather one that says which manifest it is of."""
        query = "SELECT image, depth, chain_id, reference, manifest, layer FROM snapshots WHERE image = ? AND depth = ?"
        with self._transaction() as run:
            row = run(f"{query} ORDER BY manifest = '', id DESC LIMIT 1", (image, depth)).fetchone()
            return LazyLayer(*row) if row else None

    def ids(self) -> set[int]:
        """Return the ids of all snapshots."""
        with self._transaction() as run:
            return {number for (number,) in run("SELECT id FROM snapshots")}

    def last_id(self) -> int:
        """Return the highest id that was ever given; 0 for none."""
        with self._transaction() as run:
            row = run("SELECT seq FROM sqlite_sequence WHERE name = 'snapshots'").fetchone()
            return int(row[0]) if row else 0

    # ---- changing

    def create(self, number: int, kind: Kind, name: str, parent: str, labels: dict[str, str]) -> Lineage:
        """Add an active snapshot or a view. Raises AlreadyExists; NotFound, InvalidRequest for its parent."""
        with self._transaction(changes=True) as run:
            self._insert(run, number, kind, name, parent, labels, None)
            return self._lineage(run, name)

    def add_lazy(self, number: int, name: str, parent: str, labels: dict[str, str], layer: LazyLayer) -> None:
        """Add a committed lazy snapshot. Raises as `create` does."""
        with self._transaction(changes=True) as run:
            self._insert(run, number, Kind.COMMITTED, name, parent, labels, layer)

    def commit(self, key: str, name: str, parent: str, labels: dict[str, str], usage: Usage) -> None:
        """Turn the active snapshot `key` into the committed `name`; labels are replaced.

        A `parent` may be given to one that has none. Raises NotFound, AlreadyExists, Conflict (not active; the parent
        is not committed), InvalidRequest (it has another parent).
        """
        with self._transaction(changes=True) as run:
            row = self._row(run, key)
            if run("SELECT 1 FROM snapshots WHERE name = ?", (name,)).fetchone():
                raise AlreadyExists(f"there is a snapshot {name!r} already")
            stored = _stored(row)
            if stored.info.kind is not Kind.ACTIVE:
                raise Conflict(f"cannot commit {key!r}: it is {stored.info.kind.name.lower()}, not active")
            above = run("SELECT parent FROM snapshots WHERE id = ?", (stored.id,)).fetchone()[0]
            if parent and parent != stored.info.parent:
                if stored.info.parent:
                    raise InvalidRequest(f"the snapshot {key!r} has another parent than {parent!r}")
                above = self._parent(run, parent, Conflict)
            now = self._clock()
            run(
                "UPDATE snapshots SET name = ?, kind = ?, parent = ?, created = ?, updated = ?, labels = ?, size = ?,"
                " inodes = ? WHERE id = ?",
                (name, Kind.COMMITTED, above, now, now, _json(labels), usage.size, usage.inodes, stored.id),
            )

    def update(self, name: str, labels: dict[str, str], paths: list[str]) -> Info:
        """Change labels, see `updated_labels`; raise NotFound, InvalidRequest."""
        with self._transaction(changes=True) as run:
            stored = _stored(self._row(run, name))
            after, now = updated_labels(stored.info.labels, labels, paths), self._clock()
            run("UPDATE snapshots SET labels = ?, updated = ? WHERE id = ?", (_json(after), now, stored.id))
            return msgspec.structs.replace(stored.info, labels=after, updated=now)

    def remove(self, name: str) -> None:
        """Forget a snapshot; raise NotFound, Conflict if another one stands on it."""
        with self._transaction(changes=True) as run:
            number = self._row(run, name)[0]
            child = run("SELECT name FROM snapshots WHERE parent = ? LIMIT 1", (number,)).fetchone()
            if child:
                raise Conflict(f"cannot remove the snapshot {name!r}: {child[0]!r} stands on it")
            run("DELETE FROM snapshots WHERE id = ?", (number,))

    def discard(self, number: int) -> None:
        """Forget what `create` has made under this id, if it is there and still not committed."""
        with self._transaction(changes=True) as run:
            run("DELETE FROM snapshots WHERE id = ? AND kind != ?", (number, Kind.COMMITTED))

    # ---- mounts of images

    def note_mount(self, image: str, layers: int) -> None:
        """Keep that an image is about to be mounted."""
        with self._transaction() as run:
            run("INSERT OR IGNORE INTO mounts VALUES (?, ?)", (image, layers))

    def forget_mount(self, image: str, layers: int) -> None:
        """Keep that an image is not mounted any more."""
        with self._transaction() as run:
            run("DELETE FROM mounts WHERE image = ? AND layers = ?", (image, layers))

    def mounts(self) -> list[NotedMount]:
        """Return all mounts that were noted."""
        with self._transaction() as run:
            return [NotedMount(row[0], row[1], bool(row[2]), bool(row[3])) for row in run(_MOUNTS)]

    def images(self) -> set[str]:
        """Return the images of all lazy snapshots and mounts: what `LazyImages.keep_only` must keep."""
        query = "SELECT image FROM snapshots WHERE image IS NOT NULL UNION SELECT image FROM mounts"
        with self._transaction() as run:
            return {image for (image,) in run(query)}

    # ---- inside of a transaction

    def _row(self, run: Callable[..., sqlite3.Cursor], name: str) -> Any:
        row = run(f"{_SELECT} WHERE s.name = ?", (name,)).fetchone()
        if row is None:
            raise NotFound(f"there is no snapshot {name!r}")
        return row

    def _parent(self, run: Callable[..., sqlite3.Cursor], name: str, wrong: type[DadiError]) -> int | None:
        if not name:
            return None
        row = run("SELECT id, kind FROM snapshots WHERE name = ?", (name,)).fetchone()
        if row is None:
            raise NotFound(f"there is no snapshot {name!r} to be a parent")
        if row[1] != Kind.COMMITTED:
            raise wrong(f"the parent {name!r} is {Kind(row[1]).name.lower()}, not committed")
        return int(row[0])

    def _insert(self, run: Callable[..., sqlite3.Cursor], number: int, kind: Kind, name: str, parent: str,
                labels: dict[str, str], lazy: LazyLayer | None) -> None:  # fmt: skip
        above = self._parent(run, parent, InvalidRequest)
        if run("SELECT 1 FROM snapshots WHERE name = ?", (name,)).fetchone():
            raise AlreadyExists(f"there is a snapshot {name!r} already")
        now = self._clock()
        run(
            "INSERT INTO snapshots (id, name, kind, parent, created, updated, labels,"
            " image, depth, chain_id, reference, manifest, layer) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (number, name, kind, above, now, now, _json(labels), *(lazy or (None,) * 6)),
        )

    def _lineage(self, run: Callable[..., sqlite3.Cursor], name: str) -> Lineage:
        row = self._row(run, name)
        steps = run(_UP, (row[0],)).fetchall()
        last = steps[-1]
        ordinary = tuple(number for number, image, _ in steps[1:] if image is None)
        return Lineage(row[0], Kind(row[3]), ordinary, last[1], last[2] or 0)


def _json(labels: dict[str, str]) -> str:
    return msgspec.json.encode(labels).decode()


def _stored(row: Any) -> Stored:
    number, name, parent, kind, created, updated, labels, size, inodes, *lazy = row
    info = Info(name, parent, Kind(kind), created, updated, msgspec.json.decode(labels, type=dict[str, str]))
    return Stored(number, info, Usage(size, inodes), LazyLayer(*lazy) if lazy[0] is not None else None)
