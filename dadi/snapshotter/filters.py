r"""containerd's filter language, as List uses it. Pure.

    filter    = selector *("," selector)                    all of them must match; several filters: any of them
    selector  = field *("." field) [operator value]         without an operator: the field is there
    operator  = "==" | "!=" | "~="                          ~= searches for a regular expression
    field     = quoted | 1*(letter | digit | "_")
    value     = quoted | 1*(anything but space and ",")     not beginning with one of . = ! ~ / |
    quoted    = '"' … '"' with Go's escapes; as a regular expression also /…/ and |…|

Fields: name, parent, kind (view, active, committed), labels.KEY. A filter that is "" matches everything.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence

from dadi.errors import InvalidRequest
from dadi.snapshotter.model import Info

Filter = Callable[[Info], bool]

_MAX = 64 << 10
_FIELD = re.compile(r'\s*(?:(?P<plain>[A-Za-z0-9_]+)|(?P<quoted>"(?:[^"\\\n]|\\.)*"))')
_OPERATOR = re.compile(r"\s*([=!~]+)")
_VALUE = re.compile(
    r"\s*(?:(?P<plain>[^\s,.=!~/|\"][^\s,]*)|(?P<quoted>\"(?:[^\"\\\n]|\\.)*\"|/(?:[^/\\\n]|\\.)*/|\|(?:[^|\\\n]|\\.)*\|))"
)
_ESCAPE = re.compile(
    rb"\\(?:([abfnrtv\\])|x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|([0-7]{3})|(.))", re.DOTALL
)
_SIMPLE = dict(zip(b"abfnrtv\\", b"\a\b\f\n\r\t\v\\", strict=True))


def parse(filters: Sequence[str]) -> Filter:
    """Return a test for "matches any of the filters"; raise InvalidRequest where one is not of the language."""
    parsed = [_Parser(text).filter() for text in filters]
    if not parsed:
        return _always
    return lambda info: any(matches(info) for matches in parsed)


def _always(info: Info) -> bool:
    return True


def _field(info: Info, path: tuple[str, ...]) -> str | None:
    match path:
        case ("name", *_):
            return info.name
        case ("parent", *_):
            return info.parent
        case ("kind", *_):
            return info.kind.name.lower()
        case ("labels", *key):
            return info.labels.get(".".join(key))
        case _:
            return None


def _selector(path: tuple[str, ...], operator: str, value: str) -> Filter:
    match operator:
        case "==":
            return lambda info: _field(info, path) == value
        case "!=":
            return lambda info: (_field(info, path) or "") != value
        case "~=":
            try:
                with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of Python, in Go's syntax
                    found = re.compile(value).search
            except (re.error, OverflowError, RecursionError):
                return lambda info: False  # as containerd does
            return lambda info: found(_field(info, path) or "") is not None
        case _:
            return lambda info: _field(info, path) is not None


class _Parser:
    """One filter, read from left to right."""

    def __init__(self, text: str) -> None:
        if len(text) > _MAX:
            raise InvalidRequest(f"a filter of {len(text)} characters; the limit is {_MAX}")
        self._text = text
        self._at = 0

    def filter(self) -> Filter:
        if not self._text:
            return _always
        selectors = [self._selector()]
        while self._at < len(self._text):
            if not self._take(","):
                raise self._wrong("expected a comma")
            selectors.append(self._selector())
        return lambda info: all(matches(info) for matches in selectors)

    def _selector(self) -> Filter:
        path = [self._path_field()]
        while self._take("."):
            path.append(self._path_field())
        if self._at == len(self._text) or self._text[self._at] == ",":
            return _selector(tuple(path), "", "")
        found = _OPERATOR.match(self._text, self._at)
        if found is None or found[1] not in ("==", "!=", "~="):
            raise self._wrong("expected one of == != ~=")
        self._at = found.end()
        return _selector(tuple(path), found[1], self._value(found[1] == "~="))

    def _path_field(self) -> str:
        found = _FIELD.match(self._text, self._at)
        if found is None:
            raise self._wrong("expected a field")
        self._at = found.end()
        return found["plain"] or self._unquoted(found["quoted"])

    def _value(self, expression: bool) -> str:
        found = _VALUE.match(self._text, self._at)
        if found is None or (found["quoted"] and found["quoted"][0] != '"' and not expression):
            raise self._wrong("expected a value")
        self._at = found.end()
        return found["plain"] or self._unquoted(found["quoted"])

    def _take(self, character: str) -> bool:
        if self._text.startswith(character, self._at):
            self._at += 1
            return True
        return False

    def _unquoted(self, quoted: str) -> str:
        quote = quoted[0].encode()

        def one(escape: re.Match[bytes]) -> bytes:
            simple, byte, short, long, octal, other = escape.groups()
            if simple:
                return bytes([_SIMPLE[simple[0]]])
            if byte or octal:
                number = int(byte, 16) if byte else int(octal, 8)
                if number > 255:
                    raise self._wrong("an escape of more than a byte")
                return bytes([number])
            if short or long:
                code = int(short or long, 16)
                if code > 0x10FFFF:
                    raise self._wrong("an escape of no character")
                return chr(code).encode("utf-8", "replace")
            if other != quote:
                raise self._wrong("an escape that is none")
            return quote

        return _ESCAPE.sub(one, quoted[1:-1].encode("utf-8", "replace")).decode("utf-8", "replace")

    def _wrong(self, what: str) -> InvalidRequest:
        return InvalidRequest(f"not a filter: {what} at character {self._at + 1} of {self._text[:200]!r}")
