"""`dadi index`: puts an index beside an image, so that its first start anywhere is a lazy one."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from dadi import config
from dadi.cli import show
from dadi.cli.client import as_json
from dadi.cli.registry import (
    local_images,
    names_in,
    registry_client,
    registry_config,
    registry_options,
    signing_key,
    wanted_platforms,
)
from dadi.oci.platforms import Platform
from dadi.oci.reference import Reference

if TYPE_CHECKING:
    from dadi.publish.index import IndexReport, PlatformReport

OUTPUT_HINT = "write the index into a directory with `--output DIR`, and bring it from there later"


@click.command(short_help="Make an image's index, and push it beside it.")
@click.argument("image", required=False, default="")
@click.option("--oci-layout", metavar="DIR", type=click.Path(file_okay=False), help=(
    "Read layers from this OCI layout where it has them; with --output no registry is contacted at all."))
@click.option("--docker-archive", metavar="FILE", type=click.Path(dir_okay=False), help=(
    "Read layers from what `docker save` has written, where it has them."))
@click.option("--output", metavar="DIR", type=click.Path(file_okay=False), help=(
    "Write the index into this OCI layout and do not push it."))
@click.option("--force", is_flag=True, help="Read every layer and make the index, also where there is one.")
@click.option("--spacing", metavar="SIZE", help="Bytes of output between two seek points, such as 2MiB.")
@registry_options
@as_json
def index(
    image: str,
    oci_layout: str | None,
    docker_archive: str | None,
    output: str | None,
    force: bool,
    spacing: str | None,
    platforms: tuple[str, ...],
    all_platforms: bool,
    sign_key: str | None,
    plain_http: bool,
    config_file: str | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Make the index of IMAGE and push it beside the image, which stays as it is.

    With it the image starts lazily on the very first node: a superpeer fetches just what is asked for. A second run
    finds the index and does nothing; layers that another image of the repository has had indexed are not read again.
    """
    if oci_layout and docker_archive:
        raise click.UsageError("--oci-layout and --docker-archive exclude each other")
    if not image and not (output and (oci_layout or docker_archive)):
        raise click.UsageError("which IMAGE? It can be left out only with --oci-layout and --output.")
    wanted = wanted_platforms(platforms, all_platforms)
    with show.Transfer(f"indexing {image or oci_layout or docker_archive}", quiet=as_json) as progress:
        report = asyncio.run(_index(
            image, oci_layout, docker_archive, output, force, spacing, wanted, all_platforms, sign_key, plain_http,
            config_file, progress,
        ))  # fmt: skip
    if report.moved_to is not None:
        click.echo(f"{image} leads to {report.moved_to} by now: what is indexed is {report.digest}, to which it led "
                   "when this began", err=True)  # fmt: skip
    if as_json:
        click.echo(msgspec.json.encode(report))
    else:
        _show(report, output)


async def _index(
    image: str,
    oci_layout: str | None,
    docker_archive: str | None,
    output: str | None,
    force: bool,
    spacing: str | None,
    wanted: list[Platform],
    every: bool,
    sign_key: str | None,
    plain_http: bool,
    config_file: str | None,
    progress: show.Transfer,
) -> IndexReport:
    from dadi.publish.images import LocalImage, RegistryImage
    from dadi.publish.index import index_image
    from dadi.publish.target import LayoutTarget, RegistryTarget

    key = await signing_key(sign_key)
    apart = None if spacing is None else int(config.quantity(spacing, config.SIZE))
    local = await local_images(oci_layout, docker_archive)
    directory = None if output is None else LayoutTarget(Path(output))
    if local is not None and directory is not None:
        return await index_image(
            LocalImage(local, *(names_in(image) if image else ())), directory,
            platforms=wanted, every=every, key=key, force=force, spacing=apart, progress=progress,
        )  # fmt: skip
    reference = Reference.parse(image)
    settings = await asyncio.to_thread(registry_config, config_file, [reference], plain_http)
    async with registry_client(settings) as client:
        return await index_image(
            RegistryImage(client, reference, local), directory or RegistryTarget(client, reference, OUTPUT_HINT),
            platforms=wanted, every=every, key=key, force=force, spacing=apart, progress=progress,
        )  # fmt: skip


def _show(report: IndexReport, output: str | None) -> None:
    from dadi.publish.index import PRESENT

    for row in report.platforms:
        signed = f", signed by {row.key_id}" if row.key_id else ""
        if row.how == PRESENT:
            click.echo(f"{row.platform}: the index is there already{signed}: nothing to do\n"
                       f"  manifest  {row.manifest_digest}\n  index     {row.artifact_digest}")  # fmt: skip
            continue
        where = f"in {output}" if output else "pushed"
        click.echo(f"{row.platform}: the index is {where}{signed}\n"
                   f"  manifest  {row.manifest_digest}\n  index     {row.artifact_digest}")  # fmt: skip
        _layers(row)
        if output:
            name = row.manifest_digest.replace(":", "-")
            click.echo(f"bring it with:  skopeo copy --all oci:{output}:{name} docker://REGISTRY/REPOSITORY:{name}")
            if row.key_id:
                name = row.artifact_digest.replace(":", "-")
                click.echo(f"                skopeo copy --all oci:{output}:{name} docker://REGISTRY/REPOSITORY:{name}")
    if report.left_out:
        click.echo(f"not indexed: {', '.join(report.left_out)} (--all-platforms)")


def _layers(row: PlatformReport) -> None:
    table = show.table("layer", "", "size", "unpacked", "files", "chunks", "seek points", "index", "seek table")
    for layer in row.layers:
        table.add_row(layer.digest[7:19], layer.how, show.size(layer.compressed_bytes), show.size(layer.unpacked_bytes),
                      str(layer.files), str(layer.chunks), str(layer.seek_points), show.size(layer.index_bytes),
                      show.size(layer.seek_bytes))  # fmt: skip
    show.print_table(table)
