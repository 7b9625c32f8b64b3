"""The fault suite in its short form: each case holds its bounds."""

from __future__ import annotations

import pytest

from tests.faults import frame
from tests.faults.frame import Case, Stage

CASES = frame.all_cases()
FOLLOWING = dict(zip((case.name for case in CASES), [*CASES[1:], None], strict=True))


@pytest.mark.root
@pytest.mark.programs("docker-registry")
@pytest.mark.timeout(240)
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_nothing_breaks(stage: Stage, case: Case) -> None:
    row = stage.run(case, last=not frame.shares(case, FOLLOWING[case.name]))
    print(row)
    assert row.broken == ""
