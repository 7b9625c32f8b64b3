"""What is kept of snapshots: rules, transactions, lineages, mounts, and files that are not as they should be."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dadi.errors import AlreadyExists, Conflict, DadiError, InvalidRequest, Malformed, NotFound, StoreFull, Unsupported
from dadi.snapshotter.db import VERSION, Database, Lineage, NotedMount, open_database
from dadi.snapshotter.model import Kind, LazyLayer, Usage

IMAGE = "sha256:" + "11" * 32


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    database = open_database(tmp_path)
    yield database
    database.close()


def lazy(depth: int, image: str = IMAGE) -> LazyLayer:
    return LazyLayer(image, depth, f"chain {depth}", "reference", "manifest", "layer")


def committed(db: Database, number: int, name: str, parent: str = "") -> None:
    db.create(number, Kind.ACTIVE, f"{name}-active", parent, {})
    db.commit(f"{name}-active", name, "", {}, Usage(10 * number, number))


def test_what_is_kept_is_there_after_reopening(tmp_path: Path) -> None:
    db = open_database(tmp_path)
    committed(db, 1, "c")
    db.add_lazy(2, "lazy", "c", {"l": "1"}, lazy(2))
    db.note_mount(IMAGE, 2)
    before = db.get("c"), db.get("lazy"), db.mounts(), db.counts
    db.close()
    db = open_database(tmp_path)
    assert (db.get("c"), db.get("lazy"), db.mounts(), db.counts) == before
    assert db.get("lazy").lazy == lazy(2)
    assert db.get("c").usage == Usage(10, 1)
    assert db.last_id() == 2
    db.close()


def test_the_highest_id_is_remembered_after_its_removal(db: Database) -> None:
    db.create(7, Kind.ACTIVE, "a", "", {})
    db.remove("a")
    assert db.last_id() == 7
    assert db.ids() == set()


def test_a_lineage_ends_at_the_first_lazy_layer(db: Database) -> None:
    committed(db, 1, "below")
    db.add_lazy(2, "l1", "below", {}, lazy(2))
    db.add_lazy(3, "l2", "l1", {}, lazy(3))
    committed(db, 4, "o1", "l2")
    committed(db, 5, "o2", "o1")
    assert db.create(6, Kind.ACTIVE, "container", "o2", {}) == Lineage(6, Kind.ACTIVE, (5, 4), IMAGE, 3)
    assert db.create(7, Kind.VIEW, "part", "l1", {}) == Lineage(7, Kind.VIEW, (), IMAGE, 2)
    assert db.create(8, Kind.VIEW, "ordinary", "below", {}) == Lineage(8, Kind.VIEW, (1,), None, 0)
    assert db.lineage("container").ordinary == (5, 4)


def test_lazy_layers_are_found_by_chain_id_and_parent(db: Database) -> None:
    committed(db, 1, "parent")
    db.add_lazy(2, "on parent", "parent", {}, lazy(2))
    db.add_lazy(3, "on nothing", "", {}, lazy(2))
    committed(db, 4, "ordinary")
    assert [getattr(db.find_lazy("chain 2", parent), "name", None) for parent in ("parent", "", "none")] == [
        "on parent", "on nothing", None,
    ]  # fmt: skip
    assert db.find_lazy("chain 1", "") is None
    with pytest.raises(NotFound):
        db.add_lazy(5, "other", "none", {}, lazy(2))


def test_mounts_are_used_by_what_stands_on_them_and_wanted_while_their_layer_is_there(db: Database) -> None:
    db.add_lazy(1, "l1", "", {}, lazy(1))
    db.add_lazy(2, "l2", "l1", {}, lazy(2))
    committed(db, 3, "o", "l2")
    db.create(4, Kind.ACTIVE, "a", "o", {})
    for depth in (1, 2, 3):
        db.note_mount(IMAGE, depth)
        db.note_mount(IMAGE, depth)
    assert db.mounts() == [
        NotedMount(IMAGE, 1, False, True), NotedMount(IMAGE, 2, True, True), NotedMount(IMAGE, 3, False, False),
    ]  # fmt: skip
    db.remove("a")
    assert db.mounts()[1] == NotedMount(IMAGE, 2, False, True)
    db.forget_mount(IMAGE, 1)
    assert [mount.layers for mount in db.mounts()] == [2, 3]


def test_an_undone_creation_is_gone_and_a_committed_one_is_not(db: Database) -> None:
    db.create(1, Kind.ACTIVE, "a", "", {})
    db.discard(1)
    db.discard(1)
    assert db.counts["active"] == 0
    committed(db, 2, "c")
    db.discard(2)
    assert db.counts["committed"] == 1


def test_a_failed_change_changes_nothing(db: Database) -> None:
    committed(db, 1, "c")
    db.create(2, Kind.ACTIVE, "a", "c", {"l": "1"})
    before, counts = db.all(), db.counts
    for failing in (
        lambda: db.commit("a", "c", "", {}, Usage(1, 1)),
        lambda: db.commit("a", "n", "none", {}, Usage(1, 1)),
        lambda: db.commit("c", "n", "", {}, Usage(1, 1)),
        lambda: db.remove("c"),
        lambda: db.update("a", {}, ["labels", "parent"]),
        lambda: db.create(3, Kind.VIEW, "a", "c", {}),
        lambda: db.create(3, Kind.VIEW, "v", "a", {}),
    ):
        with pytest.raises(DadiError):
            failing()
    assert db.all() == before
    assert db.counts == counts


def test_one_process_has_the_file(tmp_path: Path, db: Database) -> None:
    with pytest.raises(Conflict, match="used by another"):
        open_database(tmp_path)


@pytest.mark.parametrize(
    "damage", [b"not a database" * 500, b"SQLite format 3\0" + b"\xff" * 8000, b"", b"\0", bytes(4096)]
)
def test_a_damaged_file_is_told_and_replaced_only_if_asked(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "metadata.db").write_bytes(damage)
    (tmp_path / "snapshots" / "1").mkdir(parents=True)
    with pytest.raises(Malformed, match=r"damaged.*replace_damaged"):
        open_database(tmp_path)
    assert (tmp_path / "metadata.db").read_bytes() == damage
    db = open_database(tmp_path, replace_damaged=True)
    assert db.all() == []
    db.close()
    (old,) = tmp_path.glob("metadata.db.damaged-*")
    assert old.read_bytes() == damage
    assert len(list(tmp_path.glob("snapshots.damaged-*/1"))) == 1


def test_damage_inside_of_the_file_is_found_at_the_start(tmp_path: Path) -> None:
    db = open_database(tmp_path)
    for number in range(200):
        db.create(number + 1, Kind.ACTIVE, f"name {number} " + "x" * 200, "", {})
    db.close()
    path = tmp_path / "metadata.db"
    data = bytearray(path.read_bytes())
    data[4096 * 3 : 4096 * 9] = b"\x5a" * (4096 * 6)
    path.write_bytes(data)
    with pytest.raises(Malformed, match="damaged"):
        open_database(tmp_path)


def test_a_file_that_is_gone_while_directories_are_there_is_damage(tmp_path: Path) -> None:
    (tmp_path / "snapshots" / "1").mkdir(parents=True)
    with pytest.raises(Malformed, match="is gone"):
        open_database(tmp_path)


def test_another_program_s_or_a_newer_file_is_not_touched(tmp_path: Path) -> None:
    other = sqlite3.connect(tmp_path / "metadata.db")
    other.execute("CREATE TABLE theirs (x)")
    other.commit()
    with pytest.raises(Malformed, match="not a file of dadi"):
        open_database(tmp_path)
    other.execute("DROP TABLE theirs")
    other.execute("PRAGMA application_id = 1145128009")
    other.execute("PRAGMA user_version = 99")
    other.close()
    with pytest.raises(Unsupported, match="version 99"):
        open_database(tmp_path, replace_damaged=True)


def test_a_file_of_the_version_after_this_one_is_used_if_it_says_so_and_else_left_as_it_is(tmp_path: Path) -> None:
    def newer(*statements: str) -> None:
        other = sqlite3.connect(tmp_path / "metadata.db")
        for statement in (*statements, f"PRAGMA user_version = {VERSION + 1}"):
            other.execute(statement)
        other.commit()
        other.close()

    open_database(tmp_path).close()
    newer("ALTER TABLE snapshots ADD COLUMN more TEXT NOT NULL DEFAULT 'x'", "CREATE TABLE compatible (since INTEGER)",
          f"INSERT INTO compatible VALUES ({VERSION})")  # fmt: skip
    db = open_database(tmp_path)
    db.create(1, Kind.ACTIVE, "new", "", {})
    db.close()
    db = open_database(tmp_path)
    assert [info.name for info in db.all()] == ["new"]
    db.close()
    newer(f"UPDATE compatible SET since = {VERSION + 1}")
    before = (tmp_path / "metadata.db").read_bytes()
    with pytest.raises(Unsupported, match=f"version {VERSION + 1}; this dadi knows version {VERSION}"):
        open_database(tmp_path, replace_damaged=True)
    assert (tmp_path / "metadata.db").read_bytes() == before


def test_a_full_disk_is_store_full_and_undoes_the_transaction(db: Database) -> None:
    pages = db._db.execute("PRAGMA page_count").fetchone()[0]
    db._db.execute(f"PRAGMA max_page_count = {pages + 2}")

    def fill() -> None:
        for number in range(1000):
            db.create(number + 1, Kind.ACTIVE, f"name {number} " + "x" * 500, "", {})

    with pytest.raises(StoreFull):
        fill()
    assert len(db.all()) == db.counts["active"] < 1000
    db.remove(db.all()[0].name)


NAMES = st.sampled_from(["a", "b", "c", "d", "e"])


class Model(RuleBasedStateMachine):
    """The database against a dictionary: name → (kind, parent)."""

    def __init__(self) -> None:
        super().__init__()
        self.db = Database(Path(":memory:"))
        self.model: dict[str, tuple[Kind, str]] = {}
        self.number = 0

    @rule(name=NAMES, parent=NAMES | st.just(""), kind=st.sampled_from([Kind.ACTIVE, Kind.VIEW]))
    def create(self, name: str, parent: str, kind: Kind) -> None:
        self.number += 1
        expected: type[DadiError] | None = None
        if parent and parent not in self.model:
            expected = NotFound
        elif parent and self.model[parent][0] is not Kind.COMMITTED:
            expected = InvalidRequest
        elif name in self.model:
            expected = AlreadyExists
        if expected:
            with pytest.raises(expected):
                self.db.create(self.number, kind, name, parent, {})
        else:
            self.db.create(self.number, kind, name, parent, {})
            self.model[name] = (kind, parent)

    @rule(key=NAMES, name=NAMES)
    def commit(self, key: str, name: str) -> None:
        expected: type[DadiError] | None = None
        if key not in self.model:
            expected = NotFound
        elif name in self.model:
            expected = AlreadyExists
        elif self.model[key][0] is not Kind.ACTIVE:
            expected = Conflict
        if expected:
            with pytest.raises(expected):
                self.db.commit(key, name, "", {}, Usage(1, 1))
        else:
            self.db.commit(key, name, "", {}, Usage(1, 1))
            self.model[name] = (Kind.COMMITTED, self.model.pop(key)[1])

    @precondition(lambda self: self.model)
    @rule(name=NAMES)
    def remove(self, name: str) -> None:
        if name not in self.model:
            with pytest.raises(NotFound):
                self.db.remove(name)
        elif any(parent == name for _, parent in self.model.values()):
            with pytest.raises(Conflict):
                self.db.remove(name)
        else:
            self.db.remove(name)
            del self.model[name]

    @invariant()
    def same(self) -> None:
        assert {info.name: (info.kind, info.parent) for info in self.db.all()} == self.model
        assert sum(self.db.counts.values()) == len(self.model)

    def teardown(self) -> None:
        self.db.close()


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
