"""`dadi status`: what is mounted, how much of it is here, who served the reads, and what fell back."""

from __future__ import annotations

import time
from typing import Any

import click
import msgspec

from dadi.cli import show
from dadi.cli.client import NodeClient, as_json, node_socket


@click.command(short_help="Show images, who served their reads, what fell back.")
@click.option("--devices", is_flag=True, help="Also show each image's block devices.")
@node_socket
@as_json
def status(devices: bool, node_socket: str, as_json: bool) -> None:
    """Show images, bytes present of bytes in all, who served the reads, and what fell back and why.

    An image is "lazy" while some of its bytes are still to come, "local" when its devices are plain local files (the
    daemon is then not in the path of its reads), "broken" when what came is not what its digest says, "lost" when it
    could not be mounted again after a restart: that is tried again every 10 s, and `dadi umount` gives it up.
    """
    answer = NodeClient(node_socket).call("GET", "/v1/status")
    if as_json:
        click.echo(msgspec.json.encode(answer))
        return
    _mounts(answer["mounts"], devices)
    _drain(answer.get("drain"))
    _traffic(answer)
    _tls(answer.get("tls"))
    _fallbacks(answer["fallbacks"])


def _mounts(mounts: list[dict[str, Any]], devices: bool) -> None:
    if not mounts:
        click.echo("no image is mounted")
        return
    table = show.table("image", "mounted at", "state", "present", "of", "")
    for row in mounts:
        present, total = row["bytes_present"], row["bytes"]
        table.add_row(row["reference"], row["directory"], row["state"], show.size(present), show.size(total),
                      show.share(present, total))  # fmt: skip
        for device in row["devices"] if devices else ():
            table.add_row(f"  {device['blob'][7:19]}", device["device"] or "-", device["error"] or device["state"],
                          show.size(device["bytes_present"]), show.size(device["bytes"]),
                          show.share(device["bytes_present"], device["bytes"]))  # fmt: skip
    show.print_table(table)
    for row in mounts:
        if row["state"] == "lost":
            click.echo(f"lost: {row['directory']}: {row['error']}")


def _traffic(answer: dict[str, Any]) -> None:
    reads, store = answer["reads"], answer["store"]
    click.echo(f"\nreads by the kernel: {reads['hits']} answered from the store, {reads['misses']} had to be fetched, "
               f"{answer['waiting']['reads']} waiting, {reads['errors']} failed")  # fmt: skip
    taken = answer.get("taken_over") or {}
    if taken.get("mounts"):
        click.echo(f"taken over from the process before: {taken['mounts']} mounts, {taken['devices']} lazy devices")
    click.echo(f"from the store: {show.size(answer['bytes']['local'])}")
    for source in answer["sources"]:
        wrong = f", {source['wrong']} wrong (thrown away)" if source["wrong"] else ""
        click.echo(f"from {source['name']}: {show.size(source['bytes'])}{wrong}")
    _peers(answer.get("peers"))
    _proxy(answer.get("proxy"))
    _trace(answer.get("trace"))
    limit = f" of at most {show.size(store['limit'])}" if store["limit"] else ""
    click.echo(f"store: {show.size(store['bytes'])}{limit} in {store['blobs']} blobs; "
               f"backfill: {answer['backfill']['state']}")  # fmt: skip


def _drain(drain: dict[str, Any] | None) -> None:
    if drain and drain["state"] == "drained":
        click.echo("\nDRAINED: nothing depends on dadi-node; `dadi drain --undo` or a restart ends that")
    elif drain and drain["state"] == "draining":
        click.echo(f"\nDRAINING: {drain['lazy_devices']} devices are still lazy, {show.size(drain['bytes'])} of "
                   f"{show.size(drain['total'])} are here")  # fmt: skip


def _trace(trace: dict[str, Any] | None) -> None:
    if not trace or not (trace["replays"] or trace["recordings"]):
        return
    good = f", of which programs read {trace['hit_ratio']:.0%}" if trace["hit_ratio"] >= 0 else ""
    click.echo(f"startup traces: {trace['replays']} replayed, {show.size(trace['bytes'])} ahead of the reads{good}; "
               f"{trace['recordings']} recorded")  # fmt: skip


def _peers(peers: dict[str, Any] | None) -> None:
    if not peers:
        return
    served = peers["served"] or {"bytes": 0, "children": []}
    parents, children = (", ".join(names) or "none" for names in (peers["parents"], served["children"]))
    click.echo(f"parents: {parents}; children: {children}, who got {show.size(served['bytes'])}")


def _proxy(proxy: dict[str, Any] | None) -> None:
    if not proxy:
        return
    served, where = proxy["served"], proxy["address"] or "NOT SERVING, its port is taken"
    stale = f", {proxy['requests']['stale']} stale answers" if proxy["requests"]["stale"] else ""
    cut = f", {served['cut']} cut off" if served["cut"] else ""
    click.echo(f"plain pulls at {where}: {served['requests']} blobs, {show.size(served['bytes'])}; "
               f"{proxy['requests']['manifests']} manifests{stale}{cut}")  # fmt: skip


def _tls(tls: dict[str, Any] | None) -> None:
    if not tls:
        return
    until = time.strftime("%Y-%m-%d %H:%M", time.localtime(tls["expires"]))
    shown = f"certificate valid until {until}" if tls["certificate"] else "no certificate of our own"
    wrong = f"; NEW FILES CANNOT BE USED: {tls['error']}" if tls["error"] else ""
    click.echo(f"tls: {shown}{wrong}")


def _fallbacks(rows: list[dict[str, Any]]) -> None:
    if not rows:
        click.echo("nothing fell back")
    for row in rows:
        ago = max(0, int(time.time() - row["last"]))
        click.echo(f"fell back: {row['kind']}, {row['count']} times, last {ago} s ago: {row['why']}")
