"""Who may use the page: settings of access, checked tokens, signed session cookies, the key of the results page."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from apportion.errors import ConfigError

VARIABLE = "APPORTION_LABEL_TOKEN"
SHORTEST = 16  # characters of a token: too many to try out
SESSION_SECONDS = 30 * 24 * 3600


@dataclass(frozen=True)
class Access:
    """Who may sign in, and from where.

    Attributes:
        secret: the key of the database's sessions. study: its id. token: what annotators sign in with; "" for none.
        hosts: values of the Host header that are accepted; None accepts all. annotators: names that may sign in; None
            for all. secure: whether the browser uses https. public: whether the page is served beyond this machine.
    """

    secret: str
    study: str
    token: str = ""
    hosts: frozenset[str] | None = None
    origins: frozenset[str] = frozenset()
    annotators: Sequence[str] | None = None
    secure: bool = False
    public: bool = False

    @property
    def cookie(self) -> str:
        """The cookie's name: cookies are shared by the ports of a machine, so that each database has its own."""
        return f"apportion_label_{self.study}"

    def is_token(self, given: str) -> bool:
        """Whether `given` is the token, compared in constant time; True where none is demanded."""
        return not self.token or hmac.compare_digest(given.encode(), self.token.encode())

    def session(self, annotator: int) -> str:
        """Return the value of the cookie of an annotator who signed in."""
        body = f"{annotator}.{int(time.time()) + SESSION_SECONDS}"
        return f"{body}.{self._sign(body)}"

    def annotator(self, cookie: str | None) -> int | None:
        """Return the annotator whose cookie this is; None where it is absent, forged, old, or of another token."""
        body, _, signature = (cookie or "").rpartition(".")
        number, _, until = body.partition(".")
        if not body or not hmac.compare_digest(signature, self._sign(body)):
            return None
        return int(number) if int(until) > time.time() else None

    @property
    def results_key(self) -> str:
        """The key of the results page beyond this machine, known to whoever started the server."""
        return self._sign("results")[:32]

    def may_see_results(self, key: str) -> bool:
        """Whether `key` opens the results page."""
        return not self.public or hmac.compare_digest(key.encode(), self.results_key.encode())

    def _sign(self, text: str) -> str:
        key = f"{self.secret}:{self.token}".encode()
        return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def make_access(
    secret: str,
    study: str,
    *,
    host: str,
    port: int,
    token: str | None,
    public_url: str | None = None,
    tls: bool = False,
    annotators: Sequence[str] | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Access:
    """Return who may use a page on `host` and `port`.

    Raises:
        ConfigError: a page beyond this machine without a token, a token that is too short, an address that is no URL.
    """
    token = environment.get(VARIABLE, "") if token is None else token
    public = not is_loopback(host) or public_url is not None
    if public and not token:
        fix = f"Set {VARIABLE} to a secret, for example the output of `openssl rand -hex 16`, or leave --host out."
        raise ConfigError("token", "none", f"a token for a page on {public_url or host}, beyond this machine", fix)
    if token and len(token) < SHORTEST:
        fix = f"Set {VARIABLE} to the output of `openssl rand -hex 16`."
        raise ConfigError("token", f"{len(token)} characters", f"at least {SHORTEST} characters", fix)
    origins = {origin(public_url)} if public_url is not None else set()
    # a page that only this machine opens answers to its names alone: other names may be made to point here
    names = None if public else frozenset(f"{name}{end}" for name in LOOPBACK for end in ("", f":{port}"))
    return Access(
        secret, study, token, names, frozenset(origins), annotators,
        secure=tls or (public_url or "").startswith("https:"), public=public,
    )  # fmt: skip


LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def origin(url: str) -> str:
    """Return scheme, host and port of `url`. Raises ConfigError where it is no address of a page."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.path.strip("/"):
        fix = "Write https://rank.example.org, without a path."
        raise ConfigError("public_url", url, "an address of http or https", fix)
    return f"{parts.scheme}://{parts.netloc}".lower()
