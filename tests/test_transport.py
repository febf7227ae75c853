"""One call over gRPC, and what it leaves behind."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from connections import connections_to
from eventually import until
from helpers import transport
from helpers.answer import Answer
from helpers.errors import InvalidRequest, ServiceUnavailable
from helpers.schemas import ChatDocument, ModelDocument, ModelOutputDocument
from helpers.transport import Call, RpcError, is_ready
from helpers.wire import open_channel, stream, write_request
from scripted_service import ScriptedService

HELLO = ChatDocument(messages=[{"role": "user", "content": "Hello"}], max_tokens=3)


def call_to(service: ScriptedService, request: ChatDocument = HELLO) -> Call[ModelOutputDocument]:
    return Call("/chat", request, ModelOutputDocument, "127.0.0.1", service.port)


async def documents_of(call: Call[ModelOutputDocument]) -> list[ModelOutputDocument]:
    return [document async for document in call.documents_async()]


def test_the_documents_arrive_in_order_with_and_without_an_event_loop(scripted: ScriptedService) -> None:
    for documents in (list(call_to(scripted).documents()), asyncio.run(documents_of(call_to(scripted)))):
        assert [document.token_id for document in documents] == [0, 1, 2, -1]
        assert documents[-1].finish_reason == "length"


def test_another_thread_reads_the_same_documents(scripted: ScriptedService) -> None:
    documents: list[ModelOutputDocument] = []
    reading = threading.Thread(target=lambda: documents.extend(call_to(scripted).documents()))
    reading.start()
    reading.join()
    assert [document.token_id for document in documents] == [0, 1, 2, -1]


def test_a_program_without_the_endpoint_is_named(scripted: ScriptedService) -> None:
    call = Call("/nowhere", HELLO, ModelDocument, "127.0.0.1", scripted.port)
    with pytest.raises(ServiceUnavailable, match=f"127.0.0.1:{scripted.port} has no endpoint /nowhere"):
        call.document()


def test_a_cancelled_call_sends_nothing(scripted: ScriptedService) -> None:
    call = call_to(scripted)
    call.cancel()
    assert list(call.documents()) == []
    assert asyncio.run(documents_of(call)) == []
    assert scripted.requests == []


def test_cancelling_ends_a_call_without_a_reply(scripted: ScriptedService) -> None:
    scripted.script = scripted.silence
    call = call_to(scripted)
    failures = []

    def read() -> None:
        try:
            list(call.documents())
        except ServiceUnavailable as error:
            failures.append(error)

    reading = threading.Thread(target=read)
    reading.start()
    until(lambda: scripted.requests, "the request arrives")
    call.cancel()
    reading.join(300)
    assert len(failures) == 1
    until(lambda: not connections_to(scripted.port), "the connection is closed")


def test_leaving_the_documents_closes_the_connection(scripted: ScriptedService) -> None:
    long = ChatDocument(messages=HELLO.messages, max_tokens=10_000)

    def leave_in_this_thread() -> None:
        next(call_to(scripted, long).documents())

    def leave_in_another_thread() -> None:
        leaving = threading.Thread(target=leave_in_this_thread)
        leaving.start()
        leaving.join()

    async def leave() -> None:
        documents = call_to(scripted, long).documents_async()
        await anext(documents)
        await documents.aclose()

    for leave_this_way in (leave_in_this_thread, leave_in_another_thread, lambda: asyncio.run(leave())):
        leave_this_way()
        until(lambda: not connections_to(scripted.port), "the connection is closed")


def test_the_main_thread_leaves_sending_and_reading_to_another(scripted: ScriptedService) -> None:
    """Ctrl-C interrupts that thread anywhere. In gRPC's code, it would leave a call that never ends."""
    done = run(
        "import sys\n"
        "import helpers\n"
        f"asked = {{'max_tokens': 3, 'port': {scripted.port}}}\n"
        "print(helpers.ask('Hello', **asked))\n"
        "called = set()\n"
        "def note(frame, event, argument):\n"
        "    if frame.f_globals.get('__name__', '').partition('.')[0] == 'grpc':\n"
        "        called.add(frame.f_code.co_name)\n"
        "sys.setprofile(note)\n"
        "print(helpers.ask('Hello', **asked))\n"
        "sys.setprofile(None)\n"
        "assert not called & {'unary_stream', '__call__', '_next', '__next__', 'wait'}, called"
    )
    assert (done.stdout, done.stderr) == ("1:0 1:1 1:2 \n2:0 2:1 2:2 \n", "")


def test_a_program_that_ends_can_still_ask(scripted: ScriptedService) -> None:
    ask = f"helpers.ask('Hello', max_tokens=3, port={scripted.port})"
    done = run(
        "import atexit\n"
        f"atexit.register(lambda: print({ask}))\n"  # runs after what helpers does at exit, which it imports later
        "import helpers\n"
        f"print({ask})"
    )
    assert (done.stdout, done.stderr) == ("1:0 1:1 1:2 \n2:0 2:1 2:2 \n", "")


def test_a_service_that_stops_in_the_middle_is_unavailable(scripted: ScriptedService) -> None:
    scripted.script = scripted.half
    documents = call_to(scripted).documents()
    next(documents)
    scripted.stop()
    with pytest.raises(ServiceUnavailable, match="went away"):
        list(documents)


def test_a_service_that_is_back_is_reached_at_once(scripted: ScriptedService) -> None:
    """Another channel of the program still waits before it tries again, and gRPC would share its connection."""
    scripted.stop()
    with open_channel(f"127.0.0.1:{scripted.port}") as other:
        with pytest.raises(RpcError):
            list(stream(other, write_request("/chat", HELLO)))
        with pytest.raises(ServiceUnavailable, match=f"127.0.0.1:{scripted.port} does not answer"):
            list(call_to(scripted).documents())
        scripted.start()
        assert len(list(call_to(scripted).documents())) == 4


def test_a_port_without_a_gateway_of_jina_is_not_ready(scripted: ScriptedService) -> None:
    assert not is_ready("127.0.0.1", scripted.port)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert not is_ready("127.0.0.1", unused.getsockname()[1])


def run(program: str, folder: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a Python program that uses the client, in a process of its own."""
    command = [sys.executable, "-u", "-c", program]
    inherited = {
        name: value for name, value in os.environ.items() if name != "no_grpc_proxy"
    }  # `prepare_service` sets it
    environment = {**inherited, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=300)


def test_a_client_needs_no_torch() -> None:
    done = run(
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "import helpers.conversation, helpers.prompts, helpers.service, helpers.chat\n"
        "print(helpers.stream('Hello').finish_reason)"
    )
    assert (done.stdout, done.stderr) == ("None\n", "")


@pytest.mark.main
def test_asking_imports_no_heavy_package_and_leaves_all_of_them_usable(scripted: ScriptedService) -> None:
    """Importing them takes seconds, and DocArray offers tensors of torch only if it can import torch."""
    pytest.importorskip("torch")
    done = run(
        "import asyncio, sys, helpers\n"
        f"asked = dict(max_tokens=3, port={scripted.port})\n"
        "print(helpers.ask('Hello', **asked).completion_tokens, asyncio.run(helpers.aask('Hello', **asked)))\n"
        f"chat = helpers.Conversation(port={scripted.port})\n"
        f"print(chat.window().size, helpers.info(port={scripted.port}).model)\n"
        "print({'torch', 'transformers', 'docarray', 'jina', 'numpy', 'aiohttp'} & set(sys.modules))\n"
        "import torch\n"
        "from docarray import BaseDoc\n"
        "from docarray.typing import TorchTensor\n"
        "from jina import Client, Deployment, Executor\n"
        "from helpers.schemas import PromptDocument\n"
        "class Picture(BaseDoc):\n"
        "    tensor: TorchTensor\n"
        "assert Picture.from_bytes(Picture(tensor=torch.ones(2)).to_bytes()).tensor.sum() == 2\n"
        "assert issubclass(PromptDocument, BaseDoc)\n"
        "print(helpers.ask('Hello', **asked).completion_tokens)"
    )
    assert (done.stdout, done.stderr) == ("3 2:0 2:1 2:2 \n512 scripted\nset()\n3\n", "")


def test_importing_the_documents_leaves_the_program_as_it_was() -> None:
    """Jina's import changes the program's Ctrl-C handler, its warnings, and the start method of processes."""
    done = run(
        "import multiprocessing, signal, sys, warnings\n"
        "interrupts = []\n"
        "handler = lambda *_: interrupts.append(1)\n"
        "signal.signal(signal.SIGINT, handler)\n"
        "def press_ctrl_c(event, arguments):\n"
        "    if event == 'import' and arguments[0] == 'jina.clients':\n"
        "        signal.raise_signal(signal.SIGINT)\n"
        "sys.addaudithook(press_ctrl_c)\n"
        "format = warnings.formatwarning\n"
        "import helpers.client, helpers.schemas\n"
        "assert len(interrupts) == 1\n"
        "assert signal.getsignal(signal.SIGINT) is handler\n"
        "assert warnings.formatwarning is format\n"
        "assert ('always', None, DeprecationWarning, None, 0) not in warnings.filters\n"
        "assert multiprocessing.get_start_method(allow_none=True) is None"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.main
def test_using_the_client_changes_no_limit_and_no_variable_and_prints_nothing(scripted: ScriptedService) -> None:
    """Jina raises the limit of open files, and prints if that fails."""
    resource = pytest.importorskip("resource")
    for limits in ((1024, resource.getrlimit(resource.RLIMIT_NOFILE)[1]), (256, 256)):
        done = run(
            "import os, resource, helpers\n"
            f"resource.setrlimit(resource.RLIMIT_NOFILE, {limits})\n"
            "environment = dict(os.environ)\n"
            f"print(helpers.ask('Hello', max_tokens=3, port={scripted.port}))\n"
            f"assert resource.getrlimit(resource.RLIMIT_NOFILE) == {limits}\n"
            "assert (after := set(os.environ.items())) == set(environment.items()), after ^ set(environment.items())"
        )
        number = len(scripted.requests)
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{number}:0 {number}:1 {number}:2 \n", "")


NO_HOME = "import os, pwd; os.environ.pop('HOME', None); pwd.getpwuid = lambda uid: {}[uid]\n"


@pytest.mark.main
@pytest.mark.parametrize("home", ["/dev/null", "/proc/no-home", None])
def test_a_client_needs_no_home_and_makes_no_folder(
    scripted: ScriptedService, home: str | None, tmp_path: Path
) -> None:
    done = run(
        f"{NO_HOME if home is None else ''}import helpers\n"
        f"print(helpers.ask('Hello', max_tokens=1, port={scripted.port}).completion_tokens)",
        folder=tmp_path,
        HOME=str(home),
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def proxy() -> Iterator[socket.socket]:
    """A program that accepts connections, as a proxy does."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


def address_of(proxy: socket.socket) -> str:
    return f"http://127.0.0.1:{proxy.getsockname()[1]}"


@pytest.mark.main
@pytest.mark.parametrize("no_proxy", ["", "127.0.0.2"])
def test_a_proxy_is_kept_and_not_used_for_this_machine(proxy: socket.socket, no_proxy: str) -> None:
    with ScriptedService("0.0.0.0") as scripted:
        done = run(
            "import asyncio, helpers, subprocess\n"
            f"asked = dict(max_tokens=3, port={scripted.port})\n"
            "for host in ('127.0.0.1', '127.0.0.2', 'localhost', '0.0.0.0'):\n"
            "    print(helpers.ask('Hello', host=host, **asked).completion_tokens)\n"
            "print(asyncio.run(helpers.aask('Hello', **asked)).completion_tokens)\n"
            "subprocess.run('echo $http_proxy $no_proxy $no_grpc_proxy', shell=True)",
            http_proxy=address_of(proxy),
            no_proxy=no_proxy,
        )
    assert (done.stdout, done.stderr) == ("3\n" * 5 + f"{address_of(proxy)} {no_proxy}".rstrip() + "\n", "")


@pytest.mark.main
def test_a_proxy_is_used_for_another_machine(proxy: socket.socket) -> None:
    received: list[bytes] = []

    def refuse() -> None:
        connection, _ = proxy.accept()
        received.append(connection.recv(1000))
        connection.sendall(b"HTTP/1.1 403 Forbidden\r\n\r\n")
        connection.close()

    threading.Thread(target=refuse, daemon=True).start()
    done = run(
        "import helpers\n"
        "try: helpers.ask('Hello', host='192.0.2.77', port=5)\n"
        "except helpers.errors.ServiceUnavailable as error: print(error)",
        http_proxy=address_of(proxy),
        no_proxy="127.0.0.2",
    )
    assert "The service at 192.0.2.77:5 does not answer" in done.stdout
    assert received[0].startswith(b"CONNECT 192.0.2.77:5 ")


@pytest.mark.parametrize("host", ["::1", "[::1]", "0:0:0:0:0:0:0:1", "::", "localhost"])
def test_a_service_at_an_ipv6_address_is_reached(host: str) -> None:
    try:
        scripted = ScriptedService("[::1]")
    except RuntimeError:
        pytest.skip("This machine has no IPv6.")
    with scripted:
        call = Call("/chat", HELLO, ModelOutputDocument, host, scripted.port)
        assert len(list(call.documents())) == 4
        assert len(asyncio.run(documents_of(call))) == 4


def test_an_invalid_host_is_refused_before_anything_is_sent() -> None:
    with pytest.raises(InvalidRequest, match="'localhost:12345' is not a host"):
        Call("/chat", HELLO, ModelOutputDocument, "localhost:12345", 12345)


def test_an_ipv6_service_that_does_not_answer_is_named_with_brackets() -> None:
    with pytest.raises(ServiceUnavailable, match=r"The service at \[::1\]:1 does not answer"):
        list(Call("/chat", HELLO, ModelOutputDocument, "::1", 1).documents())


# --- Event loops ------------------------------------------------------------------------------------


def has_left_nothing(port: int) -> bool:
    return not connections_to(port) and not any(thread.name == "helpers-call" for thread in threading.enumerate())


@pytest.mark.main
def test_event_loops_in_several_threads_are_silent(scripted: ScriptedService) -> None:
    done = run(
        "import asyncio, threading, helpers\n"
        "def ask():\n"
        "    for _ in range(10):\n"
        f"        asyncio.run(helpers.aask('Hello', max_tokens=20, port={scripted.port}))\n"
        "threads = [threading.Thread(target=ask) for _ in range(8)]\n"
        "[thread.start() for thread in threads]\n"
        "[thread.join() for thread in threads]\n"
        # an answer may reach its event loop before the thread that has read it ends
        "[thread.join(60) for thread in threading.enumerate() if thread is not threading.main_thread()]\n"
        "print(threading.active_count())"
    )
    assert (done.stdout, done.stderr) == ("1\n", "")
    assert len(scripted.requests) == 80


@pytest.mark.parametrize("end", ["cancel the task", "time out", "stop the answer", "cancel the call"])
def test_a_call_without_a_reply_ends_at_once_in_an_event_loop(scripted: ScriptedService, end: str) -> None:
    scripted.script = scripted.silence

    async def read_until_the_end() -> str | None:
        call = call_to(scripted)
        answer = Answer(call)
        reading = asyncio.ensure_future(anext(aiter(answer)))
        while not scripted.requests:
            await asyncio.sleep(0.01)
        with pytest.raises((asyncio.CancelledError, asyncio.TimeoutError, StopAsyncIteration, ServiceUnavailable)):
            if end == "time out":
                await asyncio.wait_for(reading, 0.01)
            {"cancel the task": reading.cancel, "stop the answer": answer.stop, "cancel the call": call.cancel}[end]()
            await reading
        return answer.finish_reason

    assert asyncio.run(read_until_the_end()) == ("error" if end == "cancel the call" else "cancelled")
    until(lambda: has_left_nothing(scripted.port), "the connection is closed, and the thread ends")


def test_an_event_loop_that_is_closed_leaves_no_thread(scripted: ScriptedService) -> None:
    scripted.script = scripted.half
    loop = asyncio.new_event_loop()
    documents = call_to(scripted).documents_async()
    assert loop.run_until_complete(anext(documents)).generated_text == "Half "
    loop.close()
    scripted.resume.set()
    until(lambda: has_left_nothing(scripted.port), "the connection is closed, and the thread ends")


# --- Forks ------------------------------------------------------------------------------------------

FORKING = """
import asyncio, multiprocessing, os, sys, warnings, helpers
warnings.simplefilter("ignore")  # Python 3.12 warns of any fork of a program with threads

def ask_both_ways(results, half_read):
    for ask in (lambda: helpers.ask("Hello", max_tokens=3, port=PORT),
                lambda: asyncio.run(helpers.aask("Hello", max_tokens=3, port=PORT)),
                lambda: "".join(half_read)):
        try:
            results.put(str(ask()))
        except helpers.errors.ServiceUnavailable as error:
            results.put(str(error))

fork = multiprocessing.get_context("fork")
answer = helpers.stream("Hello", max_tokens=40, port=PORT)
pieces = iter(answer) if BEFORE == "half an answer" else iter(())
if BEFORE == "half an answer":
    next(pieces)
elif BEFORE == "an answer":
    helpers.ask("Hello", max_tokens=3, port=PORT)
for _ in range(20):
    results = fork.SimpleQueue()
    child = fork.Process(target=ask_both_ways, args=(results, pieces))
    child.start()
    print(*(results.get().replace(" ", "_") or "-" for _ in range(3)))
    child.join(60)
    assert child.exitcode == 0, child.exitcode
if os.fork() == 0:
    del pieces, answer
    sys.exit()
assert os.wait()[1] == 0
print(sum(1 for _ in pieces), len(list(helpers.stream("Hello", max_tokens=40, port=PORT))), file=sys.stderr)
"""


@pytest.mark.main
@pytest.mark.skipif(not hasattr(os, "fork"), reason="This system has no fork.")
@pytest.mark.parametrize("before", ["nothing", "an answer", "half an answer"])
def test_a_fork_works_or_names_spawn_and_never_harms_its_parent(scripted: ScriptedService, before: str) -> None:
    done = run(f"PORT, BEFORE = {scripted.port}, {before!r}\n{FORKING}")
    assert (done.returncode, done.stderr) == (0, "39 40\n" if before == "half an answer" else "0 40\n")
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 20
    for asked, awaited, rest in lines:
        if before == "nothing":
            assert asked.endswith(":2_")
            assert awaited.endswith(":2_")
        else:
            assert 'multiprocessing.get_context("spawn")' in asked
            assert awaited == asked
        assert rest == (asked if before == "half an answer" else "-")


def test_a_program_that_leaves_an_answer_unread_still_ends(scripted: ScriptedService) -> None:
    scripted.script = scripted.half
    done = run(f"import helpers; pieces = iter(helpers.stream('Hello', port={scripted.port})); print(next(pieces))")
    assert (done.returncode, done.stdout, done.stderr) == (0, "Half \n", "")


# --- The end of a program ---------------------------------------------------------------------------

ENDING = """
import asyncio, helpers, sys, threading, time
def read():
    for piece in helpers.stream("Hello", max_tokens=10_000_000, port=PORT): started.set()
def ask_again_and_again():
    while True:
        try: helpers.ask("Hello", max_tokens=3, port=PORT)
        except helpers.errors.HelpersError as error: print(error)
async def read_async():
    async for piece in helpers.stream("Hello", max_tokens=10_000_000, port=PORT):
        started.set()
        if WHO == "async for": sys.exit(3)
started = threading.Event()
targets = {"threads": [read] * 3 + [ask_again_and_again], "loop": [lambda: asyncio.run(read_async())]}
for target in targets.get(WHO, []): threading.Thread(target=target, daemon=True).start()
if WHO == "async for": asyncio.run(read_async())
started.wait()
sys.exit(3)
"""


@pytest.mark.main
@pytest.mark.parametrize("script", ["count_up", "half"])
@pytest.mark.parametrize("who", ["threads", "loop", "async for"])
def test_a_program_that_ends_while_it_reads_ends_silently(scripted: ScriptedService, who: str, script: str) -> None:
    scripted.script = getattr(scripted, script)
    for _ in range(3):
        done = run(f"PORT, WHO = {scripted.port}, {who!r}\n{ENDING}")
        assert (done.returncode, done.stdout, done.stderr) == (3, "", "")


# --- Other libraries for concurrency ----------------------------------------------------------------


def test_without_asyncio_the_answer_says_what_to_use(scripted: ScriptedService) -> None:
    """In trio, for example."""
    reading = aiter(Answer(call_to(scripted)))
    with pytest.raises(InvalidRequest, match=r"needs asyncio's event loop.*trio\.to_thread\.run_sync\(helpers\.ask"):
        anext(reading).send(None)
    assert scripted.requests == []


class FakeGevent:
    """A program that gevent has patched, or not. `main_hub` is False in a thread of its pool."""

    def __init__(self, patched: bool = True, main_hub: bool = True) -> None:
        self.patched, self.main_hub = patched, main_hub

    def is_module_patched(self, name: str) -> bool:
        return self.patched and name == "threading"

    def get_hub(self) -> FakeGevent:
        return self


@pytest.fixture
def started_gevent(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What gRPC has been told about gevent."""
    started: list[str] = []
    monkeypatch.setattr("grpc.experimental.gevent.init_gevent", lambda: started.append("gevent"))
    transport._init_gevent.cache_clear()
    yield started
    transport._init_gevent.cache_clear()


@pytest.mark.parametrize("patched", [True, False])
def test_grpc_waits_as_gevent_does_once_gevent_has_patched_the_program(
    scripted: ScriptedService, started_gevent: list[str], patched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    list(call_to(scripted).documents())
    assert started_gevent == []
    for module in ("gevent", "gevent.monkey"):
        monkeypatch.setitem(sys.modules, module, FakeGevent(patched))
    for _ in range(2):
        assert len(list(call_to(scripted).documents())) == 4
    assert started_gevent == ["gevent"] * patched


def test_a_thread_of_gevents_pool_is_told_to_use_a_greenlet(
    scripted: ScriptedService, started_gevent: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("gevent", "gevent.monkey"):
        monkeypatch.setitem(sys.modules, module, FakeGevent(main_hub=False))
    with pytest.raises(ServiceUnavailable, match=r"gevent\.spawn\(helpers\.ask"):
        list(call_to(scripted).documents())
    assert started_gevent == []


@pytest.mark.main
def test_a_program_that_gevent_has_patched_never_hangs(scripted: ScriptedService) -> None:
    pytest.importorskip("gevent", reason="gevent is not installed: pip install gevent")
    done = run(
        "from gevent import monkey; monkey.patch_all()\n"
        "import asyncio, gevent, helpers\n"
        f"asked = dict(max_tokens=3, port={scripted.port})\n"
        "print(helpers.ask('Hello', **asked).completion_tokens)\n"
        "print(asyncio.run(helpers.aask('Hello', **asked)).completion_tokens)\n"
        "greenlets = [gevent.spawn(helpers.ask, 'Hello', **asked) for _ in range(3)]\n"
        "print(*(greenlet.get().completion_tokens for greenlet in greenlets))\n"
        f"print(next(iter(helpers.stream('Hello', port={scripted.port}))))"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "3\n3\n3 3 3\n6:0 \n", "")
