"""What has to be in containerd's configuration, by its version. Pure.

                    exports.root    CRI is told by                                      a lazy pull comes from
    1.6             ignored         grpc.v1.cri: snapshotter, annotations               CRI, nerdctl, `dadi pull`
    1.7             from 1.7.16     the same                                            the same
    2.0             yes             cri.v1.images: snapshotter, annotations             the same
    2.1 and newer   yes             cri.v1.images: snapshotter; the plugin's exports    the same, and `ctr image pull`

("annotations": disable_snapshot_annotations = false. With it, 2.1 and newer would go back to pulling as 2.0 does.)
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from dadi.errors import InvalidRequest

PLUGIN = "dadi"
SOCKET, ROOT = "/run/dadi/snapshotter.sock", "/var/lib/dadi/node"
"""Where a node that is not told otherwise serves containerd, and where it keeps its bytes (`dadi/node/config.py`)."""
_NEWEST = 99
_OLDEST = (1, 6)
_TEXT = re.compile(r"v?(?P<major>\d{1,3})(?:\.(?:(?P<minor>\d{1,3})|x)(?:\.(?:(?P<patch>\d{1,3})|x))?)?(?:[-~+].*)?")
_PRINTED = re.compile(r"\s(v?\d+\.\d+\S*)")
_OLD_CRI, _CRI = "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images"


class Version(NamedTuple):
    """A version of containerd; a part that was not given is the newest there may be."""

    major: int
    minor: int = _NEWEST
    patch: int = _NEWEST

    def __str__(self) -> str:
        minor = "x" if self.minor == _NEWEST else str(self.minor)
        return f"{self.major}.{minor}" + ("" if self.patch == _NEWEST else f".{self.patch}")


def parse_version(text: str) -> Version:
    """Return the version that a person wrote: 1.6, 1.7.24, 2.x; raise InvalidRequest, also for one that is too old."""
    found = _TEXT.fullmatch(text.strip())
    if found is None:
        raise InvalidRequest(f"{text[:50]!r} is no version of containerd", hint="write it as 1.7 or 2.x")
    version = Version(int(found["major"]), *(_NEWEST if found[part] is None else int(found[part])
                                             for part in ("minor", "patch")))  # fmt: skip
    if version < _OLDEST:
        raise InvalidRequest(f"containerd {text} is too old", hint="1.6 is the oldest that dadi was tried with")
    return version


def printed_version(output: str) -> Version:
    """Return the version in what `containerd --version` printed; raise InvalidRequest."""
    found = _PRINTED.search(output)
    if found is None:
        raise InvalidRequest(f"`containerd --version` says {output[:100]!r}", hint="give it with --version")
    return parse_version(found[1])


def text(version: Version, *, cri: bool, socket: str, root: str) -> str:
    """Return what to put into config.toml. `root`: the directory that the images' bytes are in."""
    transfer = version >= (2, 1)
    parts = [_head(version), _proxy_plugin(socket, root, transfer)]
    if cri:
        parts.append(_for_cri(version, root, socket))
    if transfer:
        parts.append(_for_transfer())
    return "\n".join(parts)


def _head(version: Version) -> str:
    return (
        f"# For containerd {version}: add this to /etc/containerd/config.toml, then restart it; containers go on.\n"
        "# A table that is there already gets these keys; `version` stands once, at the top.\n"
        f"version = {3 if version.major >= 2 else 2}\n"
    )


def _proxy_plugin(socket: str, root: str, transfer: bool) -> str:
    annotations = '    enable_remote_snapshot_annotations = "true"\n' if transfer else ""
    return (
        f"[proxy_plugins.{PLUGIN}]\n"
        '  type = "snapshot"\n'
        f"  address = {_quoted(socket)}\n"
        f"  [proxy_plugins.{PLUGIN}.exports]\n"
        f"    root = {_quoted(root)}\n" + annotations
    )


def _for_cri(version: Version, root: str, socket: str) -> str:
    first = (
        "# Start dadi-node before containerd: at its start CRI leaves out images whose snapshots it cannot ask for,\n"
        "# until they are pulled again (for which their registry must answer; what is here is not fetched again).\n"
        "# So that private images are lazy with pods' pull secrets: `enabled = true` below `[cri]` in dadi-node's\n"
        "# file, and kubelet asks dadi-node for images, containerd for all else. In kubelet's configuration:\n"
        f"#   imageServiceEndpoint: unix://{_plain(socket.rpartition('/')[0])}/cri.sock\n"
        "# or --image-service-endpoint with the same. Not needed for images that kubelet's credential providers know:\n"
        "# `providers` below `[credentials]` in dadi-node's file.\n"
    )
    if version >= (2, 1):
        return f'{first}[plugins."{_CRI}"]\n  snapshotter = "{PLUGIN}"\n'
    name = f'[plugins."{_CRI}"]' if version.major >= 2 else f'[plugins."{_OLD_CRI}".containerd]'
    note = ""
    if version < (1, 7, 16):
        note = (
            "# This version does not know exports.root; kubelet looks at a fixed place to see how full the disk is:\n"
            f"#   ln -s {root} /var/lib/containerd/io.containerd.snapshotter.v1.{PLUGIN}\n"
        )
    return f'{first}{note}{name}\n  snapshotter = "{PLUGIN}"\n  disable_snapshot_annotations = false\n'


def _for_transfer() -> str:
    """A list of our own takes the place of containerd's, so what is in that is in ours too."""
    tables = (
        '[[plugins."io.containerd.transfer.v1.local".unpack_config]]\n'
        f'  platform = "linux"\n  snapshotter = "{name}"\n  differ = "walking"\n'
        for name in ("overlayfs", PLUGIN)
    )
    return "# What CRI and `ctr image pull` may unpack with; the first is what containerd has by itself.\n" + (
        "\n".join(tables)
    )


def _quoted(value: str) -> str:
    """Return a TOML string."""
    return '"' + _plain(value).replace("\\", "\\\\").replace('"', '\\"') + '"'


def _plain(value: str) -> str:
    """Return a path that has no characters which would end a line."""
    if any(ord(character) < 32 or ord(character) == 127 for character in value):
        raise InvalidRequest(f"{value!r} has characters that no path in a configuration should have")
    return value


class CriSettings(NamedTuple):
    """What CRI does with images, by containerd's configuration."""

    snapshotter: str
    annotations: bool
    """Whether layers come with what makes lazy ones of them."""


def cri_settings(dumped: dict[str, Any]) -> CriSettings | None:
    """Return the settings in what `containerd config dump` prints (as TOML reads it); None without CRI."""
    plugins = _table(dumped.get("plugins"))
    old = _table(_table(plugins.get(_OLD_CRI)).get("containerd"))
    new = _table(plugins.get(_CRI))
    found = new or old
    if not found:
        return None
    snapshotter = str(found.get("snapshotter") or "overlayfs")
    annotations = found.get("disable_snapshot_annotations") is False
    if new and not annotations and not found.get("use_local_image_pull"):
        exports = _table(_table(_table(dumped.get("proxy_plugins")).get(snapshotter)).get("exports"))
        annotations = exports.get("enable_remote_snapshot_annotations") == "true" and _may_unpack(plugins, snapshotter)
    return CriSettings(snapshotter, annotations)


def cri_looks_into(dumped: dict[str, Any], directory: str, usual: bool) -> bool | None:
    """Return whether CRI looks for mirrors in a directory, by what `containerd config dump` prints; None without CRI.

    `usual`: whether it does where it is told nothing. 2.2 and newer do so for /etc/containerd/certs.d, unprinted.
    """
    plugins = _table(dumped.get("plugins"))
    disabled = dumped.get("disabled_plugins")
    found = [name for name in (_CRI, _OLD_CRI) if name in plugins and not (isinstance(disabled, list)
             and {name, "cri"} & {*map(str, disabled)})]  # fmt: skip
    if not found:
        return None
    registry = _table(_table(plugins[found[0]]).get("registry"))
    path = str(registry.get("config_path") or "")
    return directory in path.split(":") if path or registry.get("mirrors") else usual


def _may_unpack(plugins: dict[str, Any], snapshotter: str) -> bool:
    rows = _table(plugins.get("io.containerd.transfer.v1.local")).get("unpack_config")
    return isinstance(rows, list) and any(_table(row).get("snapshotter") == snapshotter for row in rows)


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
