"""The token server of a registry, as Docker Hub has one: who pulls or pushes fetches a token there first.

    GET /token?service=…&scope=repository:NAME:ACTIONS     →  {"token": a JSON Web Token, "expires_in": seconds}

What lives here: the server, in threads of this process, over TLS on a host of the lab's network; one user. Repositories
below `public` may be pulled by everybody, all else is that user's. What never does: the registry itself, that is
docker-registry, which believes what `settings` names. (Distribution's documentation, "Token Authentication
Specification"; RFC 7515, 4.1.6; RFC 7518, 3.4.)
"""

from __future__ import annotations

import base64
import json
import ssl
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from tests.fakes.authority import Authority
from tests.lab.network import Host
from tests.lab.registry import PASSWORD, USER

SERVICE, ISSUER = "registry.docker.io", "the lab"
_LIFE = 300
"""Seconds."""
_RIGHT = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()


class TokenServer:
    """Serves as `name`, at port 443 of `host`, between `start` and `stop`."""

    def __init__(self, host: Host, name: str, authority: Authority, public: str = "lab/") -> None:
        self.settings = {"realm": f"https://{name}/token", "service": SERVICE, "issuer": ISSUER,
                         "rootcertbundle": authority.file}  # fmt: skip
        """docker-registry's `auth: token`."""
        self._host = host
        certificate, key = authority.issue(name, [name])
        self.shown: list[str] = []
        """The Authorization headers of those who have asked."""
        self._handler = _handler(_Signer(Path(certificate), Path(key)), public, self.shown)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate, key)
        self._server: ThreadingHTTPServer | None = None
        self._thread = threading.Thread()

    def start(self) -> None:
        """Begin to serve."""
        server = ThreadingHTTPServer((self._host.address, 443), self._handler, bind_and_activate=False)
        server.socket.close()
        server.socket = self._context.wrap_socket(self._host.socket(), server_side=True)
        server.server_bind()
        server.server_activate()
        self._server, self._thread = server, threading.Thread(target=server.serve_forever, args=(0.05,))
        self._thread.start()

    def stop(self) -> None:
        """End it; nothing happens if it does not serve."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            self._thread.join()
            server.server_close()


class _Signer:
    def __init__(self, certificate: Path, key: Path) -> None:
        loaded = serialization.load_pem_private_key(key.read_bytes(), None)
        assert isinstance(loaded, ec.EllipticCurvePrivateKey)
        self._key = loaded
        der = x509.load_pem_x509_certificate(certificate.read_bytes()).public_bytes(serialization.Encoding.DER)
        self._head = {"typ": "JWT", "alg": "ES256", "x5c": [base64.b64encode(der).decode()]}

    def token(self, access: list[dict[str, Any]]) -> str:
        now = int(time.time())
        claims = {"iss": ISSUER, "sub": "", "aud": SERVICE, "iat": now, "nbf": now - 60, "exp": now + _LIFE,
                  "jti": str(time.monotonic_ns()), "access": access}  # fmt: skip
        signed = b".".join(_encoded(json.dumps(part).encode()) for part in (self._head, claims))
        both = decode_dss_signature(self._key.sign(signed, ec.ECDSA(hashes.SHA256())))
        return b".".join([signed, _encoded(b"".join(number.to_bytes(32, "big") for number in both))]).decode()


def _handler(signer: _Signer, public: str, seen: list[str]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *arguments: object) -> None:
            """Say nothing."""

        def do_GET(self) -> None:
            shown = self.headers.get("Authorization")
            seen.append(shown or "")
            if shown not in (None, _RIGHT):
                self._answer(401, {})
                return
            access = []
            for scope in parse_qs(urlsplit(self.path).query).get("scope", []):
                kind, name, actions = scope.split(":")
                given = actions.split(",") if shown else ["pull"] if name.startswith(public) else []
                access.append({"type": kind, "name": name, "actions": given})
            self._answer(200, {"token": signer.token(access), "expires_in": _LIFE})

        def _answer(self, status: int, value: dict[str, Any]) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler


def _encoded(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")
