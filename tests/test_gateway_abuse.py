"""Hostile and broken clients of a gateway in a process of its own: its limits hold, and it serves the others meanwhile.

Each test has a quick size and, for ``make test-all``, the full one.
"""

from __future__ import annotations

import gzip
import json
import random
import socket
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx
import psutil
import pytest

from background_program import Program
from eventually import generation_stops, until
from helpers.gateway.server import HttpProtocol
from running_gateway import running_gateway
from scripted_service import ScriptedService
from test_gateway_process import CHAT, url_of
from wire import ENDLESS

pytestmark = pytest.mark.main
KEY = "a-key-of-some-length"
CHAT_PATH = "/v1/chat/completions"
MEGABYTES_MORE = 40
"""How much a gateway's memory may grow under abuse: room for a few bodies of 8 MiB."""


class Gateway:
    """A gateway in a process of its own, whose key is `KEY`."""

    def __init__(self, program: Program) -> None:
        self.program, self.url = program, url_of(program)
        self.port = int(self.url.rpartition(":")[2])
        self.headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
        self._process = psutil.Process(program.process.pid)
        self.check()

    def remember_memory(self) -> None:
        """Compare the memory with that of now in `assert_nothing_is_left`."""
        self._before = self._process.memory_info().rss

    def check(self) -> None:
        """Raise `AssertionError` unless the gateway answers as it should."""
        reply = httpx.post(f"{self.url}{CHAT_PATH}", json=CHAT, headers=self.headers, timeout=60)
        assert len(reply.json()["choices"][0]["message"]["content"].split()) == 3

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def send(self, data: bytes) -> bytes:
        """Send `data` in a connection of its own, and return all that comes back until the gateway closes it."""
        with self.connect() as connection:
            received = b""
            try:
                connection.sendall(data)
                while piece := connection.recv(65536):
                    received += piece
            except ConnectionError:  # the gateway refused the rest of a body
                pass
            return received

    def assert_nothing_is_left(self) -> None:
        """Raise `AssertionError` if connections, threads or memory are left, or if the log has an exception."""
        self.check()
        until(lambda: not self.connections(), "all connections are closed")
        until(lambda: "gateway_requests_in_progress 1.0" in self.metrics(), "all requests have ended")
        grown = (self._process.memory_info().rss - self._before) / 1e6
        print(f"memory grew by {grown:.1f} MB, {self._process.num_threads()} threads")
        assert grown < MEGABYTES_MORE
        assert "Traceback" not in self.program.log.read_text()

    def connections(self) -> list[Any]:
        """Return the open connections of clients."""
        mine = [one for one in self._process.net_connections("tcp") if one.laddr.port == self.port]
        return [one for one in mine if one.status != psutil.CONN_LISTEN]

    def metrics(self) -> str:
        return httpx.get(f"{self.url}/metrics", headers=self.headers, timeout=60).text


@pytest.fixture(scope="module")
def service() -> Iterator[ScriptedService]:
    with ScriptedService() as running:
        yield running


@pytest.fixture(scope="module")
def shared_gateway(service: ScriptedService, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("gateway")
    (folder / "keys").write_text(KEY)
    words = [
        "--service",
        f"127.0.0.1:{service.port}",
        "--port=0",
        "--keys",
        str(folder / "keys"),
        "--log-level=warning",
    ]
    program = Program("-m", "helpers", "gateway", *words, log=folder / "output.log")
    try:
        yield Gateway(program)
    finally:
        program.kill()


@pytest.fixture
def gateway(shared_gateway: Gateway) -> Gateway:
    shared_gateway.remember_memory()
    return shared_gateway


def request(body: bytes, *more: str, path: str = CHAT_PATH, method: str = "POST", length: int | None = None) -> bytes:
    """Return a request of HTTP/1.1, after which the connection is closed."""
    lines = [f"{method} {path} HTTP/1.1", "host: localhost", "connection: close", f"authorization: Bearer {KEY}"]
    lines += ["content-type: application/json", f"content-length: {len(body) if length is None else length}", *more]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def values(chance: random.Random, depth: int = 0) -> Any:
    """Return a random JSON value."""
    simple: list[Any] = [None, True, 0, -1, 2**70, 1e308, 0.5, "", "user", "\udc80", "a" * 1000, [], {}]
    if depth > 3 or chance.random() < 0.6:
        return chance.choice(simple)
    size = range(chance.randrange(4))
    if chance.random() < 0.5:
        return [values(chance, depth + 1) for _ in size]
    return {chance.choice(["role", "content", "type", "text", "x"]): values(chance, depth + 1) for _ in size}


FIELDS = [*CHAT, "stream", "n", "stop", "seed", "temperature", "stream_options", "metadata", "prompt", "input", "tools"]
PATHS = [CHAT_PATH, "/v1/completions", "/v1/responses"]


def malformed(chance: random.Random) -> bytes:
    """Return a request that is wrong in a random way."""
    good = json.dumps(CHAT).encode()
    path = chance.choice(PATHS)
    match chance.randrange(9):
        case 0:
            return chance.randbytes(chance.randrange(1, 3000)) + b"\r\n\r\n"
        case 1:
            start = chance.randrange(len(good))
            return request(good[:start] + chance.randbytes(chance.randrange(9)) + b"\0" + good[start + 1 :], path=path)
        case 2:
            wrong = {**CHAT, **{field: values(chance) for field in chance.sample(FIELDS, 3)}, "max_tokens": "3"}
            return request(json.dumps(wrong).encode(), path=path)
        case 3:
            deep = chance.randrange(201, 50_000)
            return request(chance.choice([b"[" * deep, b'{"messages":' * deep, b"[" * deep + b"]" * deep]), path=path)
        case 4:
            return request(
                b"", method=chance.choice(["PUT", "DELETE", "PATCH", "TRACE", "CONNECT", "PROPFIND"]), path=path
            )
        case 5:
            odd = ["content-length: 5", "content-length: -1", "transfer-encoding: gzip", "host: b", "x: \0", "no colon"]
            return request(good, chance.choice(odd), path=path)
        case 6:
            return request(good, path="/" + "".join(chance.choices("/%.?#:@v1", k=chance.randrange(1, 60))))
        case 7:
            return request(good[: chance.randrange(len(good))], path=path)
        case _:
            return request(good, "transfer-encoding: chunked", path=path).replace(b"content-length", b"x") + b"zz\r\n"


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.long)])
def test_malformed_requests_are_refused_and_leave_nothing(
    gateway: Gateway, service: ScriptedService, count: int
) -> None:
    chance = random.Random(3)
    before = len(service.requests)
    with ThreadPoolExecutor(16) as threads:
        replies = list(threads.map(gateway.send, [malformed(chance) for _ in range(count)]))
    statuses = Counter(reply[9:12] for reply in replies)
    print(statuses)
    assert all(status.startswith(b"4") for status in statuses), statuses
    assert len(service.requests) == before
    gateway.assert_nothing_is_left()


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.long)])
def test_wrong_keys_are_refused_while_others_are_served(gateway: Gateway, count: int) -> None:
    chance = random.Random(5)
    wrong = [
        f"authorization: Bearer {chance.choice([KEY[:-1], KEY + 'x', chance.randbytes(9).hex()])}" for _ in range(count)
    ]
    body = json.dumps(CHAT).encode()

    def ask(header: str) -> bytes:
        return gateway.send(request(body, header).replace(f"authorization: Bearer {KEY}\r\n".encode(), b""))

    with ThreadPoolExecutor(8) as threads:
        replies = threads.map(ask, wrong)
        for _ in range(10):
            gateway.check()
        assert {reply[9:12] for reply in replies} == {b"401"}
    gateway.assert_nothing_is_left()
    assert 'gateway_requests_total{key="",method="POST",route="/v1/chat/completions",status="401"}' in gateway.metrics()


@pytest.mark.parametrize("megabytes", [20, pytest.param(100, marks=pytest.mark.long)])
def test_an_enormous_body_is_refused_before_it_has_arrived(gateway: Gateway, megabytes: int) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(megabytes):
            yield b"100000\r\n" + b" " * 2**20 + b"\r\n"
        yield b"0\r\n\r\n"

    head = request(b"", "transfer-encoding: chunked").replace(b"content-length: 0\r\n", b"")
    assert gateway.send(request(b" " * 10, length=megabytes * 2**20))[9:12] == b"413"
    with gateway.connect() as connection:
        connection.sendall(head)
        sent = 0
        with pytest.raises(ConnectionError):
            for chunk in chunks():
                connection.sendall(chunk)
                sent += 1
    assert sent < megabytes
    gateway.assert_nothing_is_left()


def test_a_compressed_body_is_refused_and_not_unpacked(gateway: Gateway) -> None:
    bomb = gzip.compress(b" " * 50_000_000)
    for encoding in ("gzip", "deflate", "br", "gzip, gzip"):
        assert gateway.send(request(bomb, f"content-encoding: {encoding}"))[9:12] == b"415"
    gateway.assert_nothing_is_left()


def test_clients_that_do_not_go_on_do_not_hold_up_others(gateway: Gateway) -> None:
    """100 idle connections, 100 whose headers never end, and 100 whose bodies never end."""
    beginnings = [b"", b"POST / HTTP/1.1\r\nhost: a\r\nx: ", request(b"{", length=10**6)]
    with ExitStack() as stack:
        for beginning in beginnings * 100:
            stack.enter_context(gateway.connect()).sendall(beginning)
        gateway.check()
    gateway.assert_nothing_is_left()


def test_a_client_that_reads_none_of_its_answers_is_cut_off(
    service: ScriptedService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HttpProtocol, "SECONDS_TO_READ", 0.3)
    question = b"GET /openapi.json HTTP/1.1\r\nhost: a\r\n\r\n"
    with running_gateway(service.port) as gateway, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", gateway.port))
        connection.sendall(question * 1000)

        def is_open() -> bool:
            ends = [one for one in psutil.Process().net_connections("tcp") if one.laddr.port == gateway.port]
            return any(one.status == psutil.CONN_ESTABLISHED for one in ends)

        gateway.wait_for_records(1)
        until(lambda: not is_open(), "the gateway has closed the connection")
        assert len(gateway.records) < 1000


@pytest.mark.parametrize("count", [20, pytest.param(100, marks=pytest.mark.long)])
def test_clients_that_leave_at_random_moments_leave_nothing_in_the_service(endless_service: Any, count: int) -> None:
    chance = random.Random(11)
    model = endless_service.info().model
    moments = [(n % 2 == 0, chance.uniform(0, 1)) for n in range(count)]
    with running_gateway(endless_service.port) as gateway, ThreadPoolExecutor(8) as threads:
        (name,) = [one["id"] for one in httpx.get(f"{gateway.url}/models").json()["data"]]
        assert name in model

        def leave(is_stream: bool, moment: float) -> None:
            body = json.dumps({**CHAT, "model": name, "stream": is_stream, "max_tokens": ENDLESS}).encode()
            with socket.create_connection(("127.0.0.1", gateway.port), timeout=60) as connection:
                connection.sendall(request(body))
                time.sleep(moment)

        with generation_stops(endless_service):
            list(threads.map(leave, *zip(*moments, strict=True)))
        records = gateway.wait_for_records(count + 1)[1:]
        idle = endless_service.info().steps
        assert {record.status for record in records} == {499}
        assert endless_service.ask("Hello", max_tokens=3).completion_tokens == 3
        assert endless_service.info().steps - idle <= 4  # nothing else was generated
