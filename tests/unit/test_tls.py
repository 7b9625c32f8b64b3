"""TLS files: what is said of those that cannot be used, and when new ones are taken. Handshakes in memory."""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from dadi import config
from dadi.errors import ConfigError
from dadi.fallbacks import Fallbacks
from dadi.tls import Tls, TlsConfig
from tests.fakes.authority import HOUR, Authority


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ca")


class Started:
    """A `Tls` of the certificate "server", and what it noted."""

    def __init__(self, authority: Authority, **more: str) -> None:
        certificate, key = authority.issue("server", ["127.0.0.1", "superpeer.test"])
        self.now = os.stat(certificate).st_mtime
        self.fallbacks = Fallbacks()
        self.config = TlsConfig(certificate=certificate, key=key, ca=authority.file, **more)
        self.tls = Tls(self.config, self.fallbacks, lambda: self.now)

    def noted(self) -> list[str]:
        return [row["kind"] for row in self.fallbacks.statistics()]


@pytest.fixture
async def started(authority: Authority) -> AsyncIterator[Started]:
    made = Started(authority)
    await made.tls.start()
    yield made
    await made.tls.close()


def shake(server: ssl.SSLContext, client: ssl.SSLContext, name: str = "127.0.0.1") -> bytes:
    """Do a handshake without a network and return the server's certificate (DER); raise what either side raises."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [
        client.wrap_bio(to_client, to_server, server_hostname=name),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    client_side, under_way = sides[0], list(sides)
    while under_way:
        for side in tuple(under_way):
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
                under_way.remove(side)
    found = client_side.getpeercert(binary_form=True)
    assert found
    return found


def der(path: str) -> bytes:
    return ssl.PEM_cert_to_DER_cert(Path(path).read_text())


# ---- configuration


def test_nothing_configured_is_plain_http() -> None:
    assert Tls.of(TlsConfig(), Fallbacks()) is None


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"key": "k"}, "tls.key without tls.certificate"),
        ({"client_ca": "c", "ca": "c"}, "tls.client_ca without tls.certificate"),
        ({"peer_name": "node.test"}, "tls.peer_name without"),
        ({"peer_name": "10.0.0.1", "ca": "c"}, "is a name, not an address"),
        ({"verify": False}, "unknown configuration key: tls.verify"),
    ],
)
def test_a_section_that_makes_no_sense_is_refused(tmp_path: Path, section: dict[str, object], said: str) -> None:
    class Whole(msgspec.Struct, frozen=True):
        tls: TlsConfig = TlsConfig()

    with pytest.raises(ConfigError, match=said):
        config.load(Whole, None, {"tls": section})


def test_a_listener_without_a_certificate_is_refused(authority: Authority) -> None:
    tls = Tls(TlsConfig(ca=authority.file), Fallbacks())
    with pytest.raises(ConfigError, match="certificate is missing"):
        _ = tls.server


def test_plain_urls_are_refused_beside_tls(authority: Authority) -> None:
    tls = Tls(TlsConfig(ca=authority.file), Fallbacks())
    tls.check_urls("superpeers", ("https://a:1", "dns+https://b:1"))
    with pytest.raises(ConfigError, match="superpeers: http://c:1 is not encrypted"):
        tls.check_urls("superpeers", ("https://a:1", "http://c:1"))


def test_files_that_cannot_be_used_are_named_with_what_is_wrong(authority: Authority, tmp_path: Path) -> None:
    good, key = authority.issue("good")
    other, other_key = authority.issue("other")
    _, locked = authority.issue("locked", passphrase=b"secret")
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    for options, said in [
        ({"certificate": good, "key": key, "ca": "/nowhere/ca.pem"}, "tls.ca: /nowhere/ca.pem cannot be read"),
        ({"certificate": good, "key": key, "ca": key}, f"tls.ca: {key} cannot be used"),
        ({"certificate": good, "key": key, "client_ca": str(nonsense)}, f"tls.client_ca: {nonsense} cannot be used"),
        ({"certificate": "/nowhere/c.pem", "key": key}, "tls.certificate: /nowhere/c.pem cannot be read"),
        ({"certificate": str(nonsense), "key": key}, f"tls.certificate: {nonsense} cannot be used"),
        ({"certificate": good, "key": other_key}, f"the key in {other_key} is not that of the certificate in {good}"),
        ({"certificate": good, "key": other}, f"tls.key: {other} has no private key"),
        ({"certificate": good}, f"tls.certificate: {good} has no private key"),
        ({"certificate": good, "key": locked}, f"the key in {locked} is encrypted"),
    ]:
        with pytest.raises(ConfigError) as raised:
            TlsConfig(**options).load()
        assert said in raised.value.message
        assert raised.value.hint


def test_contexts_verify_and_are_modern(authority: Authority) -> None:
    certificate, key = authority.issue("both")
    loaded = TlsConfig(certificate=certificate, key=key, ca=authority.file, client_ca=authority.file).load()
    assert loaded.client.verify_mode is ssl.CERT_REQUIRED
    assert loaded.client.check_hostname
    assert len(loaded.client.get_ca_certs()) == 1  # and none of the system's
    assert loaded.server is not None
    assert loaded.server.verify_mode is ssl.CERT_REQUIRED
    for context in (loaded.client, loaded.server):
        assert context.minimum_version is ssl.TLSVersion.TLSv1_2
        kinds = [cipher["name"] for cipher in context.get_ciphers()]
        assert kinds
        assert all("GCM" in name or "POLY1305" in name for name in kinds)


def test_the_systems_authorities_count_where_none_is_named(authority: Authority) -> None:
    certificate, key = authority.issue("own")
    loaded = TlsConfig(certificate=certificate, key=key).load()
    assert loaded.client.verify_mode is ssl.CERT_REQUIRED
    assert loaded.server is not None
    with pytest.raises(ssl.SSLCertVerificationError):
        shake(loaded.server, loaded.client)


def test_certificate_and_key_may_be_one_file(authority: Authority) -> None:
    certificate, key = authority.issue("one")
    shown = der(certificate)
    with open(certificate, "a") as file:
        file.write(Path(key).read_text())
    loaded = TlsConfig(certificate=certificate, ca=authority.file).load()
    assert loaded.server is not None
    assert shake(loaded.server, loaded.client) == shown


# ---- names


async def test_addresses_are_checked_by_peer_name_and_names_by_themselves(authority: Authority) -> None:
    made = Started(authority, peer_name="superpeer.test")
    await made.tls.start()
    try:
        shake(made.tls.server, made.tls.client, "203.0.113.9")  # not in the certificate, but superpeer.test is
        shake(made.tls.server, made.tls.client, "superpeer.test")
        with pytest.raises(ssl.SSLCertVerificationError):
            shake(made.tls.server, made.tls.client, "node.test")
    finally:
        await made.tls.close()


async def test_without_peer_name_the_address_itself_must_be_named(started: Started) -> None:
    shake(started.tls.server, started.tls.client, "127.0.0.1")
    with pytest.raises(ssl.SSLCertVerificationError):
        shake(started.tls.server, started.tls.client, "203.0.113.9")


# ---- reload


async def test_nothing_is_trusted_before_the_start(authority: Authority) -> None:
    made = Started(authority)
    with pytest.raises(ssl.SSLError):
        shake(made.tls.server, made.tls.client)


async def test_new_files_are_used_by_the_next_handshake(started: Started, authority: Authority) -> None:
    before = shake(started.tls.server, started.tls.client)
    assert not await started.tls.refresh()
    certificate, _ = authority.issue("server")
    assert await started.tls.refresh()
    assert shake(started.tls.server, started.tls.client) == der(certificate) != before
    assert started.tls.statistics()["reloads"] == 1
    assert started.noted() == []


async def test_an_authority_that_is_taken_out_is_believed_no_more(started: Started, tmp_path: Path) -> None:
    stranger = Authority(tmp_path, "stranger")
    Path(started.config.ca).write_bytes(Path(stranger.file).read_bytes())
    assert await started.tls.refresh()
    with pytest.raises(ssl.SSLCertVerificationError):
        shake(started.tls.server, started.tls.client)


async def test_a_symbolic_link_that_is_swapped_is_noticed(authority: Authority, tmp_path: Path) -> None:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        for path in authority.issue(name):
            Path(path).rename(tmp_path / name / f"tls{Path(path).suffix}")
    link = tmp_path / "now"
    link.symlink_to("old")
    tls = Tls(TlsConfig(certificate=f"{link}/tls.pem", key=f"{link}/tls.key", ca=authority.file), Fallbacks())
    await tls.start()
    try:
        (tmp_path / "next").symlink_to("new")
        (tmp_path / "next").rename(link)
        assert await tls.refresh()
        assert shake(tls.server, tls.client) == der(str(tmp_path / "new" / "tls.pem"))
    finally:
        await tls.close()


@pytest.mark.parametrize("breakage", ["nonsense", "gone", "key of another", "expired", "not yet valid"])
async def test_broken_new_files_change_nothing_and_are_said_once(
    started: Started, authority: Authority, breakage: str
) -> None:
    before = shake(started.tls.server, started.tls.client)
    certificate, key = Path(started.config.certificate), Path(started.config.key)
    match breakage:
        case "nonsense":
            certificate.write_text("nonsense")
        case "gone":
            certificate.unlink()
        case "key of another":
            key.write_bytes(Path(authority.issue("another")[1]).read_bytes())
        case "expired":
            authority.issue("server", begins=-2 * HOUR, ends=-HOUR)
        case "not yet valid":
            authority.issue("server", begins=HOUR)
    assert not await started.tls.refresh()
    assert not await started.tls.refresh()
    assert shake(started.tls.server, started.tls.client) == before
    error = started.tls.statistics()["error"]
    assert str(certificate) in error
    assert [(row["kind"], row["count"]) for row in started.fallbacks.statistics()] == [("certificates not reloaded", 1)]
    authority.issue("server")
    assert await started.tls.refresh()
    assert started.tls.statistics()["error"] is None
    assert shake(started.tls.server, started.tls.client) == der(str(certificate))


async def test_a_file_that_becomes_readable_again_without_changing_is_taken(
    started: Started, authority: Authority, tmp_path: Path
) -> None:
    certificate = Path(started.config.certificate)
    certificate.rename(tmp_path / "aside")
    assert not await started.tls.refresh()
    (tmp_path / "aside").rename(certificate)
    assert await started.tls.refresh()
    assert started.tls.statistics()["error"] is None


async def test_a_certificate_that_runs_out_is_said_once(started: Started) -> None:
    started.now += HOUR.total_seconds() * 30
    await started.tls.refresh()
    await started.tls.refresh()
    noted = [(row["kind"], row["count"]) for row in started.fallbacks.statistics()]
    assert noted == [("certificate out of its time", 1)]


async def test_an_expired_certificate_may_be_replaced_by_any(started: Started, authority: Authority) -> None:
    started.now += HOUR.total_seconds() * 30
    authority.issue("server", ends=25 * HOUR)
    assert await started.tls.refresh()


async def test_handshakes_are_counted_with_why_they_failed(started: Started, tmp_path: Path) -> None:
    other = TlsConfig(ca=Authority(tmp_path, "stranger").file)
    stranger = (await asyncio.to_thread(other.load)).client
    shake(started.tls.server, started.tls.client)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = stranger.wrap_bio(to_client, to_server, server_hostname="127.0.0.1")
    server = started.tls.server.wrap_bio(to_server, to_client, server_side=True)
    for side in (client, server):
        with pytest.raises(ssl.SSLWantReadError):
            side.do_handshake()
    with pytest.raises(ssl.SSLCertVerificationError):
        client.do_handshake()
    with pytest.raises(ssl.SSLError):
        server.do_handshake()
    statistics = started.tls.statistics()
    assert (statistics["handshakes"], statistics["refused"]) == (2, 1)
    assert "unknown ca" in statistics["refused_why"]
