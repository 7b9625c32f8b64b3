"""What our daemons' `main` have in common: options, the loop, and a clean stop on SIGTERM and SIGINT."""

from __future__ import annotations

import asyncio
import faulthandler
import resource
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import click
import msgspec
import structlog

from dadi import __version__, config, log
from dadi.errors import DadiError
from dadi.notify import notify

logger = structlog.get_logger()


def daemon(
    name: str, about: str, config_type: type[msgspec.Struct], serve: Callable[[Any, asyncio.Event], Awaitable[None]]
) -> click.Command:
    """Return the command line of a daemon: `serve(config, stop)` runs until the event `stop` is set."""

    @click.command(name=name, help=about, context_settings={"help_option_names": ["-h", "--help"]})
    @click.option("--config", "path", metavar="FILE", help="TOML file; without it every key has its default.")
    @click.option("--print-default-config", is_flag=True, help="Print the configuration file with its explanations.")
    @click.version_option(__version__, prog_name=name)
    def command(path: str | None, print_default_config: bool) -> None:
        if print_default_config:
            click.echo(config.render(config_type()), nl=False)
            return
        try:
            loaded: Any = config.load(config_type, path)
            log.configure(loaded.log_level, loaded.log_json)
            asyncio.run(_until_stopped(name, loaded, serve))
        except DadiError as error:
            click.echo(f"{name}: {error}", err=True)
            sys.exit(1)
        except PermissionError as error:  # of its directories, before anything of ours is at work
            hint = "run it as root, or as who owns its directories (`state`, `run`)"
            click.echo(f"{name}: {error.filename}: {error.strerror} ({hint})", err=True)
            sys.exit(1)

    return command


async def _until_stopped(name: str, loaded: Any, serve: Callable[[Any, asyncio.Event], Awaitable[None]]) -> None:
    _raise_descriptor_limit()
    faulthandler.enable(sys.__stderr__ or 2)  # systemd's watchdog ends us by SIGABRT: where did the loop stand?
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stopping() -> None:
        notify.stopping()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping)
    living = asyncio.create_task(notify.live())
    try:
        await serve(loaded, stop)
    finally:
        living.cancel()
    logger.info("stopped", program=name)


def _raise_descriptor_limit() -> None:
    """Use as many descriptors as the system allows: each connection, device and blob in use takes some."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
