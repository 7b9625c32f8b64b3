"""What `dadi prefetch` says to superpeers: a client of `superpeer/jobs_http.py` that goes on when one does not answer.

What is shown to superpeers is in `prefetch_who.py`. All jobs are submitted at once, a few requests at a time; then some
are followed by events, and of the others it is asked how they are: so a thousand jobs need no thousand connections.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import aiohttp
import msgspec

from dadi import http
from dadi.errors import DadiError, Malformed
from dadi.fallbacks import Fallbacks
from dadi.oci.credentials import CredentialSource, DockerCredentials
from dadi.oci.reference import Reference
from dadi.peers import shown
from dadi.prefetch.messages import OPERATOR, Job, Readiness, Request
from dadi.tls import Tls, TlsConfig

T = TypeVar("T")
_MAX_ANSWER = 64 << 20
GIVE_UP = 60.0
"""Seconds that a superpeer may be away while its job is followed: it may be restarted."""
_PAUSE = 1.0
_CALLS, _STREAMS = 24, 24
"""Requests, and jobs that are followed by events, at a time: together fewer than a session's connections to a host."""
_ASKS = 20.0
"""Questions a second for how jobs are that are not followed by events."""


class Talk:
    """See the head of this file."""

    def __init__(self, session: aiohttp.ClientSession, credentials: CredentialSource, give_up: float = GIVE_UP,
                 token: str = "") -> None:  # fmt: skip
        """`token`: an operator's."""
        self._session = session
        self._credentials = credentials
        self._give_up = give_up
        self._operator = {OPERATOR: token} if token else {}
        self._calls = asyncio.Semaphore(_CALLS)
        self._streams = asyncio.Semaphore(_STREAMS)
        self._asking = 0

    async def has_credentials(self, reference: str) -> bool:
        """Whether there is anything to show to an image's registry."""
        return bool(await self._headers(reference))

    async def begin(self, url: str, request: Request) -> Job:
        """Ask one superpeer for a job."""
        body = msgspec.json.encode(request)
        return await self._call("POST", f"{url}/v1/prefetch", Job, request.reference, data=body)

    async def jobs(self, url: str, registry: str = "") -> list[Job]:
        """Return a superpeer's jobs of images that anybody may have; and of those of a registry that we may have."""
        reference = f"{registry}/prefetch" if registry else ""  # the credentials for the registry as a whole
        answer = await self._call("GET", f"{url}/v1/prefetch", dict[str, list[Job]], reference,
                                  params={"registry": registry} if registry else {})  # fmt: skip
        return answer.get("jobs", [])

    async def job(self, url: str, job: str, reference: str = "") -> Job:
        """Return one job. `reference`: its image, where that is known; without it a private image's is not found."""
        return await self._call("GET", f"{url}/v1/prefetch/{job}", Job, reference, params=_of(reference))

    async def act(self, url: str, job: str, what: str, reference: str = "") -> Job:
        """Have a job cancelled, or tried again."""
        return await self._call("POST", f"{url}/v1/prefetch/{job}/{what}", Job, reference, params=_of(reference))

    async def verify(self, url: str, reference: str, platform: str, scope: str) -> Readiness:
        """Return what a superpeer has of its share."""
        parameters = {"reference": reference, "platform": platform, "scope": scope}
        return await self._call("GET", f"{url}/v1/prefetch/verify", Readiness, reference, params=parameters)

    async def follow(self, url: str, job: Job, told: Callable[[Job], None], until: Callable[[Job], bool]) -> Job:
        """Follow a job, and tell of each change, until it is as `until` says; also over a superpeer's restart.

        Raises Unreachable when it stays away.
        """
        loop = asyncio.get_running_loop()
        heard = loop.time()
        while not until(job):
            try:
                if self._streams.locked():
                    job = await self._ask_again(url, job)
                    heard = loop.time()
                    told(job)
                    continue
                async with self._streams, contextlib.aclosing(self._events(url, job)) as events:
                    async for job in events:
                        heard = loop.time()
                        told(job)
                        if until(job):
                            return job
            except DadiError as error:
                if not error.retryable or loop.time() - heard > self._give_up:
                    raise
            await asyncio.sleep(_PAUSE)
        return job

    async def _ask_again(self, url: str, job: Job) -> Job:
        """Return how a job is after a while: the more are asked for, the longer that is."""
        self._asking += 1
        try:
            await asyncio.sleep(max(_PAUSE, self._asking / _ASKS))
            return await self.job(url, job.id, job.request.reference)
        finally:
            self._asking -= 1

    async def _events(self, url: str, job: Job) -> AsyncGenerator[Job, None]:
        headers = await self._headers(job.request.reference)
        async with http.request(self._session, "GET", f"{url}/v1/prefetch/{job.id}", "following a job",
                                params={"follow": "1", **_of(job.request.reference)},
                                headers=headers) as response:  # fmt: skip
            async for event in http.events(response):
                if event.get("event") == "job":
                    yield _converted(event, url)

    async def _call(self, method: str, where: str, kind: type[T], reference: str = "", **options: Any) -> T:
        headers = await self._headers(reference)
        if method == "POST":
            headers = {**headers, **self._operator}
        async with (
            self._calls,
            http.request(self._session, method, where, "prefetching", headers=headers, **options) as response,
        ):
            data = bytearray()
            async for piece in response.content.iter_any():
                data += piece
                if len(data) > _MAX_ANSWER:
                    raise Malformed(f"{where} answers with more than {_MAX_ANSWER} bytes")
        try:
            return msgspec.json.decode(data, type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            raise Malformed(f"{where} answered what cannot be used", hint="are the versions alike?") from None

    async def _headers(self, reference: str) -> dict[str, str]:
        if not reference:
            return {}
        parsed = Reference.parse(reference)
        return shown.header(await self._credentials.get(parsed.registry, parsed.repository))


@asynccontextmanager
async def talking(
    tls_config: TlsConfig, credentials: CredentialSource | None = None, token: str = ""
) -> AsyncIterator[Talk]:
    """Give a client of superpeers. `token`: an operator's."""
    tls = Tls.of(tls_config, Fallbacks())
    session = http.client(connect=3.0, read=30.0, tls=tls)
    try:
        if tls:
            await tls.start()
        yield Talk(session, credentials or DockerCredentials(), token=token)
    finally:
        await session.close()
        if tls:
            await tls.close()


def _of(reference: str) -> dict[str, str]:
    return {"reference": reference} if reference else {}


def _converted(event: dict[str, Any], url: str) -> Job:
    try:
        return msgspec.convert(event, Job)
    except msgspec.ValidationError:
        raise Malformed(f"{url} tells what cannot be used", hint="are the versions alike?") from None
