"""Run the learner's service of lesson 3 so that `helpers.capstone` sees what happens in it.

The model in `folder` is a tiny one that says known texts (`write_model`). A run of it that reads the token `fails`
raises, as a GPU without memory does. One that reads the token `holds` waits as long as the file `HOLD` exists, and
writes `HELD`. Three files say line by line what has happened: `RUNS` (of the model), `REQUESTS` (each BEGAN and ENDED),
and `ERRORS` (in the learner's code).
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from .options import HOST
from .processes import is_listening, kill
from .transport import is_ready

HOLD, HELD, RUNS, REQUESTS, ERRORS = "hold", "held", "runs.txt", "requests.txt", "errors.txt"
BEGAN, ENDED = "began", "ended"
NO_BLOCK = "It ended by itself. End the script with dep.block(), which waits."
HIDDEN = 128
"""The number of tokens that the model can continue."""

_SCRIPT = """
import sys
sys.path.append({project!r})
from helpers import capstone_runner
exec(capstone_runner.watched(**{settings!r}), globals())
"""


@dataclass(frozen=True)
class Run:
    """One run of the model: the `ids` that it read, the last one of each row, the earlier tokens in its `cache`."""

    ids: list[int]
    last: list[int]
    cache: int
    on_event_loop: bool


def write_model(folder: Path, tokenizer: Any, following: Mapping[int, int]) -> None:
    """Save a Llama of two layers that says `following[token]` after `token`, however long the text before it is."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=HIDDEN,
            intermediate_size=HIDDEN,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=2048,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )
    with torch.no_grad():
        for layer in model.model.layers:  # the layers compute and add nothing
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        for weight in (model.model.embed_tokens.weight, model.lm_head.weight):
            weight.zero_()
        for n, (token, next_token) in enumerate(following.items()):
            model.model.embed_tokens.weight[token, n] = model.lm_head.weight[next_token, n] = 1
    model.config.save_pretrained(folder)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)


def read_lines(folder: Path, name: str) -> list[str]:
    """Return the lines of one of the files that say what has happened."""
    path = folder / name
    complete, _, _ = path.read_text("utf-8").rpartition("\n") if path.exists() else ("", "", "")
    return complete.splitlines()


def _write(folder: Path, name: str, line: str) -> None:
    with (folder / name).open("a", encoding="utf-8") as file:
        file.write(" ".join(line.split()) + "\n")


def read_runs(folder: Path) -> list[Run]:
    """Return the runs of the model so far."""
    return [Run(**json.loads(line)) for line in read_lines(folder, RUNS)]


def write_script(path: Path, **settings: Any) -> None:
    """Write the script at `path`, which runs the learner's as `watched` with these `settings` says."""
    path.write_text(_SCRIPT.format(project=str(Path(__file__).parents[1]), settings=settings), "utf-8")


def watched(*, script: str, folder: str, port: int, fails: int, holds: int, limit: float) -> Any:
    """Prepare this process to run the learner's script watched, and return its code.

    - `folder`: the folder of the tiny model. `fails`, `holds`: its tokens that the module's docstring explains.
    - `port`: the port that the service listens on, whatever the script says.
    - `limit`: the seconds after which a service that does not answer is ended.

    The code must run in the globals of ``__main__``, because a process that Jina starts anew, instead of by a fork,
    looks for the Executor's class there. Such a process runs this function too.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tiny model is exact in fp32 on the CPU
    _watch_model(Path(folder), fails, holds)
    _serve_on(port)
    _watch_requests(script, Path(folder))
    main = sys.modules["__main__"]
    if main.__name__ == "__main__":  # not in a process that Jina has started anew
        threading.Thread(target=_end_if_not_ready, args=(port, limit, Path(folder)), daemon=True).start()
    sys.argv[0] = script
    if multiprocessing.get_start_method() == "fork":  # otherwise __file__ is what Jina's processes run
        main.__file__ = script
    sys.path.insert(0, os.path.dirname(script))
    return compile(Path(script).read_bytes(), script, "exec", dont_inherit=True)


def _watch_model(folder: Path, fails: int, holds: int) -> None:
    """Write down each run of a Llama in this process and its forks, and let it fail or wait."""
    from transformers.models.llama.modeling_llama import LlamaModel

    forward = LlamaModel.forward
    parameters = inspect.signature(forward)

    @functools.wraps(forward)
    def watched_forward(*arguments: Any, **options: Any) -> Any:
        given = parameters.bind(*arguments, **options).arguments
        ids, cache = given["input_ids"].tolist(), given.get("past_key_values")
        run = Run(
            ids=sum(ids, []),
            last=[row[-1] for row in ids],
            cache=0 if cache is None else int(cache.get_seq_length()),
            on_event_loop=asyncio._get_running_loop() is not None,
        )
        _write(folder, RUNS, json.dumps(asdict(run)))
        if fails in run.last:
            raise RuntimeError("CUDA out of memory")
        while holds in run.last and (folder / HOLD).exists():
            (folder / HELD).touch()
            time.sleep(0.01)
        return forward(*arguments, **options)

    LlamaModel.forward = watched_forward


def _serve_on(port: int) -> None:
    """Make every Deployment of this process listen on `port`."""
    from ._jina import Deployment

    create = Deployment.__init__

    @functools.wraps(create)
    def create_on_port(*arguments: Any, **options: Any) -> None:
        create(*arguments, **{**options, "host": HOST, "port": port})

    Deployment.__init__ = create_on_port


def _watch_requests(script: str, folder: Path) -> None:
    """Write down when requests begin and end, and the script's errors, because Jina's gateway hides them."""
    from ._jina import Deployment, WorkerRequestHandler

    def tell(kind: Any, error: Any, trace: Any) -> None:
        lines = [frame.lineno for frame in traceback.extract_tb(trace) if frame.filename == script]
        if isinstance(error, SyntaxError) and error.filename == script:
            lines, error = [error.lineno], error.msg
        _write(folder, ERRORS, (f"Line {lines[-1]}: " if lines else "") + f"{kind.__name__}: {error}")

    leave = Deployment.__exit__

    def told_exit(deployment: Any, kind: Any, *exception: Any) -> Any:
        if kind is None:
            _write(folder, ERRORS, NO_BLOCK)
        return leave(deployment, kind, *exception)

    load, stream = WorkerRequestHandler._load_executor, WorkerRequestHandler.stream_doc

    def told_load(*arguments: Any, **options: Any) -> None:
        try:
            load(*arguments, **options)
        except Exception as error:
            tell(type(error), error, error.__traceback__)
            raise

    async def told_stream(*arguments: Any, **options: Any) -> AsyncIterator[Any]:
        _write(folder, REQUESTS, BEGAN)
        try:
            async with aclosing(stream(*arguments, **options)) as replies:
                async for reply in replies:
                    yield reply
        except Exception as error:
            tell(type(error), error, error.__traceback__)
            raise
        finally:
            _write(folder, REQUESTS, ENDED)

    Deployment.__exit__ = told_exit
    WorkerRequestHandler._load_executor, WorkerRequestHandler.stream_doc = told_load, told_stream
    sys.excepthook = tell
    threading.excepthook = lambda failed: tell(failed.exc_type, failed.exc_value, failed.exc_traceback)


def _end_if_not_ready(port: int, limit: float, folder: Path) -> None:
    """End this process, with those that it has started, if its service does not answer within `limit` seconds."""
    end = time.monotonic() + limit
    while not (is_listening(HOST, port) and is_ready(HOST, port)):
        if time.monotonic() > end:
            _write(folder, ERRORS, f"It did not answer within {limit:.0f} seconds.")
            kill(psutil.Process().children(recursive=True))
            os._exit(1)
        time.sleep(0.05)
