"""What is said about prefetching between the command line, superpeers and their files, as JSON. Pure.

    POST /v1/prefetch                       Request → Job       the same image, platform and scope is the same job
    GET  /v1/prefetch                       → {"jobs": [Job]}   those of images that anybody may have; with
                                                            ?registry=HOST also those of HOST that the caller may have
    GET  /v1/prefetch/{id}                  → Job           ids can be guessed: whom the image's registry does not let
                                                            in is told what he is told of a job that there is not; with
                                                            ?reference=R what the registry says, be there a job or not
    GET  /v1/prefetch/{id}?follow=1         events: {"event": "job", …Job} whenever it has changed, until it is over
    POST /v1/prefetch/{id}/cancel|retry     → Job
    GET  /v1/prefetch/wanted?node=ID&zone=Z&rack=R&have=JOB,…   → Wishes: what this node is asked to bring; `have`: what
                                                            it keeps for pinned jobs, and is not asked for again;
                                                            with ?registry=HOST also private images of HOST
    POST /v1/prefetch/{id}/nodes            NodeReport → {}     what has become of that
    GET  /v1/prefetch/verify?reference=R&platform=P&scope=S     → Readiness

Times are seconds since 1970, 0 for none; sizes are bytes, rates bytes per second, 0 for no limit. To begin, cancel or
retry a job one must be an operator: OPERATOR is the header that proves it (`superpeer/jobs_operators.py`). Credentials
for the registry (`dadi/peers/shown.py`) that come with a request are the job's for as long as it runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from dadi.errors import DadiError, InvalidRequest, Malformed
from dadi.oci import platforms
from dadi.oci.reference import Reference
from dadi.prefetch import nodes
from dadi.prefetch.life import State
from dadi.prefetch.when import LATEST
from dadi.wire import error_from

Scope = Literal["startup", "full"]
_Text = Annotated[str, Meta(max_length=800)]
_Time = Annotated[float, Meta(ge=0, le=LATEST)]
_Rate = Annotated[float, Meta(ge=0, le=1e15)]
LOWEST, USUAL, HIGHEST = 0, 5, 9
MOST_WISHES = 64
MOST_HELD = 256
"""Pinned jobs of which a node tells that it has them."""
OPERATOR = "Dadi-Operator"
"""The header that shows an operator's token."""
MOST_LACKING = 1000
"""Rows of what is missing that are told; the count is of all."""


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is wanted. `nodes` as in `nodes.py`; "" for none.

    `rate`: of what comes from the registry, all superpeers of the datacenter together. `priority`: the higher goes
    first. `manifest`: what a sibling has found the reference to be; then that is warmed and nothing else. `batch`: jobs
    that were asked for together, and share their rate and the room: `batch_of`. `node_rate`: what each node may take.
    """

    reference: _Text
    platform: Annotated[str, Meta(max_length=100)]
    scope: Scope = "full"
    rate: _Rate = 0.0
    at: _Time = 0.0
    deadline: _Time = 0.0
    priority: Annotated[int, Meta(ge=LOWEST, le=HIGHEST)] = USUAL
    pin_until: _Time = 0.0
    nodes: Annotated[str, Meta(max_length=500)] = ""
    manifest: Annotated[str, Meta(pattern="^(sha256:[0-9a-f]{64})?$")] = ""
    batch: Annotated[str, Meta(max_length=64)] = ""
    node_rate: _Rate = 0.0


class Pin(msgspec.Struct, frozen=True):
    """An image that a job keeps from eviction `until` a time, whatever the reference leads to by then."""

    manifest: str
    until: float


class Lacking(msgspec.Struct, frozen=True):
    """One thing that a start would have to get from the registry. `what`: tag, index, layer.

    `chunks` are runs [first, last] of the layer's tar, `size` their bytes.
    """

    what: str
    name: str
    size: int = 0
    chunks: tuple[tuple[int, int], ...] = ()

    def __str__(self) -> str:
        runs = ", ".join(f"{a}-{b}" if b > a else f"{a}" for a, b in self.chunks[:5])
        more = "…" if len(self.chunks) > 5 else ""
        return f"{self.what} {self.name}" + (f": {self.size} bytes, chunks {runs}{more}" if self.chunks else "")


class Readiness(msgspec.Struct, frozen=True):
    """What one superpeer has of its share of an image. `registry_requests`: how many a start would need, at least.

    `superpeers` are all of the datacenter, as this one knows them; `url` is its own name among them ("" if it is
    alone). `chunks` and `size` are of the scope here; `proven` is the scope that they are of: "full" where "startup"
    was asked for and no trace is known, which `note` says.
    """

    reference: str
    platform: str
    scope: str
    url: str
    superpeers: tuple[str, ...]
    manifest_digest: str
    chunks: int
    size: int
    registry_requests: int
    lacking: tuple[Lacking, ...] = ()
    note: str = ""
    proven: str = ""

    @property
    def ready(self) -> bool:
        """Whether nothing is missing."""
        return self.registry_requests == 0


class Job(msgspec.Struct):
    """One job at one superpeer, as it is told and kept. `error` has the fields of `wire.error_fields`.

    `top_digest`: what the reference itself leads to, by the registry, when it was `resolved`.
    `total` and `done`: bytes of layers in this superpeer's share of the scope; `registry`: bytes that all of the image
    costs the registry, as estimated when it was resolved. `nodes`: how many have told what. `tries`: how often it was
    begun anew by itself; `failing`: since when nothing has come of that, `patience`: until when it is tried.
    `proven`: the scope that was warmed ("full" for "startup" without a trace). `private`: credentials were given for
    it, which a restart forgets; `needs_credentials`: it failed for want of any. `url`: this superpeer's name among all
    `superpeers` that share the work ("" and none where it is alone).
    """

    id: str
    request: Request
    state: State = State.QUEUED
    manifest_digest: str = ""
    top_digest: str = ""
    resolved: float = 0.0
    created: float = 0.0
    began: float = 0.0
    changed: float = 0.0
    total: int = 0
    done: int = 0
    registry: int = 0
    tries: int = 0
    stage: str = ""
    notes: list[str] = []
    error: dict[str, Any] | None = None
    lacking: list[Lacking] = []
    nodes: dict[str, int] = {}
    failing: float = 0.0
    patience: float = 0.0
    proven: str = ""
    private: bool = False
    needs_credentials: bool = False
    pins: list[Pin] = []
    url: str = ""
    superpeers: list[str] = []

    def failure(self) -> DadiError | None:
        """Return why it has failed."""
        return error_from(self.error) if self.error else None

    @property
    def pinned(self) -> Reference:
        """The image by its digest, once that is known."""
        reference = Reference.parse(self.request.reference)
        return reference.at(self.manifest_digest) if self.manifest_digest else reference


class Wish(msgspec.Struct, frozen=True):
    """What a node is to bring: an image by its digest; of its layers all, or runs [first, last + 1] of `chunks`.

    No faster than `rate`; it is not to be evicted before `pin_until`.
    """

    job: Annotated[str, Meta(max_length=64)]
    reference: _Text
    platform: Annotated[str, Meta(max_length=100)]
    chunks: dict[str, tuple[tuple[int, int], ...]] | None = None
    rate: _Rate = 0.0
    pin_until: _Time = 0.0


class Wishes(msgspec.Struct, frozen=True):
    """All that a superpeer asks a node for; `again`: seconds after which the node is to come again.

    `pinned`: of what the node said it has, what is to be kept still. `registries`: of which there are images that the
    node was not told of, for want of credentials for them. `unsure`: whether the node may hear of all that is pinned
    could not be said, as a registry is away: what is not in `pinned` may be all the same.
    """

    wishes: Annotated[tuple[Wish, ...], Meta(max_length=MOST_WISHES)] = ()
    again: Annotated[float, Meta(ge=1, le=3600)] = 15.0
    pinned: Annotated[tuple[str, ...], Meta(max_length=MOST_HELD)] = ()
    registries: Annotated[tuple[_Text, ...], Meta(max_length=MOST_WISHES)] = ()
    unsure: bool = False


class NodeReport(msgspec.Struct, frozen=True):
    """What has become of a wish."""

    node: Annotated[str, Meta(min_length=1, max_length=128)]
    state: Literal["ready", "failed"]
    message: Annotated[str, Meta(max_length=300)] = ""


def canonical(request: Request) -> Request:
    """Return the request with reference and platform as everybody writes them. Raises InvalidRequest."""
    reference, platform = str(Reference.parse(request.reference)), str(platforms.parse(request.platform))
    if request.nodes:
        nodes.parse(request.nodes)
    return msgspec.structs.replace(request, reference=reference, platform=platform)


def job_id(request: Request) -> str:
    """Return the id of the job that a (canonical) request is: the same at all superpeers, whatever else it says."""
    return hashlib.sha256(f"{request.reference}|{request.platform}|{request.scope}".encode()).hexdigest()[:12]


def joined(old: Request, new: Request) -> Request:
    """Return what a job under way is to do when it is asked for once more: what the new request says, and no less.

    The higher priority, the later end of the pin; rates, deadline and nodes are the new one's if it names them. A rate
    together with others: their batch is joined; else one that has a rate stays in its batch, whose rate is changed.
    """
    return msgspec.structs.replace(
        old,
        priority=max(old.priority, new.priority),
        pin_until=max(old.pin_until, new.pin_until),
        rate=new.rate or old.rate,
        batch=(new.batch if new.rate or not old.rate else "") or old.batch,
        node_rate=new.node_rate or old.node_rate,
        deadline=new.deadline or old.deadline,
        at=min(old.at, new.at),
        nodes=new.nodes or old.nodes,
    )


def batch_of(name: str, requests: Iterable[Request]) -> str:
    """Return the `batch` of (canonical) requests that are made together, `name` being theirs alone; "" for one job."""
    count = len({job_id(request) for request in requests})
    return f"{name}.{count}" if count > 1 else ""


def together(batch: str) -> int:
    """Return how many jobs a batch has, as far as it says: 0 if it does not."""
    count = batch.rpartition(".")[2]
    return int(count) if count.isascii() and count.isdigit() else 0


def patience(request: Request, since: float, usual: float) -> float:
    """Return until when a job that fails `since` a time for want of somebody who is away is begun anew.

    Until its deadline; without one for the `usual` seconds from then, or from when it was to begin.
    """
    return request.deadline or max(since, request.at) + usual


def decode_request(data: bytes | bytearray) -> Request:
    """Return a canonical request; raise InvalidRequest for what is none."""
    try:
        return canonical(msgspec.json.decode(data, type=Request))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"this is no request to prefetch: {error}"[:300]) from None


def decode_wishes(data: bytes | bytearray) -> Wishes:
    """Return what a superpeer wants of us; raise Malformed for what is no such thing."""
    try:
        return msgspec.json.decode(data, type=Wishes)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        why = f"a superpeer wants what cannot be read: {error}"[:300]
        raise Malformed(why, hint="are the versions alike?") from None


def decode_report(data: bytes | bytearray) -> NodeReport:
    """Return what a node tells; raise InvalidRequest for what is no such thing."""
    try:
        return msgspec.json.decode(data, type=NodeReport)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"this is no report of a node: {error}"[:300]) from None
