"""Which superpeers `dadi prefetch` talks to, and which images it is about: options, and the files behind them.

    /etc/dadi/datacenters.toml      [datacenters]
                                    fra1 = ["http://10.1.0.1:7070", "http://10.1.0.2:7070"]
                                    [tls]                       as in the daemons' configuration, for https://
    a list of images                one a line; "#" begins a comment
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import click
import msgspec

from dadi import config
from dadi.config import described
from dadi.errors import ConfigError, InvalidRequest
from dadi.oci import platforms as oci_platforms
from dadi.tls import TlsConfig

F = TypeVar("F", bound=Callable[..., object])
DEFAULT_FILE = "/etc/dadi/datacenters.toml"
_MOST_LIST = 16 << 20


class Datacenters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file."""

    datacenters: Annotated[dict[str, tuple[str, ...]], described("name → the URLs of all its superpeers")] = {}
    tls: Annotated[TlsConfig, described("TLS towards superpeers")] = TlsConfig()


class Place(msgspec.Struct, frozen=True):
    """A datacenter, or a superpeer that was named by itself."""

    name: str
    urls: tuple[str, ...]


class Where(msgspec.Struct, frozen=True):
    """Whom to talk to, and how."""

    places: tuple[Place, ...]
    tls: TlsConfig = TlsConfig()


def where_options(command: F) -> F:
    """Add the options that say which superpeers are meant."""
    for option in (
        click.option("--datacenters-file", metavar="FILE", default=DEFAULT_FILE, show_default=True, help=(
            "TOML: [datacenters], name = [URLs of its superpeers]; [tls] as the daemons have it.")),
        click.option("--all", "everywhere", is_flag=True, help="All datacenters of the file."),
        click.option("--datacenter", "datacenters", multiple=True, metavar="NAME", help=(
            "A datacenter of the file (may be given several times).")),
        click.option("--superpeer", "superpeers", multiple=True, metavar="URL", help=(
            "A superpeer (may be given several times: all those of a datacenter).")),
    ):  # fmt: skip
        command = option(command)
    return command


def where(superpeers: Sequence[str], datacenters: Sequence[str], everywhere: bool, file: str) -> Where:
    """Return whom the options mean. Superpeers that are named by themselves are one place. Raises ConfigError."""
    known = Datacenters()
    if Path(file).exists():
        known = config.load(Datacenters, file)
    elif datacenters or everywhere:
        raise ConfigError(f"there is no {file}", hint="it has a table [datacenters]: name = [URLs of its superpeers]")
    names = list(known.datacenters) if everywhere else list(dict.fromkeys(datacenters))
    for name in names:
        if not known.datacenters.get(name):
            listed = ", ".join(known.datacenters) or "none"
            raise ConfigError(f"{file} names no superpeer of {name!r}", hint=f"it has: {listed}")
    places = [Place(name, tuple(map(_url, known.datacenters[name]))) for name in names]
    if superpeers:
        urls = tuple(dict.fromkeys(map(_url, superpeers)))
        places.append(Place(urls[0].partition("//")[2] + (f" +{len(urls) - 1}" if len(urls) > 1 else ""), urls))
    if not places:
        hint = "give --superpeer URL, --datacenter NAME or --all"
        raise InvalidRequest("no superpeer is named", hint=hint)
    return Where(tuple(places), known.tls)


def images(named: Sequence[str], lists: Sequence[str], manifests: Sequence[str]) -> list[str]:
    """Return all images that are meant, each once. Raises InvalidRequest, ConfigError."""
    from dadi.prefetch import manifests as kubernetes

    found = dict.fromkeys(named)
    for path in lists:
        lines = (line.partition("#")[0].strip() for line in _read(path).splitlines())
        found.update(dict.fromkeys(line for line in lines if line))
    for path in manifests:
        found.update(dict.fromkeys(kubernetes.images(_read(path), path)))
    if not found:
        raise InvalidRequest("no image is named", hint="give IMAGE, --from-file or --from-kubernetes")
    return list(found)


def platforms(named: Sequence[str]) -> list[str]:
    """Return the platforms that are meant: this machine's without any."""
    return list(dict.fromkeys(named)) or [str(oci_platforms.of_machine(os.uname().machine))]


def _read(path: str) -> str:
    try:
        with click.open_file(path, "rb") as file:
            data = file.read(_MOST_LIST + 1)
    except OSError as error:
        hint = "name a file that you may read, or - for standard input"
        raise ConfigError(f"{path} cannot be read: {error.strerror}", hint=hint) from None
    if len(data) > _MOST_LIST:
        hint = "is it a list of images, or of manifests? a longer one can be given in parts"
        raise InvalidRequest(f"{path} has more than {_MOST_LIST} bytes", hint=hint)
    try:
        return str(data.decode())
    except UnicodeDecodeError:
        hint = "a list has one image a line, a manifest is YAML or JSON; both in UTF-8"
        raise InvalidRequest(f"{path} is no text", hint=hint) from None


def _url(url: str) -> str:
    url = url.rstrip("/")
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"{url!r} is not the URL of a superpeer", hint="write it as http://HOST:PORT")
    return url
