"""The error tree: each class has its own code, and comes over the wire as itself."""

from __future__ import annotations

import errno

import pytest

from dadi import errors
from dadi.errors import DadiError
from dadi.http import error_fields, error_from

CLASSES = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, DadiError)]


def test_codes_are_unique() -> None:
    assert len({cls.code for cls in CLASSES}) == len(CLASSES) > 12


@pytest.mark.parametrize("cls", CLASSES)
def test_an_error_survives_the_wire(cls: type[DadiError]) -> None:
    sent = cls("it failed there", hint="do this")
    received = error_from(error_fields(sent))
    assert (type(received), str(received)) == (cls, "it failed there (do this)")


@pytest.mark.parametrize("cls", CLASSES)
def test_an_error_has_a_status_and_an_errno_that_exist(cls: type[DadiError]) -> None:
    assert 400 <= cls.status <= 599
    assert cls.errno in errno.errorcode
    assert cls.__doc__


def test_an_error_from_a_newer_version_is_still_an_error() -> None:
    assert type(error_from({"error": "from-the-future", "message": "m"})) is DadiError
