"""Serve the explorer: on this machine only, or anywhere with a token; nothing on the page comes from elsewhere."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlencode

from flask import Flask, Response, abort, redirect, request

from dit_probe.errors import DitProbeError
from dit_probe.explore.application import app

LOOPBACK = ("127.0.0.1", "localhost", "::1")

POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; object-src 'none'; "
    "base-uri 'none'; form-action 'none'; script-src 'self' "
)


class ServingError(DitProbeError):
    """The page cannot be served at this address."""


def serve(
    trace: Any,
    other: Any = None,
    *,
    masks: Mapping[str, Any] | None = None,
    host: str = "127.0.0.1",
    port: int = 8050,
    token: str | None = None,
    announce: Callable[[str], Any] = print,
) -> None:
    """Serve the explorer until interrupted.

    Args:
        trace: as `app`.
        other: as `app`.
        masks: as `app`.
        host: address to listen on. Any but this machine's own needs a token, one is made where none is given.
        port: 0 takes a free one.
        token: what a browser must know to see the page; it is asked once and remembered as a cookie.
        announce: called with the address to open.

    Raises:
        ServingError: the address is taken, or is none of this machine's.
    """
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log_request(self, code: Any = "-", size: Any = "-") -> None:
            """Print nothing: a line a request, with the token in the first."""

    local = host in LOOPBACK
    if token is None and not local:
        token = secrets.token_urlsafe(24)
    application = app(trace, other, masks=masks)
    guard(application.server, token, hosts=LOOPBACK if local else None, scripts=application.csp_hashes())
    with _bound(host, port) as bound:
        at = f"[{host}]" if ":" in host else host
        address = f"http://{at}:{bound.getsockname()[1]}/" + (f"?{urlencode({'token': token})}" if token else "")
        options: dict[str, Any] = {"threaded": True, "request_handler": Quiet, "fd": bound.fileno()}
        server = make_server(host, bound.getsockname()[1], application.server, **options)
        announce(address)
        server.serve_forever()  # until interrupted


def guard(
    server: Flask, token: str | None, *, hosts: tuple[str, ...] | None = None, scripts: Sequence[str] = ()
) -> None:
    """Let nobody in without the token, and nothing out of the page.

    Args:
        server: what answers requests.
        token: asked of every request, as ``?token=`` once and as a cookie from then on; None asks for nothing.
        hosts: names under which the page may be asked for; another one is a foreign site that resolves to this
            machine. None allows all.
        scripts: hashes of the page's own inline scripts; no others run.
    """
    # Named after the token: cookies know no ports, and there may be several explorers.
    cookie = f"dit-probe-{hashlib.sha256((token or '').encode()).hexdigest()[:12]}"

    def check() -> Any:
        if hosts is not None and _hostname(request.host) not in hosts:
            abort(403, f"This page is served as {hosts[0]} only.")
        if token is None:
            return None
        given = request.args.get("token")
        if given is not None and _same(given, token):
            # Sent on without the token, which stays out of the history and of what is copied from the address bar.
            rest = {name: value for name, value in request.args.items() if name != "token"}
            answer = redirect(request.path + (f"?{urlencode(rest)}" if rest else ""))
            answer.set_cookie(cookie, token, httponly=True, samesite="Strict", path="/")
            return answer
        if not _same(request.cookies.get(cookie, ""), token):
            abort(401, "Open the address that `dit-probe explore` printed, token included.")
        return None

    def seal(response: Response) -> Response:
        response.headers["Content-Security-Policy"] = POLICY + " ".join(scripts)
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        return response

    server.before_request(check)
    server.after_request(seal)


def _same(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(), token.encode())


def _hostname(host: str) -> str:
    return host[1 : host.index("]")] if host.startswith("[") and "]" in host else host.rsplit(":", 1)[0]


def _bound(host: str, port: int) -> socket.socket:
    """A socket that listens; bound here, as werkzeug ends the program where it cannot."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
        bound.listen(128)
    except (OSError, OverflowError) as error:
        bound.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise ServingError(
            f"cannot listen on {host} port {port}: {reason}. Choose another port; 0 is a free one"
        ) from None
    return bound
