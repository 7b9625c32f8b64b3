"""Which hosts may be contacted, and how: the allow-list, plain HTTP, redirects, token realms. Pure.

Everything that a registry sends may be hostile, so where it sends us is decided here and nowhere else:

    a registry   must match a pattern of `allowed`; a mirror is allowed by being configured
    a redirect   may lead to any host (registries keep blobs elsewhere), at most MAX_REDIRECTS times in a row;
                 credentials go to the origin (scheme, host, port) that they are for and to no other
    a realm      (where tokens are fetched) may be any host, because the registry says who vouches for it
    all three    HTTPS, or plain HTTP to a host that the configuration names; no user name in the URL; no loopback,
                 private or link-local address, unless the configuration names it. "Names" means: in plain_http, as a
                 mirror, or in a pattern of `allowed` that does not begin with a wildcard

A DNS name must not lead to a loopback or link-local address either, unless it is named (`check_address`, asked after
the look-up). It may lead to a private one: that is what registries inside a company look like.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping
from urllib.parse import urljoin, urlsplit

from dadi.errors import ConfigError, DadiError, InvalidRequest, Malformed, RegistryNotAllowed, Unavailable
from dadi.oci.reference import DOCKER_HUB, parse_registry

MAX_REDIRECTS = 10
_DOCKER_HUB_API = "registry-1.docker.io"
_PATTERN = re.compile(r"(?P<host>\[[0-9a-f:.]+\]|[a-z0-9.*?-]+)(?::(?P<port>[0-9]{1,5}))?")
_PREFIX = re.compile(r"[a-z0-9]+(?:[._/-]+[a-z0-9]+)*")
_NUMERIC = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)\.?")
_URL = re.compile(r"[\x21-\x7e]{1,16384}")
_NAME = re.compile(r"[a-z0-9_-]+(?:\.[a-z0-9_-]+)*\.?|[0-9a-f:.]*:[0-9a-f:.]*")
_NAT64, _COMPATIBLE = ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("::/96")
_SITE_LOCAL = ipaddress.IPv6Network("64:ff9b:1::/48"), ipaddress.IPv6Network("fec0::/10")
"""Of one network too, though Python calls them global (RFC 8215, RFC 3879)."""
_DEFAULT_PORT = {"https": 443, "http": 80}

Origin = tuple[str, str, int]
"""Scheme, host (an IPv6 address without brackets), port."""


def split_host(host: str) -> tuple[str, int | None]:
    """Return the name (an IPv6 address without brackets) and the port of host[:port]."""
    name, colon, port = host.rpartition(":")
    if colon and port.isdigit() and (name.endswith("]") or ":" not in name):
        return name.strip("[]"), int(port)
    return host.strip("[]"), None


def origin_of(url: str) -> Origin:
    """Return the origin of an absolute http or https URL; raise Malformed for anything else."""
    if not _URL.fullmatch(url):
        raise Malformed("a URL with characters that no URL has, or too many")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise Malformed("a URL that cannot be understood") from None
    if parts.scheme not in _DEFAULT_PORT:
        raise Malformed(f"a URL of scheme {parts.scheme[:20]!r}, where http or https is due")
    if "@" in parts.netloc:
        raise Malformed("a URL with a user name in it")
    if not parts.hostname or not _NAME.fullmatch(parts.hostname):
        raise Malformed("a URL without a proper host")
    return parts.scheme, parts.hostname, _DEFAULT_PORT[parts.scheme] if port is None else port


class Hosts:
    """The rules at the head of this file, for one configuration. Raises ConfigError if that makes no sense."""

    def __init__(
        self,
        allowed: Iterable[str] = ("*",),
        plain_http: Iterable[str] = (),
        mirrors: Mapping[str, Iterable[str]] | None = None,
    ) -> None:
        self._patterns = [_Pattern(text) for text in allowed]
        self._plain = [split_host(_host("plain_http", text)) for text in plain_http]
        self._mirrors = {
            _host("mirrors", registry): tuple(_mirror(text) for text in texts)
            for registry, texts in (mirrors or {}).items()
        }
        self._named = [*self._plain]
        self._named += [split_host(host) for mirrors_of in self._mirrors.values() for host, _ in mirrors_of]

    def mirrors_of(self, registry: str) -> tuple[tuple[str, str], ...]:
        """Return the mirrors of a registry in order, each as (host[:port], repository prefix or "")."""
        return self._mirrors.get(registry, ())

    def check_registry(self, registry: str) -> None:
        """Raise RegistryNotAllowed unless an image may be taken from this registry (host[:port])."""
        name, port = split_host(registry)
        if not any(pattern.matches(name, port) for pattern in self._patterns):
            raise RegistryNotAllowed(
                f"registry {registry} is not among the allowed ones",
                hint="add it to registry.allowed, of who asks it: superpeer, proxy, or a node without superpeers",
            )
        self._check_place(name, port)

    def base_url(self, host: str) -> str:
        """Return scheme://host[:port] by which a registry or mirror is spoken to."""
        name, port = split_host(host)
        scheme = "http" if self._is_plain(name, 80 if port is None else port) else "https"
        return f"{scheme}://{_DOCKER_HUB_API if host == DOCKER_HUB else host}"

    def redirected(self, url: str, location: str | None, count: int) -> str:
        """Return where the `count`-th redirect in a row, met at `url`, leads; raise an error if we do not go there."""
        host = origin_of(url)[1]
        if count > MAX_REDIRECTS:
            raise Unavailable(f"{host} redirects in circles: more than {MAX_REDIRECTS} times")
        if not location:
            raise Malformed(f"{host} redirects to nowhere: no Location")
        if not _URL.fullmatch(location):
            raise Malformed(f"{host} redirects to something that is no URL")
        try:
            target = urljoin(url, location).partition("#")[0]
        except ValueError:
            raise Malformed(f"{host} redirects to something that is no URL") from None
        return self._foreign(target, f"{host} redirects to")

    def realm(self, registry: str, realm: str) -> str:
        """Return the URL where `registry` has its tokens fetched; raise an error if we do not go there."""
        return self._foreign(realm.partition("#")[0], f"{registry} has its tokens fetched at")

    def check_address(self, name: str, port: int, address: str) -> None:
        """Raise RegistryNotAllowed unless `name` may lead to this IP address."""
        ip = _ip(address)
        if ip is None or self._is_named(name, port):
            return
        if ip.is_loopback or ip.is_link_local or ip.is_unspecified or ip.is_multicast:
            raise RegistryNotAllowed(
                f"{name} leads to {address}, which is not a place for a registry",
                hint="if it is one, name the host in registry.allowed",
            )

    def _foreign(self, url: str, how: str) -> str:
        """Return where somebody else sends us, scheme and host in lower case; raise an error if we do not go there."""
        try:
            scheme, name, port = origin_of(url)
        except DadiError as error:
            raise Malformed(f"{how} {error.message}") from None
        if scheme == "http" and not self._is_plain(name, port):
            raise RegistryNotAllowed(
                f"{how} {name} in plain HTTP", hint="name it in registry.plain_http if that is meant to be"
            )
        try:
            self._check_place(name, port)
        except RegistryNotAllowed as error:
            raise RegistryNotAllowed(f"{how} {name}: {error.message}", hint=error.hint) from None
        parts = urlsplit(url)
        return parts._replace(netloc=parts.netloc.lower()).geturl()

    def _check_place(self, name: str, port: int | None) -> None:
        if _is_sensitive(name) and not self._is_named(name, port):
            raise RegistryNotAllowed(
                f"{name} is an address of this machine or of a private network",
                hint="name it in registry.allowed; a pattern that begins with a wildcard does not reach it",
            )

    def _is_named(self, name: str, port: int | None) -> bool:
        if any(name == named and on in (None, port) for named, on in self._named):
            return True
        return any(pattern.is_explicit and pattern.matches(name, port) for pattern in self._patterns)

    def _is_plain(self, name: str, port: int) -> bool:
        return any(name == plain and on in (None, port) for plain, on in self._plain)


class _Pattern:
    """A host[:port] with wildcards; without a port it means every port."""

    def __init__(self, text: str) -> None:
        match = _PATTERN.fullmatch(text.lower())
        if match is None:
            raise ConfigError(f"registry.allowed: {text[:100]!r} is not a pattern of host[:port]")
        host = match["host"].strip("[]")
        self.is_explicit = host[0] not in "*?"
        self._port = int(match["port"]) if match["port"] else None
        self._host = re.compile(re.escape(host).replace(r"\*", ".*").replace(r"\?", "."))

    def matches(self, name: str, port: int | None) -> bool:
        if self._port is not None and self._port != (443 if port is None else port):
            return False
        return self._host.fullmatch(name) is not None


def _host(field: str, text: str) -> str:
    try:
        return parse_registry(text)
    except InvalidRequest as error:
        raise ConfigError(f"registry.{field}: {error.message}", hint=error.hint) from None


def _mirror(text: str) -> tuple[str, str]:
    host, slash, prefix = text.partition("/")
    prefix = prefix.rstrip("/")
    if slash and prefix and not _PREFIX.fullmatch(prefix):
        raise ConfigError(f"registry.mirrors: {text[:100]!r} is not a mirror", hint="write host[:port][/prefix]")
    return _host("mirrors", host), prefix


def _ip(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        ip = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return _v4_within(ip) if isinstance(ip, ipaddress.IPv6Address) else ip


def _v4_within(ip: ipaddress.IPv6Address) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Return where an address leads: mapped, 6to4, NAT64 and IPv4-compatible ones lead to the IPv4 in them.

    (RFC 4291, 2.5.5; RFC 3056; RFC 6052.)
    """
    if ip in _NAT64 or (ip in _COMPATIBLE and int(ip) >> 16):
        return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.ipv4_mapped or ip.sixtofour or ip


def _is_sensitive(name: str) -> bool:
    """Whether a host is this machine or an address that the internet does not lead to, in any spelling."""
    ip = _ip(name)
    if ip is not None:
        return not ip.is_global or any(ip in network for network in _SITE_LOCAL)
    # 127.1, 0x7f000001 and 2130706433 are addresses too, for the resolvers that like old spellings.
    return name.rstrip(".") == "localhost" or name.rstrip(".").endswith(".localhost") or bool(_NUMERIC.fullmatch(name))
