"""Tags and referrers, as registries give them, made into the lists that were asked for. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from dadi.oci import media_types
from dadi.oci.lookups import TagsPage
from dadi.oci.manifest import Descriptor


def page(found: TagsPage, parameters: dict[str, str]) -> TagsPage:
    """Return the page that was asked for, in order, also from a registry that answers with all tags whatever it is."""
    most, last = int(parameters.get("n", len(found.tags))), parameters.get("last", "")
    if len(found.tags) <= most and last not in found.tags:
        return found if found.following else TagsPage(tuple(sorted(found.tags)), {})
    tags = sorted(tag for tag in found.tags if tag > last)
    following = {"n": str(most), "last": tags[most - 1]} if 0 < most < len(tags) else {}
    return TagsPage(tuple(tags[:most]), following)


def index(entries: list[Descriptor]) -> bytes:
    """Return the image index that lists these."""
    rows = []
    for entry in entries:
        row: dict[str, Any] = {"mediaType": entry.media_type, "digest": entry.digest, "size": entry.size}
        if entry.artifact_type:
            row["artifactType"] = entry.artifact_type
        if entry.annotations:
            row["annotations"] = entry.annotations
        rows.append(row)
    return msgspec.json.encode({"schemaVersion": 2, "mediaType": media_types.OCI_INDEX, "manifests": rows})
