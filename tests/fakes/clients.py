"""What tests of the registry client share besides the registry itself: references, a blob, questions about a client."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from dadi import digest as digests
from dadi.oci import media_types as types
from dadi.oci import platforms
from dadi.oci.credentials import Credentials
from dadi.oci.manifest import Descriptor
from dadi.oci.reference import Reference
from dadi.oci.registry import RegistryClient
from tests.fakes.registry import FakeRegistry

MakeClient = Callable[..., RegistryClient]
AMD64 = platforms.parse("linux/amd64")
DATA = random.Random(1).randbytes(1_000_000)
SECRET = Credentials("me", "secret")
KIND = "application/vnd.example.kind"


def ref(registry: FakeRegistry, rest: str = "team/app:1") -> Reference:
    return Reference.parse(f"{registry.host}/{rest}")


def blob(registry: FakeRegistry, data: bytes = DATA) -> Descriptor:
    return Descriptor(types.OCI_LAYER, registry.add_blob(data), len(data))


async def read(client: RegistryClient, reference: Reference, descriptor: Descriptor, **options: Any) -> bytes:
    return b"".join([piece async for piece in client.blob(reference, descriptor, **options)])


def hosts_of(client: RegistryClient) -> list[dict[str, Any]]:
    hosts = client.statistics()["hosts"]
    assert isinstance(hosts, list)
    return hosts


def ranges(registry: FakeRegistry) -> list[str | None]:
    return [seen.headers.get("Range") for seen in registry.asked("/blobs/")]


def artifact(subject: Descriptor | None = None, kind: str = KIND, **annotations: str) -> bytes:
    document: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": types.OCI_MANIFEST,
        "config": {"mediaType": types.OCI_EMPTY, "digest": digests.of(b"{}"), "size": 2},
        "layers": [],
    }
    if kind:
        document["artifactType"] = kind
    if annotations:
        document["annotations"] = annotations
    if subject is not None:
        document["subject"] = {"mediaType": subject.media_type, "digest": subject.digest, "size": subject.size}
    return json.dumps(document).encode()
