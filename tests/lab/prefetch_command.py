"""`dadi prefetch` in the test's own process: beside the superpeers that it talks to, which are there too."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from click.testing import CliRunner, Result

from dadi.cli.main import cli
from dadi.errors import DadiError


async def dadi(*arguments: object, stdin: str | None = None) -> Result:
    """Run `dadi prefetch` with these arguments, in a thread, as it is a program of its own."""

    def run() -> Result:
        return CliRunner().invoke(cli, ["prefetch", *map(str, arguments)], input=stdin)

    result = await asyncio.wait_for(asyncio.to_thread(run), 60)
    if result.exception is not None and not isinstance(result.exception, SystemExit | DadiError):
        raise result.exception
    return result


def told(result: Result) -> list[Any]:
    """Return the JSON that was printed; what comes before is the log of the superpeers in this process."""
    return json.loads(result.stdout.splitlines()[-1])
