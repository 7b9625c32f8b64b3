"""Credentials that were given with prefetch jobs: in memory, each for its job's repository, as long as the job runs.

What the superpeer fetches from a repository it fetches with those of the job that was asked for last, then with those
of older jobs, then with its own; those that the registry has refused come last, for want of better. Nothing here is
written, logged or shown; when the job is over they are gone, from what the registry client has made of them too.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from dadi.errors import AccessDenied, RegistryNotAllowed
from dadi.oci.credentials import Credentials, CredentialSource
from dadi.oci.reference import Reference
from dadi.prefetch.messages import Job


class _Secret(msgspec.Struct, eq=False):
    """Of one job; `refused`: by the registry."""

    reference: Reference
    credentials: Credentials
    refused: bool = False

    def __repr__(self) -> str:
        return "_Secret(hidden)"


class JobSecrets:
    """A source of credentials: those of jobs, then `others`.

    `forget_grants`: has the registry client, whose source this is, forget what it has made of a repository's.
    """

    def __init__(self, others: CredentialSource, forget_grants: Callable[[Reference], None]) -> None:
        self._others = others
        self._forget_grants = forget_grants
        self._jobs: dict[str, _Secret] = {}
        """By job, the one that was given last being last."""
        self._nothing_else: set[tuple[str, str]] = set()
        """Registry and repository where the others' were refused too, after those of jobs."""
        self.given = 0
        """How often credentials were given."""

    def __repr__(self) -> str:
        return f"JobSecrets({len(self._jobs)} jobs)"

    def remember(self, job: str, reference: Reference, credentials: Credentials) -> None:
        """Have a job's repository asked with these, until `forget`."""
        self._jobs.pop(job, None)
        self._jobs[job] = _Secret(reference, credentials)
        self._nothing_else.discard((reference.registry, reference.repository))
        self.given += 1
        self._forget_grants(reference)  # who was refused before may be let in now

    def forget(self, job: str) -> None:
        """Forget those of a job that is over."""
        secret = self._jobs.pop(job, None)
        if secret is not None:
            self._nothing_else.discard((secret.reference.registry, secret.reference.repository))
            self._forget_grants(secret.reference)

    def has(self, job: str) -> bool:
        """Whether there are any for a job."""
        return job in self._jobs

    def refused(self, job: Job, error: AccessDenied) -> AccessDenied:
        """Return what is to be said of a job whose registry refuses us, and have the job say it."""
        if isinstance(error, RegistryNotAllowed) or self.has(job.id):
            return error
        job.needs_credentials = True
        what = f"credentials needed for {Reference.parse(job.request.reference).name}: {error.message}"
        return AccessDenied(what, hint="submit it again, with them: they are in memory only, as long as their job runs")

    async def get(self, registry: str, repository: str = "") -> Credentials | None:
        """See `CredentialSource`."""
        ours = [each for each in reversed(self._jobs.values()) if _is_for(each.reference, registry, repository)]
        for secret in ours:
            if not secret.refused:
                return secret.credentials
        if ours and (registry, repository) in self._nothing_else:
            return ours[0].credentials
        return await self._others.get(registry, repository) or (ours[0].credentials if ours else None)

    def rejected(self, registry: str, repository: str, credentials: Credentials) -> bool:
        """See `CredentialSource`."""
        ours = [
            secret for secret in self._jobs.values()
            if not secret.refused and secret.credentials == credentials
            and _is_for(secret.reference, registry, repository)
        ]  # fmt: skip
        for secret in ours:
            secret.refused = True
        if ours or self._others.rejected(registry, repository, credentials):
            return True
        given = [each for each in self._jobs.values() if _is_for(each.reference, registry, repository)]
        where = registry, repository
        if where in self._nothing_else or not given or any(each.credentials == credentials for each in given):
            return False
        # One refusal may have been a whim, and nothing better is left: those of jobs once more.
        self._nothing_else.add(where)
        return True


def _is_for(reference: Reference, registry: str, repository: str) -> bool:
    return (reference.registry, reference.repository) == (registry, repository)
