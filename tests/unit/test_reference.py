"""Image references and registries, as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dadi.errors import InvalidRequest
from dadi.oci.reference import Reference, parse_registry

DIGEST = "sha256:" + "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("debian", "docker.io/library/debian:latest"),
        ("debian:12", "docker.io/library/debian:12"),
        ("docker.io/debian", "docker.io/library/debian:latest"),
        ("index.docker.io/debian", "docker.io/library/debian:latest"),
        ("someone/thing", "docker.io/someone/thing:latest"),
        (f"debian@{DIGEST}", f"docker.io/library/debian@{DIGEST}"),
        (f"debian:12@{DIGEST}", f"docker.io/library/debian:12@{DIGEST}"),
        (f"host:5000/a/b@{DIGEST}", f"host:5000/a/b@{DIGEST}"),
        ("localhost/a", "localhost/a:latest"),
        ("Registry.Example:5000/a/b/c:V1.2_x", "registry.example:5000/a/b/c:V1.2_x"),
        ("127.0.0.1:5000/a", "127.0.0.1:5000/a:latest"),
        ("[::1]:5000/a", "[::1]:5000/a:latest"),
        ("r.example/a__b.c-d--e/f_g", "r.example/a__b.c-d--e/f_g:latest"),
    ],
)
def test_a_reference_has_one_canonical_spelling(text: str, canonical: str) -> None:
    assert str(Reference.parse(text)) == canonical
    assert Reference.parse(canonical) == Reference.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Debian",
        "a//b",
        "/a",
        "a/",
        "a:",
        "a:b:c",
        "a:-b",
        "a:" + "t" * 129,
        "a@sha256:abc",
        "a@sha512:" + "0" * 128,
        f"a@{DIGEST}@{DIGEST}",
        f"a@{DIGEST.upper()}",
        "a..b",
        "../etc/passwd",
        "r.example/../a",
        "r.example/%2e%2e/a",
        "r.example:0/a",
        "r.example:65536/a",
        "r.example:x/a",
        "user@r.example/a",
        "http://r.example/a",
        "-r.example/a",
        "[::g]:1/a",
        "[::1/a",
        "a b",
        "a\n",
        "a?x=y",
        "a#b",
        "é/a",
        "r.example/" + "a" * 256,
        "a" * 5000,
    ],
)
def test_what_is_no_reference_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        Reference.parse(text)


def test_the_digest_decides_where_a_tag_is_given_too() -> None:
    assert Reference.parse(f"a:1@{DIGEST}").identifier == DIGEST
    assert Reference.parse("a:1").identifier == "1"


def test_a_reference_can_be_pinned() -> None:
    pinned = Reference.parse("r.example/a:1").at(DIGEST)
    assert str(pinned) == f"r.example/a:1@{DIGEST}"
    with pytest.raises(InvalidRequest):
        pinned.at("latest")


def test_the_hint_for_capitals_says_so() -> None:
    with pytest.raises(InvalidRequest, match="lower case"):
        Reference.parse("r.example/Team/app")


_component = st.from_regex(r"[a-z0-9]{1,8}((\.|_|__|-{1,3})[a-z0-9]{1,8}){0,2}", fullmatch=True)
_registry = st.one_of(
    st.from_regex(r"[a-z0-9]{1,5}(\.[a-z0-9]{1,5}){1,3}(:[1-9][0-9]{0,3})?", fullmatch=True),
    st.just("localhost:5000"),
    st.sampled_from(["[::1]:5000", "[2001:db8::5]"]),
)


@given(
    _registry,
    st.lists(_component, min_size=1, max_size=4),
    st.none() | st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}", fullmatch=True),
    st.booleans(),
)
def test_parts_that_are_put_together_are_taken_apart_again(
    registry: str, components: list[str], tag: str | None, pinned: bool
) -> None:
    repository = "/".join(components)
    text = f"{registry}/{repository}" + (f":{tag}" if tag else "") + (f"@{DIGEST}" if pinned else "")
    found = Reference.parse(text)
    assert (found.registry, found.repository, found.digest) == (registry, repository, DIGEST if pinned else None)
    assert found.tag == (tag or (None if pinned else "latest"))
    assert Reference.parse(str(found)) == found


@given(st.text(max_size=80) | st.text(alphabet="ab.:/@-_[]0", max_size=40))
def test_any_text_is_a_reference_or_refused(text: str) -> None:
    try:
        found = Reference.parse(text)
    except InvalidRequest:
        return
    assert Reference.parse(str(found)) == found
    assert not set(found.repository) & set(" %?#\\\n")
    assert ".." not in found.repository.split("/")


@given(st.text(max_size=40))
def test_any_text_is_a_registry_or_refused(text: str) -> None:
    try:
        found = parse_registry(text)
    except InvalidRequest:
        return
    assert parse_registry(found) == found
