"""TOML configuration: frozen msgspec structs that document themselves.

Each component declares its own configuration struct beside its code: a default, a unit and one line of meaning for
every field. This file only loads such structs, refuses unknown keys, and prints them as a commented TOML file.

Fields annotated with `SIZE` take an integer of bytes or text such as "20GiB"; with `SECONDS` a number or text such as
"90s", "5m", "2h", "1d"; with `RATE` bytes per second, or text such as "100Mbit" (per second) or "50MiB" (0: no limit).
"""

from __future__ import annotations

import re
import tomllib
import typing
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from dadi.errors import ConfigError

T = TypeVar("T", bound=msgspec.Struct)

SIZE, SECONDS, RATE = "bytes", "seconds", "bytes per second"
_SIZES = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40,
          "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}  # fmt: skip
_SECONDS: dict[str, float] = {"": 1.0, "s": 1.0, "ms": 0.001, "m": 60.0, "h": 3600.0, "d": 86400.0}
_RATES = _SIZES | {"kbit": 125, "Mbit": 125_000, "Gbit": 125_000_000}
_UNITS: dict[str, dict[str, Any]] = {SIZE: dict(_SIZES), SECONDS: dict(_SECONDS), RATE: dict(_RATES)}
_NUMBER = re.compile(r"\s*([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([A-Za-z]*)\s*")


def described(description: str, unit: str | None = None, *, at_least: int | None = None) -> Meta:
    """Return the annotation of a configuration field: one line of meaning, and its unit if it takes text with one."""
    return Meta(description=description, extra={"unit": unit} if unit else None, ge=at_least)


def quantity(text: str, unit: str) -> float:
    """Return the number that text such as "20GiB", "90s" or "100Mbit" stands for; raise ConfigError if none."""
    units = _UNITS[unit]
    match = _NUMBER.fullmatch(text)
    if not match or match[2] not in units:
        known = ", ".join(name for name in units if name)
        raise ConfigError(f"{text!r} is not a number of {unit}", hint=f"units: {known}")
    return float(match[1]) * float(units[match[2]])


def load(cls: type[T], path: str | Path | None, overrides: dict[str, Any] | None = None) -> T:
    """Return the configuration in the file (defaults if `path` is None), with `overrides` laid over it.

    Raises ConfigError naming the file and the key that is wrong.
    """
    where = str(path) if path else "the options"
    data: dict[str, Any] = {}
    if path is not None:
        try:
            data = tomllib.loads(Path(path).read_text("utf-8"))
        except OSError as error:
            hint = "--print-default-config prints one to start from"
            raise ConfigError(f"cannot read the configuration {path}: {error.strerror}", hint=hint) from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not TOML: {error}") from None
    for key, value in (overrides or {}).items():
        if value is not None:
            data[key] = value
    return converted(data, cls, where)


def converted(data: dict[str, Any], cls: type[T], where: str) -> T:
    """Return the configuration that a parsed TOML document means; raise ConfigError naming `where` and the key."""
    try:
        return msgspec.convert(_with_units(data, cls, ""), cls)
    except msgspec.ValidationError as error:
        hint = "--print-default-config shows every key with its meaning"
        raise ConfigError(f"{where}: {error}", hint=hint) from None
    except ConfigError as error:
        raise ConfigError(f"{where}: {error.message}", hint=error.hint) from None


def render(value: msgspec.Struct) -> str:
    """Return the configuration as TOML in which a comment explains each key."""
    lines: list[str] = []
    _render(value, "", lines)
    return "\n".join(lines).strip() + "\n"


def _fields(cls: type[msgspec.Struct]) -> dict[str, tuple[Any, str, str | None]]:
    """Return field name → (type, description, unit)."""
    found: dict[str, tuple[Any, str, str | None]] = {}
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        kind, description, unit = hint, "", None
        if typing.get_origin(hint) is Annotated:
            kind, *annotations = typing.get_args(hint)
            for meta in annotations:
                if isinstance(meta, Meta):
                    description = meta.description or ""
                    unit = (meta.extra or {}).get("unit")
        found[name] = (kind, description, unit)
    return found


def _with_units(data: Any, cls: type[msgspec.Struct], prefix: str) -> Any:
    if not isinstance(data, dict):
        return data  # msgspec says what was expected here
    known = _fields(cls)
    unknown = sorted(set(data) - set(known))
    if unknown:
        names = ", ".join(prefix + name for name in unknown)
        raise ConfigError(f"unknown configuration key: {names}", hint="--print-default-config shows every key")
    result = {}
    for key, value in data.items():
        kind, _, unit = known[key]
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            value = _with_units(value, kind, f"{prefix}{key}.")
        elif unit and isinstance(value, str):
            number = quantity(value, unit)
            value = int(number) if kind is int else number
        result[key] = value
    return result


def _render(value: msgspec.Struct, prefix: str, lines: list[str]) -> None:
    sections = []
    for name, (_, description, unit) in _fields(type(value)).items():
        item = getattr(value, name)
        if isinstance(item, msgspec.Struct):
            sections.append((name, description, item))
            continue
        lines.append(f"# {description}" + (f" ({unit})" if unit else ""))
        lines.append(f"{name} = {_toml(item)}")
    for name, description, item in sections:
        lines += ["", f"# {description}" if description else "", f"[{prefix}{name}]"]
        _render(item, f"{prefix}{name}.", lines)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    escaped = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
