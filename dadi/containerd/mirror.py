"""containerd's configuration of the registry proxy as a mirror: `certs.d/*/hosts.toml`. Pure.

    certs.d/_default/hosts.toml       for all registries that have no directory of their own
    certs.d/HOST[:PORT]/hosts.toml    for one; `server` says where it is when the mirror does not answer
    certs.d/HOST_PORT_/               looked at before HOST:PORT
    certs.d/HOST[:PORT]/*.crt …       certificates as Docker has them: only looked at where there is no hosts.toml

containerd asks the mirror first, with `?ns=` for the registry that is meant, and goes on to the registry by itself if
the mirror is down or answers with an error. `dial_timeout` is known to 2.1 and newer; without it, it is 30 s.
(containerd, docs/hosts.md; the code of 1.6 to 2.3.)
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable
from urllib.parse import urlsplit

from dadi.errors import InvalidRequest
from dadi.oci.reference import DOCKER_HUB, parse_registry

URL = "http://127.0.0.1:7072"
"""Where a proxy that is not told otherwise listens (`registry_proxy/config.py`)."""
CERTS_D = "/etc/containerd/certs.d"
MARK = "# Written by `dadi containerd-config --mirror`."
_DOCKER_HUB_SERVER = "https://registry-1.docker.io"
_KEYS, _HOST_KEYS = {"server", "host"}, {"capabilities", "dial_timeout", "ca"}


def files(url: str, registries: Iterable[str], ca: str = "") -> dict[str, str]:
    """Return the content of each file below certs.d by its path.

    `registries` are HOST[:PORT], or http://HOST:PORT for one without TLS. `ca`: an absolute path, of who has signed an
    https mirror. Raises InvalidRequest.
    """
    _check_url(url)
    if ca and not (ca.startswith("/") and ca.isprintable()):
        raise InvalidRequest(f"{ca[:100]!r} is no absolute path", hint="begin it with /")
    if ca and not url.startswith("https:"):
        raise InvalidRequest(f"{url} is asked without TLS: no certificate is looked at", hint="--proxy https://…")
    found = {"_default/hosts.toml": f"{MARK}\n{_host(url, ca)}"}
    for text in registries:
        scheme, _, host = text.rpartition("://")
        if scheme not in ("", "http", "https"):
            raise InvalidRequest(f"{text[:100]!r} is no registry", hint="write it as HOST[:PORT] or http://HOST:PORT")
        host = parse_registry(host)
        server = _DOCKER_HUB_SERVER if host == DOCKER_HUB else f"{scheme or 'https'}://{host}"
        found[f"{host}/hosts.toml"] = f'{MARK}\nserver = "{server}"\n\n{_host(url, ca)}'
    return found


def looked_at_before(directory: str) -> str:
    """Return the directory that containerd takes instead of HOST:PORT, if it is there; "" for one without a port."""
    host, colon, port = directory.rpartition(":")
    return f"{host}_{port}_" if colon else ""


def is_ours(text: str) -> bool:
    """Whether the content of a hosts.toml is what `files` has made, for whichever mirror; else somebody edited it."""
    if not text.startswith(MARK):
        return False
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return False
    hosts = found.get("host")
    return found.keys() <= _KEYS and isinstance(hosts, dict) and len(hosts) == 1 and all(
        isinstance(host, dict) and host.keys() <= _HOST_KEYS for host in hosts.values()
    )  # fmt: skip


def mirrors(text: str) -> dict[str, str]:
    """Return the mirrors that a hosts.toml names, in its order: by URL the authority that is trusted, or "".

    Those of a file that is none are none: containerd leaves it out, too.
    """
    try:
        hosts = tomllib.loads(text).get("host")
    except tomllib.TOMLDecodeError:
        return {}
    rows = hosts.items() if isinstance(hosts, dict) else ()
    return {url: str(host.get("ca") or "") for url, host in rows if isinstance(host, dict)}


def cri(directory: str) -> str:
    """Return what CRI needs to look into certs.d, as a comment: nerdctl does by itself, `ctr` by --hosts-dir."""
    own = "# 2.2 and newer look there by themselves.\n" if directory == CERTS_D else ""
    return (
        "# Kubernetes (CRI) looks there if /etc/containerd/config.toml says so. containerd 1.6 and 1.7:\n"
        '#   [plugins."io.containerd.grpc.v1.cri".registry]\n'
        f'#     config_path = "{directory}"\n'
        "# 2.0 and newer:\n"
        '#   [plugins."io.containerd.cri.v1.images".registry]\n'
        f'#     config_path = "{directory}"\n'
        f"{own}"
        "# nerdctl looks there by itself; ctr images pull --hosts-dir does if it is told.\n"
    )


def _host(url: str, ca: str) -> str:
    trusted = f"  ca = {json.dumps(ca, ensure_ascii=False)}\n" if ca else ""
    return f'[host."{url}"]\n  capabilities = ["pull", "resolve"]\n  dial_timeout = "1s"\n{trusted}'


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and not (parts.query or parts.fragment or "@" in parts.netloc)
        parse_registry(parts.netloc)
    except (ValueError, InvalidRequest):
        good = False
    if not good or parts.path not in ("", "/"):
        raise InvalidRequest(f"{url[:100]!r} is no address of a mirror", hint=f"write it as {URL}")
