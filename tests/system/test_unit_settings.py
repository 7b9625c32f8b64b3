"""What the node's unit takes away is not needed: it mounts, reads, unmounts; and it tells systemd how it does."""

from __future__ import annotations

import asyncio
import random
import shutil
import socket
from pathlib import Path

import pytest

from dadi.units.texts import CAPABILITIES
from tests.fakes.registry import FakeRegistry
from tests.lab.cleanup import Lab
from tests.lab.mounting import in_thread, read
from tests.lab.processes import Node
from tests.lab.services import CHUNK, running, tar_of

pytestmark = [
    pytest.mark.root, pytest.mark.timeout(120),
    pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv is missing (Debian's util-linux)"),
]  # fmt: skip
DATA = random.Random(1).randbytes(20 * CHUNK)


async def test_the_node_needs_no_more_privileges_than_its_unit_leaves_it_and_tells_how_it_does(lab: Lab) -> None:
    mounted = lab.root / "mnt"
    mounted.mkdir()
    # The lab's node, but for its process, which is one that the unit would make.
    heard = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    heard.bind(str(lab.root / "notify"))
    heard.settimeout(20)
    dropped = "-all," + ",".join(f"+{name.lower()}" for name in CAPABILITIES)
    async with FakeRegistry() as registry, running(lab.root / "superpeer", registry.host) as run:
        registry.add_image("team/app", "1", [tar_of(data=DATA)])

        prefix = ["setpriv", "--no-new-privs", "--bounding-set", dropped, "--inh-caps", "-all"]
        told = {"NOTIFY_SOCKET": str(lab.root / "notify"), "WATCHDOG_USEC": "300000"}
        node = await in_thread(lambda: Node(lab, None, [run.url], prefix=prefix, environment=told))
        status = Path(f"/proc/{node.popen.pid}/status").read_text()
        assert "NoNewPrivs:\t1" in status
        await in_thread(lambda: node.dadi("mount", f"{registry.host}/team/app:1", str(mounted)))
        assert await read(mounted / "data") == DATA
        await in_thread(lambda: node.dadi("drain", "--timeout", "30s"))
        assert await read(mounted / "data") == DATA
        await in_thread(lambda: node.dadi("umount", str(mounted)))

        def all_told() -> list[str]:
            messages: list[str] = []
            while "STOPPING=1" not in messages:
                messages.append(heard.recv(1000).decode())
                if messages[-1] == "WATCHDOG=1" and messages.count("WATCHDOG=1") == 2:
                    node.stop()
            return messages

        messages = await in_thread(all_told)
        assert messages[0].startswith("EXTEND_TIMEOUT_USEC=")
        assert messages.index("READY=1") < messages.index("WATCHDOG=1") < messages.index("STOPPING=1")
        assert await asyncio.to_thread(node.popen.wait) == 0
    heard.close()
