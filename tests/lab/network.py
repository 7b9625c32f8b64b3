"""A network of one bridge and any number of hosts, all of it in network namespaces made here, with shaped links.

What lives here: namespaces, veth pairs, `tbf` shaping, byte counters, sockets opened inside a namespace. What never
does: an interface, an address or a route in the namespace that the machine's own network lives in; not one packet
leaves the machine.

    [hub: bridge br0] p1 ───veth─── eth0 [host 1: 10.231.0.1/24]
                      p2 ───veth─── eth0 [host 2: 10.231.0.2/24]        each end of each veth may have a tbf

A link's rate holds in each direction by itself. A namespace is kept by a bind mount below the lab's directory, not by
a name in /run/netns, so that the lab's clean-up (tests/lab/cleanup.py) finds it; with a namespace go its interfaces.
"""

from __future__ import annotations

import ctypes
import http.client
import json
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tests.lab.cleanup import Lab

T = TypeVar("T")
_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Traffic:
    """What has crossed a host's link, in bytes with all headers, since the host was made."""

    received: int
    sent: int

    def __sub__(self, other: Traffic) -> Traffic:
        return Traffic(self.received - other.received, self.sent - other.sent)


class Host:
    """One machine of the network: a namespace with one link to the bridge."""

    def __init__(self, name: str, namespace: Path, address: str, hub: Path, port: str) -> None:
        self.name = name
        self.namespace = namespace
        self.address = address
        self._hub = hub
        self._port = port

    def __repr__(self) -> str:
        return f"<Host {self.name} {self.address}>"

    @property
    def prefix(self) -> list[str]:
        """What to put before a command line so that it runs on this host.

        (`ip netns exec` enters a new mount namespace too: what a daemon mounts there nobody else sees.)
        """
        return _enter(self.namespace)

    def shape(self, rate: str | None) -> None:
        """Limit the link to `rate` (tc's notation: "100mbit", "1gbit") in each direction; None lifts the limit."""
        for namespace, device in ((self.namespace, "eth0"), (self._hub, self._port)):
            subprocess.run(_tc(namespace, "del", device), capture_output=True, check=False)
            if rate is not None:
                # The burst holds the largest packet that the kernel hands a veth unsegmented (64 KiB), and one timer
                # tick's worth at 1 Gbit/s; the queue is 50 ms long, as a switch's would be.
                _run([*_tc(namespace, "add", device), "tbf", "rate", rate, "burst", "256kb", "latency", "50ms"])

    def traffic(self) -> Traffic:
        answer = _run([*self.prefix, "ip", "-j", "-s", "link", "show", "dev", "eth0"])
        counters: dict[str, Any] = json.loads(answer)[0]["stats64"]
        return Traffic(counters["rx"]["bytes"], counters["tx"]["bytes"])

    def inside(self, act: Callable[[], T]) -> T:
        """Call `act` in a thread that is on this host; sockets it opens belong to the host for as long as they live."""
        results: list[T] = []
        errors: list[BaseException] = []

        def work() -> None:
            try:
                with self.namespace.open("rb") as namespace:
                    if _libc.setns(namespace.fileno(), _CLONE_NEWNET) != 0:
                        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(self.namespace))
                results.append(act())
            except BaseException as error:
                errors.append(error)

        # A daemon thread: an interrupt of the main thread must not wait for a connection to time out.
        thread = threading.Thread(target=work, name=f"on {self.name}", daemon=True)
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        return results[0]

    def get(self, address: str, port: int, path: str, timeout: float = 5.0) -> tuple[int, bytes]:
        """GET http://address:port/path from this host; returns status and body. Raises OSError, HTTPException."""
        return self.inside(lambda: get(address, port, path, timeout))

    def socket(self) -> socket.socket:
        """Return a new TCP socket that belongs to this host."""
        return self.inside(lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM))


class Network:
    """A bridge and its hosts, made in `lab` and removed with it."""

    def __init__(self, lab: Lab, subnet: str = "10.231.0") -> None:
        self._subnet = subnet
        self._directory = lab.root / "net"
        self._directory.mkdir()
        self._hub = self._namespace("hub")
        self.hosts: dict[str, Host] = {}
        _batch(self._hub, ["link add br0 type bridge", "link set br0 addrgenmode none up"])

    def __repr__(self) -> str:
        return f"<Network {self._subnet}.0/24: {', '.join(self.hosts)}>"

    def host(self, name: str, rate: str | None = None) -> Host:
        """Add a host; `rate` limits its link in each direction (tc's notation)."""
        number = len(self.hosts) + 1
        namespace, port, address = self._namespace(name), f"p{number}", f"{self._subnet}.{number}"
        _batch(
            self._hub,
            [
                f"link add {port} type veth peer name eth0 netns {namespace}",
                f"link set {port} master br0 addrgenmode none up",
            ],
        )
        # addrgenmode none: no IPv6 address of its own, hence no neighbour discovery in the byte counters
        _batch(
            namespace,
            ["link set lo up", f"addr add {address}/24 dev eth0", "link set eth0 addrgenmode none up"],
        )
        host = Host(name, namespace, address, self._hub, port)
        host.shape(rate)
        self.hosts[name] = host
        return host


    def _namespace(self, name: str) -> Path:
        path = self._directory / name
        path.touch(exist_ok=False)
        _run(["unshare", f"--net={path}", "true"])
        return path


def get(address: str, port: int, path: str, timeout: float = 5.0) -> tuple[int, bytes]:
    """GET http://address:port/path from this machine; returns status and body. Raises OSError, HTTPException."""
    connection = http.client.HTTPConnection(address, port, timeout=timeout)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def free_ports(count: int) -> list[int]:
    """Return ports of loopback that nobody listens on just now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _enter(namespace: Path) -> list[str]:
    return ["nsenter", f"--net={namespace}", "--"]


def _tc(namespace: Path, verb: str, device: str) -> list[str]:
    return [*_enter(namespace), "tc", "qdisc", verb, "dev", device, "root"]


def _batch(namespace: Path, lines: Sequence[str]) -> None:
    _run([*_enter(namespace), "ip", "-batch", "-"], "".join(f"{line}\n" for line in lines))


def _run(command: Sequence[str], text: str = "") -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed with status {done.returncode}: {done.stderr.strip()}")
    return done.stdout
