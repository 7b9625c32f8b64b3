"""CRI's image service, passed on to containerd: so that kubelet's pull secrets reach lazy images.

    kubelet ── PullImage(image, auth) ──► cri.sock ── the same bytes ──► containerd ──► snapshotter.sock: Prepare
                                              └─ auth, for this image's repository ─► PullSecrets ◄─┘

All methods of runtime.v1.ImageService and runtime.v1alpha2.ImageService, those of tomorrow too, go on as bytes, with
metadata, deadline and cancellation; the answer comes back the same way. Only a PullImage is looked into, for `image`
and `auth` (`proto/cri_pull.proto`). Its secret is there before containerd has the call, since containerd asks for
snapshots while it pulls; after a pull that failed it is forgotten, if nobody has shown it before.

`auth` means what it means to containerd (ParseAuth): user and password, else the identity token, else `auth`; nothing
if `server_address` is another host than the image's. A secret is never logged, noted, written, or in a `repr`.
"""

from __future__ import annotations

import base64
import binascii
import re
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from dadi.containerd.proto import cri_pull_pb2 as pb
from dadi.errors import DadiError, InvalidRequest
from dadi.fallbacks import Fallbacks
from dadi.grpc_socket import Serving, listen
from dadi.oci.credentials import Credentials, same_registry
from dadi.oci.keychain import PullSecrets
from dadi.oci.reference import Reference

NOT_REMEMBERED = "pull secret not remembered"
_METHOD = re.compile(r"/runtime\.v1(?:alpha2)?\.ImageService/(?P<name>[A-Za-z0-9]+)")
_MAX_SECRET = 16 << 10
"""Characters; the longest there are, identity tokens of clouds, have some thousand."""
_MAX_TEXT = 2000
_OPTIONS = [
    # kubelet and containerd take 16 MiB
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    ("grpc.enable_http_proxy", 0),
    # containerd is back a moment after it was restarted
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]


def secret_in(request: bytes) -> tuple[Reference, Credentials] | None:
    """Return for which image a PullImageRequest has which credentials; None if it has none.

    Raises InvalidRequest if it cannot be read or makes no sense; containerd, which gets it anyway, says so to kubelet.
    """
    try:
        message = pb.PullImageRequest.FromString(request)
    except DecodeError:
        raise InvalidRequest("a PullImage cannot be read") from None
    auth = message.auth
    credentials = _credentials(auth)
    if credentials is None:
        return None
    reference = Reference.parse(message.image.image)
    if auth.server_address and not same_registry(auth.server_address, reference.registry):
        return None  # containerd does not show it to this registry either
    return reference, credentials


def _credentials(auth: Any) -> Credentials | None:
    if len(auth.username) + len(auth.password) + len(auth.auth) + len(auth.identity_token) + len(
        auth.registry_token
    ) > _MAX_SECRET:
        raise InvalidRequest(f"the auth of a PullImage has more than {_MAX_SECRET} characters")
    if auth.username:
        return Credentials(auth.username, auth.password)
    if auth.identity_token:
        return Credentials(identity_token=auth.identity_token)
    if auth.auth:
        try:
            username, _, password = base64.b64decode(auth.auth, validate=True).decode().partition(":")
        except (binascii.Error, ValueError):
            raise InvalidRequest("the auth of a PullImage is not base64 of user:password") from None
        return Credentials(username, password.strip("\0")) if username else None
    return Credentials(registry_token=auth.registry_token) if auth.registry_token else None


class ImageProxy(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc has no types
    """See the head of this file. Made in the event loop that serves it."""

    def __init__(self, containerd: str, pulls: PullSecrets, fallbacks: Fallbacks) -> None:
        """`containerd`: the path of its socket."""
        self._containerd = containerd
        self._pulls = pulls
        self._fallbacks = fallbacks
        self._channel = grpc.aio.insecure_channel(f"unix:{containerd}", options=_OPTIONS)

    def __repr__(self) -> str:
        return f"ImageProxy({self._containerd}, {self._pulls!r})"

    async def close(self) -> None:
        """Break off the calls under way."""
        await self._channel.close()

    def service(self, handler_call_details: Any) -> Any:
        """Return what handles a call: for gRPC, not for people.

        One request and a stream of answers: on the wire a single answer is a stream of one.
        """
        method = _METHOD.fullmatch(handler_call_details.method)
        if method is None:
            return grpc.unary_stream_rpc_method_handler(self._not_ours)
        work = self._pull if method["name"] == "PullImage" else self._pass_on

        async def handle(request: bytes, context: Any) -> None:
            await work(handler_call_details.method, request, context)

        return grpc.unary_stream_rpc_method_handler(handle)

    async def _not_ours(self, request: bytes, context: Any) -> None:
        text = "dadi-node serves CRI's ImageService; kubelet's --container-runtime-endpoint stays containerd's own"
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, text)

    async def _pull(self, method: str, request: bytes, context: Any) -> None:
        try:
            secret = secret_in(request)
        except DadiError as error:
            self._fallbacks.note(NOT_REMEMBERED, str(error))
            secret = None
        if secret is None:
            await self._pass_on(method, request, context)
            return
        new = self._pulls.remember(*secret)
        try:
            await self._pass_on(method, request, context)
        except BaseException:
            # It may be no good; and must not come before one that is.
            if new:
                self._pulls.forget(*secret)
            raise
        self._pulls.remember(*secret)

    async def _pass_on(self, method: str, request: bytes, context: Any) -> None:
        call = self._channel.unary_stream(method)(
            request, timeout=context.time_remaining(), metadata=_passed(context.invocation_metadata())
        )
        try:
            await context.send_initial_metadata(tuple(await call.initial_metadata() or ()))
            while (answer := await call.read()) is not grpc.aio.EOF:
                await context.write(answer)
            context.set_trailing_metadata(tuple(await call.trailing_metadata() or ()))
        except grpc.aio.AioRpcError as error:
            await context.abort(error.code(), self._text(error), tuple(error.trailing_metadata() or ()))
        finally:
            call.cancel()

    def _text(self, error: Any) -> str:
        text = str(error.details() or "")
        if error.code() is grpc.StatusCode.UNAVAILABLE and "failed to connect" in text:
            text = f"dadi-node cannot reach containerd at {self._containerd} (cri.containerd says where it is): {text}"
        return text[:_MAX_TEXT]


def _passed(metadata: Any) -> list[tuple[str, str | bytes]]:
    """Return what of a call's metadata is the caller's own, and not gRPC's."""
    return [(key, value) for key, value in metadata or () if not key.startswith(("grpc-", ":")) and key != "user-agent"]


class Proxying:
    """A proxy on its socket, until `stop`."""

    def __init__(self, serving: Serving, proxy: ImageProxy) -> None:
        self._serving = serving
        self._proxy = proxy

    def __repr__(self) -> str:
        return f"Proxying({self._serving!r}, {self._proxy!r})"

    async def stop(self, grace: float = 1.0) -> None:
        """Let calls under way finish for `grace` seconds, remove the socket."""
        await self._serving.stop(grace)
        await self._proxy.close()


async def serve(path: Path, containerd: str, pulls: PullSecrets, fallbacks: Fallbacks) -> Proxying:
    """Serve the image service of the containerd behind a socket; raise Conflict if `path` is taken."""
    proxy = ImageProxy(containerd, pulls, fallbacks)
    try:
        return Proxying(await listen(grpc.aio.server(handlers=[proxy], options=_OPTIONS), path), proxy)
    except BaseException:
        await proxy.close()
        raise
