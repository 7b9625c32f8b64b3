"""What one version of dadi leaves on the disk, the version before and the one after can go on with; or do not touch.

`LEFT` has, for each kind of small file, bytes as version 1 writes them. They are not to be changed when the code is: a
program that cannot read them any more needs another version (`dadi/state_version.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dadi import state_version, versions
from dadi.blobs import layout
from dadi.errors import Unsupported
from dadi.index.chunks import Blob
from dadi.node import images
from dadi.node.records import MountRecord
from dadi.originals.records import Record
from dadi.peers import keys
from dadi.peers.tokens import ImageTokens
from dadi.prefetch.messages import Job
from fuse import state
from superpeer import catalog, shown_layers, signing

_ANSWER = ('{"reference":"registry.example/app:1","platform":"linux/amd64","manifest_digest":"sha256:aa",'
           '"index_digest":"sha256:bb","index_size":7,"age":0.5}')  # fmt: skip
LEFT: dict[str, tuple[Any, str]] = {
    "mount": (MountRecord, f'{{"directory":"/mnt","answer":{_ANSWER},"devices":["/dev/loop1"],"layers":2,"step":""}}'),
    "image (node)": (images._Record, f'{{"answer":{_ANSWER},"resolved_at":1700000000.5}}'),
    "original": (Record, '{"key":"blob app@sha256:aa","digest":"sha256:aa","size":5,"media_type":"","checked_at":1.5,'
                         '"following":{"a":"b"}}'),
    "tokens": (ImageTokens, '{"reference":"registry.example/app@sha256:aa","platform":"linux/amd64","tokens":["t"],'
                            '"renewals":["r"]}'),
    "job": (Job, '{"id":"x","request":{"reference":"registry.example/app:1","platform":"linux/amd64","scope":"full",'
                 '"rate":0.0,"at":0.0,"deadline":0.0,"priority":0,"pin_until":0.0,"nodes":"","manifest":"","batch":"",'
                 '"node_rate":0.0},"state":"warming","manifest_digest":"sha256:aa","created":1.5,"total":9,"done":4,'
                 '"stage":"","notes":["n"],"error":null,"lacking":[],"nodes":{"warm":2}}'),
    "image (superpeer)": (catalog.ImageRecord, '{"reference":"registry.example/app:1","platform":"linux/amd64",'
                          '"top_digest":"sha256:cc","manifest_digest":"sha256:aa","index_digest":"sha256:bb",'
                          '"index_size":7,"resolved_at":1.5}'),
    "signing keys": (signing._File, '{"private":"cA==","made":1.5,"secret":"cw==","previous":[]}'),
    "FUSE mount": (state.State, '{"version":1,"major":7,"minor":41,"max_readahead":131072,"flags":5,'
                                '"max_read":1048576,"device":"0:55"}'),
}  # fmt: skip


@pytest.mark.parametrize("kind", LEFT)
def test_what_version_1_has_left_is_read_and_what_the_next_one_adds_is_passed_over(kind: str) -> None:
    decoder, text = LEFT[kind]
    known = msgspec.json.decode(text, type=decoder)
    for name, value in json.loads(text).items():
        assert json.loads(msgspec.json.encode(getattr(known, name))) == value
    newer = json.dumps({**json.loads(text), "added": {"by": ["the next version"]}})
    assert msgspec.json.decode(newer, type=decoder) == known


STRUCTS = [MountRecord, images._Record, Record, ImageTokens, keys._Word, Job, catalog.ImageRecord, signing._File,
           shown_layers._Known, state.State]  # fmt: skip


@pytest.mark.parametrize("struct", STRUCTS, ids=lambda struct: f"{struct.__module__}.{struct.__name__}")
def test_no_small_file_s_kind_refuses_fields_that_a_newer_version_adds(struct: type[msgspec.Struct]) -> None:
    assert not struct.__struct_config__.forbid_unknown_fields


def test_a_chunk_table_as_version_1_has_written_it_is_read_and_what_is_added_behind_is_passed_over(
    tmp_path: Path,
) -> None:
    digest = "sha256:" + "ab" * 32
    directory = layout.BlobDirectory(tmp_path / ("ab" * 32))
    directory.path.mkdir()
    table = [4097, 4096, b"\1" * 64]
    for fields in ([digest, table], [digest, [*table, "added"], "added"]):
        directory.table.write_bytes(b"DADIBLB1" + msgspec.msgpack.encode(fields))
        directory.present.write_bytes(b"\1\0")
        directory.data.write_bytes(bytes(8192))
        blob, present = directory.read()
        assert (blob.digest, blob.size, blob.table.count, present) == (digest, 4097, 2, bytearray(b"\1\0"))
        assert isinstance(blob, Blob)


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Begin to use a state directory, as a dadi of a version (and the oldest that it is compatible with)."""

    def check(version: int, since: int) -> None:
        monkeypatch.setattr(state_version, "VERSION", version)
        monkeypatch.setattr(state_version, "SINCE", since)
        state_version.check(tmp_path)

    return check


def said(tmp_path: Path) -> Any:
    return json.loads((tmp_path / "version").read_bytes())["version"]


def test_a_step_forward_and_back_is_possible_where_the_newer_version_is_compatible(
    tmp_path: Path, at: Callable[[int, int], None]
) -> None:
    at(1, 1)
    assert said(tmp_path) == 1
    at(2, 1)
    assert said(tmp_path) == 2
    at(1, 1)
    assert said(tmp_path) == 2, "the newer one left it, and is to find it"
    at(2, 1)


def test_a_state_that_is_too_new_is_refused_and_not_touched(tmp_path: Path, at: Callable[[int, int], None]) -> None:
    at(3, 2)
    (tmp_path / "tokens.json").write_bytes(b"of version 3")
    before = (tmp_path / "version").read_bytes()
    with pytest.raises(Unsupported, match="has version 3, for version 2 or newer; this dadi knows version 1") as error:
        at(1, 1)
    assert "nothing was changed" in (error.value.hint or "")
    at(2, 1)
    assert (tmp_path / "version").read_bytes() == before
    assert (tmp_path / "tokens.json").read_bytes() == b"of version 3"


@pytest.mark.parametrize("damaged", [b"", b"{", b"\xff", b"[1]", b'{"version": "1"}', b"[" * 5000])
def test_a_version_file_that_is_damaged_is_said_and_made_anew(
    tmp_path: Path, at: Callable[[int, int], None], damaged: bytes
) -> None:
    (tmp_path / "version").write_bytes(damaged)
    at(1, 1)
    assert said(tmp_path) == 1


@pytest.mark.parametrize(("version", "since", "known", "oldest", "understood"), [
    (1, None, 1, 1, True), (2, None, 1, 1, False), (2, 1, 1, 1, True), (2, 2, 1, 1, False), (1, 1, 2, 1, True),
    (1, 1, 3, 2, False), (9, 3, 3, 2, True),
])  # fmt: skip
def test_the_rule(version: int, since: int | None, known: int, oldest: int, understood: bool) -> None:
    if understood:
        versions.check("it", version, since, known=known, oldest=oldest)
        return
    with pytest.raises(Unsupported, match="it has version"):
        versions.check("it", version, since, known=known, oldest=oldest)
