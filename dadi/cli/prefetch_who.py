"""Who `dadi prefetch` says that it is: credentials for registries, and the token of an operator. Options, nothing else.

    credentials   Docker's configuration and its helpers, or --username and --password-stdin. Superpeers show them to
                  the image's registry, to see whether we may have it; and fetch with them, as long as the job runs.
                  They are written nowhere: after its restart a superpeer needs them again
    operator      the token of a file, where superpeers want one to begin, cancel or retry jobs (`prefetch.operators`)
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from dadi.errors import ConfigError, InvalidRequest
from dadi.oci.credentials import Credentials, CredentialSource, DockerCredentials, FixedCredentials
from dadi.oci.reference import Reference

F = TypeVar("F", bound=Callable[..., Any])
_TOKEN = re.compile(r"[\x21-\x7e]{16,512}")
_MOST = 64 << 10


class Who:
    """See the head of this file. Not to be printed."""

    def __init__(self, credentials: Credentials | None = None, token: str = "") -> None:
        self._credentials = credentials
        self.token = token

    def __repr__(self) -> str:
        return "Who(hidden)"

    def source(self, references: Sequence[str], registries: Sequence[str] = ()) -> CredentialSource:
        """Return what to show to the registries of images. Raises InvalidRequest: one password is for one registry."""
        if self._credentials is None:
            return DockerCredentials()
        named = {Reference.parse(reference).registry for reference in references} | set(registries)
        if len(named) != 1:
            listed = ", ".join(sorted(named)) or "none: name the image"
            hint = "one command for each registry; or leave --username out, and docker login at each"
            raise InvalidRequest(f"--username is for one registry, and here it would be for {listed}", hint=hint)
        return FixedCredentials({named.pop(): self._credentials})


def who_options(command: F) -> F:
    """Add the options; the command gets them as `who`."""

    @functools.wraps(command)
    def collected(*, username: str, password_stdin: bool, operator_token_file: str, **rest: Any) -> Any:
        stdin = "-" in (*rest.get("from_file", ()), *rest.get("from_kubernetes", ()))
        credentials = _credentials(username, password_stdin, stdin_is_taken=stdin)
        return command(who=Who(credentials, _token(operator_token_file)), **rest)

    with_who: Any = collected
    options: tuple[Callable[[Any], Any], ...] = (
        click.option("--operator-token-file", envvar="DADI_OPERATOR_TOKEN_FILE", default="", metavar="FILE", help=(
            "An operator's token, where superpeers want one (also DADI_OPERATOR_TOKEN_FILE).")),
        click.option("--password-stdin", is_flag=True, help="With --username: read the password from standard input."),
        click.option("--username", default="", metavar="NAME", help=(
            "For the images' registry, instead of what Docker's configuration has.")),
    )  # fmt: skip
    for option in options:
        with_who = option(with_who)
    return cast("F", with_who)


def _credentials(username: str, password_stdin: bool, *, stdin_is_taken: bool) -> Credentials | None:
    if bool(username) is not password_stdin:
        raise InvalidRequest("--username and --password-stdin go together")
    if not username:
        return None
    if stdin_is_taken:
        hint = "--from-file FILE, --from-kubernetes FILE"
        raise InvalidRequest("standard input cannot be both the password and a list of images", hint=hint)
    password = sys.stdin.read(_MOST).rstrip("\r\n")
    if not password:
        raise InvalidRequest("standard input has no password", hint="dadi prefetch … --password-stdin < FILE")
    return Credentials(username, password)


def _token(file: str) -> str:
    if not file:
        return ""
    try:
        text = Path(file).read_bytes()[:_MOST].decode().strip()
    except OSError as error:
        hint = "--operator-token-file or DADI_OPERATOR_TOKEN_FILE names it"
        raise ConfigError(f"the operator's token {file} cannot be read: {error.strerror}", hint=hint) from None
    except UnicodeDecodeError:
        text = ""
    if not _TOKEN.fullmatch(text):
        hint = "16 to 512 characters, such as openssl rand -hex 32"
        raise ConfigError(f"{file} holds no operator's token", hint=hint)
    return text
