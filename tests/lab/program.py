"""The program inside the lab's images: imports much of the standard library, reads a data file, says one line.

Runs inside an image as /app/main.py with nothing beside it but /app/rows.csv; it never imports anything of ours.
Starting it is what a service does before its first answer: hundreds of small files, a few shared libraries, some data.
"""

import importlib
import os
import sys

MODULES = """
    argparse ast asyncio base64 bisect calendar collections configparser contextlib csv dataclasses datetime decimal
    difflib email.message email.parser enum fractions functools gzip hashlib heapq html.parser http.client http.server
    inspect io itertools json logging.config multiprocessing.pool pathlib pickle queue random re selectors shutil
    socket ssl statistics string struct subprocess tarfile tempfile textwrap threading tomllib typing unittest.mock
    urllib.request uuid xml.etree.ElementTree zipfile
""".split()
ROWS = 50_000


def row(number: int) -> str:
    """Return line `number` of rows.csv, without its newline."""
    return f"{number},item {number * 7919 % 100_003},{number * 104_729 % 1_000_003 / 100}"


def first_line() -> str:
    """Return what the program says once it is ready."""
    return f"ready: {len(MODULES)} modules imported, the last row is {row(ROWS)!r}"


def main() -> None:
    loaded = [importlib.import_module(name) for name in MODULES]
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "rows.csv"), encoding="utf-8") as file:
        last = file.read().splitlines()[-1]
    sys.stdout.write(f"ready: {len(loaded)} modules imported, the last row is {last!r}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
