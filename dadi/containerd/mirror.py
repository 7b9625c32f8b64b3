"""containerd's configuration of the registry proxy as a mirror: `certs.d/*/hosts.toml`. Pure.

    certs.d/_default/hosts.toml     for all registries that have no directory of their own
    certs.d/HOST[:PORT]/hosts.toml  for one; `server` says where it is when the mirror does not answer

containerd asks the mirror first, with `?ns=` for the registry that is meant, and goes on to the registry by itself if
the mirror is down or answers with an error. (containerd, docs/hosts.md.)
"""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import urlsplit

from dadi.errors import InvalidRequest
from dadi.oci.reference import DOCKER_HUB, parse_registry

URL = "http://127.0.0.1:7072"
"""Where a proxy that is not told otherwise listens (`registry_proxy/config.py`)."""
CERTS_D = "/etc/containerd/certs.d"
MARK = "# Written by `dadi containerd-config --mirror`."
_DOCKER_HUB_SERVER = "https://registry-1.docker.io"


def files(url: str, registries: Iterable[str]) -> dict[str, str]:
    """Return the content of each file below certs.d by its path.

    `registries` are HOST[:PORT], or http://HOST:PORT for one without TLS. Raises InvalidRequest.
    """
    _check_url(url)
    found = {"_default/hosts.toml": f"{MARK}\n{_host(url)}"}
    for text in registries:
        scheme, _, host = text.rpartition("://")
        if scheme not in ("", "http", "https"):
            raise InvalidRequest(f"{text[:100]!r} is no registry", hint="write it as HOST[:PORT] or http://HOST:PORT")
        host = parse_registry(host)
        server = _DOCKER_HUB_SERVER if host == DOCKER_HUB else f"{scheme or 'https'}://{host}"
        found[f"{host}/hosts.toml"] = f'{MARK}\nserver = "{server}"\n\n{_host(url)}'
    return found


def cri(directory: str) -> str:
    """Return what CRI needs to look into certs.d, as a comment: nerdctl does by itself, `ctr` by --hosts-dir."""
    return (
        "# Kubernetes (CRI) looks there if /etc/containerd/config.toml says so. containerd 1.6 and 1.7:\n"
        '#   [plugins."io.containerd.grpc.v1.cri".registry]\n'
        f'#     config_path = "{directory}"\n'
        "# 2.0 and newer:\n"
        '#   [plugins."io.containerd.cri.v1.images".registry]\n'
        f'#     config_path = "{directory}"\n'
        "# nerdctl looks there by itself; ctr images pull --hosts-dir does if it is told.\n"
    )


def _host(url: str) -> str:
    return f'[host."{url}"]\n  capabilities = ["pull", "resolve"]\n'


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and not (parts.query or parts.fragment or "@" in parts.netloc)
        parse_registry(parts.netloc)
    except (ValueError, InvalidRequest):
        good = False
    if not good or parts.path not in ("", "/"):
        raise InvalidRequest(f"{url[:100]!r} is no address of a mirror", hint=f"write it as {URL}")
