"""The steps of `llama_shape.py`. Each runs in a process of its own, and reports each result as soon as it has it.

    python llama_shape_steps.py JOB REPORT      JOB: a step's name and arguments, as JSON; REPORT: a file

A step yields records, dictionaries that become lines of JSON in the file. A record is one of these:

- ``{"machine": text}``: the names of the device and the versions;
- ``{"note": text}``: something that the results must mention;
- ``{"failure": text}``: a measurement that is missing, and why;
- ``{"check": text, "passed": bool}``: a comparison of the engine with `generate`;
- ``{"precision", "backend", "sequences", "runs", "memory"}``: the arrival times of each round, and bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib.metadata
import itertools
import json
import os
import platform
import random
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from measurements import Arrivals

ENGINE, GENERATE, VLLM = "this engine", "generate", "vLLM"
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
PRECISIONS = [*DTYPES, "int8-6.0", "int8-0.0", "nf4"]
"""int8-6.0 and int8-0.0 are bitsandbytes' int8 with that `llm_int8_threshold`; 6.0 is its default."""
VOCABULARY, CONTEXT_LENGTH = 32_000, 4096
OUTLIERS, OUTLIER_FACTOR = 6, 20.0
"""The dimensions of the hidden state that are much larger than the others, and how much. A model of 7B parameters has
6 (LLM.int8(), arXiv 2208.07339, section 4). bitsandbytes multiplies those above its threshold in 16 bit."""
STANDARD_DEVIATION = 0.01
"""Of the weights. With transformers' 0.02, hundreds of the MLP's activations of each token would be outliers too."""
SWITCH_INTERVAL = 0.0001
"""Seconds after which a thread releases Python's lock, as in the service."""
WARM_UP_TOKENS = 4
CHECK_TOKENS = 24
TOLERANCES = {"fp32": 1e-4, "fp16": 1e-2}
"""How much the engine's logits may differ from those of `generate`, relative to their norm."""

Record = dict[str, Any]
Prompts = list[list[int]]
Answer = Callable[[Prompts, int], Arrivals]
"""Continue all prompts at once, each by that number of tokens. Return when the tokens arrived."""


class Scale(NamedTuple):
    """The size of the measurements. Lengths are in tokens."""

    sequences: Sequence[int]
    prompt_tokens: int
    tokens: int
    rounds: int


def build(folder: str, shape: dict[str, int]) -> Iterator[Record]:
    """Save a Llama of this shape with random weights in fp16, and a tokenizer of its kind if one is installed.

    `folder` must not exist. It appears when it is complete.
    """
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from helpers.bundled import llama_tokenizer
    from helpers.errors import ModelUnavailable

    config = LlamaConfig(
        **shape,
        vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT_LENGTH,
        initializer_range=STANDARD_DEVIATION,
        eos_token_id=None,  # no answer ends early
    )
    torch.manual_seed(0)
    with torch.device(_device()):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    for name, parameter in model.named_parameters():
        if name.endswith("layernorm.weight"):
            parameter.data[:OUTLIERS] = OUTLIER_FACTOR
    unfinished = Path(f"{folder}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # left by a step that was stopped
    model.save_pretrained(unfinished, max_shard_size="2GB")
    try:
        llama_tokenizer().save_pretrained(unfinished)
    except ModelUnavailable as reason:
        yield {"note": f"The model was saved without a tokenizer, which no measurement needs. {reason}"}
    unfinished.rename(folder)


def check(folder: str, layers: int) -> Iterator[Record]:
    """Compare the engine with `generate` on prompts of several lengths, with the first `layers` layers of the model.

    In fp32 the greedy ids must be equal. In fp32 and fp16 the logits must be close, for the same ids.
    """
    import torch

    from helpers.engine import Engine
    from helpers.kv_cache import KVCache
    from helpers.options import SamplingParams
    from helpers.packed import forward_packed
    from helpers.packed_attention import TransformersModel

    prompts = [random_prompt(length, seed=length) for length in (5, 40, 17, 64)]
    for precision, tolerance in TOLERANCES.items():
        model = load(folder, precision, num_hidden_layers=layers)
        greedy = [greedy_answer(model, prompt) for prompt in prompts]
        engine = Engine(TransformersModel(model), eos_token_ids=(), context_length=CONTEXT_LENGTH)
        with contextlib.closing(engine):
            streams = [engine.submit(prompt, SamplingParams(max_tokens=CHECK_TOKENS)) for prompt in prompts]
            answers = [list(stream) for stream in streams]
        equal = sum(answer == ids for answer, (ids, _) in zip(answers, greedy, strict=True))

        caches = [KVCache(len(prompt) + CHECK_TOKENS) for prompt in prompts]
        half = [(cache, prompt[: len(prompt) // 2]) for cache, prompt in zip(caches, prompts, strict=True)]
        forward_packed(engine.model, half)
        unread = [prompt[len(prompt) // 2 :] for prompt in prompts]
        difference = 0.0
        for n in range(CHECK_TOKENS):
            logits, _ = forward_packed(engine.model, list(zip(caches, unread, strict=True)))
            expected = torch.stack([logits_of_step[n] for _, logits_of_step in greedy])
            error = (logits.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
            difference = max(difference, error.max().item())
            unread = [[ids[n]] for ids, _ in greedy]
        yield {
            "check": f"{precision}, {model.device.type}, {layers} layers: {equal} of {len(prompts)} greedy answers of "
            f"{CHECK_TOKENS} tokens equal generate's; the logits differ by at most {difference:.1e} of their norm "
            f"(allowed: {tolerance:.0e})",
            "passed": difference <= tolerance and (precision != "fp32" or equal == len(prompts)),
        }


def greedy_answer(model: Any, prompt: list[int]) -> tuple[list[int], Any]:
    """Return the ids of `generate` for one prompt alone, and the logits of each step in fp32, (tokens, vocabulary)."""
    import torch

    rows = torch.tensor([prompt], device=model.device)
    output = model.generate(
        rows,
        attention_mask=torch.ones_like(rows),
        max_new_tokens=CHECK_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return output.sequences[0, len(prompt) :].tolist(), torch.cat(output.logits).float()


def measure(folder: str, precision: str, scale: Sequence[Any]) -> Iterator[Record]:
    """Measure `generate`, and then the engine, which changes the model, at one precision."""
    sys.setswitchinterval(SWITCH_INTERVAL)
    model = load(folder, precision)
    yield {"machine": _machine()}

    @contextlib.contextmanager
    def start_engine(n: int) -> Iterator[Answer]:
        engine = _engine_for(model, n, Scale(*scale))
        with contextlib.closing(engine):
            yield lambda prompts, tokens: engine_arrivals(engine, prompts, tokens)

    @contextlib.contextmanager
    def start_generate(n: int) -> Iterator[Answer]:
        yield lambda prompts, tokens: generate_arrivals(model, prompts, tokens)

    yield from _cells(precision, GENERATE, start_generate, Scale(*scale))
    yield from _cells(precision, ENGINE, start_engine, Scale(*scale))


def measure_vllm(folder: str, precision: str, scale: Sequence[Any]) -> Iterator[Record]:
    """Measure vLLM at one precision without quantisation, through the engine below its server."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # so that this process's torch knows the memory
    import vllm

    sequences, prompt_tokens, tokens, _ = scale
    engine = vllm.LLMEngine.from_engine_args(
        vllm.EngineArgs(
            model=folder,
            skip_tokenizer_init=True,
            dtype=DTYPES[precision],
            max_model_len=prompt_tokens + tokens,
            max_num_seqs=max(sequences),
            enable_prefix_caching=False,
        )
    )
    numbers = itertools.count()

    def answer(prompts: Prompts, tokens: int) -> Arrivals:
        params = vllm.SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
        arrivals: dict[str, list[float]] = {}
        started = time.perf_counter()
        for prompt in prompts:
            name = str(next(numbers))
            arrivals[name] = []
            engine.add_request(name, {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                times = arrivals[output.request_id]
                new = len(output.outputs[0].token_ids) - len(times)
                times += [time.perf_counter() - started] * new
        return list(arrivals.values())

    @contextlib.contextmanager
    def start(n: int) -> Iterator[Answer]:
        yield answer

    yield {"note": f"vLLM {vllm.__version__} takes the memory for its KV cache when it starts."}
    yield from _cells(precision, VLLM, start, Scale(*scale))


def _cells(
    precision: str, backend: str, start: Callable[[int], contextlib.AbstractContextManager[Answer]], scale: Scale
) -> Iterator[Record]:
    """Measure a backend with each number of sequences. `start` starts it for that number.

    If one of them fails, as it does without enough memory, report that and go on with the next.
    """
    seeds = itertools.count()
    for n in scale.sequences:
        _reset_peak_memory()
        try:
            with start(n) as answer:
                runs = []
                for tokens in [min(WARM_UP_TOKENS, scale.tokens)] + [scale.tokens] * scale.rounds:
                    prompts = [random_prompt(scale.prompt_tokens, seed=next(seeds)) for _ in range(n)]
                    runs.append(answer(prompts, tokens))
                memory = _peak_memory()
        except Exception as error:  # each backend raises its own classes
            traceback.print_exc()
            yield {"failure": f"{precision}, {backend}, {n} sequences: {type(error).__name__}: {str(error)[:300]}"}
        else:
            yield {"precision": precision, "backend": backend, "sequences": n, "runs": runs[1:], "memory": memory}


def random_prompt(length: int, *, seed: int) -> list[int]:
    """Return the beginning-of-sequence id and random ids, `length` together."""
    return [1, *random.Random(seed).choices(range(3, VOCABULARY), k=length - 1)]


def load(folder: str, precision: str, **config: Any) -> Any:
    """Load the model onto the GPU, or onto the CPU if there is none. `config` changes its configuration."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    # bitsandbytes' int8 computes in float16. It casts anything else for each product, and logs a warning each time.
    dtype, quantization = torch.float16, None
    if precision.startswith("int8"):
        quantization = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=float(precision.removeprefix("int8-")))
    elif precision == "nf4":
        if not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 0):
            dtype = torch.bfloat16
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    else:
        dtype = getattr(torch, DTYPES[precision])
    options = {} if quantization is None else {"quantization_config": quantization}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map={"": _device()}, **options, **config)
    return model.eval()


def _engine_for(model: Any, n: int, scale: Scale) -> Any:
    """Start an engine whose KV cache holds `n` sequences, and nothing of earlier ones beside them."""
    from helpers.engine import Engine
    from helpers.options import EngineArgs
    from helpers.packed_attention import TransformersModel

    config = model.config
    bytes_per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    cache_memory = n * (scale.prompt_tokens + scale.tokens) * bytes_per_token
    return Engine(
        TransformersModel(model),
        eos_token_ids=(),
        context_length=CONTEXT_LENGTH,
        args=EngineArgs(max_num_seqs=n, cache_memory=cache_memory),
    )


def engine_arrivals(engine: Any, prompts: Prompts, tokens: int) -> Arrivals:
    """Return when each token arrives in an event loop, as in the service."""
    from helpers.options import SamplingParams

    async def read(stream: Any) -> list[float]:
        return [time.perf_counter() - started async for _ in stream]

    async def read_all() -> Arrivals:
        params = SamplingParams(max_tokens=tokens)
        return list(await asyncio.gather(*[read(engine.submit(prompt, params)) for prompt in prompts]))

    started = time.perf_counter()
    return asyncio.run(read_all())


def generate_arrivals(model: Any, prompts: Prompts, tokens: int) -> Arrivals:
    """Return when each token of one batch arrives on the CPU. The prompts have the same length."""
    import torch
    from transformers.generation.streamers import BaseStreamer

    class Clock(BaseStreamer):
        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: Any) -> None:  # the prompts first, then a token of each sequence
            self.times.append(time.perf_counter() - started)

        def end(self) -> None:
            pass

    clock, started = Clock(), time.perf_counter()
    rows = torch.tensor(prompts, device=model.device)
    model.generate(rows, attention_mask=torch.ones_like(rows), max_new_tokens=tokens, do_sample=False, streamer=clock)
    return [clock.times[1:]] * len(prompts)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _reset_peak_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak_memory() -> int:
    """Return the bytes that torch has allocated at most on the GPU; without one, the process's memory now."""
    import psutil
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss


def _machine() -> str:
    import torch

    has_gpu = torch.cuda.is_available()
    device = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}" if has_gpu else _cpu()
    packages = []
    for package in ("transformers", "bitsandbytes"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages.append(f"{package} {importlib.metadata.version(package)}")
    return ", ".join([device, f"Python {platform.python_version()}", f"torch {torch.__version__}", *packages])


def _cpu() -> str:
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"no GPU; {next(iter(names), platform.processor())}, {torch.get_num_threads()} threads"


STEPS: dict[str, Callable[..., Iterator[Record]]] = {
    "build": build,
    "check": check,
    "measure": measure,
    "measure_vllm": measure_vllm,
}


def run_step(job: str, report: str) -> None:
    """Run a step in this process. `job` is its name and arguments, as JSON; each record is a line of `report`."""
    name, arguments = json.loads(job)
    with open(report, "w", encoding="utf-8") as lines:
        for record in STEPS[name](**arguments):
            print(json.dumps(record), file=lines, flush=True)


if __name__ == "__main__":
    run_step(*sys.argv[1:])
