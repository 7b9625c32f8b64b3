"""Whom we say we are: Docker's configuration file and its credential helpers.

    auths          host → auth (base64 of "user:password"), or username and password; identitytoken; registrytoken
    credHelpers    host → NAME of the program docker-credential-NAME that knows the credentials of this host
    credsStore     NAME of the program for all other hosts
    helper         `docker-credential-NAME get`, the host on its standard input; answers JSON with Username and
                   Secret; the user name "<token>" says that the secret is an identity token; with nothing to tell it
                   exits with a status other than 0 and says "credentials not found"

(docker/cli "Configuration files"; docker/docker-credential-helpers, README.) The file is read again when it changes,
because what rotates credentials rewrites it. No secret is ever put into a message, a log line or a `repr`.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import os
import re
from collections.abc import Mapping
from typing import Protocol

import msgspec

from dadi.errors import AccessDenied, ConfigError
from dadi.oci import helper
from dadi.oci.reference import DOCKER_HUB

_HELPER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MAX_FILE = 4 << 20
_TOKEN_USER = "<token>"
_HUB_KEYS = ("https://index.docker.io/v1/", "index.docker.io", "docker.io", "registry-1.docker.io")


class Credentials(msgspec.Struct, frozen=True):
    """User name and password; or an identity token, which buys access tokens; or an access token itself."""

    username: str = ""
    password: str = ""
    identity_token: str = ""
    registry_token: str = ""

    def __repr__(self) -> str:
        kind = "registry token" if self.registry_token else "identity token" if self.identity_token else "password"
        return f"Credentials({kind}, hidden)"

    @property
    def basic(self) -> str:
        """The value of an Authorization header of the scheme Basic (RFC 7617)."""
        return "Basic " + base64.b64encode(f"{self.username}:{self.password}".encode()).decode()


class CredentialSource(Protocol):
    """Where credentials come from. Asked again each time that a registry rejects what it was shown."""

    async def get(self, registry: str, repository: str = "") -> Credentials | None:
        """Return the credentials for a repository of host[:port], None to go without; raise AccessDenied, ConfigError.

        Without a repository: those for the registry as a whole.
        """
        ...

    def rejected(self, registry: str, repository: str, credentials: Credentials) -> bool:
        """Learn that the registry does not want these; return whether `get` may now know others because of it."""
        ...


class FixedCredentials:
    """Credentials that the caller has already, by host[:port]; without any, every registry is asked anonymously."""

    def __init__(self, by_registry: Mapping[str, Credentials] | None = None) -> None:
        self._by_registry = dict(by_registry or {})

    async def get(self, registry: str, repository: str = "") -> Credentials | None:
        """See `CredentialSource`."""
        return self._by_registry.get(registry)

    def rejected(self, registry: str, repository: str, credentials: Credentials) -> bool:
        """There are no others."""
        return False

    def __repr__(self) -> str:
        return f"FixedCredentials({', '.join(sorted(self._by_registry))})"


class _Auth(msgspec.Struct):
    auth: str | None = None
    username: str | None = None
    password: str | None = None
    identitytoken: str | None = None
    registrytoken: str | None = None


class _File(msgspec.Struct, rename="camel"):
    auths: dict[str, _Auth] | None = None
    cred_helpers: dict[str, str] | None = None
    creds_store: str | None = None


class _Answer(msgspec.Struct, rename="pascal"):
    username: str = ""
    secret: str = ""


class DockerCredentials:
    """The credentials of a Docker configuration file (see the head of this file).

    Without `path` it is $DOCKER_CONFIG/config.json, else ~/.docker/config.json, and need not exist.
    """

    def __init__(self, path: str = "", *, helper_timeout: float = 15.0) -> None:
        self._must_exist = bool(path)
        directory = os.environ.get("DOCKER_CONFIG") or os.path.join(os.path.expanduser("~"), ".docker")
        self._path = path or os.path.join(directory, "config.json")
        self._helper_timeout = helper_timeout
        self._read: tuple[tuple[int, int, int], _File] | None = None

    def __repr__(self) -> str:
        return f"DockerCredentials({self._path})"

    def rejected(self, registry: str, repository: str, credentials: Credentials) -> bool:
        """There are no others: the file is read again anyway when it changes."""
        return False

    async def get(self, registry: str, repository: str = "") -> Credentials | None:
        """Return what the file or a helper knows of host[:port].

        Raises ConfigError if the file cannot be used, AccessDenied if a helper fails. A helper that does not know the
        host is no failure: the file's `auths` are looked at then.
        """
        file = await asyncio.to_thread(self._load)
        keys = _keys(registry)
        helpers = file.cred_helpers or {}
        name = next((helpers[key] for key in keys if key in helpers), file.creds_store)
        if name:
            found = await self._ask_helper(name, registry)
            if found is not None:
                return found
        auth = _find(file.auths or {}, keys)
        return None if auth is None else self._decode(registry, auth)

    def _load(self) -> _File:
        try:
            with open(self._path, "rb") as file:
                status = os.fstat(file.fileno())
                stamp = (status.st_ino, status.st_size, status.st_mtime_ns)
                if self._read is not None and self._read[0] == stamp:
                    return self._read[1]
                data = file.read(_MAX_FILE + 1)
        except FileNotFoundError:
            if self._must_exist:
                hint = "`docker login` makes one; \"\" takes the usual place, if it is there"
                raise ConfigError(f"registry.docker_config: {self._path} does not exist", hint=hint) from None
            return _File()
        except OSError as error:
            raise ConfigError(f"the Docker configuration {self._path} cannot be read: {error.strerror}") from None
        if len(data) > _MAX_FILE:
            raise ConfigError(f"the Docker configuration {self._path} has more than {_MAX_FILE} bytes")
        try:
            parsed = msgspec.json.decode(data, type=_File) if data.strip() else _File()
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise ConfigError(f"the Docker configuration {self._path} is not valid: {error}") from None
        self._read = stamp, parsed
        return parsed

    def _decode(self, registry: str, auth: _Auth) -> Credentials | None:
        username, password = auth.username or "", auth.password or ""
        if auth.auth:
            try:
                text = base64.b64decode(auth.auth, validate=True).decode()
            except (binascii.Error, ValueError):
                raise ConfigError(f"{self._path}: the auth of {registry} is not base64 of user:password") from None
            username, _, password = text.partition(":")
            password = password.rstrip("\0")
        if not (username or auth.identitytoken or auth.registrytoken):
            return None
        return Credentials(username, password, auth.identitytoken or "", auth.registrytoken or "")

    async def _ask_helper(self, name: str, registry: str) -> Credentials | None:
        if not _HELPER.fullmatch(name):
            raise ConfigError(f"{self._path}: {name[:40]!r} cannot be the name of a credential helper")
        program = f"docker-credential-{name}"
        server = _HUB_KEYS[0] if registry == DOCKER_HUB else registry
        status, output = await helper.ask(
            [program, "get"], server.encode() + b"\n", timeout=self._helper_timeout,
            hint="install it, or take it out of the Docker configuration",
        )  # fmt: skip
        if status != 0:
            if b"credentials not found" in output:
                return None
            raise _helper_failed(program, server, f"exited with status {status}")
        try:
            answer = msgspec.json.decode(output, type=_Answer)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            raise _helper_failed(program, server, "answered something that is not its protocol") from None
        if answer.username == _TOKEN_USER:
            return Credentials(identity_token=answer.secret)
        return Credentials(answer.username, answer.secret) if answer.username else None


def same_registry(spelt: str, registry: str) -> bool:
    """Whether an address (host, https://host, https://host/v1/) means a registry, host[:port]."""
    host = spelt.partition("://")[2] if "://" in spelt else spelt
    return host.partition("/")[0].lower() in _keys(registry)


def _keys(registry: str) -> tuple[str, ...]:
    return _HUB_KEYS if registry == DOCKER_HUB else (registry,)


def _find(auths: Mapping[str, _Auth], keys: tuple[str, ...]) -> _Auth | None:
    """Return the entry of a host, however it is spelt: host, https://host, https://host/v1/."""
    for key in keys:
        if key in auths:
            return auths[key]
    for spelt, auth in auths.items():
        host, _, path = spelt.partition("://")[2].partition("/") if "://" in spelt else spelt.partition("/")
        if host.lower() in keys and path.strip("/") in ("", "v1", "v2"):
            return auth
    return None


def _helper_failed(program: str, server: str, how: str) -> AccessDenied:
    return AccessDenied(
        f"the credential helper {program} {how}", hint=f"see what it says to: echo {server} | {program} get"
    )
