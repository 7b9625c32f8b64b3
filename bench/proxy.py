"""Plain pulls through the registry proxy: throughput of a warm blob against nginx, time of a manifest request.

The blob is a layer that the proxy has whole; nginx (Debian's, one worker, sendfile) has a copy. Clients read it over
kept connections, at full speed, no link shaped; client and server share the machine's processors, for both alike.
A manifest is asked for by its tag over one kept connection: of the proxy, alone or with a superpeer behind it, and of
docker-registry itself. Rounds alternate.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from functools import partial

from bench.harness import Bench, Row, alternately
from bench.serving import Nginx
from tests.lab import images
from tests.lab.cleanup import Lab
from tests.lab.network import Host, Network
from tests.lab.processes import LabFailed, Registry, Superpeer
from tests.lab.proxies import ProxyProcess

_TARGET = 0.5
_CLIENTS = (1, 16)
_PULL = """
import http.client, json, sys, threading, time
host, port, path, size, clients, times = json.loads(sys.argv[1])
failures = []

def pull():
    connection = http.client.HTTPConnection(host, port, timeout=60)
    buffer = bytearray(1 << 20)
    for _ in range(times):
        connection.request("GET", path)
        answer = connection.getresponse()
        left = size
        while left and (got := answer.readinto(buffer)):
            left -= got
        if answer.status != 200 or left:
            failures.append(f"{answer.status}, {left} bytes missing")
            return
        answer.read()

threads = [threading.Thread(target=pull) for _ in range(clients)]
began = time.perf_counter()
for thread in threads: thread.start()
for thread in threads: thread.join()
print(clients * times * size / (time.perf_counter() - began))
sys.exit("; ".join(failures[:2]) or 0)
"""
_ASK = """
import http.client, json, sys, time
host, port, path, times = json.loads(sys.argv[1])
connection = http.client.HTTPConnection(host, port, timeout=60)
took = []
for _ in range(times + 20):
    began = time.perf_counter()
    connection.request("GET", path, headers={"Accept": "application/vnd.oci.image.manifest.v1+json"})
    answer = connection.getresponse()
    answer.read()
    took.append(time.perf_counter() - began)
    if answer.status != 200:
        sys.exit(f"{answer.status}")
took = sorted(took[20:])
print(json.dumps([took[len(took) // 2] * 1e3, took[len(took) * 99 // 100] * 1e3]))
"""


def run(bench: Bench) -> None:
    """Measure throughput at 1 and 16 clients, and the time of a manifest request."""
    bench.ours, bench.theirs = "proxy", "baseline"
    size, times, rounds, asks = (32 << 20, 2, 2, 200) if bench.quick else (200 << 20, 2, 5, 1000)
    with Lab("bench", images.CACHE) as lab:
        network = Network(lab)
        host = network.host("registry")
        registry = Registry(lab, host)
        image = images.synthetic(lab.root / "image", layers=1, files=8, size=size, compressible=0, whiteouts=False)
        bench.say("pushing the image")
        image.push(f"{registry.address}/bench/large:1", prefix=host.prefix)
        superpeer = Superpeer(lab, network.host("superpeer"), [registry.address])
        alone = ProxyProcess(lab, network.host("alone"), registry.address, name="alone")
        behind = ProxyProcess(lab, network.host("behind"), registry.address, [superpeer.url], name="behind")
        layer = image.layers[0].blob
        copy = lab.root / "copy"
        shutil.copy(image.layout / "blobs" / "sha256" / layer.digest.removeprefix("sha256:"), copy)
        nginx = Nginx(lab, network.host("nginx"), copy)
        client = network.host("client")
        blob = f"/v2/bench/large/blobs/{layer.digest}"
        assert nginx.host is not None
        for what, proxy in (("alone", alone), ("with a superpeer", behind)):
            assert proxy.host is not None
            _pull(client, proxy.host, 7072, blob, layer.size, 1, 1)  # now it has it
            for clients in _CLIENTS:
                bench.say(f"{clients} clients, {what}")
                each = times * 4 if clients == 1 else times // 2
                ours, theirs = alternately(
                    rounds, partial(_pull, client, proxy.host, 7072, blob, layer.size, clients, each),
                    partial(_pull, client, nginx.host, 80, "/file", layer.size, clients, each),
                )  # fmt: skip
                bench.add(Row(f"warm pull, {clients} clients, {what}; against nginx", "MB/s", ours, theirs,
                              target=_TARGET))  # fmt: skip
        manifest = "/v2/bench/large/manifests/1"
        for what, proxy in (("alone", alone), ("with a superpeer", behind)):
            assert proxy.host is not None
            bench.say(f"manifest requests, {what}")
            pairs = [(_ask(client, proxy.host, 7072, manifest, asks), _ask(client, host, 5000, manifest, asks))
                     for _ in range(rounds)]  # fmt: skip
            for place, name in enumerate(("median", "99th percentile")):
                bench.add(Row(f"manifest by tag, {name}, {what}; against docker-registry itself", "ms",
                              [ours[place] for ours, _ in pairs], [theirs[place] for _, theirs in pairs],
                              better="less"))  # fmt: skip
    bench.note(f"The layer has {layer.size >> 20} MiB. {asks} manifest requests a round, one after the other. A proxy "
               "with a superpeer asks it each time who may and what the tag is: one request more inside.")  # fmt: skip


def _pull(client: Host, server: Host, port: int, path: str, size: int, clients: int, times: int) -> float:
    """Return MB/s of all clients together."""
    said = _run(client, _PULL, [server.address, port, path, size, clients, times])
    return float(said) / 1e6


def _ask(client: Host, server: Host, port: int, path: str, times: int) -> list[float]:
    """Return the median and the 99th percentile in milliseconds."""
    found: list[float] = json.loads(_run(client, _ASK, [server.address, port, path, times]))
    return found


def _run(client: Host, program: str, arguments: list[object]) -> str:
    command = [*client.prefix, sys.executable, "-c", program, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode != 0:
        raise LabFailed(f"a client: {done.stderr.strip()[-500:]}")
    return done.stdout
