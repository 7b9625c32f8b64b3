"""Kubelet's credential providers: programs that know credentials for some images, told by kubelet's own configuration.

    kubelet --image-credential-provider-config FILE --image-credential-provider-bin-dir DIRECTORY

    FILE        CredentialProviderConfig of kubelet.config.k8s.io/v1, YAML or JSON: providers, each with `name` (of the
                program in DIRECTORY), `matchImages` (`kubelet_match.py`), `defaultCacheDuration`, `apiVersion`,
                `args`, `env`
    question    {"kind": "CredentialProviderRequest", "apiVersion": …, "image": registry/repository}
    answer      {"kind": "CredentialProviderResponse", "apiVersion": the same, "cacheKeyType": Image, Registry or
                Global, "cacheDuration": Go's "12h" or null, "auth": {pattern: {"username", "password"}}}

(Kubernetes, "Configure a kubelet image credential provider"; credentialprovider.kubelet.k8s.io.) A provider that fails
is passed over and noted as a fallback; what it said is shown to nobody. Providers that want a service account's token
are left out: only kubelet has that. The file is read once, as kubelet does.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec
import yaml

from dadi.errors import AccessDenied, ConfigError, DadiError, InvalidRequest
from dadi.fallbacks import Fallbacks
from dadi.oci import helper, kubelet_match
from dadi.oci.config import CredentialsConfig
from dadi.oci.credentials import Credentials
from dadi.oci.reference import Reference

FAILED, LEFT_OUT = "credential provider failed", "credential provider left out"
_MAX_FILE = 256 << 10
_MAX_ANSWERS = 1000
"""Answers that are kept for each provider."""
_GLOBAL = "\0global"
_ConfigVersion = Literal["kubelet.config.k8s.io/v1", "kubelet.config.k8s.io/v1beta1", "kubelet.config.k8s.io/v1alpha1"]
_Version = Literal[
    "credentialprovider.kubelet.k8s.io/v1",
    "credentialprovider.kubelet.k8s.io/v1beta1",
    "credentialprovider.kubelet.k8s.io/v1alpha1",
]


class _Variable(msgspec.Struct, frozen=True):
    name: str
    value: str = ""


class ProviderConfig(msgspec.Struct, frozen=True, rename="camel"):
    """One provider as kubelet's configuration has it."""

    name: str
    match_images: tuple[str, ...]
    default_cache_duration: str
    api_version: _Version
    args: tuple[str, ...] | None = None
    env: tuple[_Variable, ...] | None = None
    token_attributes: dict[str, object] | None = None


class _File(msgspec.Struct, frozen=True, rename="camel"):
    api_version: _ConfigVersion
    kind: Literal["CredentialProviderConfig"]
    providers: tuple[ProviderConfig, ...]


class _Entry(msgspec.Struct, frozen=True):
    username: str = ""
    password: str = ""

    def __repr__(self) -> str:
        return "_Entry(hidden)"


class _Answer(msgspec.Struct, frozen=True, rename="camel"):
    kind: Literal["CredentialProviderResponse"]
    api_version: str
    cache_key_type: Literal["Image", "Registry", "Global"]
    cache_duration: str | None = None
    auth: dict[str, _Entry] | None = None

    def __repr__(self) -> str:
        return "_Answer(hidden)"


def read_config(data: bytes, where: str) -> tuple[ProviderConfig, ...]:
    """Return the providers in a configuration file (YAML or JSON); raise ConfigError."""
    try:
        # In Python: the loader in C crashes the process where lists are nested deep enough.
        file = msgspec.convert(yaml.load(data, Loader=yaml.SafeLoader), _File)
    except (msgspec.MsgspecError, yaml.YAMLError, ValueError, RecursionError) as error:
        why = " ".join(str(error).split())[:200] if isinstance(error, msgspec.ValidationError) else "no YAML"
        raise ConfigError(f"{where} is no CredentialProviderConfig of kubelet: {why}") from None
    names = [provider.name for provider in file.providers]
    for provider in file.providers:
        _check(provider, where)
        if names.count(provider.name) > 1:
            raise ConfigError(f"{where}: there are several providers {provider.name!r}")
    return file.providers


def _check(provider: ProviderConfig, where: str) -> None:
    name = provider.name
    if not name or name in (".", "..") or any(c.isspace() or c in "/\0" for c in name):
        raise ConfigError(f"{where}: {name[:60]!r} cannot be the name of a provider's program")
    try:
        kubelet_match.seconds(provider.default_cache_duration)
        if not provider.match_images:
            raise InvalidRequest("matchImages is empty")
        for pattern in provider.match_images:
            kubelet_match.check(pattern)
    except InvalidRequest as error:
        raise ConfigError(f"{where}: provider {name}: {error.message}", hint=error.hint) from None


class _Provider:
    """One program, and what it has said."""

    def __init__(self, config: ProviderConfig, directory: str, timeout: float, clock: Callable[[], float]) -> None:
        self.config = config
        self._program = os.path.join(directory, config.name)
        self._timeout = timeout
        self._clock = clock
        self._default = kubelet_match.seconds(config.default_cache_duration)
        self._kept: OrderedDict[str, tuple[float, dict[str, _Entry]]] = OrderedDict()
        self.asking: dict[str, asyncio.Task[dict[str, _Entry]]] = {}

    def is_for(self, image: str) -> bool:
        return any(kubelet_match.matches(pattern, image) for pattern in self.config.match_images)

    async def get(self, image: str) -> Credentials | None:
        """Return what the program, now or earlier, says of an image; raise AccessDenied."""
        for key in (image, _registry(image), _GLOBAL):
            until, auth = self._kept.get(key, (0.0, {}))
            if key in self._kept and self._clock() < until:
                return _found(auth, image)
        task = self.asking.get(image)
        if task is None:
            task = self.asking[image] = asyncio.create_task(self._ask(image))
            task.add_done_callback(lambda done: self._asked(image, done))
        return _found(await asyncio.shield(task), image)

    def _asked(self, image: str, task: asyncio.Task[dict[str, _Entry]]) -> None:
        del self.asking[image]
        if not task.cancelled():
            task.exception()  # looked at: who asked may be gone

    def drop(self, image: str, credentials: Credentials) -> bool:
        """Forget an answer that is not good (any more); return whether there was one."""
        keys = [key for key in (image, _registry(image), _GLOBAL)
                if key in self._kept and _found(self._kept[key][1], image) == credentials]  # fmt: skip
        for key in keys:
            del self._kept[key]
        return bool(keys)

    async def _ask(self, image: str) -> dict[str, _Entry]:
        config = self.config
        question = {"kind": "CredentialProviderRequest", "apiVersion": config.api_version, "image": image}
        status, output = await helper.ask(
            [self._program, *(config.args or ())], msgspec.json.encode(question), timeout=self._timeout,
            hint="credentials.provider_directory says where providers are",
            environment={variable.name: variable.value for variable in config.env or ()},
        )  # fmt: skip
        if status != 0:
            raise AccessDenied(f"the credential provider {config.name} exited with status {status}")
        wrong = f"the credential provider {config.name} answered something that is not its protocol"
        try:
            answer = msgspec.json.decode(output, type=_Answer)
            lifetime = self._default if answer.cache_duration is None else kubelet_match.seconds(answer.cache_duration)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, InvalidRequest):
            raise AccessDenied(wrong) from None  # and nothing of what it said
        if answer.api_version != config.api_version:
            raise AccessDenied(wrong)
        auth = answer.auth or {}
        if lifetime > 0:
            key = {"Image": image, "Registry": _registry(image), "Global": _GLOBAL}[answer.cache_key_type]
            self._kept[key] = self._clock() + lifetime, auth
            self._kept.move_to_end(key)
            if len(self._kept) > _MAX_ANSWERS:
                self._kept.popitem(last=False)
        return auth


class CredentialProviders:
    """The providers of a configuration file, asked in its order. A CredentialSource; see the head of this file."""

    def __init__(
        self, config: CredentialsConfig, fallbacks: Fallbacks, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._config = config
        self._fallbacks = fallbacks
        self._clock = clock
        self._loading = asyncio.Lock()
        self._providers: list[_Provider] | None = None

    def __repr__(self) -> str:
        names = ", ".join(provider.config.name for provider in self._providers or ())
        return f"CredentialProviders({self._config.providers}: {names})"

    async def load(self) -> None:
        """Read the file, once; raise ConfigError."""
        async with self._loading:
            if self._providers is not None:
                return
            path = self._config.providers
            found = await asyncio.to_thread(lambda: read_config(_contents(path), path))
            self._providers = []
            for provider in found:
                if provider.token_attributes is not None:
                    self._fallbacks.note(LEFT_OUT, f"{provider.name} wants service account tokens, which kubelet has")
                    continue
                self._providers.append(
                    _Provider(provider, self._config.provider_directory, self._config.provider_timeout, self._clock)
                )

    async def get(self, registry: str, repository: str = "") -> Credentials | None:
        """Return what the first provider says that says something; raise what `load` raises if that was not called."""
        if not repository:
            return None  # they know images
        await self.load()
        image = Reference(registry, repository).name
        for provider in self._providers or ():
            try:
                found = await provider.get(image) if provider.is_for(image) else None
            except DadiError as error:
                self._fallbacks.note(FAILED, f"{image}: {error}")
                continue
            if found is not None:
                return found
        return None

    def rejected(self, registry: str, repository: str, credentials: Credentials) -> bool:
        """Have the providers asked anew that said so."""
        image = Reference(registry, repository).name
        dropped = [provider.drop(image, credentials) for provider in self._providers or ()]
        return any(dropped)

    async def close(self) -> None:
        """Stop the programs that run."""
        tasks = [task for provider in self._providers or () for task in provider.asking.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _contents(path: str) -> bytes:
    try:
        with Path(path).open("rb") as file:
            data = file.read(_MAX_FILE + 1)
    except OSError as error:
        raise ConfigError(f"credentials.providers: {path} cannot be read: {error.strerror}") from None
    if len(data) > _MAX_FILE:
        raise ConfigError(f"credentials.providers: {path} has more than {_MAX_FILE} bytes")
    return data


def _registry(image: str) -> str:
    return image.partition("/")[0]


def _found(auth: dict[str, _Entry], image: str) -> Credentials | None:
    entry = kubelet_match.find(auth, image)
    return Credentials(entry.username, entry.password) if entry is not None and entry.username else None
