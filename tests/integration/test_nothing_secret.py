"""Nothing secret in logs, errors, status or metrics: a canary goes through all that can happen, and is looked for."""

from __future__ import annotations

import base64
import contextlib
import json
import traceback
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest
import structlog
from aiohttp import web

from dadi.errors import DadiError
from dadi.oci.credentials import Credentials
from dadi.peers import shown
from dadi.peers.gate import Gate
from dadi.peers.tokens import Tokens
from tests.fakes.registry import FakeRegistry, status
from tests.lab.access import Clock, Node
from tests.lab.services import PLATFORM, Running, running, tar_of

PASSWORD = "canary-password-7c1e"
IDENTITY = "canary-identity-token-55d0"
BEARER = "canary-bearer-token-e21f"


class Ears:
    """Collects what is said anywhere."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def hear(self, *what: object) -> None:
        self.heard += [repr(item) + str(item) for item in what]

    def error(self, error: BaseException) -> None:
        self.hear(error, error.args, getattr(error, "hint", ""), *traceback.format_exception(error))

    @property
    def text(self) -> str:
        return "\n".join(self.heard)


@pytest.fixture
def ears() -> Iterator[Ears]:
    ears = Ears()

    def listen(logger: object, method: str, event: dict[str, object]) -> dict[str, object]:
        ears.hear(event)
        error = event.get("exc_info")
        if error:
            ears.hear(traceback.format_exc())
        raise structlog.DropEvent

    before = structlog.get_config()
    structlog.configure(processors=[listen], cache_logger_on_first_use=False)
    yield ears
    structlog.configure(**before)


class Echoing(FakeRegistry):
    """Answers, if `echoes` is a status, with what it was shown."""

    echoes = 0

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        shown = request.headers.get("Authorization", "")
        if not self.echoes or not shown:
            return await super()._handle(request)
        if request.method == "HEAD":
            return web.Response(status=405)
        value = shown.partition(" ")[2]
        with contextlib.suppress(ValueError):
            value += base64.b64decode(value, validate=True).decode()
        return web.json_response({"errors": [{"code": "SHOWN", "message": value}]}, status=self.echoes)


async def look_everywhere(ears: Ears, run: Running, session: aiohttp.ClientSession) -> None:
    for path in ("/v1/status", "/metrics", "/v1/keys", "/healthz"):
        async with session.get(run.url + path) as response:
            ears.hear(await response.text(), dict(response.headers))
    ears.hear(run.superpeer.statistics(), run.who_may.statistics(), run.client.statistics(), run.fallbacks.statistics())
    ears.hear(run.client.tokens.statistics(), run.who_may.keys, run.who_may, run.client, run.superpeer)
    ears.hear(run.client.tokens, run.client.access, run.client.keys, run.who_may.gate)
    ears.hear(*[held.image for held in run.client.tokens._images.values()])


async def ask(ears: Ears, run: Running, session: aiohttp.ClientSession, **headers: str) -> None:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    parameters = {"reference": f"{run.client_host}/team/app:1", "platform": PLATFORM}
    for path in ("/v1/token", "/v1/images", "/v1/blobs/sha256:" + "0" * 64, "/nowhere"):
        async with session.get(run.url + path, params=parameters, headers=names) as response:
            if response.status != 200:  # an answer of 200 has tokens: they are what was asked for
                ears.hear(await response.text(), dict(response.headers))


@pytest.mark.parametrize("kind", ["basic", "bearer"])
async def test_nothing_secret_is_said_whatever_happens(tmp_path: Path, ears: Ears, kind: str) -> None:
    clock = Clock()
    own = tmp_path / "config.json"
    async with Echoing(auth=kind, user="me", password=PASSWORD) as registry, aiohttp.ClientSession() as session:
        registry.add_image("team/app", "1", [tar_of(a=b"a" * 50_000)])
        auth = base64.b64encode(f"me:{PASSWORD}".encode()).decode()
        own.write_text(json.dumps({"auths": {registry.host: {"auth": auth}}}))
        node = Node(Credentials("me", PASSWORD))
        reference = f"{registry.host}/team/app:1"
        async with running(
            tmp_path / "state", registry.host, docker_config=own, credentials=node.credential, clock=clock, tag_ttl=0.0
        ) as run:
            run.client_host = registry.host

            async def attempt(*, rested: bool = True) -> bool:
                for held in run.client.tokens._images.values():
                    held.tried_at = float("-inf") if rested else held.tried_at
                try:
                    index = await run.index(reference)
                    await run.client.source.read(index.layers[0].blob, range(index.layers[0].table.count))
                    return True
                except DadiError as error:
                    ears.error(error)
                    return False

            # All is well; then tokens expire, and are renewed.
            assert await attempt()
            index = await run.index(reference)
            clock.ahead += 700
            for held in run.client.tokens._images.values():
                held.tried_at = float("-inf")
            await run.client.source.read(index.layers[0].blob, range(1))
            # Secrets of every form, right and wrong, well and badly formed.
            ears.hear(registry.host)
            for credentials in (
                Credentials("me", PASSWORD + "-wrong"),
                Credentials(identity_token=IDENTITY),
                Credentials(registry_token=BEARER),
                Credentials("me", PASSWORD + "é\r\n"),
                Credentials("me", PASSWORD * 1000),
                Credentials(registry_token=BEARER + "\r\nX-Injected: yes"),
                None,
            ):
                node.credentials = credentials
                assert not await attempt()
                with contextlib.suppress(DadiError):
                    await ask(ears, run, session, **shown.header(credentials))
            for value in (f"Basic {PASSWORD}", f"Digest {PASSWORD}", f"Bearer {BEARER} {BEARER}", PASSWORD):
                await ask(ears, run, session, **{shown.HEADER: value})
                await ask(ears, run, session, Authorization=value)
            # The registry away, slow to answer nonsense, changing its mind.
            node.credentials = Credentials("me", PASSWORD)
            for fault in (status(503), status(500), status(403), status(404), status(200, b"nonsense")):
                clock.ahead += 700
                registry.script("/", *[fault] * 40)
                await attempt()
                registry._script.clear()
            # A registry that repeats what it was shown.
            for registry.echoes in (503, 403, 404, 400):
                clock.ahead += 700
                await attempt()
            registry.echoes = 0
            registry.password = "another"
            clock.ahead += 700
            assert not await attempt()
            registry.password = PASSWORD
            # A key that is rotated, tokens that are revoked, a gate that refuses them.
            clock.ahead += 8 * 86400
            await run.who_may.keys.look()
            assert await attempt()
            held = [held.image for held in run.client.tokens._images.values()]
            texts = [text for image in held for text in (*image.tokens, *image.renewals)]
            (tmp_path / "state" / "keys" / "revoked").write_text("before 99999999999\n" + PASSWORD + "\n")
            await run.who_may.keys.look()
            assert not await attempt()
            gate = Gate(run.who_may.keys, clock=clock)
            for text in [*texts, PASSWORD, BEARER]:
                try:
                    gate.check({"Authorization": f"Bearer {text}"}, "sha256:" + "0" * 64)
                except DadiError as error:
                    ears.error(error)
            # Files that are damaged.
            for name in ("tokens.json", "verdicts.json"):
                (tmp_path / name).write_text(f'[["{BEARER}", "{texts[0]}"')
            tokens = Tokens(run.fallbacks, file=tmp_path / "tokens.json")
            await tokens.load()
            await look_everywhere(ears, run, session)
            private = run.who_may.keys._file.private
            secret = run.who_may.keys._file.secret
    heard = ears.text
    assert "fell back" in heard, "the test hears the log"
    assert "dadi_superpeer" in heard, "and the metrics"
    assert len(ears.heard) > 100
    encoded = [base64.b64encode(f"me:{PASSWORD}".encode()).decode(), base64.b64encode(PASSWORD.encode()).decode()]
    issued = [*registry.tokens, *registry.token_scopes]
    for canary in (PASSWORD, IDENTITY, BEARER, *encoded, private, secret, *texts, *issued):
        for line in ears.heard:
            assert canary not in line


async def test_nothing_secret_is_left_on_disk(tmp_path: Path, ears: Ears) -> None:
    own = tmp_path / "config.json"
    async with FakeRegistry(auth="basic", user="me", password=PASSWORD) as registry:
        registry.add_image("team/app", "1", [tar_of(a=b"a" * 50_000)])
        auth = base64.b64encode(f"me:{PASSWORD}".encode()).decode()
        own.write_text(json.dumps({"auths": {registry.host: {"auth": auth}}}))
        node = Node(Credentials("me", PASSWORD))
        state = tmp_path / "state"
        async with running(state, registry.host, docker_config=own, credentials=node.credential) as run:
            await run.index(f"{registry.host}/team/app:1")
    files = [path for path in state.rglob("*") if path.is_file()]
    assert (state / "keys" / "verdicts.json") in files
    for path in files:
        data = path.read_bytes()
        assert PASSWORD.encode() not in data, path
        assert auth.encode() not in data, path
    for path in (state / "keys").iterdir():
        assert path.stat().st_mode & 0o077 == 0, path
