"""Manifests, indexes and configs: what is understood, and what is refused with which error."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dadi.errors import DadiError, Malformed, NoSuchPlatform, TooLarge, Unsupported
from dadi.oci import manifest as manifests
from dadi.oci import media_types as types
from dadi.oci import platforms
from dadi.oci.manifest import Index, Manifest
from dadi.oci.media_types import Compression

A, B, C = ("sha256:" + letter * 64 for letter in "abc")
AMD64 = platforms.parse("linux/amd64")


def descriptor(media_type: str = types.OCI_LAYER_GZIP, digest: str = A, size: Any = 10, **more: Any) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": digest, "size": size, **more}


def image(**changes: Any) -> dict[str, Any]:
    document = {
        "schemaVersion": 2,
        "mediaType": types.OCI_MANIFEST,
        "config": descriptor(types.OCI_CONFIG, C),
        "layers": [descriptor(), descriptor(digest=B, size=20)],
    }
    return {name: value for name, value in (document | changes).items() if value is not ...}


def index(*entries: dict[str, Any], **changes: Any) -> dict[str, Any]:
    document = {"schemaVersion": 2, "mediaType": types.OCI_INDEX, "manifests": list(entries)}
    return {name: value for name, value in (document | changes).items() if value is not ...}


def entry(platform: str | None, digest: str = A, **more: Any) -> dict[str, Any]:
    made = descriptor(types.OCI_MANIFEST, digest, **more)
    if platform is not None:
        os, architecture, *variant = platform.split("/")
        made["platform"] = {"os": os, "architecture": architecture} | ({"variant": variant[0]} if variant else {})
    return made


def parse(document: Any, content_type: str = "", **more: Any) -> Manifest | Index:
    return manifests.parse(json.dumps(document).encode(), content_type, **more)


def image_of(document: dict[str, Any]) -> Manifest:
    parsed = parse(document)
    assert isinstance(parsed, Manifest)
    return parsed


def index_of(*entries: dict[str, Any]) -> Index:
    parsed = parse(index(*entries))
    assert isinstance(parsed, Index)
    return parsed


def test_an_image_is_read() -> None:
    parsed = image_of(image(annotations={"a": "b"}))
    assert [layer.digest for layer in parsed.layers] == [A, B]
    assert parsed.config.digest == C
    assert parsed.annotations == {"a": "b"}
    assert parsed.check_is_image() is parsed


def test_the_type_may_stand_in_the_header_only_or_nowhere() -> None:
    bare = image(mediaType=...)
    assert parse(bare, types.DOCKER_MANIFEST).media_type == types.DOCKER_MANIFEST
    assert parse(bare, "application/json; charset=utf-8").media_type == types.OCI_MANIFEST
    assert parse(bare).media_type == types.OCI_MANIFEST
    assert parse(index(entry("linux/amd64"), mediaType=...)).media_type == types.OCI_INDEX


def test_parameters_and_case_of_the_header_do_not_matter() -> None:
    assert parse(image(), f"{types.OCI_MANIFEST.upper()} ; charset=utf-8").media_type == types.OCI_MANIFEST


@pytest.mark.parametrize(
    ("document", "content_type", "expected"),
    [
        (image(), types.DOCKER_MANIFEST, ""),
        (image(), types.OCI_INDEX, ""),
        (image(mediaType=...), types.OCI_INDEX, ""),
        (image(mediaType=types.OCI_INDEX), "", ""),
        (index(mediaType=types.OCI_MANIFEST), "", ""),
        (image(), "", types.DOCKER_MANIFEST),
        (image(), types.OCI_MANIFEST, types.OCI_INDEX),
        (image(manifests=[entry("linux/amd64")]), "", ""),
        (index(entry("linux/amd64"), layers=[descriptor()]), "", ""),
        (index(entry("linux/amd64"), config=descriptor()), "", ""),
    ],
)
def test_documents_that_could_be_read_in_two_ways_are_refused(
    document: dict[str, Any], content_type: str, expected: str
) -> None:
    with pytest.raises(Malformed):
        parse(document, content_type, expected=expected)


@pytest.mark.parametrize(
    "document",
    [
        [],
        "x",
        {},
        {"schemaVersion": 2},
        image(config=...),
        image(layers=[descriptor(size=-1)]),
        image(layers=[descriptor(size=1 << 63)]),
        image(layers=[descriptor(size="10")]),
        image(layers=[descriptor(size=1.5)]),
        image(layers=[descriptor(digest="latest")]),
        image(layers=[descriptor(digest="sha256:" + "A" * 64)]),
        image(layers=[descriptor(digest="sha256:" + "a" * 63)]),
        image(layers=[descriptor(digest="sha256:../../etc")]),
        image(layers=[descriptor(size=10), descriptor(size=11)]),
        image(layers=[descriptor(digest=C, size=11)]),
        image(layers=[{"mediaType": types.OCI_LAYER}]),
    ],
)
def test_nonsense_is_malformed(document: Any) -> None:
    with pytest.raises(Malformed):
        parse(document)


def test_other_digests_than_sha256_and_old_schemas_are_unsupported() -> None:
    with pytest.raises(Unsupported, match="sha512"):
        parse(image(layers=[descriptor(digest="sha512:" + "a" * 128)]))
    with pytest.raises(Unsupported, match="schema"):
        parse({"schemaVersion": 1, "fsLayers": [{"blobSum": A}]})
    with pytest.raises(Unsupported, match="schema"):
        parse(image(mediaType="application/vnd.docker.distribution.manifest.v1+prettyjws"))
    with pytest.raises(Unsupported, match="text/html"):
        parse(image(mediaType="text/html"))


def test_too_much_is_too_large() -> None:
    with pytest.raises(TooLarge, match="limit is 100"):
        parse(image(), limit=100)
    layers = [descriptor(digest="sha256:" + f"{n:064x}") for n in range(manifests.MAX_LAYERS + 1)]
    with pytest.raises(TooLarge, match="1001 layers"):
        parse(image(layers=layers))
    assert len(image_of(image(layers=layers[:-1])).layers) == manifests.MAX_LAYERS
    with pytest.raises(TooLarge, match="1001 entries"):
        parse(index(*[entry("linux/amd64")] * 1001))


def test_the_same_layer_may_stand_twice() -> None:
    parsed = image_of(image(layers=[descriptor(), descriptor(digest=B, size=20), descriptor()]))
    config = {"rootfs": {"type": "layers", "diff_ids": [A, B, A]}}
    assert manifests.parse_config(json.dumps(config).encode(), parsed).diff_ids == (A, B, A)
    config = {"rootfs": {"type": "layers", "diff_ids": [A, B, C]}}
    with pytest.raises(Malformed, match="twice"):
        manifests.parse_config(json.dumps(config).encode(), parsed)


def test_fields_that_are_null_are_as_good_as_absent() -> None:
    parsed = image_of(image(layers=None, annotations=None, manifests=None, subject=None))
    assert parsed.layers == ()
    assert parsed.annotations == {}


def test_an_artifact_is_read_but_is_no_image() -> None:
    document = image(
        config=descriptor(types.OCI_EMPTY, C, 2), artifactType="application/x", subject=descriptor(types.OCI_MANIFEST)
    )
    parsed = image_of(document)
    assert parsed.subject is not None
    with pytest.raises(Unsupported, match="application/x"):
        parsed.check_is_image()


@pytest.mark.parametrize(
    ("media_type", "packed"),
    [
        (types.OCI_LAYER, Compression.NONE),
        (types.OCI_LAYER_GZIP, Compression.GZIP),
        (types.OCI_LAYER_ZSTD, Compression.ZSTD),
        (types.DOCKER_LAYER_GZIP, Compression.GZIP),
        (types.DOCKER_FOREIGN_GZIP, Compression.GZIP),
        ("application/vnd.oci.image.layer.nondistributable.v1.tar", Compression.NONE),
        ("application/vnd.oci.image.layer.nondistributable.v1.tar+zstd", Compression.ZSTD),
    ],
)
def test_a_layers_type_says_how_it_is_packed(media_type: str, packed: Compression) -> None:
    assert types.compression(media_type) is packed
    assert types.is_layer(media_type)


def test_foreign_layers_are_known_as_such() -> None:
    assert types.is_foreign(types.DOCKER_FOREIGN_GZIP)
    assert not types.is_foreign(types.DOCKER_LAYER_GZIP)


@pytest.mark.parametrize("media_type", ["", "text/plain", types.OCI_LAYER + "+xz", types.OCI_LAYER + "+gzip+encrypted"])
def test_other_layers_are_unsupported(media_type: str) -> None:
    with pytest.raises(Unsupported):
        image_of(image(layers=[descriptor(media_type)])).check_is_image()


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"rootfs": None},
        {"rootfs": {"type": "layers", "diff_ids": [A]}},
        {"rootfs": {"type": "layers", "diff_ids": [A, B, C]}},
        {"rootfs": {"type": "other", "diff_ids": [A, B]}},
        {"rootfs": {"type": "layers", "diff_ids": [A, "b"]}},
        {"rootfs": {"type": "layers", "diff_ids": [A, 1]}},
        [],
    ],
)
def test_a_config_must_fit_its_manifest(config: Any) -> None:
    with pytest.raises(Malformed):
        manifests.parse_config(json.dumps(config).encode(), image_of(image()))


def test_a_config_tells_its_platform_and_diff_ids() -> None:
    config = {
        "os": "linux",
        "architecture": "arm64",
        "variant": "v8",
        "rootfs": {"type": "layers", "diff_ids": [B, C]},
        "history": None,
    }
    parsed = manifests.parse_config(json.dumps(config).encode(), image_of(image()))
    assert str(parsed.platform) == "linux/arm64"
    assert parsed.diff_ids == (B, C)


def test_the_entry_for_the_platform_is_chosen() -> None:
    parsed = index_of(entry("linux/arm64/v8", A), entry("linux/amd64", B), entry("linux/amd64/v3", C))
    assert [d.digest for d in manifests.candidates(parsed, AMD64)] == [B]
    assert [d.digest for d in manifests.candidates(parsed, platforms.parse("linux/amd64/v4"))] == [C]
    assert [d.digest for d in manifests.candidates(parsed, platforms.parse("linux/arm64"))] == [A]


def test_the_first_of_equal_entries_is_chosen() -> None:
    parsed = index_of(entry("linux/amd64", C), entry("linux/amd64", A))
    assert [d.digest for d in manifests.candidates(parsed, AMD64)] == [C]


def test_attestations_and_artifacts_are_left_out() -> None:
    parsed = index_of(
        entry("unknown/unknown", A),
        entry("linux/amd64", A, annotations={"vnd.docker.reference.type": "attestation-manifest"}),
        descriptor("application/x", A),
        entry("linux/arm64", B),
    )
    with pytest.raises(NoSuchPlatform) as failure:
        manifests.candidates(parsed, AMD64)
    assert failure.value.hint == "there is linux/arm64"


def test_entries_without_a_platform_come_into_question_when_nothing_else_suits() -> None:
    parsed = index_of(entry("linux/arm64", A), entry(None, B), entry(None, C))
    assert [d.digest for d in manifests.candidates(parsed, AMD64)] == [B, C]
    assert [d.digest for d in manifests.candidates(parsed, platforms.parse("linux/arm64"))] == [A]


def test_an_empty_index_has_no_platform() -> None:
    with pytest.raises(NoSuchPlatform, match="no image at all"):
        manifests.candidates(index_of(), AMD64)


_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.sampled_from([A, B]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "schemaVersion",
                    "mediaType",
                    "config",
                    "layers",
                    "manifests",
                    "digest",
                    "size",
                    "platform",
                    "annotations",
                ]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)


@given(_json)
def test_any_json_is_a_manifest_or_an_error_of_ours(document: Any) -> None:
    if isinstance(document, dict):
        document["schemaVersion"] = 2
    _manifest_or_error(json.dumps(document).encode())


@given(st.binary(max_size=200))
def test_any_bytes_are_a_manifest_or_an_error_of_ours(data: bytes) -> None:
    _manifest_or_error(data)


def test_deep_nesting_is_an_error_of_ours() -> None:
    with pytest.raises(Malformed):
        manifests.parse(b'{"schemaVersion":2,"x":' + b"[" * 100_000)


def _manifest_or_error(data: bytes) -> None:
    try:
        parsed = manifests.parse(data)
    except DadiError:
        return
    assert isinstance(parsed, Manifest | Index)


@given(st.dictionaries(st.sampled_from(["rootfs", "os", "architecture", "variant"]), _json))
def test_any_config_is_read_or_an_error_of_ours(document: dict[str, Any]) -> None:
    try:
        parsed = manifests.parse_config(json.dumps(document).encode(), image_of(image()))
    except DadiError:
        return
    assert len(parsed.diff_ids) == 2
