"""WWW-Authenticate: what a registry wants to see before it answers. Pure.

    header       challenge *("," challenge)
    challenge    scheme [1*SP (token68 | param *("," param))]
    param        token "=" (token | quoted-string)

RFC 9110, 11.6.1 (with the parsing trap that commas separate both challenges and parameters); "Docker Registry v2
authentication via central service" for the parameters of Bearer: realm, service, scope.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import msgspec

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_PARAM = re.compile(rf'({_TOKEN})[ \t]*=[ \t]*(?:"((?:[^"\\]|\\.)*)"|({_TOKEN}))[ \t]*(?=,|$)')
_SCHEME = re.compile(rf"({_TOKEN})(?:[ \t]+|(?=,|$))")
_TOKEN68 = re.compile(r"[A-Za-z0-9._~+/-]+=*[ \t]*(?=,|$)")
_SEPARATOR = re.compile(r"[ \t,]*")


class Challenge(msgspec.Struct, frozen=True):
    """One challenge; scheme and parameter names in lower case. Of a parameter given twice the first counts."""

    scheme: str
    params: dict[str, str] = {}


def parse(headers: Iterable[str]) -> list[Challenge]:
    """Return the challenges of all WWW-Authenticate headers, in order; what cannot be understood ends its header."""
    return [challenge for header in headers for challenge in _parse_one(header)]


def choose(challenges: Iterable[Challenge]) -> Challenge | None:
    """Return the challenge that we can answer: Bearer before Basic, None if there is neither."""
    known = {challenge.scheme: challenge for challenge in reversed(list(challenges))}
    bearer = known.get("bearer")
    return bearer if bearer is not None and bearer.params.get("realm") else known.get("basic")


def _parse_one(header: str) -> list[Challenge]:
    found: list[Challenge] = []
    at = 0
    while (at := _skip(header, at)) < len(header):
        param = _PARAM.match(header, at)
        if param is not None and found:
            name, quoted, plain = param.groups()
            value = plain if quoted is None else re.sub(r"\\(.)", r"\1", quoted)
            found[-1].params.setdefault(name.lower(), value)
            at = param.end()
            continue
        scheme = _SCHEME.match(header, at)
        if scheme is None:
            break
        found.append(Challenge(scheme[1].lower(), {}))
        at = scheme.end()
        if _PARAM.match(header, at) is None and (token68 := _TOKEN68.match(header, at)) is not None:
            # "Basic, Bearer realm=…": what follows a bare scheme and its comma is the next scheme, not a token68.
            at = token68.end() if header[scheme.end() - 1 : scheme.end()] in (" ", "\t") else at
    return found


def _skip(header: str, at: int) -> int:
    match = _SEPARATOR.match(header, at)
    return match.end() if match else at
