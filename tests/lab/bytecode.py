"""Our programs' bytecode, kept below .cache where this machine would have it kept nowhere (PYTHONDONTWRITEBYTECODE).

A daemon of ours is hundreds of modules. Compiled anew at each start they take as long as all the rest of it, and tests
start hundreds of daemons and commands. Only for programs that the lab runs: an image's own Python must find no other
files than the image has.
"""

from __future__ import annotations

import os
from pathlib import Path

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "bytecode"


def environment() -> dict[str, str]:
    """Return what to add to a program's environment, so that it compiles no module that an earlier one has compiled."""
    if not os.environ.get("PYTHONDONTWRITEBYTECODE"):
        return {}  # it is kept, where Python keeps it
    return {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(CACHE)}
