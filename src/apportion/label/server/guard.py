"""Protections around every request: its host, its origin, its size, and the headers of every response."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

from apportion.label.server.access import Access

HEADER = b"x-apportion"  # of requests that change something: another site's form cannot set it
LARGEST = 64 * 1024  # bytes of a request; a ranking has a few hundred
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-store",
}
SAFE = ("GET", "HEAD", "OPTIONS")


class TooLarge(Exception):
    """A request's body is larger than `LARGEST`, whatever its headers say."""


class Guard:
    """ASGI middleware that refuses requests of other hosts and sites and large ones, and completes the headers."""

    def __init__(self, app: Any, access: Access) -> None:
        self.app, self.access = app, access

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        sending = _Completed(send)
        problem = self.problem(scope["method"], headers)
        if problem is not None:
            await sending.refuse(*problem)
            return
        with suppress(TooLarge):
            await self.app(scope, _Limited(receive, sending), sending)
        if sending.muted:
            sending.muted = False
            await sending.refuse(413, *_large("more than that"))

    def problem(self, method: str, headers: dict[bytes, bytes]) -> tuple[int, str, str, str, str] | None:
        """Return (status, field, got, expected, fix) of a request that is refused, None of one that is served."""
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if self.access.hosts is not None and host not in self.access.hosts:
            fix = "Open the address that was printed when the server started."
            return 403, "Host", host[:100], "this machine", fix
        if method in SAFE:
            return None
        came_from = headers.get(b"origin", b"").decode("latin-1").lower()
        own = {f"http://{host}", f"https://{host}", *self.access.origins}
        site = headers.get(b"sec-fetch-site", b"same-origin")
        if (came_from and came_from not in own) or site not in (b"same-origin", b"none") or HEADER not in headers:
            fix = "Use the page itself; behind a proxy set public_url to the address in the browser."
            return 403, "Origin", came_from[:100] or "none", "a request of this page", fix
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > LARGEST:
            return 413, *_large(length.decode("latin-1")[:20])
        return None


def _large(size: str) -> tuple[str, str, str, str]:
    return "Content-Length", size, f"at most {LARGEST} bytes", "Send one answer at a time."


class _Limited:
    """A request's body that ends in an error where it grows beyond `LARGEST`."""

    def __init__(self, receive: Any, sending: _Completed) -> None:
        self.receive, self.sending, self.size = receive, sending, 0

    async def __call__(self) -> Any:
        message = await self.receive()
        self.size += len(message.get("body", b""))
        if self.size > LARGEST:
            self.sending.muted = not self.sending.started  # the application would answer with an error of its own
            raise TooLarge
        return message


class _Completed:
    """A response with `HEADERS`, of which it may set its own."""

    def __init__(self, send: Any) -> None:
        self.send, self.started, self.muted = send, False, False

    async def __call__(self, message: Any) -> None:
        if self.muted:
            return
        if message["type"] == "http.response.start":
            self.started = True
            present = {name.lower() for name, _ in message["headers"]}
            more = [(n.encode(), v.encode()) for n, v in HEADERS.items() if n.encode() not in present]
            message = message | {"headers": [*message["headers"], *more]}
        await self.send(message)

    async def refuse(self, status: int, field: str, got: str, expected: str, fix: str) -> None:
        """Send an error."""
        body = json.dumps({"error": {"field": field, "got": got, "expected": expected, "fix": fix}}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await self({"type": "http.response.start", "status": status, "headers": [*headers, (b"connection", b"close")]})
        await self({"type": "http.response.body", "body": body})
