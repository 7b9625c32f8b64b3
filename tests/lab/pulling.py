"""A plain pull: manifest, config and layers of an image by HTTP, through the registry proxy of the machine it runs on.

What lives here: the client, which knows nothing of dadi, and what it saw. What never does: who has it pull.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from urllib.parse import quote

from tests.lab.network import Host

ACCEPT = "application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.v2+json"
_PATIENCE = 60.0


@dataclass
class Pulled:
    """What one client got: seconds until all was there; each blob's bytes; and what went wrong."""

    seconds: float = 0.0
    blobs: dict[str, int] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)


def pull(address: str, port: int, image: str, tag: str, registry: str) -> Pulled:
    """Pull REGISTRY/IMAGE:TAG through the proxy at address:port."""
    pulled, began = Pulled(), time.monotonic()
    ns = f"?ns={quote(registry)}"
    connection = http.client.HTTPConnection(address, port, timeout=_PATIENCE)
    try:
        connection.request("GET", f"/v2/{image}/manifests/{tag}{ns}", headers={"Accept": ACCEPT})
        answer = connection.getresponse()
        raw = answer.read()
        if answer.status != 200:
            raise OSError(f"manifest: {answer.status} {raw[:300]!r}")
        if f"sha256:{sha256(raw).hexdigest()}" != answer.headers["Docker-Content-Digest"]:
            raise OSError("another manifest than it says")
        manifest = json.loads(raw)
        for wanted in (manifest["config"], *manifest["layers"]):
            _blob(connection, f"/v2/{image}/blobs/{wanted['digest']}{ns}", wanted, pulled)
    except (OSError, http.client.HTTPException) as error:
        pulled.errors.append(repr(error))
    finally:
        connection.close()
    pulled.seconds = time.monotonic() - began
    return pulled


def _blob(connection: http.client.HTTPConnection, path: str, wanted: dict[str, object], pulled: Pulled) -> None:
    connection.request("GET", path)
    answer = connection.getresponse()
    if answer.status != 200:
        raise OSError(f"{wanted['digest']}: {answer.status} {answer.read(300)!r}")
    hashed, size = sha256(), 0
    while piece := answer.read(1 << 18):
        hashed.update(piece)
        size += len(piece)
    digest = f"sha256:{hashed.hexdigest()}"
    if digest != wanted["digest"] or size != wanted["size"]:
        raise OSError(f"{wanted['digest']}: {size} bytes of {digest}")
    pulled.blobs[digest] = size


class Pulls:
    """Clients on many hosts that pull the same image at the same moment, each in a thread."""

    def __init__(self, hosts: Sequence[Host], port: int, image: str, tag: str, registry: str) -> None:
        self.found: dict[str, Pulled] = {}
        go = threading.Barrier(len(hosts))

        def work(host: Host) -> None:
            go.wait()
            self.found[host.name] = host.inside(lambda: pull("127.0.0.1", port, image, tag, registry))

        self._threads = [threading.Thread(target=work, args=(host,), name=f"pull on {host.name}") for host in hosts]
        for thread in self._threads:
            thread.start()

    def wait(self) -> dict[str, Pulled]:
        """Return what came of them, by the hosts' names."""
        for thread in self._threads:
            thread.join()
        return self.found
