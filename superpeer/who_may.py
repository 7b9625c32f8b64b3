"""Who may have an image: the registry says, and a signed token says it again to everybody who serves its blobs.

    a node resolves an image    its credentials (`dadi/peers/shown.py`) are shown to the image's registry: a HEAD of the
                                manifest. Yes, and its layers are that repository's (`shared_layers.py`): tokens for
                                the image's blobs. How the question is asked, and the answer kept: `verdicts.py`
    a node renews its tokens    it shows a renewal, and its credentials once more:
          the registry says yes       new tokens, a new renewal of the same id
          it refuses the very credentials that the renewal stems from, now or since (or says to them that the image is
          not there, while the superpeer's own see it)                                   no; the tokens run out
          it cannot say: it is away, the image is gone there, the node has lost the credentials, or has others by now
                                      new tokens, until `stale` after the last yes; said aloud

So a running container keeps its reads through a registry's outage, a rotated password and a restart, for a day at
least; and whoever the registry refuses is out when the token it has runs out, within minutes. Who hides credentials
that were refused nowhere yet gains a day at most: revoke its renewals (`signing.py`) to be faster. A renewal keeps its
id when it is renewed, and the log says who was granted which: to revoke that one ends all that come of it.

The credentials are used for this question, at the registry that the reference names, and nowhere else; they are never
stored, logged or put into an error. Mirrors are not asked: they might show anybody what they fetched as themselves.
"""

from __future__ import annotations

import hmac
import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import structlog

from dadi.errors import AccessDenied, NotFound, RegistryNotAllowed, TokenRefused, Unavailable
from dadi.fallbacks import Fallbacks
from dadi.index.image import ImageIndex
from dadi.oci.reference import Reference
from dadi.peers import token as tokens
from dadi.peers.gate import AUTHORIZATION, OPEN, Doorman, Gate
from dadi.peers.keys import Keys, KeySource, PublicKeys
from dadi.peers.token import MAX_BLOBS, NAME, Kind, Token
from superpeer.config import SuperpeerConfig
from superpeer.shown_layers import Layer
from superpeer.signing import SigningKeys
from superpeer.verdicts import Grant, Verdicts, denied

log = structlog.get_logger()
_SHARED_FOR = 60.0
"""Seconds for which one read token is given to all who may read the same blobs: peers then check it once."""
_MOST_SHARED = 1000
_MOST_LOOSE = 20_000
_NOBODY = bytes(tokens.GRANT_SIZE)
"""The grant of who was not asked for: all was open."""
CheckAgain = Callable[[Token, str | None], Awaitable[bool]]
"""(renewal, what is shown) → whether tokens for what it names are firm; raises if they may not be given any more."""


class WhoMay:
    """See the head of this file. `open` it, `close` it. `gate` is what requests for blobs must pass."""

    def __init__(self, config: SuperpeerConfig, keys: SigningKeys, fallbacks: Fallbacks, *,
                 clock: Callable[[], float] = time.time) -> None:  # fmt: skip
        self.keys = keys
        self._all_keys: KeySource = keys
        self._asks = config.authorization == "registry"
        self.gate: Doorman = Gate(self._all_keys, clock=clock) if self._asks else OPEN
        self._stale = config.authorization_stale
        self._lifetime = config.token_lifetime
        self.keep = config.authorization_stale + config.token_lifetime
        """Seconds that a token may be valid for."""
        self.siblings_keys = Path(config.state) / "keys" / "siblings.json"
        self.fallbacks = fallbacks
        self._clock = clock
        self._verdicts = Verdicts(config, keys, fallbacks, clock)
        self._shared: OrderedDict[bytes, tuple[float, str]] = OrderedDict()
        self._counts: Counter[str] = Counter()
        self._loose: OrderedDict[tuple[str, str], Token] = OrderedDict()
        """By repository and id."""

    @classmethod
    async def open(cls, config: SuperpeerConfig, fallbacks: Fallbacks,
                   clock: Callable[[], float] = time.time) -> WhoMay:  # fmt: skip
        """Read keys and verdicts, begin to rotate. Raises ConfigError for keys that cannot be read."""
        keys = SigningKeys(Path(config.state) / "keys", peers_key=config.peers_key, lifetime=config.key_lifetime,
                           keep=config.authorization_stale + config.token_lifetime, clock=clock)  # fmt: skip
        await keys.load()
        who_may = cls(config, keys, fallbacks, clock=clock)
        await who_may._verdicts.load()
        keys.start()
        who_may._verdicts.start()
        return who_may

    def trust(self, siblings: KeySource) -> None:
        """Accept what siblings have signed too: `siblings` has their keys, and ours as its `own`."""
        self._all_keys = siblings
        if isinstance(self.gate, Gate):
            self.gate.keys = siblings

    # ---- asking the registry

    @property
    def asks(self) -> bool:
        """Whether anything is checked at all."""
        return self._asks

    async def check(self, reference: Reference, shown: str | None, address: str = "") -> Grant:
        """Return a grant if the registry lets the shower of these credentials (None: anybody) read the repository.

        `address`: where they come from. Raises AccessDenied; InvalidRequest for a malformed header; NotFound,
        RegistryNotAllowed, Unavailable.
        """
        if not self._asks:
            return Grant(_NOBODY, int(self._clock()))
        return await self._verdicts.check(reference, shown, address)

    def is_public(self, repository: str) -> bool:
        """Whether anybody could read a repository (with its registry) when that was last asked."""
        return self._verdicts.is_public(repository)

    async def has_blob(self, reference: Reference, shown: str | None, digest: str) -> bool:
        """Whether the registry shows a blob of the repository to who has these credentials."""
        return await self._verdicts.has_blob(reference, shown, digest)

    # ---- tokens

    def tokens(self, pinned: str, index: ImageIndex, index_digest: str, grant: Grant,
               *, firm: bool = True, address: str = "") -> dict[str, list[str]]:  # fmt: skip
        """Return read tokens, and their renewals, for all blobs of an image; `pinned`: a reference to its manifest.

        Those that are not `firm` are revoked when another repository shows that it has a layer (`shared_layers.py`).
        """
        names = tokens.names_of(blobs_of(index, index_digest))
        step = MAX_BLOBS * NAME
        parts = [(names[at : at + step], secrets.token_hex(tokens.ID_SIZE)) for at in range(0, len(names), step)]
        log.info("access granted", image=pinned, to=address, revoke=[ident for _, ident in parts])
        return self._signed(parts, pinned, grant, firm)

    def _signed(
        self, parts: Sequence[tuple[bytes, str]], pinned: str, grant: Grant, firm: bool
    ) -> dict[str, list[str]]:
        """`parts`: names of blobs, and the id of the renewal for them: one renewed keeps it, to be revoked by."""
        expires = grant.authorized + int(self._stale)
        renewals = [
            self.keys.sign(Kind.RENEWAL, names, 0, reference=pinned, authorized=grant.authorized, grant=grant.grant,
                           expires=expires, ident=ident)
            for names, ident in parts
        ]  # fmt: skip
        self._counts["tokens"] += len(parts)
        reads = [self._read_token(names) for names, _ in parts]
        if not firm:
            repository = Reference.parse(pinned).name
            for text in reads:
                self._remember_loose(repository, tokens.parse(text))
        return {"tokens": reads, "renewals": renewals}

    def _remember_loose(self, repository: str, token: Token) -> None:
        self._loose[repository, token.id] = token
        self._loose.move_to_end((repository, token.id))
        while self._loose:
            first = next(iter(self._loose))
            if self._loose[first].expires + tokens.LEEWAY > self._clock() and len(self._loose) <= _MOST_LOOSE:
                break
            token = self._loose.pop(first)
            if token.expires + tokens.LEEWAY > self._clock():
                self.keys.revoke(token)  # who is not remembered cannot be revoked later; it is had anew at once

    def revoke_loose(self, layer: Layer) -> None:
        """Revoke the loose tokens for a layer that another repository was given."""
        for (repository, ident), token in list(self._loose.items()):
            if repository != layer.repository and any(map(token.opens, layer.blobs)):
                del self._loose[repository, ident]
                self.keys.revoke(token)
                self._counts["loose_revoked"] += 1

    def _read_token(self, names: bytes) -> str:
        now = self._clock()
        made, text = self._shared.get(names, (0.0, ""))
        # Not one that was revoked: whoever gets it would come back at once.
        if not text or now - made >= min(_SHARED_FOR, self._lifetime / 4) or not self._still_good(text):
            text = self.keys.sign(Kind.READ, names, self._lifetime)
            self._shared[names] = (now, text)
            self._shared.move_to_end(names)
            if len(self._shared) > _MOST_SHARED:
                self._shared.popitem(last=False)
        return text

    def _still_good(self, text: str) -> bool:
        try:
            self._all_keys.check_not_revoked(tokens.parse(text))
        except TokenRefused:
            return False
        return True

    async def renew(self, headers: Mapping[str, str], shown: str | None, *, address: str = "",
                    check: CheckAgain | None = None) -> dict[str, list[str]]:  # fmt: skip
        """Return a read token and a renewal for the renewal in the headers; see the head of this file.

        `check`: whether what it names may still be given (`SharedLayers.check_renewal`). Raises TokenRefused if it is
        none of ours or too old, AccessDenied if the registry refused meanwhile; what `check` raises.
        """
        text = tokens.bearer(headers.get(AUTHORIZATION))
        told = tokens.parse(text)
        if self._all_keys.find(told.key) is None:
            await self._all_keys.ask_for(told.key)
        renewal = tokens.verify(text, self._all_keys.find)
        if renewal.kind is not Kind.RENEWAL:
            raise TokenRefused("this token opens blobs; it renews nothing")
        renewal.check_time(self._clock())
        self._all_keys.check_not_revoked(renewal)
        if self._asks and renewal.grant == _NOBODY:
            raise TokenRefused("no registry has said yes to this renewal: it was given while all was open")
        reference = Reference.parse(renewal.reference)
        grant = await self._grant_again(reference, shown, renewal, address) if self._asks else await self.check(
            reference, shown)  # fmt: skip
        firm = await check(renewal, shown) if check else True
        return self._signed([(renewal.names, renewal.id)], renewal.reference, grant, firm)

    async def _grant_again(self, reference: Reference, shown: str | None, renewal: Token, address: str) -> Grant:
        grant = Grant(renewal.grant, renewal.authorized)
        try:
            grant = await self._verdicts.check_again(reference, shown, renewal.grant, address)
        except RegistryNotAllowed:
            raise
        except (Unavailable, NotFound) as error:
            self._counts["renewed_unchecked"] += 1
            self.fallbacks.note("token renewed, the registry cannot say", f"{reference.name}: {error}")
        except AccessDenied:
            if hmac.compare_digest(renewal.grant, self.keys.grant(shown or "", reference.name)):
                raise
            self._counts["renewed_unchecked"] += 1
            self.fallbacks.note("token renewed without the credentials of then", reference.name)
        if grant.grant == renewal.grant and self._verdicts.refused_at(renewal.grant) > grant.authorized:
            raise denied(reference, None)
        return grant

    def read_token(self, *blobs: str) -> str:
        """Return a token for blobs (≤ MAX_BLOBS) that the caller may have: who asks for it has found that out."""
        return self._read_token(tokens.names_of(blobs))

    def sibling_headers(self, *blobs: str) -> dict[str, str]:
        """Return the headers by which this superpeer asks a sibling, which knows its key, for blobs (≤ MAX_BLOBS)."""
        return {AUTHORIZATION: f"Bearer {self._read_token(tokens.names_of(blobs))}"}

    def sibling_list_headers(self) -> dict[str, str]:
        """Return the headers by which this superpeer asks a sibling for what is told to no node."""
        return {AUTHORIZATION: f"Bearer {self.keys.sign(Kind.SIBLING, b'', _SHARED_FOR)}"}

    def public(self) -> PublicKeys:
        """Return the answer to GET /v1/keys."""
        own, known = self.keys.public(), self._all_keys
        return known.with_siblings(own) if isinstance(known, Keys) else own

    # ---- state

    def statistics(self) -> dict[str, Any]:
        """Return counts: questions to registries, yes, no, tokens signed, renewed without an answer; the gate's."""
        names = ("tokens", "renewed_unchecked", "loose_revoked")
        return {**self._verdicts.statistics(), **{name: self._counts[name] for name in names},
                "rotations": self.keys.rotations, "gate": self.gate.statistics()}  # fmt: skip

    async def close(self) -> None:
        """Break off what is asked, write what is known."""
        await self._verdicts.close()
        await self.keys.close()


def blobs_of(index: ImageIndex, index_digest: str) -> list[str]:
    """Return the blobs that who may have an image is given: its layers' tars first, which peers give to each other."""
    layers = index.layers
    blobs = [layer.diff_id for layer in layers]
    blobs += [index.metadata.digest, index_digest]
    blobs += [layer.index_digest for layer in layers]
    blobs += [layer.seek_digest for layer in layers if layer.seek_digest]
    blobs += [layer.layer_digest for layer in layers]
    blobs += [index.manifest_digest, index.config_digest]
    return list(dict.fromkeys(blobs))
