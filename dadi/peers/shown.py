"""The caller's registry credentials on their way to a superpeer, which asks the registry whether it accepts them.

    Dadi-Registry-Authorization: Basic base64(USER:PASSWORD)      as the registry is shown them (RFC 7617)
                                 Basic base64(<token>:TOKEN)      an identity token, which buys access tokens
                                 Bearer TOKEN                     an access token

Sent by nodes to their superpeers only: never to peers, never along a redirect (our client follows none). Pure.
"""

from __future__ import annotations

import base64
import binascii
import re

from dadi.errors import InvalidRequest
from dadi.oci.credentials import Credentials

HEADER = "Dadi-Registry-Authorization"
MAX = 7 << 10
"""Characters; what does not fit a header cannot be shown."""
_IDENTITY = "<token>"
_FORM = re.compile(r"(?P<scheme>[Bb]asic|[Bb]earer) +(?P<value>[\x21-\x7e]+) *")


def header(credentials: Credentials | None) -> dict[str, str]:
    """Return the header that shows these credentials, {} for none. Raises InvalidRequest if they do not fit."""
    if credentials is None:
        return {}
    if credentials.registry_token:
        value = f"Bearer {credentials.registry_token}"
    elif credentials.identity_token:
        value = Credentials(_IDENTITY, credentials.identity_token).basic
    elif credentials.username:
        value = credentials.basic
    else:
        return {}
    if len(value) > MAX or not _FORM.fullmatch(value):
        what = "registry credentials that are too long, or have characters that no header has"
        raise InvalidRequest(what, hint=f"at most {MAX} characters with their encoding; log in anew")
    return {HEADER: value}


def credentials(value: str | None) -> Credentials | None:
    """Return what a header shows, None without one. Raises InvalidRequest, which never repeats what was shown."""
    if value is None:
        return None
    match = _FORM.fullmatch(value) if len(value) <= MAX else None
    if match is None:
        raise InvalidRequest(f"{HEADER} is neither Basic nor Bearer")
    if match["scheme"].lower() == "bearer":
        return Credentials(registry_token=match["value"])
    try:
        text = base64.b64decode(match["value"], validate=True).decode()
    except (binascii.Error, ValueError):
        text = ""
    username, colon, password = text.partition(":")
    if not colon or not username:
        raise InvalidRequest(f"{HEADER} is not base64 of user:password")
    return Credentials(identity_token=password) if username == _IDENTITY else Credentials(username, password)
