"""Who asks, as the registry would see him: the Authorization header of his request, and nothing else. Pure.

    Authorization    "Basic" base64(user ":" password)      RFC 7617
                     "Bearer" token                          RFC 6750

Credentials are for one registry, that of the request: `for_registry` gives them to no other, also not to a mirror.
No secret is ever put into a message, a log line or a `repr`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re

import msgspec

from dadi.errors import InvalidRequest
from dadi.oci.credentials import Credentials, CredentialSource, FixedCredentials

_MAX = 16 << 10
_FORM = re.compile(r"(?P<scheme>[A-Za-z]+) +(?P<proof>[\x21-\x7e]+)")


class Caller(msgspec.Struct, frozen=True):
    """`authorization` is the header as it came, "" if there was none."""

    authorization: str = ""

    def __repr__(self) -> str:
        return f"Caller({'with credentials, hidden' if self.authorization else 'anonymous'})"

    @property
    def key(self) -> str:
        """A name for him that can be kept: a hash; "" for anybody."""
        return hashlib.sha256(self.authorization.encode()).hexdigest() if self.authorization else ""

    def for_registry(self, registry: str) -> CredentialSource:
        """Return what he shows to this registry (host[:port])."""
        credentials = _credentials(self.authorization)
        return FixedCredentials({registry: credentials} if credentials else {})


ANYBODY = Caller()


def parse(authorization: str | None) -> Caller:
    """Return who it is; raise InvalidRequest for a header that is none of the above."""
    if not authorization:
        return ANYBODY
    # Without a password some clients (containers/image) show an empty one where Basic is asked for.
    return ANYBODY if _credentials(authorization) == Credentials("", "") else Caller(authorization)


def _credentials(authorization: str) -> Credentials | None:
    if not authorization:
        return None
    match = _FORM.fullmatch(authorization) if len(authorization) <= _MAX else None
    scheme = match["scheme"].lower() if match else ""
    if match and scheme == "bearer":
        return Credentials(registry_token=match["proof"])
    if match and scheme == "basic":
        try:
            user, colon, password = base64.b64decode(match["proof"], validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            colon = ""
        if colon:
            return Credentials(user, password)
    raise InvalidRequest("an Authorization header that is neither Basic nor Bearer", hint="log in as usual")
