"""What registries may hold besides ordinary images, through the proxy: it comes as it is, or it is said why not.

OCI distribution specification 1.1, "Pulling manifests" (end-3), "Listing Tags" (end-8a), with the shapes of manifests
that its conformance list pushes before it pulls them. Ordinary images: `test_registry_proxy_conformance.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dadi import digest as digests
from dadi.oci import media_types
from tests.fakes.registry import FakeRegistry, status
from tests.lab.proxies import proxied


def described(media_type: str, **more: Any) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": digests.of(b"{}"), "size": 2, **more}


EMPTY = described(media_types.OCI_EMPTY)
IMAGE: dict[str, Any] = {
    "schemaVersion": 2, "mediaType": media_types.OCI_MANIFEST, "config": described(media_types.OCI_CONFIG),
    "layers": [described(media_types.OCI_LAYER)],
}  # fmt: skip
LIST: dict[str, Any] = {
    "schemaVersion": 2, "mediaType": media_types.OCI_INDEX, "manifests": [described(media_types.OCI_MANIFEST)],
}  # fmt: skip
SHAPES = {
    "large": {**IMAGE, "annotations": {f"a{number}": "A" * 10_000 for number in range(390)}},
    "without layers": {**IMAGE, "layers": []},
    "without its type": {name: said for name, said in IMAGE.items() if name != "mediaType"},
    "with fields of somebody's own": {**IMAGE, "org.example.field": {"a": [1]}},
    "with data": {**IMAGE, "config": {**IMAGE["config"], "data": "e30="}},
    "with layers from elsewhere": {**IMAGE, "layers": [described(
        "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", urls=["https://elsewhere.example/layer"])]},
    "with a missing subject": {**IMAGE, "subject": described(media_types.OCI_MANIFEST)},
    "an artifact": {**IMAGE, "artifactType": "application/vnd.example", "config": EMPTY, "layers": [EMPTY]},
    "an empty index": {**LIST, "manifests": []},
    "an index of indexes": {**LIST, "manifests": [described(media_types.OCI_INDEX)]},
    "an artifact of several": {**LIST, "artifactType": "application/vnd.example",
                               "subject": described(media_types.OCI_INDEX)},
    "Docker's": {**IMAGE, "mediaType": media_types.DOCKER_MANIFEST},
    "Docker's list": {**LIST, "mediaType": media_types.DOCKER_INDEX},
}  # fmt: skip


async def test_manifests_of_all_shapes_come_as_they_are(tmp_path: Path) -> None:
    """"Pulling manifests", with the shapes of manifests that the conformance list pushes before it pulls them."""
    async with FakeRegistry() as fake, proxied(tmp_path, fake.host) as proxy:
        for number, (name, document) in enumerate(SHAPES.items()):
            media_type = str(document.get("mediaType", media_types.OCI_MANIFEST))
            digest, _ = fake.add_manifest("team/app", f"v{number}", document, media_type)
            for identifier in (f"v{number}", digest):
                response, body = await proxy.get(f"/v2/team/app/manifests/{identifier}")
                assert (response.status, response.headers["Content-Type"]) == (200, media_type), name
                assert response.headers["Docker-Content-Digest"] == digests.of(body) == digest, name


async def test_what_no_client_of_today_understands_is_unsupported(tmp_path: Path) -> None:
    """Docker's schema 1 is converted by registries on the fly; digests but SHA-256 are none that we could check."""
    old = {"schemaVersion": 1, "name": "team/app", "fsLayers": [], "history": [], "signatures": []}
    other = {**IMAGE, "layers": [described(media_types.OCI_LAYER, digest="sha512:" + "a" * 128)]}
    async with FakeRegistry() as fake, proxied(tmp_path, fake.host) as proxy:
        for kind in sorted(media_types.DOCKER_SCHEMA_1):
            fake.add_manifest("team/app", "old", old, kind)
            response, body = await proxy.get("/v2/team/app/manifests/old")
            assert (response.status, json.loads(body)["errors"][0]["code"]) == (501, "UNSUPPORTED")
        fake.add_manifest("team/app", "other", other, media_types.OCI_MANIFEST)
        response, body = await proxy.get("/v2/team/app/manifests/other")
        assert (response.status, json.loads(body)["errors"][0]["code"]) == (501, "UNSUPPORTED")


async def test_a_repository_without_tags_is_an_empty_list(tmp_path: Path) -> None:
    async with FakeRegistry() as fake, proxied(tmp_path, fake.host) as proxy:
        for number, said in enumerate(('{"name":"a","tags":[]}', '{"name":"a","tags":null}', '{"name":"a"}')):
            fake.script(f"/app{number}/tags/list", *[status(200, said.encode())] * 2)
            response, body = await proxy.get(f"/v2/team/app{number}/tags/list")
            assert (response.status, json.loads(body)) == (200, {"name": f"team/app{number}", "tags": []}), said
