"""`dadi pull`: a lazy pull into containerd, which `ctr image pull` of containerd 1.x cannot do."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from typing import TYPE_CHECKING

import click
import msgspec

from dadi.cli import show
from dadi.cli.client import as_json
from dadi.cli.registry import DEFAULT_CONFIG, registry_client, registry_config
from dadi.oci import platforms
from dadi.oci.reference import Reference

if TYPE_CHECKING:
    from dadi.containerd.pull import PullReport

DEFAULT_ADDRESS = "/run/containerd/containerd.sock"
containerd_address = click.option(
    "--containerd-address",
    envvar="CONTAINERD_ADDRESS",
    default=DEFAULT_ADDRESS,
    show_default=True,
    metavar="PATH",
    help="containerd's socket (also CONTAINERD_ADDRESS).",
)


@click.command(short_help="Pull an image into containerd, lazily.")
@click.argument("image")
@click.option("--namespace", envvar="CONTAINERD_NAMESPACE", default="default", show_default=True, metavar="NAME", help=(
    "containerd's namespace; Kubernetes' is k8s.io (also CONTAINERD_NAMESPACE)."))
@click.option("--platform", default="", metavar="OS/ARCH", help=(
    "For an image of several platforms; default: this machine's."))
@containerd_address
@click.option("--snapshotter", default="dadi", show_default=True, metavar="NAME", help=(
    "What the plugin is called in containerd's configuration."))
@click.option("--plain-http", is_flag=True, help="Speak plain HTTP to the image's registry.")
@click.option("--config", "config_file", metavar="FILE", type=click.Path(dir_okay=False), help=(
    f"TOML file whose [registry] table is like the daemons'. Default: {DEFAULT_CONFIG}, if it exists."))
@as_json
def pull(
    image: str,
    namespace: str,
    platform: str,
    containerd_address: str,
    snapshotter: str,
    plain_http: bool,
    config_file: str | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Pull IMAGE into containerd without waiting for its bytes; `ctr run --snapshotter dadi` then works at once.

    containerd must know the snapshotter (`dadi containerd-config`), and dadi-node must be running. A layer that cannot
    be lazy is downloaded and unpacked, and that is said.
    """
    begin = time.monotonic()
    with show.Transfer(f"pulling {image}", quiet=as_json) as progress:
        try:
            report = asyncio.run(
                _pull(image, namespace, platform, containerd_address, snapshotter, plain_http, config_file, progress)
            )
        except asyncio.CancelledError:  # by SIGTERM; what was half-made is gone
            sys.exit(128 + signal.SIGTERM)
    seconds = time.monotonic() - begin
    if as_json:
        click.echo(msgspec.json.encode({**msgspec.to_builtins(report), "seconds": round(seconds, 3)}))
    else:
        _show(report, seconds)


async def _pull(
    image: str,
    namespace: str,
    platform: str,
    address: str,
    snapshotter: str,
    plain_http: bool,
    config_file: str | None,
    progress: show.Transfer,
) -> PullReport:
    from dadi.containerd.client import connect
    from dadi.containerd.pull import Pull

    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    reference = Reference.parse(image)
    wanted = platforms.parse(platform) if platform else platforms.of_machine(os.uname().machine)
    settings = await asyncio.to_thread(registry_config, config_file, [reference], plain_http)
    async with registry_client(settings) as registry, connect(address, namespace) as containerd:
        return await Pull(registry, containerd, reference, wanted, snapshotter=snapshotter, progress=progress).run()


def _show(report: PullReport, seconds: float) -> None:
    from dadi.containerd.pull import LAZY, ORDINARY, PRESENT

    if report.already:
        click.echo(f"{report.name} is in containerd already (namespace {report.namespace}): nothing to do")
    else:
        count = {how: sum(row.how == how for row in report.layers) for how in (LAZY, PRESENT, ORDINARY)}
        what = [f"{count[LAZY]} lazy"]
        if count[PRESENT]:
            what.append(f"{count[PRESENT]} there already")
        if count[ORDINARY]:
            what.append(f"{count[ORDINARY]} downloaded and unpacked ({show.size(report.downloaded_bytes)})")
        click.echo(f"{report.name} is in containerd (namespace {report.namespace}) after {seconds:.2f} s: "
                   f"{len(report.layers)} layers, {', '.join(what)}")  # fmt: skip
    click.echo(f"  manifest  {report.manifest_digest}")
    click.echo(f"  run it    ctr -n {report.namespace} run --snapshotter {report.snapshotter} {report.name} NAME")
