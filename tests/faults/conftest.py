"""The stage that all tests of this directory share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.frame import Stage
from tests.faults.supply import Supply
from tests.lab.cleanup import Lab, leak_check


@pytest.fixture(scope="session")
def stage() -> Iterator[Stage]:
    with Lab("suite") as suite, leak_check(suite.root) as leaks:
        with Lab("supply", suite.root) as lab, Supply(lab) as supply, Stage(supply, suite.root) as stage:
            yield stage
    assert leaks.found == []
