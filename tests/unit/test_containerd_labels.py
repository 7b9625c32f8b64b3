"""containerd's labels, as its own client sets them."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dadi.containerd import labels
from dadi.oci import media_types
from dadi.oci.manifest import Descriptor
from dadi.oci.reference import Reference
from dadi.snapshotter.model import checked_labels, request_in, unpacked_layer


def sha(text: str) -> str:
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def layers(count: int, annotations: dict[str, str] | None = None) -> list[Descriptor]:
    return [Descriptor(media_types.OCI_LAYER_GZIP, sha(f"{n}"), n, annotations=annotations or {}) for n in range(count)]


def test_chain_ids_are_those_of_the_specification() -> None:
    a, b, c = sha("a"), sha("b"), sha("c")
    assert labels.chain_ids([]) == []
    assert labels.chain_ids([a]) == [a]
    assert labels.chain_ids([a, b, c]) == [a, sha(f"{a} {b}"), sha(f"{sha(f'{a} {b}')} {c}")]


def test_a_manifest_refers_to_its_config_and_its_layers_by_number() -> None:
    one, two = layers(2)
    config = Descriptor(media_types.DOCKER_CONFIG, sha("config"), 1)
    assert labels.children((config, one, two, one)) == {
        "containerd.io/gc.ref.content.config": config.digest,
        "containerd.io/gc.ref.content.l.0": one.digest,
        "containerd.io/gc.ref.content.l.1": two.digest,
        "containerd.io/gc.ref.content.l.2": one.digest,
    }


def test_an_index_refers_to_manifests_indexes_and_whatever_else_it_has() -> None:
    kinds = [media_types.OCI_MANIFEST, media_types.OCI_INDEX, media_types.DOCKER_MANIFEST, "application/x-else"]
    entries = [Descriptor(kind, sha(kind), 1) for kind in kinds]
    assert labels.children(entries) == {
        "containerd.io/gc.ref.content.m.0": entries[0].digest,
        "containerd.io/gc.ref.content.0": entries[1].digest,
        "containerd.io/gc.ref.content.m.1": entries[2].digest,
        "containerd.io/gc.ref.content.1": entries[3].digest,
    }


@pytest.mark.parametrize(
    ("name", "host"),
    [("debian", "docker.io"), ("r.example:5000/library/debian", "r.example"), ("[::1]:5000/library/debian", "::1"),
     ("[::1]/library/debian", "::1")],
)  # fmt: skip
def test_the_source_of_content_is_the_registrys_host_without_its_port(name: str, host: str) -> None:
    key = f"containerd.io/distribution.source.{host}"
    assert labels.source(Reference.parse(name), {}) == {key: "library/debian"}
    assert labels.source(Reference.parse(name), {key: "z,a"}) == {key: "a,library/debian,z"}
    assert labels.source(Reference.parse(name), {key: "library/debian"}) == {key: "library/debian"}
    assert labels.source(Reference.parse(name), {key: "x" * 4080}) == {}, "containerd takes no longer one"


def test_what_a_prepare_says_is_what_the_snapshotter_reads() -> None:
    three = layers(3)
    said = labels.for_layer("r.example/app:1", sha("manifest"), three, 1, sha("chain"))
    assert said[labels.SNAPSHOT_REF] == sha("chain")
    request = request_in(said)
    assert request is not None
    assert request.reference == "r.example/app:1"
    assert request.manifest == sha("manifest")
    assert request.layers == (three[1].digest, three[2].digest)
    assert unpacked_layer(f"extract-123-aB_- {sha('chain')}") == sha("chain")


@given(st.integers(1, 200), st.integers(0, 199))
def test_layers_are_cut_to_what_a_label_takes(count: int, number: int) -> None:
    number %= count
    every = layers(count)
    said = labels.for_layer("r.example/app:1", sha("manifest"), every, number, sha("chain"))
    assert checked_labels(said) == said
    digests = said[labels.IMAGE_LAYERS].split(",")
    assert digests == [layer.digest for layer in every[number : number + len(digests)]]
    assert len(digests) == min(count - number, 56)


def test_only_annotations_for_snapshots_are_passed_on_and_never_instead_of_ours() -> None:
    annotations = {
        "containerd.io/snapshot/other": "x", labels.LAYER_DIGEST: "lie", "else": "y", labels.SNAPSHOT_REF: "lie",
        "containerd.io/snapshot/long": "x" * 5000,
    }  # fmt: skip
    (layer,) = layers(1, annotations)
    said = labels.for_layer("r.example/app:1", sha("manifest"), [layer], 0, sha("chain"))
    assert said.keys() == {
        labels.SNAPSHOT_REF, labels.IMAGE_REFERENCE, labels.MANIFEST_DIGEST, labels.LAYER_DIGEST, labels.IMAGE_LAYERS,
        "containerd.io/snapshot/other",
    }  # fmt: skip
    assert (said[labels.LAYER_DIGEST], said[labels.SNAPSHOT_REF]) == (layer.digest, sha("chain"))
