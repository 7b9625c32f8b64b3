"""`dadi trace show|export|import|clear IMAGE`: what containers of an image read first, as superpeers have learnt it.

The node is asked, which asks superpeers. Only `export --push` talks to a registry by itself.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import click
import msgspec

from dadi.cli import show as shown
from dadi.cli.client import NodeClient, as_json, node_socket, platform_option
from dadi.cli.registry import DEFAULT_CONFIG, registry_client, registry_config, signing_key
from dadi.errors import ConfigError, NotFound
from dadi.oci.reference import Reference


@click.group(short_help="Show, export, import, clear startup traces.")
def trace() -> None:
    """What was learnt of starts of IMAGE: show it, export it, import it elsewhere, clear it.

    Traces are recorded by nodes and merged by superpeers by themselves; nothing of this has to be called.
    """


@trace.command()
@click.argument("image")
@click.option("--chunks", is_flag=True, help="Also list what is read, in order.")
@platform_option
@node_socket
@as_json
def show(image: str, chunks: bool, platform: str, node_socket: str, as_json: bool) -> None:
    """Show what starts of IMAGE read, each way in which it is started by itself, and how good that was here."""
    answer = _asked(node_socket, "GET", image, platform)
    if as_json:
        click.echo(msgspec.json.encode(answer))
        return
    found = answer["trace"]
    if found is None:
        click.echo(f"{answer['reference']}: nothing was learnt yet")
        return
    click.echo(f"{answer['reference']} ({answer['platform']}, {answer['manifest_digest']})")
    for number, group in enumerate(found["groups"], 1):
        size = sum(count * found["blobs"][blob][1] for blob, _, count, _ in group["steps"])
        blobs = len({blob for blob, *_ in group["steps"]})
        seconds = max((at for *_, at in group["steps"]), default=0) / 1000
        click.echo(f"start {number}: {group['recordings']} nodes, {sum(s[2] for s in group['steps'])} chunks "
                   f"({shown.size(size)}) of {blobs} layers in {seconds:.1f} s")  # fmt: skip
        if chunks:
            _chunks(found, group)
    last = answer["last_start"]
    if last and last["replayed"]:
        click.echo(f"last start here: {last['used_chunks']} of the trace's {last['trace_chunks']} chunks were read "
                   f"({last['hit_ratio']:.0%}); it had {last['covered']:.0%} of what was read")  # fmt: skip


def _chunks(found: dict[str, Any], group: dict[str, Any]) -> None:
    table = shown.table("seconds", "layer", "chunks", "bytes")
    for blob, first, count, at in group["steps"]:
        digest, size = found["blobs"][blob]
        chunks = f"{first}" if count == 1 else f"{first}-{first + count - 1}"
        table.add_row(f"{at / 1000:.3f}", digest[7:19], chunks, shown.size(count * size))
    shown.print_table(table)


@trace.command(name="export")
@click.argument("image")
@click.option("--output", default="", metavar="FILE", help=(
    "Where to write it. Default: standard output, or nowhere with --push."))
@click.option("--push", is_flag=True, help=(
    "Push it beside the image, as an OCI artifact: superpeers that know nothing yet of its starts begin with it."))
@click.option("--sign-key", metavar="FILE", type=click.Path(dir_okay=False), help=(
    "With --push: Ed25519 private key (PEM) to sign it with, for superpeers with indexing.trusted_keys."))
@click.option("--plain-http", is_flag=True, help="With --push: speak plain HTTP to the image's registry.")
@click.option("--config", "config_file", metavar="FILE", type=click.Path(dir_okay=False), help=(
    f"With --push: TOML file whose [registry] table is like the daemons'. Default: {DEFAULT_CONFIG}, if it exists."))
@platform_option
@node_socket
def export_(image: str, output: str, push: bool, sign_key: str | None, plain_http: bool, config_file: str | None,
            platform: str, node_socket: str) -> None:  # fmt: skip
    """Write what was learnt of IMAGE as JSON, for `dadi trace import` in another datacenter; or push it there."""
    if not push and (sign_key or plain_http or config_file):
        raise click.UsageError("--sign-key, --plain-http and --config belong to --push")
    answer = _asked(node_socket, "GET", image, platform)
    if answer["trace"] is None:
        raise NotFound(f"nothing was learnt of starts of {answer['reference']} yet", hint="start it once")
    text = _lines(answer["trace"])
    if output == "-" or not (output or push):
        click.echo(text, nl=False)
    elif output:
        try:
            Path(output).write_text(text)
        except OSError as error:
            raise ConfigError(f"cannot write {output}: {error.strerror}") from None
    if push:
        digest = asyncio.run(_push(image, answer["manifest_digest"], text.encode(), sign_key, plain_http, config_file))
        click.echo(f"{answer['reference']}: the startup trace is pushed, as {digest}", err=True)


async def _push(image: str, manifest: str, text: bytes, sign_key: str | None, plain_http: bool,
                config_file: str | None) -> str:  # fmt: skip
    """Push a trace beside the very image that it is of, wherever the tag leads by now; return its digest."""
    from dadi.publish.artifacts import bring_trace
    from dadi.publish.target import RegistryTarget

    key = await signing_key(sign_key)
    reference = Reference.parse(image)
    settings = await asyncio.to_thread(registry_config, config_file, [reference], plain_http)
    async with registry_client(settings) as client:
        subject, _ = await client.manifest(reference, manifest)
        target = RegistryTarget(client, reference, "bring it with `dadi trace export` and `dadi trace import`")
        with shown.Transfer(f"pushing the startup trace of {image}", quiet=True) as progress:
            return (await bring_trace(target, subject, text, key, progress)).digest


@trace.command(name="import")
@click.argument("image")
@click.argument("file")
@platform_option
@node_socket
def import_(image: str, file: str, platform: str, node_socket: str) -> None:
    """Give the superpeer what `dadi trace export` wrote ("-": standard input); it must be of this very image."""
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        value = msgspec.json.decode(data, type=dict[str, Any])
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{file} is no startup trace: {error}") from None
    body = {"image": image, "platform": platform, "trace": value}
    answer = NodeClient(node_socket).call("POST", "/v1/traces", body=body)
    click.echo(f"{answer['reference']}: {len(answer['trace']['groups'])} ways to start are known now")


@trace.command()
@click.argument("image")
@platform_option
@node_socket
def clear(image: str, platform: str, node_socket: str) -> None:
    """Forget what was learnt of IMAGE; it is learnt anew."""
    _asked(node_socket, "DELETE", image, platform)


def _asked(socket: str, method: str, image: str, platform: str) -> dict[str, Any]:
    parameters = {"image": image, **({"platform": platform} if platform else {})}
    answer: dict[str, Any] = NodeClient(socket).call(method, "/v1/traces", parameters)
    return answer


def _lines(found: dict[str, Any]) -> str:
    """Return JSON with a step a line: what has changed is seen in a diff."""
    head = {key: value for key, value in found.items() if key != "groups"}
    text = msgspec.json.format(msgspec.json.encode(head), indent=1).decode().rstrip("}\n")
    groups = []
    for group in found["groups"]:
        steps = ",\n".join(f"   {msgspec.json.encode(step).decode()}" for step in group["steps"])
        groups.append(f'  {{"recordings": {group["recordings"]}, "steps": [\n{steps}\n  ]}}')
    return f'{text},\n "groups": [\n' + ",\n".join(groups) + "\n ]\n}\n"
