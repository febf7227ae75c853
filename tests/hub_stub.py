"""A stand-in for the Hugging Face Hub on 127.0.0.1, for the real huggingface_hub client.

It speaks the part of the Hub's HTTP API that this package and a download use: the owner of a token, the access
to a repository, its metadata and its files. Answers, headers and sentences are the real Hub's, as its client
expects them (``huggingface_hub/utils/_http.py``) and as others recorded them.

    with HubStub(users={token: "alice"}, repos={"org/model": Repo("pending")}) as hub:
        hub.connect(monkeypatch, home=tmp_path)  # for this process
        subprocess.run([...], env=hub.environment(home=tmp_path))  # for another one
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import numpy
import pytest
from huggingface_hub import constants, hf_api
from safetensors.numpy import save_file

TOKEN = f"hf_{secrets.token_hex(17)}"
"""A new one in each run, so no file contains it by accident."""
MALFORMED = {
    "{}\x0cabc": r"contains characters that no token has: U\+000C",
    "{} abc": r"contains characters that no token has: a space",
    "Bearer {}": r"contains characters that no token has: a space",
    "{}\x7f": r"contains characters that no token has: U\+007F",
    "{}\udcff": r"contains characters that no token has: U\+DCFF",
    "\xa0{}\xa0x": r"contains characters that no token has: U\+00A0",
    "{}\tx": r"contains characters that no token has: U\+0009",
    "HF_TOKEN={}": r"contains characters that no token has: =",
    "<{}>": r"contains characters that no token has: <, >",
    "${{HF_TOKEN}}": r"contains characters that no token has: \$, \{, \}",
    "\u201c{}\u201d": "is in quotation marks",
    '"{}"': "is in quotation marks",
    "'{}'": "is in quotation marks",
}
"""Forms of a token that no header may carry, or that were not meant as they stand → what is wrong with each."""

State = Literal["public", "granted", "pending", "never asked", "reset", "rejected", "missing"]
Fault = Literal["hang", "drop", "cut", "html"] | int
"""Never answer, close the connection, close it in the middle of a file, answer with a hotel's login page, or
answer with an HTTP status."""

GATED = {
    "pending": "Your request to access model {id} is awaiting a review from the repo authors.",
    "never asked": "Access to model {id} is restricted and you are not in the authorized list. "
    "Visit https://huggingface.co/{id} to ask for access.",
    "reset": "Your request to access model {id} has been reset by the repo's authors. "
    "Visit https://huggingface.co/{id} to submit a new request.",
    "rejected": "Your request to access model {id} has been rejected by the repo's authors.",
}
ANONYMOUS = (
    "Access to model {id} is restricted. You must have access to it and be authenticated to access it. Please log in."
)
NARROW = (
    "Please enable access to public gated repositories in your fine-grained token settings to view this repository."
)
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass(frozen=True)
class Repo:
    """One model repository.

    - ``state``: who may read it.
    - ``folder``: a local folder with its files.
    - ``parameters``: what the Hub says about its safetensors files, such as ``{"BF16": 123}``.
    """

    state: State = "public"
    folder: Path | None = None
    parameters: Mapping[str, int] | None = None


@dataclass(frozen=True)
class Request:
    """A request that the stub received; `path` includes the query."""

    method: str
    path: str
    token: str | None


@dataclass
class HubStub:
    """A running stub. A changed attribute applies from the next request on.

    - ``users``: token → account. Any other token is refused.
    - ``narrow``: fine-grained tokens that may not read gated repositories.
    - ``faults``: part of a path → what goes wrong there.
    """

    users: dict[str, str] = field(default_factory=dict)
    repos: dict[str, Repo] = field(default_factory=dict)
    narrow: set[str] = field(default_factory=set)
    faults: dict[str, Fault] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    url: str = ""

    def __enter__(self) -> HubStub:
        self._closing = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.hub = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def environment(self, *, home: Path, **more: str) -> dict[str, str]:
        """Return this process's environment for another process, with the Hugging Face settings of the stub only."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(_SETTINGS)}
        return {**kept, **_NO_PROXY, "HF_ENDPOINT": self.url, "HF_HOME": str(home), **more}

    def connect(self, monkeypatch: pytest.MonkeyPatch, *, home: Path, **more: str) -> None:
        """Give this process the Hugging Face settings of the stub only, and the variables `more`, until the test ends.

        huggingface_hub reads its variables when it is imported, so its constants are set too. So are
        the clients that it and transformers keep: they would repeat requests to an earlier stub for a minute.
        """
        for name in [name for name in os.environ if name.startswith(_SETTINGS)]:
            monkeypatch.delenv(name)
        for name, value in {**_NO_PROXY, **more}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        monkeypatch.setattr(hf_api.api, "endpoint", self.url)
        if "transformers" in sys.modules:
            monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", self.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        huggingface_hub.close_session()  # it may have been opened with a proxy

    @property
    def storage(self) -> str:
        """Return the address of the storage for the weights: this server under another name.

        A client tells hosts apart by their names. It sends its token to the Hub, but not to the storage.
        """
        return self.url.replace("127.0.0.1", "localhost")

    @contextmanager
    def failing(self, path: str, fault: Fault) -> Iterator[None]:
        """Answer with `fault` if `path` is part of the path, inside a ``with`` block."""
        self.faults[path] = fault
        try:
            yield
        finally:
            del self.faults[path]


_SETTINGS = ("HF_", "HUGGING", "TRANSFORMERS_")
_NO_PROXY = dict.fromkeys(("no_proxy", "NO_PROXY"), "127.0.0.1,localhost")

NO_HUB = HubStub(url="http://127.0.0.1:9")
"""A Hub that does not run: port 9 refuses connections."""


def model_folder(folder: Path, *, parts: int = 1, dtype: Any = numpy.float16) -> Path:
    """Write a model of 10 parameters in each part, as `save_pretrained` lays it out, and return `folder`."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    names = [f"model-{n}-of-{parts}.safetensors" for n in range(parts)] if parts > 1 else ["model.safetensors"]
    for n, name in enumerate(names):
        tensors = {f"{n}.a": numpy.ones((2, 3), dtype), f"{n}.b": numpy.ones(4, dtype)}
        save_file(tensors, folder / name, metadata={"format": "pt"})
    if parts > 1:
        weight_map = {f"{n}.{key}": name for n, name in enumerate(names) for key in "ab"}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        return  # `HubStub.requests` records them

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub = self._hub
        if self.path == "/api/agent-harnesses":  # the client asks once in each process, whatever it is used for
            self._error(404, "Not found")
            return
        bearer = self.headers.get("Authorization", "").removeprefix("Bearer ")
        hub.requests.append(Request(self.command, self.path, bearer or None))
        url = urlsplit(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        fault = next((fault for part, fault in hub.faults.items() if part in path), None)
        if fault == "hang":
            hub._closing.wait()
        if fault in ("hang", "drop"):
            self.close_connection = True
        elif fault == "html":
            self._send(200, b"<html>Welcome to our hotel</html>", {"Content-Type": "text/html"})
        elif isinstance(fault, int):
            self._error(fault, f"status {fault}")
        elif bearer and bearer not in hub.users:
            self._error(401, "Invalid credentials in Authorization header")
        else:
            self._route(path, query, bearer, cut=fault == "cut")

    def _route(self, path: str, query: dict[str, list[str]], token: str, *, cut: bool) -> None:
        if path == "/api/whoami-v2":
            self._whoami(token)
            return
        for repo_id, repo in self._hub.repos.items():
            api = f"/api/models/{repo_id}"
            if path == f"{api}/auth-check":
                if self._admit(repo_id, repo, token):
                    self._send(200, b"OK")
                return
            if path == api or path == f"{api}/revision/main" or path == f"{api}/revision/{COMMIT}":
                if self._exists(repo, token):
                    self._json(_info(repo_id, repo, query))
                return
            if path.startswith(f"{api}/tree/"):
                if self._exists(repo, token):
                    self._json([_tree_entry(name, file) for name, file in _files(repo).items()])
                return
            for revision in ("main", COMMIT):
                start = f"/{repo_id}/resolve/{revision}/"
                if path.startswith(start):
                    if self._admit(repo_id, repo, token):
                        self._file(repo_id, repo, path.removeprefix(start), cut=cut)
                    return
            if path.startswith(f"/cdn/{repo_id}/"):
                self._content(_files(repo)[path.removeprefix(f"/cdn/{repo_id}/")], {}, cut=cut)
                return
        if path.startswith("/api/models/"):
            self._exists(Repo("missing"), token)
        else:
            self._error(404, "Not found")

    def _whoami(self, token: str) -> None:
        if token:
            self._json({"type": "user", "name": self._hub.users[token], "orgs": [], "auth": {}})
        else:
            self._error(401, "Invalid username or password.")

    def _exists(self, repo: Repo, token: str) -> bool:
        """Answer with an error if the repository is missing. Without a token it looks like a private one."""
        if repo.state != "missing":
            return True
        if token:
            self._error(404, "Repository not found", code="RepoNotFound")
        else:
            self._error(401, "Invalid username or password.")
        return False

    def _admit(self, repo_id: str, repo: Repo, token: str) -> bool:
        """Return whether the token may read the content, or answer with an error. Metadata is public."""
        if not self._exists(repo, token):
            return False
        if repo.state == "public":
            return True
        if not token:
            self._error(401, ANONYMOUS.format(id=repo_id), code="GatedRepo")
        elif token in self._hub.narrow:
            self._error(403, NARROW)
        elif repo.state == "granted":
            return True
        else:
            self._error(403, GATED[repo.state].format(id=repo_id), code="GatedRepo")
        return False

    def _file(self, repo_id: str, repo: Repo, name: str, *, cut: bool) -> None:
        """Send a small file, or redirect to the storage for the weights, as the real Hub does."""
        file = _files(repo).get(name)
        if file is None:
            self._error(404, "Entry not found", code="EntryNotFound")
        elif file.suffix in (".safetensors", ".bin"):
            headers = {
                "X-Repo-Commit": COMMIT,
                "X-Linked-Etag": f'"{_sha(file)}"',
                "X-Linked-Size": str(file.stat().st_size),
                "Location": f"{self._hub.storage}/cdn/{repo_id}/{name}",
            }
            self._send(302, b"", headers)
        else:
            self._content(file, {"X-Repo-Commit": COMMIT}, cut=cut)

    def _content(self, file: Path, headers: dict[str, str], *, cut: bool) -> None:
        content, status = file.read_bytes(), 200
        wanted = self.headers.get("Range")
        if wanted:
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            headers = {
                **headers,
                "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}",
            }
            content, status = content[start:], 206
        headers = {**headers, "ETag": f'"{_sha(file)}"', "Accept-Ranges": "bytes"}
        self._send(status, content, headers, cut=cut)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, message: str, *, code: str | None = None) -> None:
        headers = {"X-Error-Message": message, "Content-Type": "application/json"}
        if code:
            headers["X-Error-Code"] = code
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _send(self, status: int, body: bytes, headers: Mapping[str, str] = {}, *, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
            self.close_connection = self.close_connection or cut

    @property
    def _hub(self) -> HubStub:
        return self.server.hub  # type: ignore[attr-defined, no-any-return]


def _files(repo: Repo) -> dict[str, Path]:
    if repo.folder is None:
        return {}
    found = sorted(path for path in repo.folder.rglob("*") if path.is_file())
    return {path.relative_to(repo.folder).as_posix(): path for path in found}


def _sha(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _info(repo_id: str, repo: Repo, query: dict[str, list[str]]) -> dict[str, Any]:
    parts = repo.parameters
    whole = {
        "_id": "0" * 24,
        "id": repo_id,
        "modelId": repo_id,
        "sha": COMMIT,
        "private": False,
        "gated": False if repo.state == "public" else "manual",
        "tags": [],
        "siblings": [{"rfilename": name} for name in _files(repo)],
        "safetensors": {"parameters": dict(parts), "total": sum(parts.values())} if parts else None,
    }
    wanted = query.get("expand") or query.get("expand[]")
    kept = {"_id", "id", "modelId", *wanted} if wanted else set(whole) - {"safetensors"}
    return {name: value for name, value in whole.items() if name in kept and value is not None}


def _tree_entry(name: str, file: Path) -> dict[str, Any]:
    size, sha = file.stat().st_size, _sha(file)
    entry: dict[str, Any] = {"type": "file", "path": name, "size": size, "oid": sha[:40]}
    if file.suffix in (".safetensors", ".bin"):
        entry["lfs"] = {"oid": sha, "size": size, "pointerSize": 134}
    return entry
