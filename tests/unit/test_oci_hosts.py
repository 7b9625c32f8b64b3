"""Which hosts may be contacted: the allow-list, redirects, realms, addresses."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dadi.errors import ConfigError, DadiError, Malformed, RegistryNotAllowed, Unavailable
from dadi.oci.hosts import MAX_REDIRECTS, Hosts, origin_of, split_host

LOCAL = ["localhost", "a.localhost", "127.0.0.1", "127.8.8.8", "10.0.0.1", "192.168.1.1", "172.16.0.1",
         "169.254.169.254", "100.64.0.1", "0.0.0.0", "[::1]", "[::]", "[fe80::1]", "[fd00:ec2::254]",
         "[::ffff:127.0.0.1]", "[::ffff:10.0.0.1]", "[64:ff9b::7f00:1]", "[64:ff9b:1::1]", "[2002:a00:1::]",
         "[::10.0.0.1]", "[fec0::1]"]  # fmt: skip


@pytest.mark.parametrize(
    ("patterns", "registry", "allowed"),
    [
        (["*"], "docker.io", True),
        (["*"], "r.example:5000", True),
        (["*"], "8.8.8.8:5000", True),
        ([], "docker.io", False),
        (["docker.io"], "r.example", False),
        (["r.example"], "r.example:5000", True),
        (["r.example:5000"], "r.example:5000", True),
        (["r.example:5000"], "r.example", False),
        (["r.example:443"], "r.example", True),
        (["*.example"], "a.b.example", True),
        (["*.example"], "example", False),
        (["*.example"], "evil-example", False),
        (["r?.example"], "r1.example", True),
        (["R.Example"], "r.example", True),
        (["r.example"], "rxexample", False),
        (["127.0.0.1"], "127.0.0.1:5000", True),
        (["127.*"], "127.0.0.1:5000", True),
        (["*.1"], "127.0.0.1:5000", False),
        (["?27.0.0.1"], "127.0.0.1:5000", False),
        (["[::1]:5000"], "[::1]:5000", True),
        (["[::1]"], "[::1]:5000", True),
        (["localhost"], "localhost:5000", True),
    ],
)
def test_the_allow_list(patterns: list[str], registry: str, allowed: bool) -> None:
    hosts = Hosts(patterns)
    if allowed:
        hosts.check_registry(registry)
    else:
        with pytest.raises(RegistryNotAllowed, match=r"registry\.allowed"):
            hosts.check_registry(registry)


@pytest.mark.parametrize("host", LOCAL)
def test_addresses_of_this_machine_and_network_must_be_named(host: str) -> None:
    with pytest.raises(RegistryNotAllowed):
        Hosts().check_registry(f"{host}:5000")
    Hosts(plain_http=[f"{host}:5000"]).check_registry(f"{host}:5000")
    Hosts(allowed=[host]).check_registry(f"{host}:5000")


def test_plain_http_is_for_the_hosts_that_are_named() -> None:
    hosts = Hosts(plain_http=["a.example", "b.example:5000", "[::1]:80"])
    assert hosts.base_url("a.example") == "http://a.example"
    assert hosts.base_url("a.example:1") == "http://a.example:1"
    assert hosts.base_url("b.example:5000") == "http://b.example:5000"
    assert hosts.base_url("b.example:5001") == "https://b.example:5001"
    assert hosts.base_url("[::1]") == "http://[::1]"
    assert hosts.base_url("c.example") == "https://c.example"


def test_docker_hub_is_spoken_to_where_it_listens() -> None:
    assert Hosts().base_url("docker.io") == "https://registry-1.docker.io"


def test_mirrors_are_read() -> None:
    hosts = Hosts(mirrors={"docker.io": ["m.example:5000/hub/x/", "n.example"]})
    assert hosts.mirrors_of("docker.io") == (("m.example:5000", "hub/x"), ("n.example", ""))
    assert hosts.mirrors_of("r.example") == ()


@pytest.mark.parametrize(
    "config",
    [
        {"allowed": ["http://r.example"]},
        {"allowed": [""]},
        {"allowed": ["r.example/team"]},
        {"plain_http": ["*"]},
        {"plain_http": ["http://a"]},
        {"mirrors": {"docker.io": ["https://m.example"]}},
        {"mirrors": {"docker.io": ["m.example/Team"]}},
        {"mirrors": {"docker.io": ["m.example/../x"]}},
        {"mirrors": {"https://docker.io": ["m.example"]}},
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(config: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="registry"):
        Hosts(**config)


@pytest.mark.parametrize(
    ("location", "target"),
    [
        ("https://cdn.example/x?sig=a%2Bb#part", "https://cdn.example/x?sig=a%2Bb"),
        ("HTTPS://CDN.Example:443/X?Y", "https://cdn.example:443/X?Y"),
        ("/elsewhere", "https://r.example/elsewhere"),
        ("//cdn.example/x", "https://cdn.example/x"),
        ("?y", "https://r.example/v2/x?y"),
        ("http://plain.example:5000/x", "http://plain.example:5000/x"),
    ],
)
def test_redirects_are_followed(location: str, target: str) -> None:
    hosts = Hosts(plain_http=["plain.example:5000"])
    assert hosts.redirected("https://r.example/v2/x", location, 1) == target


@pytest.mark.parametrize(
    "location",
    [
        "http://r.example/x",
        "http://cdn.example/x",
        "http://plain.example:5001/x",
        "https://127.0.0.1/x",
        "https://169.254.169.254/latest/meta-data",
        "https://[::ffff:169.254.169.254]/",
        "https://localhost/x",
        "https://LOCALHOST./x",
        "https://2130706433/",
        "https://0x7f.1/",
        "https://127.1/",
        "https://10.0.0.1:8443/x",
    ],
)
def test_redirects_that_lead_where_they_must_not_are_refused(location: str) -> None:
    with pytest.raises(RegistryNotAllowed):
        Hosts(plain_http=["plain.example:5000"]).redirected("https://r.example/v2/x", location, 1)


@pytest.mark.parametrize(
    "location",
    [
        None,
        "",
        "ftp://cdn.example/x",
        "file:///etc/passwd",
        "https://me:secret@cdn.example/x",
        "https://cdn.example\\@127.0.0.1/",
        "https://cdn.example:port/x",
        "https://cdn.example:99999/x",
        "https://[::1/x",
        "https://cdn.example/a b",
        "https://cdn.example/\u00e9",
        "https://127%2e0.0.1/",
        "https://" + "a" * 20_000,
    ],
)
def test_redirects_that_make_no_sense_are_malformed(location: str | None) -> None:
    with pytest.raises(Malformed) as failure:
        Hosts().redirected("https://r.example/v2/x", location, 1)
    assert "secret" not in str(failure.value)


def test_redirects_end() -> None:
    with pytest.raises(Unavailable, match="circles"):
        Hosts().redirected("https://r.example/", "/again", MAX_REDIRECTS + 1)


def test_a_realm_is_https_or_a_host_that_is_named() -> None:
    hosts = Hosts(plain_http=["r.example"])
    assert hosts.realm("r.example", "https://auth.example/token?a=b#c") == "https://auth.example/token?a=b"
    assert hosts.realm("r.example", "http://R.Example/token") == "http://r.example/token"
    for realm in ("http://auth.example/token", "https://127.0.0.1/token"):
        with pytest.raises(RegistryNotAllowed):
            hosts.realm("r.example", realm)
    for realm in ("", "token", "/token", "ftp://auth.example/"):
        with pytest.raises(Malformed):
            hosts.realm("r.example", realm)


@pytest.mark.parametrize("address", ["127.0.0.1", "169.254.169.254", "::1", "fe80::1%eth0", "0.0.0.0", "224.0.0.1"])
def test_a_name_must_not_lead_to_this_machine_unless_it_is_named(address: str) -> None:
    with pytest.raises(RegistryNotAllowed, match="leads to"):
        Hosts().check_address("innocent.example", 443, address)
    Hosts(allowed=["innocent.example"]).check_address("innocent.example", 443, address)


def test_a_name_may_lead_to_a_private_network() -> None:
    Hosts().check_address("registry.corp.example", 443, "10.1.2.3")


@given(st.text(max_size=60) | st.from_regex(r"https?://[a-z0-9.:@\[\]\\%-]{0,20}/?", fullmatch=True))
def test_any_location_is_followed_safely_or_refused(location: str) -> None:
    hosts = Hosts()
    with contextlib.suppress(DadiError):
        scheme, name, _ = origin_of(hosts.redirected("https://r.example/v2/", location, 1))
        assert scheme == "https"
        with contextlib.suppress(RegistryNotAllowed):
            hosts.check_registry(f"[{name}]" if ":" in name else name)
            assert name != "localhost"


def test_hosts_are_split() -> None:
    assert split_host("a.example") == ("a.example", None)
    assert split_host("a.example:1") == ("a.example", 1)
    assert split_host("[::1]:1") == ("::1", 1)
    assert split_host("[::1]") == ("::1", None)
