"""Images in Kubernetes manifests."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dadi.errors import InvalidRequest
from dadi.prefetch.manifests import images

POD = "{containers: [{name: a, image: app:1}], initContainers: [{name: b, image: init:2}]}"


@pytest.mark.parametrize(
    "document",
    [
        f"kind: Pod\nspec: {POD}",
        *(f"kind: {kind}\nspec: {{replicas: 2, template: {{metadata: {{}}, spec: {POD}}}}}"
          for kind in ("Deployment", "StatefulSet", "DaemonSet", "ReplicaSet", "Job", "ReplicationController")),
        f"kind: CronJob\nspec: {{jobTemplate: {{spec: {{template: {{spec: {POD}}}}}}}}}",
        f"kind: PodTemplate\ntemplate: {{spec: {POD}}}",
        f"kind: List\nitems: [{{kind: Service, spec: {{ports: []}}}}, {{kind: Pod, spec: {POD}}}]",
        f"kind: PodList\nitems:\n- spec: {POD}",
        f"apiVersion: example.com/v1\nkind: Fleet\nspec: {{size: 3, template: {{spec: {POD}}}}}",
    ],
)  # fmt: skip
def test_every_kind_that_holds_pods(document: str) -> None:
    assert images(document) == ["init:2", "app:1"]


def test_several_documents_and_each_image_once() -> None:
    text = f"---\nkind: Pod\nspec: {POD}\n---\n---\nkind: ConfigMap\ndata: {{image: no:1}}\n---\n" \
           f"kind: Pod\nspec: {{containers: [{{image: 'app:1'}}, {{image: other@sha256:{'1' * 64}}}]}}\n"  # fmt: skip
    assert images(text) == ["init:2", "app:1", f"other@sha256:{'1' * 64}"]


def test_json_ephemeral_containers_and_image_volumes() -> None:
    spec = {"containers": [{"image": "a"}], "ephemeralContainers": [{"image": "debug"}],
            "volumes": [{"name": "v", "image": {"reference": "model:1"}}, {"emptyDir": {}}]}  # fmt: skip
    assert images(json.dumps({"kind": "Pod", "spec": spec}).encode()) == ["a", "debug", "model:1"]


@pytest.mark.parametrize(
    "text", ["", "kind: Service", "a: [", "kind: Pod\nspec: {containers: []}", "!!python/object:x {}", "\x00",
             "kind: Pod\nspec: {containers: [{image: 5}, null, x]}", "- " * 5000 + "x"]
)  # fmt: skip
def test_what_names_no_image_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        images(text)


def test_nested_aliases_are_looked_at_once() -> None:
    levels = ["a0: &a0 {kind: List, items: []}"]
    levels += [f"a{n}: &a{n} {{kind: List, items: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 16)]
    text = "\n".join(levels) + "\nkind: List\nitems: [*a15, {kind: Pod, spec: {containers: [{image: app}]}}]"
    assert images(text) == ["app"]


@given(st.text(max_size=200))
def test_any_text_gives_images_or_is_refused(text: str) -> None:
    try:
        found = images(text)
    except InvalidRequest:
        return
    assert found
