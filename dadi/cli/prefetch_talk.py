"""What `dadi prefetch` says to superpeers: a client of `superpeer/jobs_http.py` that goes on when one does not answer.

Registry credentials come from Docker's configuration of whoever runs the command; they go to the superpeers, which show
them to the image's registry and keep them not.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
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
from dadi.prefetch.messages import Job, Readiness, Request
from dadi.tls import Tls, TlsConfig

T = TypeVar("T")
_MAX_ANSWER = 64 << 20
GIVE_UP = 60.0
"""Seconds that a superpeer may be away while its job is followed: it may be restarted."""
_PAUSE = 1.0


class Talk:
    """See the head of this file."""

    def __init__(self, session: aiohttp.ClientSession, credentials: CredentialSource, give_up: float = GIVE_UP) -> None:
        self._session = session
        self._credentials = credentials
        self._give_up = give_up

    async def begin(self, url: str, request: Request) -> Job:
        """Ask one superpeer for a job."""
        body = msgspec.json.encode(request)
        return await self._call("POST", f"{url}/v1/prefetch", Job, request.reference, data=body)

    async def jobs(self, url: str) -> list[Job]:
        """Return a superpeer's jobs that we may see."""
        answer = await self._call("GET", f"{url}/v1/prefetch", dict[str, list[Job]])
        return answer.get("jobs", [])

    async def job(self, url: str, job: str, reference: str = "") -> Job:
        """Return one job."""
        return await self._call("GET", f"{url}/v1/prefetch/{job}", Job, reference)

    async def act(self, url: str, job: str, what: str, reference: str = "") -> Job:
        """Have a job cancelled, or tried again."""
        return await self._call("POST", f"{url}/v1/prefetch/{job}/{what}", Job, reference)

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
        headers = await self._headers(job.request.reference)
        where = f"{url}/v1/prefetch/{job.id}"
        while not until(job):
            try:
                async with http.request(self._session, "GET", where, "following a job", params={"follow": "1"},
                                        headers=headers) as response:  # fmt: skip
                    async for event in http.events(response):
                        heard = loop.time()
                        if event.get("event") == "job":
                            job = _converted(event, url)
                            told(job)
                            if until(job):
                                return job
            except DadiError as error:
                if not error.retryable or loop.time() - heard > self._give_up:
                    raise
            await asyncio.sleep(_PAUSE)
        return job

    async def _call(self, method: str, where: str, kind: type[T], reference: str = "", **options: Any) -> T:
        headers = await self._headers(reference)
        async with http.request(self._session, method, where, "prefetching", headers=headers, **options) as response:
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
async def talking(tls_config: TlsConfig, credentials: CredentialSource | None = None) -> AsyncIterator[Talk]:
    """Give a client of superpeers."""
    tls = Tls.of(tls_config, Fallbacks())
    session = http.client(connect=3.0, read=30.0, tls=tls)
    try:
        if tls:
            await tls.start()
        yield Talk(session, credentials or DockerCredentials())
    finally:
        await session.close()
        if tls:
            await tls.close()


def _converted(event: dict[str, Any], url: str) -> Job:
    try:
        return msgspec.convert(event, Job)
    except msgspec.ValidationError:
        raise Malformed(f"{url} tells what cannot be used", hint="are the versions alike?") from None
