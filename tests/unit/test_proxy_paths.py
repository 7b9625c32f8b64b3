"""What request targets mean, and that nothing else means anything."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dadi.errors import InvalidRequest, NotFound
from dadi.oci.reference import Reference
from registry_proxy import paths
from registry_proxy.paths import Kind, Route

DIGEST = "sha256:" + "a" * 64


@pytest.mark.parametrize(
    ("path", "route"),
    [
        ("/v2", Route(Kind.BASE)),
        ("/v2/", Route(Kind.BASE)),
        ("/v2/app/manifests/1", Route(Kind.MANIFEST, "app", "1")),
        ("/v2/a/b/c/manifests/v1.0", Route(Kind.MANIFEST, "a/b/c", "v1.0")),
        (f"/v2/app/blobs/{DIGEST}", Route(Kind.BLOB, "app", DIGEST)),
        (f"/v2/app/blobs/{DIGEST.replace(':', '%3A')}", Route(Kind.BLOB, "app", DIGEST)),
        ("/v2/app/tags/list", Route(Kind.TAGS, "app")),
        (f"/v2/app/referrers/{DIGEST}", Route(Kind.REFERRERS, "app", DIGEST)),
        ("/v2/app/blobs/uploads/", None),
        ("/v2/app/blobs/uploads", Route(Kind.UPLOAD, "app")),
        ("/v2/app/blobs/uploads/7f-_=", Route(Kind.UPLOAD, "app", "7f-_=")),
        ("/v2/manifests/tags/list", Route(Kind.TAGS, "manifests")),
        ("/v2/a/manifests/manifests/b", Route(Kind.MANIFEST, "a/manifests", "b")),
    ],
)
def test_what_a_path_is_about(path: str, route: Route | None) -> None:
    assert paths.split(path) == (route or Route(Kind.UPLOAD, "app", ""))


@pytest.mark.parametrize("path", ["/v1/app/manifests/1", "/", "", "v2/", "/v2/a%2fb/manifests/1", "/v2/a\\b/tags/list",
                                  "/v2/%2e%2e/manifests/1", "/v2/a/manifests/1\n", "/v2/a b/manifests/1",
                                  "http://host/v2/", "/v2/" + "a/" * 1100 + "tags/list"])  # fmt: skip
def test_what_no_image_has_is_invalid(path: str) -> None:
    with pytest.raises(InvalidRequest):
        paths.split(path)


@pytest.mark.parametrize("path", ["/v2/app", "/v2/app/manifests", "/v2/manifests/1", "/v2/_catalog", "/v2//manifests"])
def test_what_is_nothing_is_not_found(path: str) -> None:
    with pytest.raises(NotFound):
        paths.split(path)


@pytest.mark.parametrize(
    ("name", "ns", "expected"),
    [
        ("team/app", None, "up.example/team/app"),
        ("team/app", "reg.example:5000", "reg.example:5000/team/app"),
        ("app", "docker.io", "docker.io/library/app"),
        ("library/app", "docker.io", "docker.io/library/app"),
        ("reg.example/team/app", None, "reg.example/team/app"),
        ("localhost:5000/app", None, "localhost:5000/app"),
        ("REG.example/app", None, "reg.example/app"),
        ("reg.example_5000/team/app", None, "reg.example:5000/team/app"),
        ("10.0.0.1_80/app", None, "10.0.0.1:80/app"),
        ("localhost_5000/app", None, "localhost:5000/app"),
        ("team_5000/app", None, "up.example/team_5000/app"),
        ("reg.example_5000/app", "other.example", "other.example/reg.example_5000/app"),
    ],
)
def test_whose_repository_it_is(name: str, ns: str | None, expected: str) -> None:
    assert paths.repository(name, ns, "up.example").name == expected


@pytest.mark.parametrize(
    ("name", "ns"),
    [("../etc", None), ("a/../b", None), ("a//b", None), ("A/b", None), ("a:1", None), (f"a@{DIGEST}", None),
     ("", None), ("a", ""), ("a", "bad host"), ("a", "reg.example/path"), ("a", "user@reg.example"), ("a", "single"),
     ("a", "reg.example:99999"), ("x" * 300, None), ("a", "http://reg.example"), (".", None), ("a/.", None),
     ("reg.example_0/a", None), ("reg.example_99999/a", None), ("reg.example_a/b", None), ("reg.example__80/a", None),
     ("reg.example:1_2/a", None)],
)  # fmt: skip
def test_what_cannot_be_a_repository(name: str, ns: str | None) -> None:
    with pytest.raises(InvalidRequest):
        paths.repository(name, ns, "up.example")


@pytest.mark.parametrize(
    "identifier",
    ["sha256:abc", "sha512:" + "a" * 128, "-x", "a" * 129, "a/b", "", "a@b", DIGEST + "0", DIGEST.upper()],
)
def test_what_can_be_neither_tag_nor_digest(identifier: str) -> None:
    with pytest.raises(InvalidRequest):
        paths.identified(Reference("up.example", "app", "latest"), identifier)


@given(
    st.text(alphabet=st.sampled_from("/v2abMTs.:%3A-_~@=sha256listmanifestsblobsupreferrers\\\n\x00é"), max_size=80),
    st.none() | st.text(max_size=30),
)
def test_any_text_is_a_route_or_an_error_of_ours(text: str, ns: str | None) -> None:
    for path in (text, "/v2/" + text, "/v2/" + text + "/manifests/" + text):
        try:
            route = paths.split(path)
            if route.kind is Kind.BASE:
                continue
            found = paths.repository(route.name, ns, "up.example")
            if route.kind is Kind.MANIFEST:
                paths.identified(found, route.identifier)
        except (InvalidRequest, NotFound):
            pass
        else:
            assert ".." not in found.name.split("/")
            assert Reference.parse(str(found)) == found
