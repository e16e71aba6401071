"""A small hub over HTTP: who a token is, repositories, uploads by LFS, commits; what it got is kept for the test."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKENS = {"hf_write": "write", "hf_read": "read", "hf_odd": "odd"}


class HubServer(ThreadingHTTPServer):
    """The server; a context manager that runs it in a thread.

    Attributes:
        files: {repository: {path: content}} of what was committed. private: {repository: whether}.
        broken: a path prefix whose requests fail with 500. requests: (method, path) of each.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}
        self.broken = ""
        self.requests: list[tuple[str, str]] = []

    @property
    def address(self) -> str:
        """Its address, for HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *rest: object) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    """The requests of huggingface_hub's `whoami`, `create_repo` and `upload_folder`."""

    server: HubServer

    def log_message(self, *rest: object) -> None:
        """Write nothing to the test's output."""

    def do_GET(self) -> None:
        if not self.allowed():
            return
        if self.path == "/api/whoami-v2":
            role = TOKENS[self.token]
            known = {"name": "me", "orgs": [{"name": "team"}], "auth": {"accessToken": {"role": role}}}
            self.answer({"message": "sign in"} if role == "odd" else known)
        elif (match := re.match(r"/api/models/([^/?]+/[^/?]+)(?:/revision/[^/?]+)?(\?|$)", self.path)) and (
            match[1] in self.server.files
        ):
            self.answer({"id": match[1], "modelId": match[1], "sha": "0" * 40, "siblings": []})
        else:
            self.answer({"error": "no such thing"}, 404)

    def do_POST(self) -> None:
        if not self.allowed():
            return
        body = self.body()
        if self.path == "/api/repos/create":
            self.create(json.loads(body))
        elif self.path.startswith("/api/validate-yaml"):
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            big = [{**file, "lfs": file["path"].endswith(".safetensors")} for file in files]
            made = [
                {"path": f["path"], "uploadMode": "lfs" if f["lfs"] else "regular", "shouldIgnore": False} for f in big
            ]
            self.answer({"files": made})
        elif self.path.endswith("/info/lfs/objects/batch"):
            wanted = json.loads(body)["objects"]
            self.answer({"transfer": "basic", "objects": [self.place(one) for one in wanted]})
        elif match := re.match(r"/api/models/([^/]+/[^/]+)/commit/", self.path):
            self.commit(match[1], body)
        else:
            self.answer({"error": "no such thing"}, 404)

    def do_PUT(self) -> None:
        data = self.body()
        self.server.objects[self.path.rpartition("/")[2]] = data
        self.answer({})

    @property
    def token(self) -> str:
        """The token of the request."""
        return str(self.headers.get("authorization", "")).removeprefix("Bearer ")

    def allowed(self) -> bool:
        """Whether the request is answered as it asks: its token is known, and its path is not a broken one."""
        self.server.requests.append((self.command, self.path))
        if self.server.broken and self.path.startswith(self.server.broken):
            self.body()
            self.answer({"error": "out of order"}, 400)
            return False
        if self.token not in TOKENS:
            self.body()
            self.answer({"error": "Invalid credentials"}, 401)
            return False
        return True

    def body(self) -> bytes:
        """Return the body of the request."""
        if self.headers.get("transfer-encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("content-length") or 0))

    def create(self, wanted: dict[str, Any]) -> None:
        """Make a repository, or say that it exists."""
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        url = {"url": f"{self.server.address}/{name}", "name": name}
        if name in self.server.files:
            self.answer({**url, "error": "You already created this model repo"}, 409)
            return
        self.server.files[name] = {}
        self.server.private[name] = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.answer(url)

    def place(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """Return where to put a large file."""
        upload = {"href": f"{self.server.address}/objects/{wanted['oid']}"}
        return {"oid": wanted["oid"], "size": wanted["size"], "actions": {"upload": upload}}

    def commit(self, name: str, body: bytes) -> None:
        """Keep the files of a commit; a large one must be there, with its hash."""
        kept = self.server.files[name]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                kept[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                data = self.server.objects[value["oid"]]
                assert hashlib.sha256(data).hexdigest() == value["oid"]
                kept[value["path"]] = data
        found = {"commitUrl": f"{self.server.address}/{name}/commit/{'a' * 40}", "commitOid": "a" * 40}
        self.answer({"success": True, **found, "hookOutput": ""})

    def answer(self, value: dict[str, Any], code: int = 200) -> None:
        """Send JSON."""
        data = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
