"""Every error that leaves a dadi component, in one tree; translated only at the edges.

The text of an error is the sentence that a person reads: what failed, where, and what to do (`hint`). The class
carries what a caller decides by: `retryable`, and the two codes that edges translate to (`errno` for the kernel,
`status` for HTTP). Nothing here does I/O. Edges: `fuse/device.py` (errno), `dadi/http.py` (HTTP),
`registry_proxy/app.py` (OCI error JSON), `dadi/snapshotter/service.py` (gRPC), `dadi/cli` (exit status 1 and the
sentence).
"""

from __future__ import annotations

import errno as _errno
from typing import ClassVar


class DadiError(Exception):
    """Something that dadi does failed.

    `hint` says what the reader can do about it. `code` names the class on the wire (see `by_code`).
    """

    code: ClassVar[str] = "internal"
    status: ClassVar[int] = 500
    errno: ClassVar[int] = _errno.EIO
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class ConfigError(DadiError):
    """A configuration file, an option or an environment variable cannot be used as it stands."""

    code = "config"
    status = 400


class InvalidRequest(DadiError):
    """The caller asked for something that has no meaning: a malformed reference, digest, range or body."""

    code = "invalid"
    status = 400
    errno = _errno.EINVAL


class NotFound(DadiError):
    """The image, blob or mount that was asked for does not exist there."""

    code = "not-found"
    status = 404
    errno = _errno.ENOENT


class NoSuchPlatform(NotFound):
    """The image exists, but not for the platform that was asked for."""

    code = "no-such-platform"


class AccessDenied(DadiError):
    """The registry (or a superpeer) refused the credentials that were given, or wants some."""

    code = "denied"
    status = 403
    errno = _errno.EACCES


class TokenRefused(AccessDenied):
    """No token was shown where one is needed, or one that has expired, was revoked, or that nobody we know has signed.

    Who has a right to the blob gets a new token from its superpeer, and asks again.
    """

    code = "token-refused"
    status = 401


class LoginRequired(AccessDenied):
    """The registry wants credentials, or others than those that were shown.

    `challenge` is how it asked for them: the WWW-Authenticate header of its answer.
    """

    code = "login-required"
    status = 401

    def __init__(self, message: str, *, hint: str | None = None, challenge: str = "") -> None:
        super().__init__(message, hint=hint)
        self.challenge = challenge


class RegistryNotAllowed(AccessDenied):
    """The configuration does not allow this registry to be contacted at all."""

    code = "registry-not-allowed"


class Unsupported(DadiError):
    """Well-formed, but a kind of thing that dadi does not handle: a media type, a tar feature, a version."""

    code = "unsupported"
    status = 422


class Malformed(DadiError):
    """Bytes from outside that break their own format's rules: manifest, tar, gzip, zstd, index, message."""

    code = "malformed"
    status = 502


class TooLarge(Malformed):
    """Bytes from outside that would cost more memory, disk or time than the configured limit."""

    code = "too-large"


class DigestMismatch(DadiError):
    """Bytes that are not what their digest says. They are thrown away; `source` names who gave them.

    The message says of which blob, and which chunk of it, they were to be (`Blob.verify`): all that the log will have.
    """

    code = "digest-mismatch"
    status = 502

    def __init__(self, message: str, *, source: str = "", hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.source = source


class Unavailable(DadiError):
    """A machine we depend on cannot answer now: refused, timed out, cut off, 5xx, 429.

    `retry_after` is what it asked us to wait, in seconds; None when it said nothing.
    """

    code = "unavailable"
    status = 503
    retryable = True

    def __init__(self, message: str, *, retry_after: float | None = None, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.retry_after = retry_after


class Unreachable(Unavailable):
    """Nothing came from a machine of ours: refused, timed out, cut off. Somebody else may be asked in its stead.

    Other `Unavailable` are its answer: it is up, and something behind it is not.
    """

    code = "unreachable"


class StoreFull(DadiError):
    """The disk, or the byte limit that the configuration gives the store, has no room for these bytes."""

    code = "store-full"
    status = 507
    errno = _errno.ENOSPC


class Conflict(DadiError):
    """The thing is in a state that does not allow this: busy, mounted already, taken by somebody else."""

    code = "conflict"
    status = 409
    errno = _errno.EBUSY


class AlreadyExists(Conflict):
    """Something of this name is there already; for a layer that can be lazy this is the good news."""

    code = "exists"
    errno = _errno.EEXIST


class MissingFeature(DadiError):
    """This machine lacks something dadi needs: a kernel feature, a device, a privilege."""

    code = "missing-feature"
    status = 501
    errno = _errno.ENOSYS


def by_code(code: str) -> type[DadiError]:
    """Return the class whose `code` this is; DadiError itself for one that this version does not know."""
    return _CLASSES.get(code, DadiError)


def _tree(cls: type[DadiError]) -> list[type[DadiError]]:
    return [cls, *(c for sub in cls.__subclasses__() for c in _tree(sub))]


_CLASSES = {cls.code: cls for cls in _tree(DadiError)}
