"""A node's side of "who may", over HTTP: show credentials, take tokens, have them renewed, ask for keys.

    GET /v1/token?reference=R&platform=P    → {"tokens": [text], "renewals": [text]}
        with `Authorization: Bearer RENEWAL`: for the blobs of that renewal; without: for all of the image
        with `Dadi-Registry-Authorization` (`shown.py`), if the node has credentials for the reference; those that
        the registry refuses are put behind the node's others, and the next ones shown
    GET /v1/keys                            → see `keys.py`

Everything here goes to superpeers, never to peers. Answers are bounded; nothing of them is put into errors.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Annotated, Any, TypeVar

import aiohttp
import msgspec
from msgspec import Meta

from dadi import http
from dadi.errors import AccessDenied, DadiError, Malformed, NotFound, RegistryNotAllowed, TokenRefused
from dadi.fallbacks import Fallbacks
from dadi.oci.credentials import Credentials
from dadi.oci.reference import Reference
from dadi.peers import keys as key_format
from dadi.peers import shown
from dadi.peers.keys import PublicKeys
from dadi.peers.token import MAX_TEXT
from dadi.peers.tokens import MOST_TOKENS, ImageTokens, Tokens
from dadi.wire import Event

T = TypeVar("T")
FindCredentials = Callable[[Reference], Awaitable[Credentials | None]]
"""The node's credentials for an image (`Keychain.credential`); raises AccessDenied, ConfigError."""
Refused = Callable[[Reference, Credentials], bool]
"""Told of credentials that the registry refuses; returns whether others are shown next (`Keychain.refused`)."""
AskOne = Callable[[str, Callable[[str], Awaitable[T]]], Awaitable[T]]
"""(key, one): what `one(url)` gives for the first superpeer that can, of those that are responsible for `key`."""
_MOST_TRIES = 8
"""Credentials that are shown for one question."""
_Text = Annotated[str, Meta(max_length=MAX_TEXT)]


class _Granted(msgspec.Struct, frozen=True):
    tokens: Annotated[tuple[_Text, ...], Meta(max_length=MOST_TOKENS)] = ()
    renewals: Annotated[tuple[_Text, ...], Meta(max_length=MOST_TOKENS)] = ()


class Caller:
    """Credentials as they are shown for `reference`: `headers`, {} for none. Not to be printed."""

    def __init__(self, reference: str, headers: dict[str, str] | None = None,
                 refused: Callable[[], bool] = lambda: False, tries: int = 1) -> None:  # fmt: skip
        self.reference = reference
        self.headers = headers or {}
        self.refused = refused
        self.tries = tries


class Access:
    """See the head of this file. Without `credentials` every registry is read as anybody."""

    def __init__(
        self, tokens: Tokens, session: aiohttp.ClientSession, fallbacks: Fallbacks, ask: AskOne[_Granted],
        credentials: FindCredentials | None = None, refused: Refused = lambda reference, credentials: False,
    ) -> None:  # fmt: skip
        self.tokens = tokens
        self._session = session
        self._fallbacks = fallbacks
        self._ask = ask
        self._credentials = credentials
        self._refused = refused
        tokens.renew = self.renew

    async def caller(self, reference: str, tries: int = 1) -> Caller:
        """Return what to show for an image: nothing if there are no credentials, or none that can be had."""
        if self._credentials is None:
            return Caller(reference)
        try:
            parsed = Reference.parse(reference)
            credentials = await self._credentials(parsed)
            headers = shown.header(credentials)
        except DadiError as error:
            # What is public is read all the same; for the rest the superpeer says that it needs credentials.
            self._fallbacks.note("no credentials to show", f"{reference}: {error}")
            return Caller(reference)
        if credentials is None:
            return Caller(reference)
        return Caller(reference, headers, partial(self._refused, parsed, credentials), tries)

    async def instead(self, caller: Caller, error: AccessDenied) -> Caller:
        """Return what to show in place of credentials that were refused with `error`; raise it if there is nothing."""
        # What a token or a configuration forbids says nothing about credentials.
        about_them = not isinstance(error, TokenRefused | RegistryNotAllowed)
        if not about_them or caller.tries == _MOST_TRIES or not caller.refused():
            raise error
        following = await self.caller(caller.reference, caller.tries + 1)
        if following.headers == caller.headers:  # who was asked for others says the same
            raise error
        return following

    async def learn(self, event: Event) -> None:
        """Take the tokens out of an "image" event: nobody after us gets to see them."""
        fields = {name: event.pop(name, ()) for name in ("tokens", "renewals")}
        try:
            granted = msgspec.convert(fields, _Granted)
            pinned = str(Reference.parse(str(event.get("reference"))).at(str(event.get("manifest_digest"))))
        except (msgspec.ValidationError, DadiError):
            self._fallbacks.note("tokens that make no sense left out", str(event.get("reference"))[:200])
            return
        await self.tokens.learn(ImageTokens(pinned, str(event.get("platform")), granted.tokens, granted.renewals))

    async def renew(self, image: ImageTokens) -> ImageTokens:
        """Return new tokens for an image: by its renewals; where these are of no use (any more), as if resolved anew.

        Raises AccessDenied if access was refused, Unavailable if no superpeer can say.
        """

        async def one(url: str) -> _Granted:
            caller = await self.caller(image.reference)
            while True:
                try:
                    return await self._renew_at(url, image, caller.headers)
                except AccessDenied as error:
                    caller = await self.instead(caller, error)

        granted = await self._ask(image.reference, one)
        return msgspec.structs.replace(image, tokens=granted.tokens, renewals=granted.renewals)

    async def _renew_at(self, url: str, image: ImageTokens, headers: dict[str, str]) -> _Granted:
        # All of it at one superpeer: where the one that signed is away, a stand-in that does not know its key would be
        # passed over, and the way that is left, to ask anew, never taken.
        if image.renewals:
            try:
                work = (self._token(url, image, {**headers, "Authorization": f"Bearer {text}"})
                        for text in image.renewals)  # fmt: skip
                parts = await asyncio.gather(*work)
                return _Granted(
                    tuple(text for part in parts for text in part.tokens),
                    tuple(text for part in parts for text in part.renewals),
                )
            except TokenRefused as error:
                self._fallbacks.note("renewal refused, asked anew", f"{image.reference}: {error}")
        return await self._token(url, image, headers)

    async def _token(self, url: str, image: ImageTokens, headers: dict[str, str]) -> _Granted:
        where, what = f"{url}/v1/token", f"a token for {image.reference}"
        parameters = {"reference": image.reference, "platform": image.platform}
        async with http.request(self._session, "GET", where, what, params=parameters, headers=headers) as response:
            granted = await _decoded(response, _Granted, where)
        if not granted.tokens:
            raise NotFound(f"{where} gives no token for {image.reference}", hint="are the versions alike?")
        return granted

    async def fetch_keys(self, url: str) -> PublicKeys:
        """Return what a superpeer says of its keys."""
        return await keys_of(self._session, url)


async def keys_of(session: aiohttp.ClientSession, url: str, **options: Any) -> PublicKeys:
    """Return what the superpeer at `url` says of its keys. Raises Unavailable, Malformed."""
    where = f"{url}/v1/keys"
    async with http.request(session, "GET", where, "asking for keys", **options) as response:
        return await _decoded(response, PublicKeys, where)


async def _decoded(response: aiohttp.ClientResponse, kind: type[T], where: str) -> T:
    data = bytearray()
    async for piece in response.content.iter_any():
        data += piece
        if len(data) > key_format.MAX_ANSWER:
            raise Malformed(f"{where} answers with more than {key_format.MAX_ANSWER} bytes", hint="is it a superpeer?")
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise Malformed(f"{where} answered what cannot be used", hint="are the versions alike?") from None
