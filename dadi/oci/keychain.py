"""Which credentials are for an image: all places that know some, in the order in which they are asked.

    1. pull secrets    what somebody showed for this very repository when it was pulled (`PullSecrets`, in memory)
    2. providers       kubelet's credential providers, if there are any (`kubelet.py`)
    3. Docker          Docker's configuration file and its helpers (`credentials.py`)
    4. pull secrets    once more: those that the registry has refused already, for want of better

A pull secret is used for the repository of its pull and for no other: who may pull one image need not see the next.
Nothing here writes, logs or shows a secret.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

import msgspec

from dadi.fallbacks import Fallbacks
from dadi.oci.config import CredentialsConfig, RegistryConfig
from dadi.oci.credentials import Credentials, CredentialSource, DockerCredentials
from dadi.oci.kubelet import CredentialProviders
from dadi.oci.reference import Reference

_PER_REPOSITORY = 4
"""Secrets that are kept for one repository: pulls of several namespaces may be under way at once."""


class _Secret(msgspec.Struct, eq=False):
    """One pull secret; `refused`: by the registry, so that others come first."""

    credentials: Credentials
    until: float
    refused: bool = False

    def __repr__(self) -> str:
        return "_Secret(hidden)"


class PullSecrets:
    """Pull secrets by repository, newest first: at most `most` repositories, each for `lifetime` seconds."""

    def __init__(self, *, most: int = 1000, lifetime: float = 43200, clock: Callable[[], float] = time.monotonic):
        self._most = most
        self._lifetime = lifetime
        self._clock = clock
        self._by_name: OrderedDict[str, list[_Secret]] = OrderedDict()

    def __repr__(self) -> str:
        return f"PullSecrets({len(self)} repositories)"

    def __len__(self) -> int:
        return len(self._by_name)

    def remember(self, reference: Reference, credentials: Credentials) -> bool:
        """Have the repository of `reference` asked for with these credentials first; return whether they are new."""
        self._drop_old()
        before = self._by_name.pop(reference.name, [])
        older = [secret for secret in before if secret.credentials != credentials]
        secret = _Secret(credentials, self._clock() + self._lifetime)
        self._by_name[reference.name] = [secret, *older][:_PER_REPOSITORY]
        while len(self._by_name) > self._most:
            self._by_name.popitem(last=False)
        return len(older) == len(before)

    def forget(self, reference: Reference, credentials: Credentials) -> None:
        """Forget what `remember` was told."""
        self._keep(reference.name, lambda secret: secret.credentials != credentials)

    def refused(self, name: str, credentials: Credentials) -> bool:
        """Put behind all others what the registry refuses; return whether that is news."""
        news = [s for s in self._by_name.get(name, ()) if s.credentials == credentials and not s.refused]
        for secret in news:
            secret.refused = True
        return bool(news)

    def find(self, name: str, *, refused: bool = False) -> Credentials | None:
        """Return the newest for registry/repository; with `refused` the newest of those that were refused."""
        self._drop_old()
        return next((s.credentials for s in self._by_name.get(name, ()) if s.refused is refused), None)

    def _drop_old(self) -> None:
        now = self._clock()
        for name in list(self._by_name):
            self._keep(name, lambda secret: secret.until > now)

    def _keep(self, name: str, wanted: Callable[[_Secret], bool]) -> None:
        left = [secret for secret in self._by_name.get(name, ()) if wanted(secret)]
        if left:
            self._by_name[name] = left
        else:
            self._by_name.pop(name, None)


class Keychain:
    """See the head of this file. Is a CredentialSource, so that a RegistryClient can use it."""

    def __init__(self, *sources: CredentialSource, pulls: PullSecrets | None = None) -> None:
        """`sources` are asked in this order, after the pull secrets."""
        self.pulls = PullSecrets() if pulls is None else pulls
        self._sources = sources
        self._providers: CredentialProviders | None = None

    @classmethod
    def of(
        cls, registry: RegistryConfig, credentials: CredentialsConfig, fallbacks: Fallbacks, pulls: PullSecrets
    ) -> Keychain:
        """Return what the configuration says, in the order of the head of this file."""
        docker = DockerCredentials(registry.docker_config, helper_timeout=registry.helper_timeout)
        if not credentials.providers:
            return cls(docker, pulls=pulls)
        providers = CredentialProviders(credentials, fallbacks)
        keychain = cls(providers, docker, pulls=pulls)
        keychain._providers = providers
        return keychain

    async def load(self) -> None:
        """Read the providers' configuration now and not at the first question; raise ConfigError."""
        if self._providers:
            await self._providers.load()

    async def close(self) -> None:
        """Stop the programs that were asked."""
        if self._providers:
            await self._providers.close()

    def __repr__(self) -> str:
        return f"Keychain({', '.join(map(repr, (self.pulls, *self._sources)))})"

    async def credential(self, reference: Reference) -> Credentials | None:
        """Return what to show to the reference's registry for its repository, None to go without.

        Raises ConfigError if the Docker configuration cannot be used, AccessDenied if its helper fails.
        """
        return await self.get(reference.registry, reference.repository)

    async def get(self, registry: str, repository: str = "") -> Credentials | None:
        """See `CredentialSource`."""
        name = f"{registry}/{repository}"
        found = self.pulls.find(name)
        if found is not None:
            return found
        for source in self._sources:
            found = await source.get(registry, repository)
            if found is not None:
                return found
        return self.pulls.find(name, refused=True)

    def rejected(self, registry: str, repository: str, credentials: Credentials) -> bool:
        """See `CredentialSource`."""
        news = self.pulls.refused(f"{registry}/{repository}", credentials)
        for source in self._sources:
            news = source.rejected(registry, repository, credentials) or news
        return news

    def refused(self, reference: Reference, credentials: Credentials) -> bool:
        """Learn from a superpeer that an image's registry refuses these; return whether others are shown next."""
        return self.rejected(reference.registry, reference.repository, credentials)
