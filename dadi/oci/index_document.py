"""An OCI index that others write too: read with bounds, changed without losing what we do not understand. Pure.

    document     a JSON object with schemaVersion 2 and `manifests`; its other fields are kept as they are
    its entries  those that make a descriptor of ours are shown; others (another digest algorithm, fields that are
                 missing) are not shown and are kept as they are

An entry that is written again because nobody changed it is written byte for byte as it was, whatever fields it has that
our `Descriptor` has not. The same calls give the same bytes. (OCI image specification, "Image Index".)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from dadi.errors import DadiError, Malformed, TooLarge, Unsupported
from dadi.oci import manifest as manifests
from dadi.oci import media_types
from dadi.oci.manifest import MAX_ENTRIES, MAX_SIZE, Descriptor

_HINT = "delete entries that nobody needs any more"
_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_ENTRIES = msgspec.json.Decoder(list[msgspec.Raw] | None)


class IndexDocument(msgspec.Struct, frozen=True):
    """An index as it was read; `entries` pairs what we understand of each entry with its bytes."""

    media_type: str
    fields: dict[str, msgspec.Raw]
    entries: tuple[tuple[Descriptor | None, bytes], ...]

    @property
    def descriptors(self) -> list[Descriptor]:
        """The entries that we understand, in order."""
        return [descriptor for descriptor, _ in self.entries if descriptor is not None]

    def with_descriptors(self, wanted: Iterable[Descriptor]) -> bytes:
        """Return the index with these entries in place of those that we understand; raise TooLarge for too many."""
        known = {descriptor: raw for descriptor, raw in reversed(self.entries) if descriptor is not None}
        raws = [known.get(descriptor) or encode_descriptor(descriptor) for descriptor in wanted]
        raws += [raw for descriptor, raw in self.entries if descriptor is None]
        _check_count(len(raws))
        fields: dict[str, Any] = {**self.fields, "manifests": [msgspec.Raw(raw) for raw in raws]}
        data = msgspec.json.encode(fields)
        if len(data) > MAX_SIZE:
            raise TooLarge(f"an index that would have {len(data)} bytes; the limit is {MAX_SIZE}", hint=_HINT)
        return data


EMPTY = IndexDocument(
    media_types.OCI_INDEX,
    {
        "schemaVersion": msgspec.Raw(b"2"),
        "mediaType": msgspec.Raw(msgspec.json.encode(media_types.OCI_INDEX)),
        "manifests": msgspec.Raw(b"[]"),
    },
    (),
)
"""The index that has no entries yet."""


def parse(data: bytes, content_type: str = "") -> IndexDocument:
    """Return an index; `content_type` is the header that it came with.

    Raises TooLarge above MAX_SIZE bytes or MAX_ENTRIES entries, Unsupported for something else than an index, and
    Malformed for what makes no sense as a whole.
    """
    if len(data) > MAX_SIZE:
        raise TooLarge(f"an index of {len(data)} bytes; the limit is {MAX_SIZE}", hint=_HINT)
    try:
        fields = _FIELDS.decode(data)
        # An empty list is null where the writer's language makes no difference between the two.
        raws = (_ENTRIES.decode(fields["manifests"]) or []) if "manifests" in fields else None
        version = msgspec.json.decode(fields.get("schemaVersion", b"null"))
        said = msgspec.json.decode(fields.get("mediaType", b'""'), type=str | None)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise Malformed(f"not a valid index: {error}") from None
    media_type = said or media_types.bare(content_type) or media_types.OCI_INDEX
    if raws is None or version != 2 or media_type not in media_types.INDEXES or {"layers", "config"} & fields.keys():
        raise Unsupported(f"not an index but something of media type {media_type[:100]!r}")
    _check_count(len(raws))
    return IndexDocument(media_type, fields, tuple((_understood(bytes(raw)), bytes(raw)) for raw in raws))


def encode_descriptor(descriptor: Descriptor) -> bytes:
    """Return a descriptor as JSON, without the fields that it has no value for."""
    wire: dict[str, Any] = {
        "mediaType": descriptor.media_type,
        "digest": descriptor.digest,
        "size": descriptor.size,
    }
    if descriptor.artifact_type:
        wire["artifactType"] = descriptor.artifact_type
    if descriptor.platform is not None:
        platform = descriptor.platform
        wire["platform"] = {"architecture": platform.architecture, "os": platform.os}
        if platform.variant:
            wire["platform"]["variant"] = platform.variant
    if descriptor.annotations:
        wire["annotations"] = dict(sorted(descriptor.annotations.items()))
    return msgspec.json.encode(wire)


def _understood(raw: bytes) -> Descriptor | None:
    try:
        return manifests.parse_descriptor(raw)
    except DadiError:
        return None


def _check_count(count: int) -> None:
    if count > MAX_ENTRIES:
        raise TooLarge(f"an index of {count} entries; the limit is {MAX_ENTRIES}", hint=_HINT)
