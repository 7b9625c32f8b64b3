"""Merging layers into one tree: what later layers do to earlier ones, and what is refused.

Longer than 400 lines: one rule of the image specification after the other.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dadi.erofs import tree
from dadi.erofs.tree import Node, merge
from dadi.errors import Malformed, TooLarge
from dadi.index.layer import Entry, Kind
from tests.lab.layers import index_of

NAME = 255


def file(path: bytes, mark: int = 0, **attributes: object) -> Entry:
    """A file that can be told from others by its mtime, `mark`."""
    return Entry(path, Kind.FILE, mode=0o644, mtime=mark, **attributes)


def directory(path: bytes, mode: int = 0o700, **attributes: object) -> Entry:
    return Entry(path, Kind.DIRECTORY, mode=mode, **attributes)


def symlink(path: bytes, target: bytes) -> Entry:
    return Entry(path, Kind.SYMLINK, target=target)


def hardlink(path: bytes, target: bytes) -> Entry:
    return Entry(path, Kind.HARDLINK, target=target)


def whiteout(path: bytes) -> Entry:
    return Entry(path, Kind.WHITEOUT)


def opaque(path: bytes) -> Entry:
    return Entry(path, Kind.OPAQUE)


def flat(root: Node) -> dict[bytes, Node]:
    """Return every path but the root's with its node."""
    found: dict[bytes, Node] = {}
    todo = [(b"", root)]
    while todo:
        path, node = todo.pop()
        for name, child in (node.children or {}).items():
            found[path + name] = child
            todo.append((path + name + b"/", child))
    return found


def merged(*layers: Sequence[Entry]) -> dict[bytes, Node]:
    return flat(merge([index_of(entries, name=str(n)) for n, entries in enumerate(layers)]))


def test_missing_parents_are_directories_of_root_with_time_zero() -> None:
    found = merged([file(b"a/b/c")])
    for path in (b"a", b"a/b"):
        entry = found[path].entry
        assert (entry.kind, entry.mode, entry.uid, entry.gid, entry.mtime) == (Kind.DIRECTORY, 0o755, 0, 0, 0)
    assert found.keys() == {b"a", b"a/b", b"a/b/c"}


def test_no_layers_make_an_empty_root() -> None:
    assert merge([]).children == {}


def test_an_entry_for_the_root_gives_it_its_attributes() -> None:
    root = merge([index_of([file(b"a"), directory(b"", 0o711)])])
    assert root.entry.mode == 0o711
    assert root.children is not None
    assert b"a" in root.children


def test_a_later_entry_for_a_directory_replaces_all_of_its_attributes_and_keeps_its_children() -> None:
    old = directory(b"d", 0o700, uid=1, xattrs=((b"user.a", b"1"),))
    new = directory(b"d", 0o755, gid=2, mtime=9)
    found = merged([old, file(b"d/f")], [new])
    assert found[b"d"].entry == new
    assert b"d/f" in found


def test_a_later_file_in_a_directory_leaves_the_directory_as_it_was() -> None:
    found = merged([directory(b"d", 0o711, mtime=5)], [file(b"d/f")])
    assert (found[b"d"].entry.mode, found[b"d"].entry.mtime) == (0o711, 5)


@pytest.mark.parametrize("new", [file(b"x", 2), symlink(b"x", b"y"), Entry(b"x", Kind.FIFO)])
def test_what_is_not_a_directory_replaces_a_directory_and_all_below_it(new: Entry) -> None:
    for layers in ([[file(b"x/y/z")], [new]], [[file(b"x/y/z"), new]]):
        found = merged(*layers)
        assert found.keys() == {b"x"}
        assert found[b"x"].entry == new


@pytest.mark.parametrize("old", [file(b"x"), symlink(b"x", b"y"), Entry(b"x", Kind.CHARACTER)])
def test_a_directory_replaces_what_is_not_one(old: Entry) -> None:
    for layers in ([[old], [directory(b"x"), file(b"x/y")]], [[old, directory(b"x"), file(b"x/y")]]):
        found = merged(*layers)
        assert found[b"x"].entry.kind is Kind.DIRECTORY
        assert found.keys() == {b"x", b"x/y"}


def test_of_two_entries_for_one_path_in_a_layer_the_last_counts() -> None:
    found = merged([file(b"f", 1), hardlink(b"g", b"f"), file(b"f", 2)])
    assert found[b"f"].entry.mtime == 2
    assert found[b"g"].entry.mtime == 1


def test_the_layer_of_a_node_is_the_one_that_has_its_data() -> None:
    found = merged([file(b"a"), file(b"b")], [file(b"b"), hardlink(b"c", b"a")], [directory(b"d")])
    assert {path: node.layer for path, node in found.items()} == {b"a": 0, b"b": 1, b"c": 0, b"d": 2}


# -- whiteouts and opaque directories


def test_a_whiteout_removes_a_file_or_a_whole_directory_of_a_lower_layer() -> None:
    lower = [file(b"d/a"), file(b"d/sub/b"), file(b"e")]
    assert merged(lower, [whiteout(b"d/a")]).keys() == {b"d", b"d/sub", b"d/sub/b", b"e"}
    assert merged(lower, [whiteout(b"d")]).keys() == {b"e"}


@pytest.mark.parametrize("path", [b"no", b"no/such/path", b"f/below-a-file", b"dead/x", b"d/no"])
def test_a_whiteout_of_what_is_not_there_does_nothing(path: bytes) -> None:
    lower = [file(b"f"), directory(b"d"), symlink(b"dead", b"nowhere")]
    assert merged(lower, [whiteout(path)]).keys() == {b"f", b"d", b"dead"}


@pytest.mark.parametrize("first", [True, False])
def test_a_whiteout_does_not_touch_its_own_layer_wherever_it_stands(first: bool) -> None:
    own = [file(b"x/own", 2), file(b"f", 2)]
    marks = [whiteout(b"x"), whiteout(b"f")]
    found = merged([file(b"x/lower"), file(b"f", 1)], [*marks, *own] if first else [*own, *marks])
    assert found.keys() == {b"x", b"x/own", b"f"}
    assert found[b"f"].entry.mtime == 2


@pytest.mark.parametrize("at", range(4))
def test_an_opaque_mark_hides_what_lower_layers_have_in_the_directory_wherever_it_stands(at: int) -> None:
    lower = [directory(b"d", 0o711), file(b"d/old"), file(b"d/sub/old"), file(b"beside")]
    own = [directory(b"d", 0o750), file(b"d/new"), file(b"d/sub/new")]
    own.insert(at, opaque(b"d"))
    found = merged(lower, own)
    assert found.keys() == {b"d", b"d/new", b"d/sub", b"d/sub/new", b"beside"}
    assert found[b"d"].entry.mode == 0o750


def test_an_opaque_mark_without_an_entry_for_its_directory_keeps_the_directory() -> None:
    found = merged([directory(b"d", 0o711), file(b"d/old")], [opaque(b"d")])
    assert found.keys() == {b"d"}
    assert found[b"d"].entry.mode == 0o711


def test_an_opaque_root_hides_everything_below() -> None:
    assert merged([file(b"a"), file(b"b/c")], [file(b"new"), opaque(b"")]).keys() == {b"new"}


@pytest.mark.parametrize("first", [True, False])
def test_an_opaque_mark_does_not_follow_a_symlink_that_its_layer_replaces(first: bool) -> None:
    lower = [file(b"real/kept"), symlink(b"link", b"real")]
    own = [directory(b"link"), opaque(b"link")]
    found = merged(lower, own if first else own[::-1])
    assert found.keys() == {b"real", b"real/kept", b"link"}
    assert found[b"link"].entry.kind is Kind.DIRECTORY


def test_marks_follow_symlinks_among_their_parents() -> None:
    lower = [file(b"real/gone"), file(b"real/sub/gone"), file(b"real/kept"), symlink(b"link", b"/real")]
    assert merged(lower, [whiteout(b"link/gone"), opaque(b"link/sub")]).keys() == {
        b"real",
        b"real/sub",
        b"real/kept",
        b"link",
    }


@pytest.mark.parametrize("order", [1, -1])
def test_marks_are_all_looked_up_before_the_first_one_acts(order: int) -> None:
    lower = [file(b"real/gone"), file(b"real/kept"), symlink(b"link", b"real")]
    assert merged(lower, [whiteout(b"link"), whiteout(b"link/gone")][::order]).keys() == {b"real", b"real/kept"}


# -- hard links


def test_hard_links_share_an_inode_within_and_across_layers() -> None:
    found = merged([file(b"a", 1), hardlink(b"d/b", b"a")], [hardlink(b"c", b"d/b")])
    assert found[b"a"] is found[b"d/b"] is found[b"c"]


def test_a_hard_link_keeps_its_content_when_its_target_goes() -> None:
    lower = [file(b"a", 1), hardlink(b"b", b"a"), hardlink(b"c", b"a")]
    for upper in ([whiteout(b"a")], [file(b"a", 2)], [directory(b"a")]):
        found = merged(lower, upper)
        assert found[b"b"] is found[b"c"]
        assert found[b"b"].entry.mtime == 1


def test_a_hard_link_refers_to_the_tree_as_merged_so_far() -> None:
    found = merged([file(b"a", 1)], [hardlink(b"b", b"a"), file(b"a", 2), hardlink(b"c", b"a")])
    assert found[b"b"].entry.mtime == 1
    assert found[b"c"] is found[b"a"]


def test_a_hard_link_replaces_what_is_at_its_path_and_its_own_attributes_mean_nothing() -> None:
    link = Entry(b"x", Kind.HARDLINK, mode=0o7777, uid=7, target=b"a")
    found = merged([file(b"a", 1), file(b"x/y")], [link])
    assert found.keys() == {b"a", b"x"}
    assert found[b"x"].entry == file(b"a", 1)


def test_a_hard_link_to_a_symlink_is_a_link_to_the_symlink_itself() -> None:
    found = merged([file(b"a"), symlink(b"s", b"a"), hardlink(b"t", b"s")])
    assert found[b"t"] is found[b"s"]


def test_the_parents_of_a_hard_links_target_may_be_symlinks() -> None:
    found = merged([file(b"real/a"), symlink(b"link", b"real"), hardlink(b"b", b"link/a")])
    assert found[b"b"] is found[b"real/a"]


@pytest.mark.parametrize(
    ("target", "why"),
    [
        (b"missing", "does not exist"),
        (b"no/parent", "does not exist"),
        (b"f/below", "does not exist"),
        (b"d", "is a directory"),
        (b"", "not a name"),
        (b"link", "does not exist"),
        (b"d/../f", "not a name"),
        (b"/f", "not a name"),
    ],
)
def test_impossible_hard_links_are_refused_with_path_and_reason(target: bytes, why: str) -> None:
    with pytest.raises(Malformed, match=f"layer 1 .*b'link'.*{why}"):
        merged([file(b"f"), directory(b"d"), hardlink(b"link", target)])


def test_a_hard_link_into_the_directory_that_it_replaces_is_refused() -> None:
    with pytest.raises(Malformed, match="does not exist"):
        merged([file(b"d/f"), hardlink(b"d", b"d/f")])


# -- symlinks among the parents


@pytest.mark.parametrize(
    ("target", "lands"),
    [
        (b"usr/lib", b"usr/lib/f"),
        (b"/usr/lib", b"usr/lib/f"),
        (b"./usr//lib/.", b"usr/lib/f"),
        (b"../../../usr/lib", b"usr/lib/f"),
        (b"/../../etc/passwd", b"etc/passwd/f"),
        (b"usr/missing/..", b"usr/f"),
        (b"..", b"f"),
        (b"usr/also", b"usr/lib/f"),
        (b"new/directory", b"new/directory/f"),
    ],
)
def test_symlinks_among_the_parents_are_followed_inside_the_tree(target: bytes, lands: bytes) -> None:
    base = [directory(b"usr/lib"), symlink(b"usr/also", b"lib"), symlink(b"link", target)]
    found = merged(base, [file(b"link/f", 7)])
    assert found[lands].entry.mtime == 7
    assert found[b"link"].entry.kind is Kind.SYMLINK
    assert b"usr/missing" not in found


def test_a_chain_or_a_loop_of_too_many_symlinks_is_refused() -> None:
    with pytest.raises(TooLarge, match=r"b'a/f'.*too many symlinks"):
        merged([symlink(b"a", b"b"), symlink(b"b", b"a"), file(b"a/f")])
    chain = [symlink(b"%d" % n, b"%d" % (n + 1)) for n in range(tree.MAX_HOPS)]
    assert b"%d/f" % tree.MAX_HOPS in merged([*chain, file(b"0/f")])
    with pytest.raises(TooLarge, match="too many symlinks"):
        merged([*chain, symlink(b"first", b"0"), file(b"first/f")])


def test_the_work_that_symlinks_cause_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "MAX_STEPS", 1000)
    entries = [symlink(b"s", b"a/" * 90), *(file(b"s/%d/f" % n) for n in range(100))]
    with pytest.raises(TooLarge, match="too many symlinks"):
        merged(entries)


def test_an_entry_below_what_is_not_a_directory_is_refused() -> None:
    for path in (b"f/x", b"f/x/y", b"to-file/x"):
        with pytest.raises(Malformed, match=rf"layer 2 \(.*{path!r}.*b'f'.*not a directory"):
            merged([file(b"f"), symlink(b"to-file", b"f")], [file(path)])


# -- names and attributes


@pytest.mark.parametrize(
    "path",
    [b"/absolute", b"..", b"../up", b"a/../b", b"a//b", b"a/", b".", b"./a", b"nul\0", b"a\0/b", b"n" * (NAME + 1)],
)
@pytest.mark.parametrize("kind", [Kind.FILE, Kind.DIRECTORY, Kind.WHITEOUT])
def test_paths_that_are_not_normal_are_refused(path: bytes, kind: Kind) -> None:
    with pytest.raises(Malformed, match=r"layer 1 \("):
        merged([Entry(path, kind)])


def test_the_longest_names_and_paths_are_taken_and_longer_ones_refused() -> None:
    longest = b"/".join([b"n" * NAME] * 16)
    assert len(longest) == tree.PATH_MAX - 1
    assert longest in merged([file(longest)])
    with pytest.raises(Malformed, match="at most 4096 bytes"):
        merged([file(longest + b"/n")])
    with pytest.raises(Malformed, match="at most 255 bytes"):
        merged([symlink(b"s", b"n" * 256), file(b"s/f")])


@pytest.mark.parametrize(
    "entry",
    [
        Entry(b"", Kind.FILE),
        Entry(b"", Kind.SYMLINK, target=b"x"),
        Entry(b"", Kind.HARDLINK, target=b"f"),
        Entry(b"", Kind.WHITEOUT),
        Entry(b"x", Kind.FILE, uid=-1),
        Entry(b"x", Kind.FILE, gid=2**32 - 1),
        Entry(b"x", Kind.FILE, mode=0o10000),
        Entry(b"x", Kind.SYMLINK),
        Entry(b"x", Kind.SYMLINK, target=b"a\0b"),
        Entry(b"x", Kind.SYMLINK, target=b"t" * 4096),
        Entry(b"x", Kind.CHARACTER, major=4096),
        Entry(b"x", Kind.BLOCK, minor=1 << 20),
        Entry(b"x", Kind.BLOCK, minor=-1),
    ],
)
def test_what_no_file_system_could_hold_is_refused(entry: Entry) -> None:
    with pytest.raises(Malformed, match=r"layer 1 \("):
        merged([file(b"f"), entry])


def test_the_number_of_names_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "MAX_NAMES", 10)
    assert len(merged([file(b"%d" % n) for n in range(10)])) == 10
    for entries in (
        [file(b"%d" % n) for n in range(11)],
        [file(b"f"), *(hardlink(b"%d" % n, b"f") for n in range(10))],
        [file(b"/".join([b"d"] * 11))],
    ):
        with pytest.raises(TooLarge, match="more than 10"):
            merged(entries)


def test_a_tree_that_is_deeper_than_any_stack_is_no_problem() -> None:
    step = b"/".join([b"d"] * 1000)
    entries = [symlink(b"s0", step)]
    for n in range(25):
        entries += [file(b"s%d/f" % n), symlink(b"s%d" % (n + 1), b"s%d/%s" % (n, step))]
    root = merge([index_of(entries)])
    depth, node = 0, root
    while node.children and b"d" in node.children:
        depth, node = depth + 1, node.children[b"d"]
    assert depth == 25_000
    del root, node
    gc.collect()


# -- against a model that knows paths only

NAMES = st.sampled_from([b"a", b"b", b"c"])
PATHS = st.lists(NAMES, min_size=1, max_size=3).map(b"/".join)
ENTRIES = st.one_of(
    st.builds(file, PATHS, st.integers(1, 10**6)),
    st.builds(lambda path, time: directory(path, mtime=time), PATHS, st.integers(1, 10**6)),
    st.builds(whiteout, PATHS),
    st.builds(opaque, PATHS),
    st.builds(hardlink, PATHS, PATHS),
)


def model(layers: Sequence[Sequence[Entry]]) -> dict[bytes, tuple[str, int]] | None:
    """Return (type, mtime) of every path; None if a layer has to be refused."""
    paths: dict[bytes, tuple[str, int]] = {}

    def remove(path: bytes) -> None:
        for other in [other for other in paths if other == path or other.startswith(path + b"/")]:
            del paths[other]

    for layer in layers:
        lower = dict(paths)
        for entry in layer:
            if entry.kind is Kind.WHITEOUT:
                remove(entry.path)
            elif entry.kind is Kind.OPAQUE:
                for child in [path for path in lower if path.startswith(entry.path + b"/")]:
                    remove(child)
        for entry in layer:
            if entry.kind in (Kind.WHITEOUT, Kind.OPAQUE):
                continue
            parts = entry.path.split(b"/")
            for n in range(1, len(parts)):
                if paths.setdefault(b"/".join(parts[:n]), ("directory", 0))[0] != "directory":
                    return None
            if entry.kind is not Kind.DIRECTORY or paths.get(entry.path, ("", 0))[0] != "directory":
                remove(entry.path)
            if entry.kind is Kind.HARDLINK and paths.get(entry.target, ("directory", 0))[0] == "directory":
                return None
            linked = paths.get(entry.target)
            kind = "directory" if entry.kind is Kind.DIRECTORY else "file"
            paths[entry.path] = linked if entry.kind is Kind.HARDLINK and linked else (kind, entry.mtime)
    return paths


@given(st.lists(st.lists(ENTRIES, max_size=8), max_size=4))
def test_merging_gives_what_a_model_of_paths_gives(layers: list[list[Entry]]) -> None:
    expected = model(layers)
    if expected is None:
        with pytest.raises(Malformed):
            merged(*layers)
    else:
        found = merged(*layers)
        assert {
            path: ("file" if node.children is None else "directory", node.entry.mtime) for path, node in found.items()
        } == expected
