"""Processor time for serving: a node and a superpeer against nginx, the same file, the same requests.

The file is the uncompressed layer of an image that superpeer and node have whole; nginx (Debian's, one worker,
sendfile) has a copy. Clients ask for ranges of the same lengths in the same order over a few kept connections, as nodes
do; ours also check the caller's token. What counts is the server's own processor time, user and system, from
/proc; what the kernel does for a connection in interrupts is counted for nobody. Rounds alternate.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from bench.harness import Bench, Row, alternately
from dadi.blobs.layout import padded
from tests.lab import images
from tests.lab.cleanup import Lab
from tests.lab.network import Host, Network
from tests.lab.processes import LabFailed, Node, Process, Registry, Superpeer

_TARGET = 0.5
"""nginx's seconds to ours: at most twice as many."""
_CONNECTIONS = 4
_RANGES = ((8 << 20, "8 MiB"), (1 << 20, "1 MiB"), (256 << 10, "256 KiB"))
"""The longest is the most that a node gives at a time (`_LARGEST` in `dadi/peers/server.py`)."""
_NODE = '[backfill]\nquiet = 0\n[peers]\nlisten = "0.0.0.0:7071"\n'
_CLIENT = """
import http.client, json, sys, threading
host, port, path, size, step, connections, times, headers = json.loads(sys.argv[1])
failures = []

def take(number):
    connection = http.client.HTTPConnection(host, port, timeout=60)
    buffer = bytearray(1 << 20)
    for _ in range(times):
        for at in range(number * step, size, connections * step):
            last = min(at + step, size) - 1
            connection.request("GET", path, headers={**headers, "Range": f"bytes={at}-{last}"})
            answer = connection.getresponse()
            left = last - at + 1
            if answer.status != 206 or int(answer.headers["Content-Length"]) != left:
                failures.append(f"{answer.status} {answer.read(300)}")
                return
            while left and (got := answer.readinto(buffer)):
                left -= got
    connection.close()

threads = [threading.Thread(target=take, args=(n,)) for n in range(connections)]
for thread in threads: thread.start()
for thread in threads: thread.join()
sys.exit("; ".join(failures[:2]) or 0)
"""


def run(bench: Bench) -> None:
    """Measure both of our servers against nginx, at several lengths of ranges."""
    bench.ours, bench.theirs = "dadi", "nginx"
    size, times, rounds = (64 << 20, 4, 2) if bench.quick else (256 << 20, 8, 5)
    with Lab("bench", images.CACHE) as lab:
        network = Network(lab)
        host = network.host("registry")
        registry = Registry(lab, host)
        image = images.synthetic(lab.root / "image", layers=1, files=64, size=size, compressible=0, whiteouts=False)
        reference = f"{registry.address}/bench/large:latest"
        bench.say("pushing, mounting and back-filling the image")
        image.push(reference, prefix=host.prefix)
        superpeer = Superpeer(lab, network.host("superpeer"), [registry.address])
        node = Node(lab, network.host("node"), [superpeer.url], sections=_NODE)
        (lab.root / "mount").mkdir()
        node.dadi("mount", reference, str(lab.root / "mount"))
        node.wait_until(lambda: all(row["state"] == "local" for row in node.status()["mounts"]), timeout=300)
        layer = image.layers[0]
        nginx = Nginx(lab, network.host("nginx"), _tar(lab, superpeer, layer.tar_size))
        client = network.host("client")
        headers = _token(superpeer, reference)
        blob = f"/v1/blobs/{layer.diff_id}"
        for step, words in _RANGES:
            bench.say(f"ranges of {words}")
            take = partial(_seconds_a_gibibyte, client, layer.tar_size, step, times)
            for what, process, port in (("a superpeer", superpeer, 7070), ("a node", node, 7071)):
                ours, theirs = alternately(
                    rounds, partial(take, process, port, blob, headers), partial(take, nginx, 80, "/file", {})
                )
                bench.add(Row(f"{what}, ranges of {words}: CPU per GiB served", "s", ours, theirs, better="less",
                              target=_TARGET))  # fmt: skip
    bench.note(f"The file has {size >> 20} MiB; {_CONNECTIONS} connections; {times} times each round. "
               "No link is shaped.")  # fmt: skip


class Nginx(Process):
    """Debian's nginx with one worker that serves `file` as /file on port 80 of its host."""

    def __init__(self, lab: Lab, host: Host, file: Path) -> None:
        directory = lab.root / "nginx"
        (directory / "files").mkdir(parents=True)
        file.rename(directory / "files" / "file")
        configuration = directory / "nginx.conf"
        temporary = "".join(f"{kind}_temp_path {directory}/{kind};" for kind in ("client_body", "proxy", "fastcgi",
                                                                                 "uwsgi", "scgi"))  # fmt: skip
        configuration.write_text(
            f"daemon off; worker_processes 1; user root; pid {directory}/pid; error_log {directory}/errors;\n"
            f"events {{ worker_connections 512; }}\n"
            f"http {{ access_log off; sendfile on; tcp_nopush on; keepalive_requests 1000000; {temporary}\n"
            f"  server {{ listen {host.address}:80; root {directory}/files; }} }}\n"
        )
        super().__init__(lab, "nginx", ["nginx", "-e", str(directory / "errors"), "-c", str(configuration)], host=host)
        self.wait_until(lambda: host.get(host.address, 80, "/nothing")[0] == 404)


def _tar(lab: Lab, superpeer: Superpeer, size: int) -> Path:
    """Return a copy of the blob from the superpeer's store, where it is padded to 4096."""
    store = lab.root / superpeer.name / "state" / "store"
    found = [file for file in store.rglob("*") if file.is_file() and file.stat().st_size == padded(size)]
    copy = lab.root / "copy"
    subprocess.run(["cp", "--sparse=never", str(found[0]), str(copy)], check=True)
    os.truncate(copy, size)
    return copy


def _token(superpeer: Superpeer, reference: str) -> dict[str, str]:
    """Return the header that lets a caller in, as the superpeer gives it to who may have the image."""
    _, body = superpeer.get(f"/v1/images?reference={reference}&platform=linux/{images.ARCHITECTURE}")
    event: dict[str, Any] = next(e for e in map(json.loads, body.splitlines()) if e["event"] == "image")
    tokens = event.get("tokens")
    return {"Authorization": f"Bearer {tokens[0]}"} if tokens else {}


def _seconds_a_gibibyte(client: Host, size: int, step: int, times: int, process: Process, port: int, path: str,
                        headers: Mapping[str, str]) -> float:  # fmt: skip
    assert process.host is not None
    wanted = json.dumps([process.host.address, port, path, size, step, _CONNECTIONS, times, dict(headers)])
    before = _processor_time(process.popen.pid)
    done = subprocess.run([*client.prefix, sys.executable, "-c", _CLIENT, wanted], capture_output=True, text=True,
                          check=False, timeout=300)  # fmt: skip
    if done.returncode != 0:
        raise LabFailed(f"reading from {process.name}: {done.stderr.strip()[-500:]}\n{process.tail()}")
    return (_processor_time(process.popen.pid) - before) / (size * times / (1 << 30))


def _processor_time(pid: int) -> float:
    """Return the seconds that a process and its children have used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    ticks = int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK") + sum(_processor_time(int(child)) for child in children)
