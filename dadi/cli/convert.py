"""`dadi convert`: copies an image with its layers packed so that one can begin to read anywhere in them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from dadi.cli import show
from dadi.cli.client import as_json
from dadi.cli.registry import (
    LAYOUT,
    is_local,
    registry_client,
    registry_config,
    registry_options,
    signing_key,
    source_of,
    split_local,
    wanted_platforms,
)
from dadi.errors import InvalidRequest
from dadi.oci.platforms import Platform
from dadi.oci.reference import Reference

if TYPE_CHECKING:
    from dadi.publish.convert_report import ConvertReport

_DEFAULT_LEVEL, _MIN_LEVEL, _MAX_LEVEL = 9, 1, 19
_HINT = "convert into a directory, with `oci:DIR` for DST, and bring it from there later"


@click.command(short_help="Copy an image with seekable zstd layers.")
@click.argument("src")
@click.argument("dst")
@click.option("--level", type=click.IntRange(_MIN_LEVEL, _MAX_LEVEL), default=_DEFAULT_LEVEL, show_default=True,
              help="Compression level of zstd.")  # fmt: skip
@registry_options
@as_json
def convert(
    src: str,
    dst: str,
    level: int,
    platforms: tuple[str, ...],
    all_platforms: bool,
    sign_key: str | None,
    plain_http: bool,
    config_file: str | None,
    as_json: bool,
) -> None:
    """Copy the image SRC to DST with its layers as zstd, one frame a chunk, and its index beside it.

    The copy is an ordinary OCI image: containerd, podman and skopeo pull it. Diff IDs and the image ID stay. SRC is a
    reference, oci:DIR[:TAG] or docker-archive:FILE[:NAME]; DST is a reference or oci:DIR[:TAG].
    """
    wanted = wanted_platforms(platforms, all_platforms)
    with show.Transfer(f"converting {src}", quiet=as_json) as progress:
        report = asyncio.run(
            _convert(src, dst, level, wanted, all_platforms, sign_key, plain_http, config_file, progress)
        )
    if as_json:
        click.echo(msgspec.json.encode(report))
    else:
        _show(report)


async def _convert(
    src: str,
    dst: str,
    level: int,
    wanted: list[Platform],
    every: bool,
    sign_key: str | None,
    plain_http: bool,
    config_file: str | None,
    progress: show.Transfer,
) -> ConvertReport:
    from dadi.publish.convert import convert_image
    from dadi.publish.target import LayoutTarget, RegistryTarget, Target

    if is_local(dst) and not dst.startswith(LAYOUT):
        raise InvalidRequest(f"{dst} cannot be written", hint="DST is a reference or oci:DIR[:TAG]")
    key = await signing_key(sign_key)
    named = [Reference.parse(name) for name in (src, dst) if not is_local(name)]
    settings = await asyncio.to_thread(registry_config, config_file, named, plain_http)
    async with registry_client(settings) as client:
        source = await source_of(src, client)
        target: Target
        if is_local(dst):
            directory, tag = split_local(dst)
            target = LayoutTarget(Path(directory), tag or "latest")
        else:
            target = RegistryTarget(client, named[-1], _HINT)
        return await convert_image(
            source, target, platforms=wanted, every=every, level=level, key=key, progress=progress
        )


def _show(report: ConvertReport) -> None:
    table = show.table("layer", "is now", "before", "after", "", "unpacked", "chunks", "repeated", "index", "seeks")
    for row in report.layers:
        table.add_row(row.digest[7:19], row.new_digest[7:19], show.size(row.before_bytes), show.size(row.after_bytes),
                      "" if row.pushed else "there already", show.size(row.unpacked_bytes), str(row.chunks),
                      str(row.repeated_chunks), show.size(row.index_bytes), show.size(row.seek_bytes))  # fmt: skip
    show.print_table(table)
    change = f"{100 * report.after_bytes / report.before_bytes:.0f} %" if report.before_bytes else "nothing"
    click.echo(f"layers     {show.size(report.before_bytes)} before, {show.size(report.after_bytes)} after ({change})\n"
               f"chunks     {report.chunks}; {_share(report.repeated_chunks, report.chunks)} of them are there more "
               "than once")  # fmt: skip
    if report.known_chunks is not None:
        click.echo(f"           {_share(report.known_chunks, report.chunks)} were in the image that DST was before")
    click.echo(f"index      {show.size(report.index_bytes + report.seek_bytes)}")
    for image in report.platforms:
        signed = f", signed by {image.key_id}" if image.key_id else ""
        click.echo(f"{image.platform}: manifest {image.new_manifest_digest}, index {image.artifact_digest}{signed}")
    click.echo(f"{report.target} is {report.digest}")
    if report.left_out:
        click.echo(f"not copied: {', '.join(report.left_out)} (--all-platforms)")


def _share(part: int, whole: int) -> str:
    return f"{part} ({100 * part / whole:.1f} %)" if whole else "0"
