"""Errors as status codes, generated modules that are what the .proto files say, and who may know of gRPC."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import grpc
import pytest
from structlog.testing import capture_logs

from dadi import errors
from dadi.errors import DadiError
from dadi.snapshotter import service
from dadi.snapshotter.proto import snapshots_pb2 as pb

Code = grpc.StatusCode
ROOT = Path(__file__).parents[2]
PROTO = Path("dadi/snapshotter/proto")


class Aborted(Exception):
    pass


class Context:
    """A call that can be aborted."""

    code: Any = None
    text = ""

    async def abort(self, code: Any, text: str) -> NoReturn:
        self.code, self.text = code, text
        raise Aborted


class Failing:
    """Snapshots whose `stat` fails."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    async def stat(self, name: str) -> NoReturn:
        raise self._error


async def told(error: Exception) -> Context:
    context = Context()
    with pytest.raises(Aborted):
        await service.Service(Failing(error)).Stat(pb.StatSnapshotRequest(key="k"), context)
    return context


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.NotFound, Code.NOT_FOUND),
        (errors.NoSuchPlatform, Code.NOT_FOUND),
        (errors.AlreadyExists, Code.ALREADY_EXISTS),
        (errors.Conflict, Code.FAILED_PRECONDITION),
        (errors.InvalidRequest, Code.INVALID_ARGUMENT),
        (errors.AccessDenied, Code.PERMISSION_DENIED),
        (errors.StoreFull, Code.RESOURCE_EXHAUSTED),
        (errors.Unavailable, Code.UNAVAILABLE),
        (errors.MissingFeature, Code.FAILED_PRECONDITION),
        (errors.Unsupported, Code.FAILED_PRECONDITION),
        (errors.Malformed, Code.INTERNAL),
        (DadiError, Code.INTERNAL),
    ],
)
async def test_each_error_has_its_status_code(error: type[DadiError], code: Any) -> None:
    context = await told(error("it failed there", hint="do this"))
    assert (context.code, context.text) == (code, "it failed there (do this)")


async def test_no_error_says_that_a_call_is_not_implemented() -> None:
    """containerd overlooks that one."""
    for kind in [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, DadiError)]:
        assert (await told(kind("x"))).code not in (Code.UNIMPLEMENTED, Code.OK, Code.UNKNOWN)


async def test_a_fault_of_ours_is_logged_with_its_trace_and_not_shown() -> None:
    with capture_logs() as logs:
        context = await told(ValueError("secret"))
    assert context.code is Code.INTERNAL
    assert "secret" not in context.text
    assert logs[0]["exc_info"]


async def test_the_text_of_an_error_fits_a_header() -> None:
    assert len((await told(errors.NotFound("x" * 100_000))).text) == 2000


def test_grpc_and_protobuf_are_imported_where_they_are_spoken_and_nowhere_else() -> None:
    importing = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "dadi").rglob("*.py")
        if re.search(r"^\s*(?:import|from) (?:grpc|google)\b", path.read_text(), re.MULTILINE)
        and path.parent.name != "proto"
    }
    assert importing == {"dadi/snapshotter/service.py", "dadi/containerd/client.py", "dadi/containerd/cri.py"}


def test_the_generated_modules_are_what_the_proto_files_say(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools", reason="needs grpcio-tools (scripts/setup installs it)")
    command = [sys.executable, "-m", "grpc_tools.protoc", f"--proto_path={ROOT}"]
    files = [str(PROTO / name) for name in ("mount.proto", "snapshots.proto")]
    subprocess.run([*command, f"--python_out={tmp_path}", *files], check=True, timeout=60)
    subprocess.run([*command, f"--grpc_python_out={tmp_path}", files[1]], check=True, timeout=60)
    made = {path.name: path.read_text() for path in (tmp_path / PROTO).iterdir()}
    assert made == {path.name: path.read_text() for path in (ROOT / PROTO).glob("*_pb2*.py")}, "run `make proto`"
