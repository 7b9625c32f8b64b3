"""The peer directory: 10,000 nodes and 20 blobs in memory, processor time of a join, a heartbeat, a restart.

Everything runs in a process of its own, so that its memory is what the state takes. A join includes what the node's
answer is made of, and not the HTTP request around it.
"""

from __future__ import annotations

import json
import subprocess
import sys

from bench.harness import Bench, Row

_MEASURE = """
import json, random, sys, time
from dadi.peers.places import Heartbeat, Peer, Told
from superpeer.directory import Directory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / (1 << 20)

nodes, blobs = int(sys.argv[1]), int(sys.argv[2])
chance = random.Random(1)
peers = [Peer(f"node-{n:05}", f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}:7071", f"zone-{n % 250 % 3}", f"rack-{n % 250}")
         for n in range(nodes)]
digests = [f"sha256:{chance.getrandbits(256):064x}" for _ in range(blobs)]
before = resident()
directory, slowest = Directory(now=1e9), []
joined = 0.0
for digest in digests:
    for peer in chance.sample(peers, nodes):
        start = time.process_time()
        directory.join(peer, digest, 1e9)
        took = time.process_time() - start
        joined += took
        slowest.append(took)
state = resident() - before
slowest.sort()

def told(peer, digest):
    place = directory.join(peer, digest, 1e9)  # again: it says the same
    return Told(digest, place.order, place.depth, tuple(parent.id for parent in place.parents))

beats = [Heartbeat(peer, blobs=tuple(told(peer, digest) for digest in digests)) for peer in peers]
start = time.process_time()
for beat in beats:
    directory.heartbeat(beat, 1e9 + 5)
beaten = time.process_time() - start
again = Directory(now=1e9 + 10)
start = time.process_time()
for beat in beats:
    again.heartbeat(beat, 1e9 + 11)
rebuilt = time.process_time() - start
parents = [sorted((row["id"], row["parent"]) for row in d.tree(digests[0])) for d in (directory, again)]
rows = directory.tree(digests[0])
racks = {row["id"]: row["rack"] for row in rows}
outside = sum(1 for row in rows if racks.get(row["parent"]) != row["rack"])
print(json.dumps({
    "join": joined / nodes / blobs, "p99": slowest[int(len(slowest) * 0.99)], "beat": beaten / nodes,
    "rebuilt": rebuilt, "same": parents[0] == parents[1], "state": state,
    "depth": max(row["depth"] for row in rows), "outside": outside / len(set(racks.values())),
}))
"""


def run(bench: Bench) -> None:
    """Measure a directory of the size that is asked for, several times."""
    bench.ours, bench.theirs = "directory", ""
    nodes, blobs, times = (1000, 20, 1) if bench.quick else (10_000, 20, 3)
    bench.say(f"{nodes:,} nodes join {blobs} blobs")
    found = [_measure(nodes, blobs) for _ in range(times)]
    what = f"{nodes:,} nodes × {blobs} blobs"
    bench.add(Row("a join, mean, processor time", "µs", [row["join"] * 1e6 for row in found], limit=100.0))
    bench.add(Row("a join, 99th percentile", "µs", [row["p99"] * 1e6 for row in found]))
    bench.add(Row(f"{what}: state in memory", "MiB", [row["state"] for row in found], limit=200e6 / (1 << 20)))
    bench.add(Row(f"a heartbeat of a node with {blobs} blobs", "µs", [row["beat"] * 1e6 for row in found]))
    bench.add(Row(f"{what}: all heard after a restart, processor time", "s", [row["rebuilt"] for row in found]))
    bench.add(Row("copies into a rack, mean", "", [row["outside"] for row in found]))
    bench.add(Row("depth of a tree", "", [float(row["depth"]) for row in found]))
    assert all(row["same"] for row in found), "the trees after a restart are not those before it"
    bench.note("After the restart every tree was as before. The state does not count how nodes introduce themselves.")


def _measure(nodes: int, blobs: int) -> dict[str, float]:
    command = [sys.executable, "-c", _MEASURE, str(nodes), str(blobs)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    answer: dict[str, float] = json.loads(done.stdout)
    return answer
