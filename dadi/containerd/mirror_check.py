"""What `dadi doctor` looks at where engines are told to pull through a registry proxy: is it in force, does it answer?

    certs.d/*/hosts.toml    containerd; those that `dadi containerd-config --mirror` wrote
    dadi.conf               podman and CRI-O, by the name that the README gives it

Where nobody is told of a proxy there is nothing to say. One that does not answer costs engines nothing but its use:
they go to the registries.
"""

from __future__ import annotations

import http.client
import ssl
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from dadi.containerd import check, config, mirror
from dadi.errors import DadiError
from dadi.node.kernel import Feature

REGISTRIES_CONF = "/etc/containers/registries.conf.d/dadi.conf"
_PATIENCE = 3.0
_CRI = "Kubernetes (CRI) pulls through it"
_HINT = "start dadi-registry-proxy, or dadi-node with `enabled = true` below [proxy]; engines pull past it meanwhile"


def probe(address: str, certs: str = mirror.CERTS_D, registries_conf: str = REGISTRIES_CONF) -> list[Feature]:
    """Return a row for each proxy that an engine is told of, and one for CRI; `address`: containerd's socket."""
    containerd = dict(_of_containerd(Path(certs)))
    proxies = {**dict(_of_podman(Path(registries_conf))), **containerd}
    rows = [_answers(url, ca) for url, ca in sorted(proxies.items())]
    return [*rows, *(_cri(address.removeprefix("unix://"), certs) if containerd else ())]


def _of_containerd(certs: Path) -> Iterator[tuple[str, str]]:
    for file in sorted(certs.glob("*/hosts.toml")):
        text = _read(file)
        if text.startswith(mirror.MARK):
            yield from mirror.mirrors(text).items()


def _of_podman(file: Path) -> Iterator[tuple[str, str]]:
    try:
        registries = tomllib.loads(_read(file)).get("registry")
    except tomllib.TOMLDecodeError:
        return
    for registry in registries if isinstance(registries, list) else ():
        found = registry.get("mirror") if isinstance(registry, dict) else None
        for row in found if isinstance(found, list) else ():
            if isinstance(row, dict) and row.get("location"):
                scheme = "http" if row.get("insecure") is True else "https"
                yield f"{scheme}://{str(row['location']).partition('/')[0]}", ""


def _read(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""


def _answers(url: str, ca: str) -> Feature:
    name, why = "registry proxy", ""
    parts = urlsplit(url)
    try:
        if parts.scheme == "https":
            trusted = ssl.create_default_context(cafile=ca or None)
            client: http.client.HTTPConnection = http.client.HTTPSConnection(
                parts.netloc, timeout=_PATIENCE, context=trusted
            )
        else:
            client = http.client.HTTPConnection(parts.netloc, timeout=_PATIENCE)
        try:
            client.request("GET", "/healthz")
            answer = client.getresponse()
            if answer.status != 200 or answer.read(16) != b"ok\n":
                why = "somebody else answers there"
        finally:
            client.close()
    except (OSError, ValueError, http.client.HTTPException) as error:
        why = str(error) or type(error).__name__
    return Feature(name, False, f"{url}: {why}", _HINT) if why else Feature(name, True, f"{url} answers", "")


def _cri(socket: str, certs: str) -> list[Feature]:
    """Return a row if containerd runs, with CRI. It is no lack: this machine may have no Kubernetes."""
    if not Path(socket).exists():
        return []
    try:
        said = subprocess.run(["containerd", "--version"], capture_output=True, text=True, timeout=10, check=True)
        usual = certs == mirror.CERTS_D and config.printed_version(said.stdout) >= (2, 2)
        looks = config.cri_looks_into(check.dumped(socket), certs, usual)
    except (*check.DUMP_FAILS, DadiError) as error:
        return [Feature(_CRI, True, f"not known: {error}", "")]
    if looks is None:
        return []
    detail = f"yes, by {certs}" if looks else f"no: its config_path is not {certs} (`dadi containerd-config --mirror`)"
    return [Feature(_CRI, True, detail, "")]
