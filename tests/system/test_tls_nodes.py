"""Mutual TLS between real processes: a superpeer and two nodes, of which the second reads from the first."""

from __future__ import annotations

import http.client
import json
import ssl
import sys
from pathlib import Path

import pytest

from tests.fakes.authority import Authority
from tests.lab import images
from tests.lab.cleanup import Lab
from tests.lab.compare import differences, snapshot_of
from tests.lab.network import Host, Network
from tests.lab.processes import Node, Process, Registry
from tests.lab.waiting import wait_until

pytestmark = [pytest.mark.root, pytest.mark.programs("docker-registry", "skopeo", "ip")]


def section(authority: Authority, host: Host) -> str:
    certificate, key = authority.issue(host.name, [host.address])
    files = {"certificate": certificate, "key": key, "ca": authority.file, "client_ca": authority.file}
    return "[tls]\n" + "".join(f"{name} = {json.dumps(path)}\n" for name, path in files.items())


def status_over_tls(host: Host, address: str, port: int, path: str, context: ssl.SSLContext) -> int:
    """Return the status of a GET from `host`; raise what TLS raises."""

    def act() -> int:
        connection = http.client.HTTPSConnection(address, port, timeout=5, context=context)
        try:
            connection.request("GET", path)
            return connection.getresponse().status
        finally:
            connection.close()

    return host.inside(act)


def test_nodes_read_from_each_other_under_mutual_tls_and_nobody_else_is_let_in(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "tls")
    made = images.synthetic(tmp_path / "oci", layers=2, size=2 << 20)
    with Lab("tls") as lab:
        network = Network(lab)
        registry = Registry(lab, network.host("registry"))
        reference = f"{registry.address}/team/app:1"
        made.push(reference, prefix=network.hosts["registry"].prefix)
        host = network.host("superpeer")
        file = lab.root / "superpeer.toml"
        file.write_text(
            f'listen = "{host.address}:7070"\nstate = "{lab.root / "superpeer"}"\nlog_json = true\n'
            f"{section(authority, host)}"
            f'[registry]\nallowed = ["{registry.address}"]\nplain_http = ["{registry.address}"]\n'
        )
        superpeer = Process(lab, "superpeer", [sys.executable, "-m", "superpeer", "--config", str(file)], host=host)
        superpeer.wait_until(lambda: any(row["event"] == "superpeer is ready" for row in superpeer.events()))
        nodes, directories = [], []
        for name in ("first", "second"):
            node_host = network.host(name)
            sections = f"{section(authority, node_host)}[backfill]\nquiet = 0\n"
            node = Node(lab, node_host, [f"https://{host.address}:7070"], name=name, sections=sections)
            directories.append(lab.root / f"{name}-mnt")
            directories[-1].mkdir()
            node.dadi("mount", reference, str(directories[-1]))
            wait_until(lambda node=node: node.status()["mounts"][0]["state"] == "local")
            nodes.append(node)
        first, second = nodes
        assert differences(snapshot_of(directories[0]), snapshot_of(directories[1])) == []
        assert second.status()["peers"]["asking"]["peer_bytes"] > 0
        assert "tls: certificate valid until" in first.dadi("status")
        assert all(node.status()["tls"]["refused"] == 0 for node in nodes)

        (port,) = {int(row["address"].rpartition(":")[2]) for row in first.events()
                   if row["event"] == "serving other nodes"}  # fmt: skip
        stranger = network.host("stranger")
        for address, its_port in ((host.address, 7070), (first.host.address if first.host else "", port)):
            with pytest.raises((OSError, http.client.HTTPException)):
                stranger.get(address, its_port, "/healthz")
            nobody = ssl.create_default_context(cafile=authority.file)
            with pytest.raises((ssl.SSLError, ConnectionError)):
                status_over_tls(stranger, address, its_port, "/healthz", nobody)
            nobody.load_cert_chain(*authority.issue("guest"))
            assert status_over_tls(stranger, address, its_port, "/v1/blobs/sha256:" + "0" * 64, nobody) in (401, 404)
        assert first.status()["tls"]["refused"] > 0
