"""What pushing decides without a registry: bodies on their way out, Link headers, indexes that are changed, scopes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dadi import digest as digests
from dadi.errors import DadiError, InvalidRequest, Malformed, TooLarge, Unsupported
from dadi.oci import index_document, link, media_types
from dadi.oci.auth import wanted_scopes
from dadi.oci.manifest import MAX_ENTRIES, MAX_SIZE, Descriptor
from dadi.oci.outgoing import PIECE, Body
from dadi.oci.platforms import Platform
from dadi.oci.referrers import fallback_tag

D1, D2 = digests.of(b"1"), digests.of(b"2")
URL = "https://r.example/v2/a/referrers/x?n=1"


def entry(digest: str = D1, **more: Any) -> dict[str, Any]:
    return {"mediaType": media_types.OCI_MANIFEST, "digest": digest, "size": 7, **more}


def index(*entries: Any, **more: Any) -> bytes:
    return json.dumps({"schemaVersion": 2, "mediaType": media_types.OCI_INDEX, "manifests": entries, **more}).encode()


# ---- bodies


def pieces_of(*pieces: bytes) -> Callable[[], AsyncIterator[bytes]]:
    async def source() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    return source


async def test_a_body_is_sent_in_small_pieces_each_time_from_the_start() -> None:
    data = bytes(range(256)) * 4096  # 1 MiB
    said: list[int] = []
    for body in (Body(len(data), data, said.append), Body(len(data), pieces_of(data[:5], b"", data[5:]))):
        for _ in range(2):
            outgoing = body.start()
            pieces = [piece async for piece in outgoing]
            assert b"".join(pieces) == data
            assert max(map(len, pieces)) <= PIECE
            assert outgoing.finished
            await outgoing.close()
    assert said == [PIECE, 2 * PIECE, 3 * PIECE, 4 * PIECE] * 2


async def test_an_empty_body_has_no_pieces() -> None:
    outgoing = Body(0, b"").start()
    assert [piece async for piece in outgoing] == []
    assert outgoing.finished


@pytest.mark.parametrize("pieces", [(b"123", b"45"), (b"123", b"4567"), ()])
async def test_a_body_of_another_size_than_announced_is_not_sent_to_its_end(pieces: tuple[bytes, ...]) -> None:
    outgoing = Body(6, pieces_of(*pieces)).start()
    sent = bytearray()

    async def send() -> None:
        async for piece in outgoing:
            sent.extend(piece)

    with pytest.raises(InvalidRequest, match=r"6 were announced|6 bytes to send"):
        await send()
    assert len(sent) <= 6
    assert not outgoing.finished
    assert isinstance(outgoing.failure, InvalidRequest)
    await outgoing.close()


async def test_closing_a_body_stops_a_source_that_waits_and_closes_it() -> None:
    waits, closed = asyncio.Event(), asyncio.Event()

    async def source() -> AsyncIterator[bytes]:
        try:
            waits.set()
            await asyncio.Event().wait()
            yield b""
        finally:
            closed.set()

    outgoing = Body(1, source).start()
    reader = asyncio.create_task(anext(outgoing))
    await waits.wait()
    await outgoing.close()
    assert closed.is_set()
    with pytest.raises(asyncio.CancelledError):
        await reader
    with pytest.raises(ConnectionAbortedError):
        await anext(outgoing)


async def test_whose_turn_it_is_is_told_while_a_body_is_sent() -> None:
    turns: list[bool] = []
    outgoing = Body(3, pieces_of(b"1", b"23")).start()
    outgoing.watch = turns.append
    assert [bytes(piece) async for piece in outgoing] == [b"1", b"23"]
    assert turns == [False, True, False, True, False]


# ---- Link


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("</v2/a/referrers/x?n=2>; rel=\"next\"", "https://r.example/v2/a/referrers/x?n=2"),
        ("<https://r.example:443/p?q=%2F>;rel=next", "https://r.example:443/p?q=%2F"),
        ("<?n=3>; REL = next", "https://r.example/v2/a/referrers/x?n=3"),
        ("</a>; rel=prev, </b>; title=\"a, b\"; rel=\"last next\"", "https://r.example/b"),
        ("</a>; rel=\"prev\"", None),
        ("</a>", None),
        ("next", None),
        ("", None),
    ],
)
def test_the_next_page_is_found(header: str, expected: str | None) -> None:
    assert link.next_page(URL, ["", header]) == expected


@pytest.mark.parametrize(
    "target", ["https://evil.example/p", "//evil.example/p", "http://r.example/p", "https://r.example:444/p",
               "https://u@r.example/p", "ftp://r.example/p", "https://[", "/a b"],
)  # fmt: skip
def test_a_next_page_elsewhere_is_refused(target: str) -> None:
    with pytest.raises(Malformed, match=r"^r\.example gives"):
        link.next_page(URL, [f'<{target}>; rel="next"'])


@given(st.text() | st.lists(st.sampled_from(["<", ">", ";", "rel", "=", '"', "next", ",", " ", "/p"])).map("".join))
def test_any_link_header_gives_a_page_of_the_same_host_or_none(header: str) -> None:
    try:
        found = link.next_page(URL, [header])
    except Malformed:
        return
    assert found is None or found.startswith("https://r.example")


# ---- indexes


def test_what_is_not_changed_is_written_as_it_was() -> None:
    strange = {"mediaType": "x/y", "digest": "sha512:" + "0" * 128, "size": 1}
    rich = entry(D1, urls=["https://a.example/"], data="AA==", platform={"os": "linux", "architecture": "amd64",
                 "os.version": "1"}, annotations={"b": "2", "a": "1"})  # fmt: skip
    raw = index(rich, strange, annotations={"who": "me"}, unknown=77).replace(b"77", b"[1.50]")
    document = index_document.parse(raw)
    assert [d.digest for d in document.descriptors] == [D1]
    added = Descriptor(
        media_types.OCI_MANIFEST, D2, 9, Platform("linux", "arm", "v7"), {"k": "v"}, artifact_type="application/x"
    )
    changed = document.with_descriptors([*document.descriptors, added])
    found = json.loads(changed)
    assert found["annotations"] == {"who": "me"}
    assert b"1.50" in changed
    assert rich in found["manifests"]
    assert strange in found["manifests"]
    assert index_document.parse(changed).descriptors == [*document.descriptors, added]
    assert json.loads(index_document.parse(changed).with_descriptors([added]))["manifests"] == [
        {
            "mediaType": media_types.OCI_MANIFEST,
            "digest": D2,
            "size": 9,
            "artifactType": "application/x",
            "platform": {"architecture": "arm", "os": "linux", "variant": "v7"},
            "annotations": {"k": "v"},
        },
        strange,
    ]


def test_the_empty_index_is_one() -> None:
    raw = index_document.EMPTY.with_descriptors([])
    assert index_document.parse(raw).descriptors == []
    assert json.loads(raw) == {"schemaVersion": 2, "mediaType": media_types.OCI_INDEX, "manifests": []}


def test_an_empty_index_may_say_null() -> None:
    assert index_document.parse(b'{"schemaVersion": 2, "manifests": null}').with_descriptors([]) == (
        b'{"schemaVersion":2,"manifests":[]}'
    )


def test_an_index_without_a_media_type_is_what_its_header_says() -> None:
    raw = json.dumps({"schemaVersion": 2, "manifests": []}).encode()
    docker = media_types.DOCKER_INDEX
    assert index_document.parse(raw, f"{docker}; charset=utf-8").media_type == docker
    assert index_document.parse(raw).media_type == media_types.OCI_INDEX


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", Malformed),
        (b"[]", Malformed),
        (b'{"schemaVersion": 2, "manifests": 3}', Malformed),
        (b'{"schemaVersion": 2, "mediaType": 3, "manifests": []}', Malformed),
        (b'{"schemaVersion": 2}', Unsupported),
        (b'{"schemaVersion": 1, "manifests": []}', Unsupported),
        (b'{"manifests": []}', Unsupported),
        (index(layers=[]), Unsupported),
        (index(mediaType=media_types.OCI_MANIFEST), Unsupported),
        (b'{"a":' * 100_000, Malformed),
        (index(*[entry()] * (MAX_ENTRIES + 1)), TooLarge),
        (b" " * (MAX_SIZE + 1), TooLarge),
    ],
)  # fmt: skip
def test_what_is_no_index_is_refused(data: bytes, error: type[DadiError]) -> None:
    with pytest.raises(error):
        index_document.parse(data)


def test_an_index_that_would_be_too_large_is_not_made() -> None:
    many = [Descriptor("x/y", digests.of(str(n).encode()), n) for n in range(MAX_ENTRIES + 1)]
    with pytest.raises(TooLarge, match=r"1001 entries.*delete"):
        index_document.EMPTY.with_descriptors(many)
    assert len(index_document.parse(index_document.EMPTY.with_descriptors(many[:-1])).entries) == MAX_ENTRIES
    fat = Descriptor("x/y", D1, 1, annotations={"a": "x" * MAX_SIZE})
    with pytest.raises(TooLarge, match="delete"):
        index_document.EMPTY.with_descriptors([fat])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from([D1, "linux", 2, "x/y"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["mediaType", "digest", "size", "platform", "os", "annotations", "manifests", "artifactType"]),
        inner, max_size=6),
    max_leaves=12,
)  # fmt: skip


@given(st.lists(json_values, max_size=4), st.binary(max_size=20))
def test_any_entries_are_read_and_kept(entries: list[Any], junk: bytes) -> None:
    document = index_document.parse(index(*entries))
    again = json.loads(document.with_descriptors(document.descriptors))["manifests"]
    key = json.dumps
    assert sorted(map(key, again)) == sorted(map(key, entries))
    with pytest.raises(DadiError):
        index_document.parse(junk + b"\xff")


# ---- scopes and tags


@pytest.mark.parametrize(
    ("asked", "needed", "expected"),
    [
        ("", "repository:a:pull", ["repository:a:pull"]),
        ("repository:b:pull", "repository:a:pull", ["repository:b:pull"]),
        ("repository:a:pull", "repository:a:pull,push", ["repository:a:pull,push"]),
        ("", "repository:a:pull,push", ["repository:a:pull,push"]),
        ("repository:h:5/a:pull registry:x:*", "repository:h:5/a:pull,push",
         ["repository:h:5/a:pull,push", "registry:x:*"]),
        ("repository:a:push", "repository:a:pull,push repository:b:pull",
         ["repository:a:push,pull", "repository:b:pull"]),
    ],
)  # fmt: skip
def test_scopes_for_pushing_are_those_asked_for_and_those_needed(asked: str, needed: str, expected: list[str]) -> None:
    assert wanted_scopes(asked, needed) == expected


def test_the_fallback_tag_is_a_tag() -> None:
    assert fallback_tag(D1) == "sha256-" + D1[7:]
    with pytest.raises(InvalidRequest):
        fallback_tag("sha256:../../x")
