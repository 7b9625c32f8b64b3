"""An image of a layout pushed over plain HTTP, without a program for it: milliseconds instead of a process each.

What lives here: the push of the OCI distribution specification, "Pushing blobs" (POST, then one PUT) and "Pushing
manifests". What never does: credentials, TLS, trying again; `Image.push` (skopeo) is for what needs them.
"""

from __future__ import annotations

import http.client
import json
from urllib.parse import urljoin, urlsplit

from tests.lab.oci_layout import CONFIG, Descriptor, Image


def push(image: Image, host: str, repository: str, tag: str) -> None:
    """Push to HOST/REPOSITORY:TAG. Raises RuntimeError with the registry's words."""
    connection = http.client.HTTPConnection(host, timeout=30)
    try:
        for blob in [layer.blob for layer in image.layers] + [_config(image)]:
            location = _call(connection, "POST", f"/v2/{repository}/blobs/uploads/", b"", 202)
            parts = urlsplit(urljoin(f"http://{host}/", location))
            target = f"{parts.path}?{parts.query}&digest={blob.digest}"
            _call(connection, "PUT", target, _blob(image, blob), 201, "application/octet-stream")
        manifest = _blob(image, image.manifest)
        _call(connection, "PUT", f"/v2/{repository}/manifests/{tag}", manifest, 201, image.manifest.media_type)
    finally:
        connection.close()


def _config(image: Image) -> Descriptor:
    described = json.loads(_blob(image, image.manifest))["config"]
    return Descriptor(CONFIG, described["digest"], described["size"])


def _blob(image: Image, blob: Descriptor) -> bytes:
    return (image.layout / "blobs" / "sha256" / blob.digest.removeprefix("sha256:")).read_bytes()


def _call(connection: http.client.HTTPConnection, method: str, target: str, body: bytes, expected: int,
          media_type: str = "") -> str:  # fmt: skip
    """Return the answer's Location."""
    connection.request(method, target, body, {"Content-Type": media_type} if media_type else {})
    answer = connection.getresponse()
    text = answer.read()
    if answer.status != expected:
        raise RuntimeError(f"{method} {target}: {answer.status} {text[:300]!r}")
    return answer.headers.get("Location", "")
