"""What the verbs that talk to registries themselves share: options, their configuration, keys, names of images.

    SRC, DST    HOST[:PORT]/REPOSITORY[:TAG][@DIGEST]    in a registry
                oci:DIRECTORY[:TAG]                      in an OCI layout
                docker-archive:FILE[:NAME]               in what `docker save` has written (SRC only)
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import click
import msgspec

from dadi import config
from dadi.config import described
from dadi.errors import ConfigError, InvalidRequest
from dadi.oci import platforms as oci_platforms
from dadi.oci.config import RegistryConfig
from dadi.oci.platforms import Platform
from dadi.oci.reference import Reference

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from dadi.oci.registry import RegistryClient
    from dadi.publish.images import ImageSource
    from dadi.publish.local import LocalImages

F = TypeVar("F", bound=Callable[..., object])

DEFAULT_CONFIG = "/etc/dadi/cli.toml"
LAYOUT, ARCHIVE = "oci:", "docker-archive:"


class CliConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The configuration of the verbs that talk to registries."""

    registry: Annotated[RegistryConfig, described("registries")] = RegistryConfig()


def registry_options(command: F) -> F:
    """Add the options of a verb that talks to registries."""
    for option in (
        click.option("--config", "config_file", metavar="FILE", type=click.Path(dir_okay=False), help=(
            f"TOML file whose [registry] table is like the daemons'. Default: {DEFAULT_CONFIG}, if it exists.")),
        click.option("--plain-http", is_flag=True, help="Speak plain HTTP to the registries that are named here."),
        click.option("--sign-key", metavar="FILE", type=click.Path(dir_okay=False), help=(
            "Ed25519 private key (PEM) to sign the index with.")),
        click.option("--all-platforms", is_flag=True, help="All platforms of an image that has several."),
        click.option("--platform", "platforms", multiple=True, metavar="OS/ARCH", help=(
            "For an image of several platforms: this one (may be given several times). Default: this machine's.")),
    ):  # fmt: skip
        command = option(command)
    return command


def wanted_platforms(texts: tuple[str, ...], every: bool) -> list[Platform]:
    """Return the platforms that options name."""
    if texts and every:
        raise click.UsageError("--platform and --all-platforms exclude each other")
    return [oci_platforms.parse(text) for text in texts]


def registry_config(config_file: str | None, named: list[Reference], plain_http: bool) -> RegistryConfig:
    """Return the configuration, in which the registries that were named on the command line are allowed."""
    path = config_file or (DEFAULT_CONFIG if Path(DEFAULT_CONFIG).exists() else None)
    found = config.load(CliConfig, path).registry
    hosts = tuple(reference.registry for reference in named)
    plain = (*found.plain_http, *hosts) if plain_http else found.plain_http
    return msgspec.structs.replace(found, allowed=(*found.allowed, *hosts), plain_http=plain)


@asynccontextmanager
async def registry_client(settings: RegistryConfig) -> AsyncIterator[RegistryClient]:
    """Give a client, and close it."""
    from dadi.oci.registry import RegistryClient

    client = RegistryClient(settings)
    try:
        yield client
    finally:
        await client.close()


async def signing_key(path: str | None) -> Ed25519PrivateKey | None:
    """Return the key in a file; None if there is no file to be read."""
    if path is None:
        return None
    from dadi.index import signature

    try:
        pem = await asyncio.to_thread(Path(path).read_bytes)
    except OSError as error:
        raise ConfigError(f"the key {path} cannot be read: {error.strerror}") from None
    return signature.private_key(pem, path)


async def local_images(layout: str | None, archive: str | None) -> LocalImages | None:
    """Return the images in a layout or an archive; None if there is neither."""
    from dadi.publish.archive import open_archive
    from dadi.publish.local import open_layout

    if layout is not None:
        return await asyncio.to_thread(open_layout, Path(layout))
    return None if archive is None else await asyncio.to_thread(open_archive, Path(archive))


def is_local(name: str) -> bool:
    """Whether this is the name of an image on this machine's disk."""
    return name.startswith((LAYOUT, ARCHIVE))


def split_local(name: str) -> tuple[str, str]:
    """Return the path and the image's name ("" if it has none) of oci:PATH[:NAME] or docker-archive:PATH[:NAME]."""
    path, _, image = name.partition(":")[2].partition(":")
    if not path:
        raise InvalidRequest(f"{name!r} names no path", hint=f"write {name.partition(':')[0]}:PATH[:NAME]")
    return path, image


async def source_of(name: str, client: RegistryClient | None) -> ImageSource:
    """Return the image that SRC names."""
    from dadi.publish.images import LocalImage, RegistryImage

    if not is_local(name):
        assert client is not None
        return RegistryImage(client, Reference.parse(name))
    path, image = split_local(name)
    layout = name.startswith(LAYOUT)
    local = await local_images(path if layout else None, None if layout else path)
    assert local is not None
    return LocalImage(local, *names_in(image)) if image else LocalImage(local)


def names_in(image: str) -> list[str]:
    """Return the names by which a layout or archive may know what a person calls `image`, the surest first."""
    try:
        reference = Reference.parse(image)
    except InvalidRequest:
        return [image]
    if reference.digest:
        return [reference.digest]
    return [image, str(reference), reference.tag or ""]
