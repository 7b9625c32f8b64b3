"""One target, for `make fuzz`: python -m tests.fuzz.one TARGET SECONDS CORPUS. Status 0: nothing broke it."""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

# Instrumented is what is imported here, of our own: the branches of libraries are not what is looked for.
with atheris.instrument_imports(include=["dadi", "fuse", "superpeer", "registry_proxy"]):
    from tests.fuzz.targets import TARGETS, check

MOST_BYTES, MOST_SECONDS_AN_INPUT, MOST_MIB = 1 << 16, 10, 1024


def main() -> None:
    name, seconds, kept = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    corpus = kept / name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(TARGETS[name].seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    atheris.Setup(
        [sys.argv[0], str(corpus), f"-max_total_time={seconds}", f"-max_len={MOST_BYTES}", f"-rss_limit_mb={MOST_MIB}",
         f"-timeout={MOST_SECONDS_AN_INPUT}", f"-artifact_prefix={kept}/{name}."],
        lambda data: check(name, data),
    )  # fmt: skip
    atheris.Fuzz()


main()
