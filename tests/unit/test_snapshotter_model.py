"""Labels, names and mount options: what is read out of them and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dadi.errors import InvalidRequest
from dadi.snapshotter import model, overlay
from dadi.snapshotter.model import Kind, Mount, Request
from tests.fakes.lazy_images import labels_for

CHAIN = "sha256:" + "ab" * 32


def test_the_labels_of_a_layer_say_image_manifest_and_layers() -> None:
    labels = labels_for(CHAIN, "docker.io/library/nginx:1", "sha256:m", ("sha256:1", "sha256:2"))
    assert model.request_in(labels) == Request("docker.io/library/nginx:1", "sha256:m", ("sha256:1", "sha256:2"))


def test_labels_that_were_cut_or_are_missing_say_less() -> None:
    assert model.request_in(labels_for(CHAIN)) is None
    assert model.request_in(labels_for(CHAIN, "image")) == Request("image", None, ())
    labels = labels_for(CHAIN, "image") | {"containerd.io/snapshot/cri.layer-digest": "sha256:1"}
    assert model.request_in(labels) == Request("image", None, ("sha256:1",))


@pytest.mark.parametrize(
    ("key", "chain_id"),
    [
        (f"default/3/extract-728-Xy_z {CHAIN}", CHAIN),
        (f"extract-1 {CHAIN}", CHAIN),
        ("default/3/container", None),
        (f"default/3/{CHAIN}", None),
        (f"default/3/notextract-1 {CHAIN}", None),
        ("default/3/extract-1 sha256:short", None),
    ],
)
def test_a_key_for_unpacking_is_known_by_its_form(key: str, chain_id: str | None) -> None:
    assert model.unpacked_layer(key) == chain_id


def test_an_empty_value_deletes_a_label() -> None:
    assert model.checked_labels({"a": "", "b": "1"}) == {"b": "1"}
    assert model.updated_labels({"a": "1", "b": "2"}, {}, ["labels.a"]) == {"b": "2"}
    assert model.updated_labels({"a": "1"}, {}, []) == {}


def test_labels_and_names_have_a_largest_size() -> None:
    assert model.checked_labels({"k": "v" * 4095})
    with pytest.raises(InvalidRequest, match="4097 bytes"):
        model.checked_labels({"k": "v" * 4096})
    with pytest.raises(InvalidRequest, match="the limit is"):
        model.checked_name("n" * (model.MAX_NAME + 1), "the name")
    with pytest.raises(InvalidRequest, match="must not be empty"):
        model.checked_name("", "the name")


@given(st.dictionaries(st.text(max_size=20), st.text(max_size=300), max_size=6))
def test_any_labels_ask_for_an_image_or_not(labels: dict[str, str]) -> None:
    assert model.request_in(labels) is None
    request = model.request_in(labels | labels_for(CHAIN, "image", layers=tuple(labels)))
    assert request is not None
    assert request.reference == "image"


OPTIONS = ("index=off",)


def test_without_a_parent_it_is_a_bind_mount_of_its_own_directory() -> None:
    assert overlay.mounts(Kind.ACTIVE, "/u", "/w", [], OPTIONS) == [Mount("bind", "/u", ("rw", "rbind"))]
    assert overlay.mounts(Kind.VIEW, "/u", "/w", [], OPTIONS) == [Mount("bind", "/u", ("ro", "rbind"))]


def test_a_view_of_one_directory_is_a_bind_mount_of_that() -> None:
    assert overlay.mounts(Kind.VIEW, "/u", "/w", ["/l"], OPTIONS) == [Mount("bind", "/l", ("ro", "rbind"))]


def test_all_else_is_an_overlay_with_the_topmost_directory_first() -> None:
    (view,) = overlay.mounts(Kind.VIEW, "/u", "/w", ["/top", "/image"], OPTIONS)
    assert view == Mount("overlay", "overlay", ("lowerdir=/top:/image", "index=off"))
    (active,) = overlay.mounts(Kind.ACTIVE, "/u", "/w", ["/top", "/image"], OPTIONS)
    assert active.options == ("workdir=/w", "upperdir=/u", "lowerdir=/top:/image", "index=off")
