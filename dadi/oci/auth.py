"""Requests that prove who we are: challenges answered, tokens fetched once, kept, and renewed when they run out.

    1. A request goes out with what is known for (registry, scope); at first that is nothing, or the token that a caller
       of ours has shown for this very registry.
    2. 401 with a challenge: Basic is answered with the credentials; for Bearer a token is fetched from the realm, with
       the credentials if there are any, else as anybody.
    3. 401 or 403 to something that we did show: it may have run out, in the middle of a download too. It is made
       anew, once; if the registry refuses that as well, it means it.
    4. A token near its end is renewed before it is used; if that fails, the registry is asked anew what it wants.

However many requests need the same token, it is fetched once, and the fetch outlives the request that began it.
Challenges count only from the registry itself, never from where it redirects to. ("Docker Registry v2 authentication
via central service", its OAuth2 variant for identity tokens; RFC 6750, RFC 7617.)
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import re
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping
from functools import partial
from urllib.parse import urlencode

import msgspec

from dadi.errors import AccessDenied, DadiError, Malformed
from dadi.oci import challenge as challenges
from dadi.oci.answer import Answer
from dadi.oci.challenge import Challenge
from dadi.oci.credentials import Credentials, CredentialSource, FixedCredentials
from dadi.oci.hosts import Hosts, origin_of
from dadi.oci.outgoing import Body
from dadi.oci.transport import Transport

CLIENT_ID = "dadi"
_ROUNDS = 2
"""How often a request is made anew with other proof."""
_MAX_GRANTS = 1000
_MAX_TOKEN_ANSWER = 1 << 20
_DEFAULT_LIFETIME = 60.0
_NO_TOKEN = "is that the registry's token service, or a login page before it?"
_TOKEN = re.compile(r"[\x21-\x7e]+")


class _TokenAnswer(msgspec.Struct):
    token: str | None = None
    access_token: str | None = None
    expires_in: float | None = None


@dataclasses.dataclass(slots=True, eq=False)
class _Grant:
    """What is known for one registry and scope."""

    challenge: Challenge | None = None
    authorization: str | None = None
    expires: float = math.inf
    renewal: asyncio.Task[None] | None = None
    credentials: Credentials | None = None
    """Those that `authorization` says as they are; not those that bought a token."""


class Authenticator:
    """A transport that shows what the registry wants to see."""

    def __init__(self, transport: Transport, hosts: Hosts, credentials: CredentialSource) -> None:
        self._transport = transport
        self._hosts = hosts
        self._credentials = credentials
        self._grants: OrderedDict[tuple[str, str], _Grant] = OrderedDict()

    @contextlib.asynccontextmanager
    async def open(
        self,
        method: str,
        registry: str,
        url: str,
        headers: Mapping[str, str],
        scope: str,
        *,
        body: Body | None = None,
    ) -> AsyncIterator[Answer]:
        """Send a request as `Transport.open` does, and prove who we are if `registry` (host[:port]) asks for it.

        `url` may be of another host (where a registry wants its uploads): nothing is proved there. `scope` is what the
        request needs, for example "repository:library/debian:pull". An answer of 401 or 403 means that nothing we have
        is good enough. Raises AccessDenied if a token or credentials cannot be had.
        """
        home = origin_of(self._hosts.base_url(registry))
        grant = self._grant((registry, scope))
        if grant.authorization is None and isinstance(self._credentials, FixedCredentials):
            await self._show_token(grant, registry, repository_in(scope))
        fresh = False
        for round_ in range(_ROUNDS + 1):
            if grant.challenge and self._transport.clock.monotonic() >= grant.expires:
                fresh = await self._renew_early(grant, registry, scope)
            shown = grant.authorization
            async with self._transport.open(
                method, url, headers, authorization=shown, home=home, body=body
            ) as answer:
                # New proof helps against 401 ("who are you?"), and against 403 only if the old proof may have run out.
                refused = answer.status == 401 or (answer.status == 403 and shown is not None and not fresh)
                if refused and answer.at_home and round_ < _ROUNDS:
                    asked = challenges.choose(challenges.parse(answer.headers.getall("WWW-Authenticate", ())))
                    grant.challenge = asked or grant.challenge
                    if grant.challenge and await self._renew(grant, registry, scope, shown):
                        fresh = True
                        continue
                yield answer
                return

    def forget(self, registry: str, repository: str) -> None:
        """Forget what was proved for a repository: other credentials are for it from now on."""
        for key in [key for key in self._grants if key[0] == registry and repository_in(key[1]) == repository]:
            del self._grants[key]

    async def close(self) -> None:
        """Stop fetching tokens."""
        renewals = [grant.renewal for grant in self._grants.values() if grant.renewal]
        for renewal in renewals:
            renewal.cancel()
        await asyncio.gather(*renewals, return_exceptions=True)

    def _grant(self, key: tuple[str, str]) -> _Grant:
        grant = self._grants.setdefault(key, _Grant())
        self._grants.move_to_end(key)
        if len(self._grants) > _MAX_GRANTS:
            self._grants.popitem(last=False)
        return grant

    async def _show_token(self, grant: _Grant, registry: str, repository: str) -> None:
        """Use a token that is in our hands already: the registry need not say first that it wants one."""
        credentials = await self._credentials.get(registry, repository)
        if credentials is not None and credentials.registry_token:
            grant.authorization, grant.credentials = f"Bearer {credentials.registry_token}", credentials

    async def _renew_early(self, grant: _Grant, registry: str, scope: str) -> bool:
        """As `_renew`; a challenge that leads nowhere any more is forgotten: the registry says what it wants now."""
        expired = grant.authorization
        try:
            return await self._renew(grant, registry, scope, expired)
        except AccessDenied:
            raise
        except DadiError:
            if grant.authorization == expired:
                grant.challenge, grant.authorization, grant.expires = None, None, math.inf
            return False

    async def _renew(self, grant: _Grant, registry: str, scope: str, rejected: str | None) -> bool:
        """Make the grant's authorization anew, once for all who wait; return whether it is another than `rejected`."""
        if grant.authorization is not None and grant.authorization != rejected:
            return True
        if grant.renewal is None:
            grant.renewal = asyncio.create_task(self._obtain(grant, registry, scope))
            grant.renewal.add_done_callback(partial(_landed, grant))
        await asyncio.shield(grant.renewal)
        return grant.authorization != rejected

    async def _obtain(self, grant: _Grant, registry: str, scope: str) -> None:
        repository, known = repository_in(scope), self._credentials
        if grant.credentials is not None:
            known.rejected(registry, repository, grant.credentials)
            grant.credentials = None
        credentials = await known.get(registry, repository)
        while True:
            try:
                await self._obtain_with(credentials, grant, registry, scope)
                return
            except AccessDenied:
                if credentials is None or not known.rejected(registry, repository, credentials):
                    raise
                refused, credentials = credentials, await known.get(registry, repository)
                if credentials == refused:
                    raise

    async def _obtain_with(self, credentials: Credentials | None, grant: _Grant, registry: str, scope: str) -> None:
        assert grant.challenge is not None
        began = self._transport.clock.monotonic()
        if credentials is not None and credentials.registry_token:
            grant.authorization, grant.expires = f"Bearer {credentials.registry_token}", math.inf
            grant.credentials = credentials
        elif grant.challenge.scheme == "bearer":
            token, lifetime = await self._fetch_token(registry, grant.challenge.params, scope, credentials)
            grant.authorization = f"Bearer {token}"
            grant.expires = began + lifetime - min(10.0, lifetime / 10)
        elif credentials is not None and credentials.username:
            grant.authorization, grant.expires = credentials.basic, math.inf
            grant.credentials = credentials
        else:
            raise AccessDenied(
                f"{registry} wants a user name and a password, and there are none",
                hint=f"log in to it with `docker login {registry}`",
            )

    async def _fetch_token(
        self, registry: str, params: Mapping[str, str], scope: str, credentials: Credentials | None
    ) -> tuple[str, float]:
        """Return a token for the challenge's scope (ours if it names none), and its lifetime in seconds."""
        realm = self._hosts.realm(registry, params.get("realm", ""))
        scopes = wanted_scopes(params.get("scope", ""), scope)
        service = {"service": params["service"]} if params.get("service") else {}
        headers: dict[str, str] = {}
        authorization = form = None
        if credentials is not None and credentials.identity_token:
            secret = credentials.identity_token
            form = {"grant_type": "refresh_token", "refresh_token": secret, "client_id": CLIENT_ID, **service}
            form["scope"] = " ".join(scopes)
        else:
            authorization = credentials.basic if credentials is not None and credentials.username else None
            realm += ("&" if "?" in realm else "?") + urlencode({**service, "scope": scopes}, doseq=True)
        method = "GET" if form is None else "POST"
        what = f"a token for {registry}"
        self._transport.counters.tokens += 1
        async with self._transport.open(
            method, realm, headers, authorization=authorization, form=form, follow=False
        ) as answer:
            if answer.status != 200:
                raise await self._refused(answer, registry, what, credentials)
            body = await answer.body(_MAX_TOKEN_ANSWER, what)
        try:
            found = msgspec.json.decode(body, type=_TokenAnswer)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            raise Malformed(f"{what}: {answer.host} answers something that is not a token", hint=_NO_TOKEN) from None
        token = found.token or found.access_token or ""
        if not _TOKEN.fullmatch(token):
            raise Malformed(f"{what}: {answer.host} answers something that is not a token", hint=_NO_TOKEN)
        lifetime = found.expires_in
        return token, lifetime if lifetime is not None and 0 < lifetime < math.inf else _DEFAULT_LIFETIME

    async def _refused(self, answer: Answer, registry: str, what: str, credentials: Credentials | None) -> DadiError:
        if answer.status in (400, 401, 403):
            if credentials is None:
                hint = f"log in with `docker login {registry}`, or check that the name is right"
            else:
                hint = f"the credentials for {registry} may be wrong or have run out: `docker login {registry}`"
            return AccessDenied(f"{what}: {answer.host} refuses one ({answer.status})", hint=hint)
        return await answer.error(what, registry)


def wanted_scopes(asked: str, needed: str) -> list[str]:
    """Return the scopes to fetch a token for: those of the challenge, ours if it names none.

    For pushing it is both together: the first request of a push is a HEAD, which is challenged for reading only, and
    the token must still be good for what follows. A scope is type:name:action[,action…].
    """
    if ",push" not in needed:
        return asked.split() or needed.split()
    actions: dict[str, dict[str, None]] = {}
    for scope in (*asked.split(), *needed.split()):
        resource, _, of = scope.rpartition(":")
        actions.setdefault(resource, {}).update(dict.fromkeys(of.split(",")))
    return [f"{resource}:{','.join(of)}" for resource, of in actions.items()]


def repository_in(scope: str) -> str:
    """Return the repository that a request is for: that of the first of its scopes. See `wanted_scopes`."""
    return scope.split(" ")[0].rpartition(":")[0].partition(":")[2]


def _landed(grant: _Grant, task: asyncio.Task[None]) -> None:
    """Forget the renewal, and look at its exception: whoever waited for it may be gone."""
    grant.renewal = None
    if not task.cancelled():
        task.exception()
