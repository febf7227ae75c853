"""The Llama family on a CPU: Llama, SmolLM, Mistral, Qwen 2 and Qwen 3.

`Llama` reads the files that `transformers` reads, and computes the same logits. ONNX Runtime computes them, in graphs
that are made once, while the model loads: one for all that happens between the attention of a layer and that of the
next, and one for the attention itself, the only operation that mixes tokens.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from weakref import WeakKeyDictionary

import numpy
import torch
from onnx import TensorProto
from safetensors import safe_open
from torch import Tensor

from .errors import ModelUnavailable
from .graphs import MICROSOFT, Graph
from .kv_cache import KVCache
from .model_files import CONTEXT_LENGTH, head_size_of, missing_weights, rope_of
from .packed import Chunk, forward_packed, last_tokens, require_finite
from .prefill import BLOCK

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Llama:
    """A model of the Llama family, as `helpers.packed.PackedModel`.

    - `config`: the content of config.json. `helpers.model_files.is_llama_family` must accept it.
    - `files`: the safetensors files with the weights. The embeddings stay there.
    - `precision`: ``fp32`` or ``int8``.

    Only two layers at a time are in memory more than once. Raise `ModelUnavailable` if a tensor is missing, has another
    shape than `config` says, or contains NaN or infinity.
    """

    def __init__(self, config: Mapping[str, Any], files: Sequence[str], precision: str) -> None:
        self.precision = precision
        self.num_embeddings: int = config["vocab_size"]
        self._heads: int = config["num_attention_heads"]
        self._kv_heads: int = config.get("num_key_value_heads") or self._heads
        self._head_size = head_size_of(config)
        self._hidden: int = config["hidden_size"]
        self._epsilon: float = config.get("rms_norm_eps", 1e-6)
        self._attention = _Attention(config, self._heads, self._kv_heads, self._head_size)
        weights = _Weights(files)
        embeddings, head = EMBEDDINGS, HEAD
        if config.get("tie_word_embeddings") and HEAD not in weights:
            head = EMBEDDINGS
        elif config.get("tie_word_embeddings") and EMBEDDINGS not in weights:
            embeddings = HEAD
        weights.require(self._tensor_shapes(config, embeddings, head))
        self._embeddings = weights[embeddings]
        head_weight = self._embeddings if head == embeddings else weights[head]
        layers = config["num_hidden_layers"]
        with ThreadPoolExecutor(2, "make-graphs") as pool:
            making_head = pool.submit(self._make_head, weights["model.norm.weight"], head_weight)
            self._between = list(pool.map(lambda n: self._make_between(weights, n, layers), range(layers + 1)))
            self._head = making_head.result()

    def _tensor_shapes(self, config: Mapping[str, Any], embeddings: str, head: str) -> dict[str, tuple[int, ...]]:
        """Return the tensors that the model must have, and their shapes."""
        kind, bias, mlp_bias = config["model_type"], bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
        hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
        q, k = self._heads * self._head_size, self._kv_heads * self._head_size
        linear = {  # outputs, inputs, and whether there is a bias
            "self_attn.q_proj": (q, hidden, bias or kind == "qwen2"),
            "self_attn.k_proj": (k, hidden, bias or kind == "qwen2"),
            "self_attn.v_proj": (k, hidden, bias or kind == "qwen2"),
            "self_attn.o_proj": (hidden, q, bias),
            "mlp.gate_proj": (inner, hidden, mlp_bias),
            "mlp.up_proj": (inner, hidden, mlp_bias),
            "mlp.down_proj": (hidden, inner, mlp_bias),
        }
        in_layer: dict[str, tuple[int, ...]] = dict.fromkeys(
            ["input_layernorm.weight", "post_attention_layernorm.weight"], (hidden,)
        )
        if kind == "qwen3":
            in_layer |= {"self_attn.q_norm.weight": (self._head_size,), "self_attn.k_norm.weight": (self._head_size,)}
        for name, (outputs, inputs, has_bias) in linear.items():
            in_layer[f"{name}.weight"] = (outputs, inputs)
            if has_bias:
                in_layer[f"{name}.bias"] = (outputs,)
        shapes = {embeddings: (vocabulary, hidden), head: (vocabulary, hidden), "model.norm.weight": (hidden,)}
        for n in range(config["num_hidden_layers"]):
            shapes |= {f"model.layers.{n}.{name}": shape for name, shape in in_layer.items()}
        return shapes

    def _make_head(self, norm: Tensor, weight: Tensor) -> Any:
        """Return the graph from hidden states to logits."""
        graph = Graph(self.precision)
        rows = graph.norm(graph.input("hidden", "tokens", self._hidden), norm, self._epsilon)
        return graph.session(graph.linear(rows, weight))

    def _make_between(self, weights: _Weights, n: int, layers: int) -> Any:
        """Return the graph from the attention of layer n - 1, if any, to that of layer n, if any.

        Its inputs are the hidden states and what the tokens have attended to. It returns the hidden states, and what
        the attention of layer n reads: q, k and v of all heads, (tokens, (heads + 2 * KV heads) * head size).
        """
        graph = Graph(self.precision)
        hidden = graph.input("hidden", "tokens", self._hidden)
        prefix = f"model.layers.{n}"
        if n == 0:
            rows = graph.norm(hidden, weights[f"{prefix}.input_layernorm.weight"], self._epsilon)
        else:
            hidden, change = self._add_mlp(graph, weights, f"model.layers.{n - 1}", hidden)
            if n == layers:
                return graph.session(graph.node("Add", hidden, change))
            norm = weights[f"{prefix}.input_layernorm.weight"]
            hidden, rows = graph.sum_and_norm(hidden, change, norm, self._epsilon)
        qkv = graph.linear(rows, *weights.of_linear(*(f"{prefix}.self_attn.{name}_proj" for name in "qkv")))
        if (q_norm := weights.get(f"{prefix}.self_attn.q_norm.weight")) is not None:
            qkv = self._add_head_norms(graph, qkv, q_norm, weights[f"{prefix}.self_attn.k_norm.weight"])
        return graph.session(qkv) if n == 0 else graph.session(hidden, qkv)

    def _add_mlp(self, graph: Graph, weights: _Weights, prefix: str, hidden: str) -> tuple[str, str]:
        """Add what a layer does after its attention. Return the hidden states, and what the MLP adds to them."""
        attended = graph.input("attended", "tokens", self._heads * self._head_size)
        output = graph.linear(attended, *weights.of_linear(f"{prefix}.self_attn.o_proj"))
        norm = weights[f"{prefix}.post_attention_layernorm.weight"]
        hidden, rows = graph.sum_and_norm(hidden, output, norm, self._epsilon)
        gate, up = (graph.linear(rows, *weights.of_linear(f"{prefix}.mlp.{name}_proj")) for name in ("gate", "up"))
        gate = graph.node("QuickGelu", gate, domain=MICROSOFT, alpha=1.0)  # with this alpha, it is SiLU
        return hidden, graph.linear(graph.node("Mul", gate, up), *weights.of_linear(f"{prefix}.mlp.down_proj"))

    def _add_head_norms(self, graph: Graph, qkv: str, q_norm: Tensor, k_norm: Tensor) -> str:
        """Return q, k and v with a norm for each head of q and k. Qwen 3 has them."""
        sizes = [heads * self._head_size for heads in (self._heads, self._kv_heads, self._kv_heads)]
        parts = ["q", "k", "v"]
        graph.node("Split", qkv, graph.integers(*sizes), outputs=parts, axis=-1)
        for index, weight in enumerate((q_norm, k_norm)):
            heads = graph.node("Reshape", parts[index], graph.integers(0, -1, self._head_size))
            heads = graph.norm(heads, weight, self._epsilon)
            parts[index] = graph.node("Reshape", heads, graph.integers(0, sizes[index]))
        return graph.node("Concat", *parts, axis=-1)

    def prepare(self) -> KVCache:
        """Read a prompt, and return its KV cache.

        From now on, torch uses one thread here: a second one would take a core from ONNX Runtime. Raise
        `ModelUnavailable` if reading fails, or if the logits are NaN or infinite.
        """
        _use_one_thread()
        cache = KVCache(4)
        try:
            logits, _ = forward_packed(self, [(cache, [3, 1, 4, 1])])
        except Exception as error:
            raise ModelUnavailable(
                f"The model failed at its first step ({type(error).__name__}: {error}). "
                "Close other programs and try again, or choose another model."
            ) from error
        require_finite(logits, type(self).__name__, self.precision)
        return cache

    def logits(self, ids: Tensor, chunks: list[Chunk]) -> Tensor:
        """Return the logits after the last token of each chunk, (chunks, vocabulary)."""
        return self.logits_of(self.hidden_states(ids, chunks)[last_tokens(chunks)])

    def logits_of(self, hidden: Tensor) -> Tensor:
        """Return the logits for hidden states, (tokens, hidden size). They are NaN if a hidden state is not finite."""
        logits = torch.from_numpy(self._head.run(None, {"hidden": hidden.numpy()})[0])
        is_finite = hidden.isfinite().all(dim=-1)
        if not is_finite.all():
            logits[~is_finite] = math.nan  # 8 bit would hide it
        return logits

    def hidden_states(self, ids: Tensor, chunks: list[Chunk]) -> Tensor:
        """Return what the layers make of all tokens, (tokens, hidden size)."""
        hidden = self._embeddings[ids].float().numpy()
        first, *others = self._between
        (qkv,) = first.run(None, {"hidden": hidden})
        readers = self._attention.readers(chunks, len(others))
        for n, graph in enumerate(others):
            attended: Any = numpy.empty((len(qkv), self._attention.width), numpy.float32)
            for reader in readers:
                reader.attend(n, qkv, attended)
            hidden, *rest = graph.run(None, {"hidden": hidden, "attended": attended})
            if rest:
                (qkv,) = rest
        return torch.from_numpy(hidden)


class _Attention:
    """The attention of all layers: it rotates q and k, appends k and v to the KV caches, and attends."""

    def __init__(self, config: Mapping[str, Any], heads: int, kv_heads: int, size: int) -> None:
        self._heads, self._kv_heads, self._size = heads, kv_heads, size
        self.width, self.qkv_width = heads * size, (heads + 2 * kv_heads) * size
        frequencies, magnitude = _rotary_frequencies(config, size)
        angles = torch.outer(torch.arange(config[CONTEXT_LENGTH], dtype=torch.float32), frequencies)
        self._rotations = [(part * magnitude).numpy() for part in (angles.cos(), angles.sin())]
        self.sessions = {slots: self._make_session(slots) for slots in (1, _SLOTS)}
        self._groups: list[_Group] = []

    def _make_session(self, slots: int) -> Any:
        """Return the graph for the tokens of one sequence, or for one token of each of several sequences."""
        graph = Graph()
        qkv = graph.input("qkv", 1, "tokens", self.qkv_width)
        rotations = [graph.input(name, "positions", self._size // 2) for name in _ROTATIONS]
        parts, attended = [qkv], ["attended"]
        if slots > 1:
            parts, attended = ([f"{name}{slot}" for slot in range(slots)] for name in ("qkv", "attended"))
            graph.node("Split", qkv, graph.integers(*[1] * slots), outputs=parts, axis=1)
        stored = []
        for slot in range(slots):
            inputs = [
                *(parts[slot], "", ""),  # holds q, k and v
                *(graph.input(f"{name}{slot}", 1, self._kv_heads, "capacity", self._size) for name in _MEMORY),
                graph.input(f"last{slot}", 1, type=TensorProto.INT32),
                graph.input(f"length{slot}", type=TensorProto.INT32),
            ]
            outputs = [attended[slot], *(f"new_{name}{slot}" for name in _MEMORY)]
            counts = {"num_heads": self._heads, "kv_num_heads": self._kv_heads, "do_rotary": 1}
            graph.node("GroupQueryAttention", *inputs, *rotations, outputs=outputs, domain=MICROSOFT, **counts)
            stored += outputs[1:]
        if slots > 1:
            graph.node("Concat", *attended, outputs=["attended"], axis=1)
        return graph.session("attended", *stored)

    def readers(self, chunks: Sequence[Chunk], layers: int) -> list[_Tokens | _Group]:
        """Return what attends with the tokens of these chunks in the next step.

        Raise `IndexError` if they do not fit into a KV cache.
        """
        several: list[_Tokens] = []
        row_of: dict[KVCache, int] = {}
        end = 0
        for chunk in chunks:
            chunk.cache.require_room(chunk.n)
            start, end = end, end + chunk.n
            if chunk.n > 1:
                several.append(_Tokens(self, chunk, start))
            else:
                row_of[chunk.cache] = start
        slots = _SLOTS if len(row_of) >= _ENOUGH_FOR_A_GROUP else 1
        groups = [group for group in self._groups if group.slots == slots]
        for group in groups:
            group.keep(row_of)
        placed = {cache for group in groups for cache in group.slot_of}
        for cache in row_of:
            if cache not in placed and not any(group.add(cache) for group in groups):
                groups.append(_Group(self, slots, layers))
                groups[-1].add(cache)
        self._groups = [group for group in groups if group.slot_of]
        for group in self._groups:
            group.prepare(row_of)
        return [*several, *self._groups]

    def bind(self, slots: int, qkv: Any, attended: Any) -> Any:
        """Return a binding, which tells ONNX Runtime where its inputs and outputs lie. The caller keeps the arrays."""
        binding = self.sessions[slots].io_binding()
        binding.bind_input("qkv", "cpu", 0, numpy.float32, (1, *qkv.shape), qkv.ctypes.data)
        for name, array in zip(_ROTATIONS, self._rotations, strict=True):
            binding.bind_input(name, "cpu", 0, numpy.float32, array.shape, array.ctypes.data)
        binding.bind_output("attended", "cpu", 0, numpy.float32, (1, *attended.shape), attended.ctypes.data)
        return binding

    def bind_slot(self, binding: Any, slot: int, cache: KVCache, layer: int, length: Any, last: Any) -> None:
        """Bind the keys and values of a sequence, where the new ones are written too, and the places of its tokens."""
        stored = cache.reserve(layer, heads=2 * self._kv_heads, size=self._size)
        shape = 1, self._kv_heads, cache.capacity, self._size
        for name, address in zip(_MEMORY, (stored.data_ptr(), stored.data_ptr() + stored.nbytes // 2), strict=True):
            binding.bind_input(f"{name}{slot}", "cpu", 0, numpy.float32, shape, address)
            binding.bind_output(f"new_{name}{slot}", "cpu", 0, numpy.float32, shape, address)
        binding.bind_input(f"length{slot}", "cpu", 0, numpy.int32, (), length.ctypes.data)
        binding.bind_input(f"last{slot}", "cpu", 0, numpy.int32, (1,), last.ctypes.data)


_ROTATIONS, _MEMORY = ("cos", "sin"), ("keys", "values")
_SLOTS = 8
_ENOUGH_FOR_A_GROUP = 4
"""From so many sequences on, one run for all slots takes less time than a run for each. An empty slot costs little."""


class _Tokens:
    """Attends with several tokens of a sequence. `start` is the row of the first one."""

    def __init__(self, attention: _Attention, chunk: Chunk, start: int) -> None:
        self._attention, self._chunk, self._start = attention, chunk, start

    def attend(self, layer: int, qkv: Any, attended: Any) -> None:
        """Write what the tokens attend to into their rows, (tokens, heads * head size).

        `qkv`: q, k and v of all tokens, (tokens, (heads + 2 * KV heads) * head size).
        """
        first_row = self._start - self._chunk.positions.start
        for block in _blocks(self._chunk.positions):
            rows = slice(first_row + block.start, first_row + block.stop)
            length, last = (numpy.array([end], numpy.int32) for end in (block.stop, block.stop - 1))
            binding = self._attention.bind(1, qkv[rows], attended[rows])
            self._attention.bind_slot(binding, 0, self._chunk.cache, layer, length, last)
            self._attention.sessions[1].run_with_iobinding(binding)


class _Group:
    """Attends with one token of each of up to `slots` sequences, in arrays that stay where they are: binding takes
    longer than attending. A sequence keeps its slot while it decodes. An empty slot has a KV cache of its own.
    """

    def __init__(self, attention: _Attention, slots: int, layers: int) -> None:
        self.slots = slots
        self.slot_of: WeakKeyDictionary[KVCache, int] = WeakKeyDictionary()
        self._attention, self._run = attention, attention.sessions[slots].run_with_iobinding
        self._qkv: Any = numpy.zeros((slots, attention.qkv_width), numpy.float32)
        self._attended: Any = numpy.empty((slots, attention.width), numpy.float32)
        self._length: Any = numpy.empty(slots, numpy.int32)
        self._last: Any = numpy.empty(slots, numpy.int32)
        self._bindings = [attention.bind(slots, self._qkv, self._attended) for _ in range(layers)]
        self._unused, self._empty = KVCache(1), set[int]()
        self._taken: list[int] = []
        self._rows: list[int] = []

    def keep(self, caches: Container[KVCache]) -> None:
        """Free the slots of all sequences whose KV caches are not among these."""
        for cache in [cache for cache in self.slot_of if cache not in caches]:
            del self.slot_of[cache]

    def add(self, cache: KVCache) -> bool:
        """Give a sequence a slot. Return False if all are taken."""
        taken = set(self.slot_of.values())
        slot = next((slot for slot in range(self.slots) if slot not in taken), None)
        if slot is None:
            return False
        self.slot_of[cache] = slot
        self._empty.discard(slot)
        self._bind(slot, cache)
        return True

    def prepare(self, row_of: Mapping[KVCache, int]) -> None:
        """Look up the rows and the positions of the next tokens."""
        for slot in {*range(self.slots)} - {*self.slot_of.values()} - self._empty:
            self._empty.add(slot)
            self._bind(slot, self._unused)
            self._length[slot], self._last[slot] = 1, 0
        self._taken, self._rows = list(self.slot_of.values()), [row_of[cache] for cache in self.slot_of]
        self._last[self._taken] = [cache.length for cache in self.slot_of]
        self._length[self._taken] = [cache.length + 1 for cache in self.slot_of]

    def attend(self, layer: int, qkv: Any, attended: Any) -> None:
        """Do for one token of each sequence what `_Tokens.attend` does."""
        self._qkv[self._taken] = qkv[self._rows]
        self._run(self._bindings[layer])
        attended[self._rows] = self._attended[self._taken]

    def _bind(self, slot: int, cache: KVCache) -> None:
        places = self._length[slot:], self._last[slot:]
        for layer, binding in enumerate(self._bindings):
            self._attention.bind_slot(binding, slot, cache, layer, *places)


def _use_one_thread() -> None:
    """Let torch use one thread in the calling thread, and as many as now in all others."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    restoring = threading.Thread(target=torch.set_num_threads, args=(before,))  # OpenMP counts for each thread
    restoring.start()
    restoring.join()


def _blocks(positions: range) -> list[range]:
    """Divide a chunk at multiples of `BLOCK`, so that its tokens attend in the same blocks whatever the chunk is."""
    begins = [positions.start, *range((positions.start // BLOCK + 1) * BLOCK, positions.stop, BLOCK)]
    return [range(*ends) for ends in itertools.pairwise([*begins, positions.stop])]


def _rotary_frequencies(config: Mapping[str, Any], head_size: int) -> tuple[Tensor, float]:
    """Return the angle by which each position rotates a pair further, (head size / 2,), and a factor for the result."""
    kind, rope = rope_of(config)
    if kind == "default":
        theta = rope.get("rope_theta") or config.get("rope_theta", 10_000.0)
        return theta ** (torch.arange(0, head_size, 2, dtype=torch.float32) / -head_size), 1.0
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    return ROPE_INIT_FUNCTIONS[kind](AutoConfig.for_model(**config), torch.device("cpu"))


class _Weights:
    """The tensors in safetensors files, by name. Each is read when it is asked for."""

    def __init__(self, files: Sequence[str]) -> None:
        opened = [safe_open(file, "pt") for file in files]
        self._file_of = {name: file for file in opened for name in file.keys()}  # noqa: SIM118

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def require(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise `ModelUnavailable` if a tensor is missing or has another shape."""
        if missing := [name for name in shapes if name not in self]:
            raise missing_weights(missing)
        for name, shape in shapes.items():
            if (found := tuple(self._file_of[name].get_slice(name).get_shape())) != shape:
                raise ModelUnavailable(
                    f"The model's tensor {name} has the shape {found}, and by its config.json {shape}. "
                    "Download the model again."
                )

    def of_linear(self, *names: str) -> tuple[Tensor, Tensor | None]:
        """Return the weights and the biases, if any, of several layers as if they were one."""
        biases = [bias for name in names if (bias := self.get(f"{name}.bias")) is not None]
        return torch.cat([self[f"{name}.weight"] for name in names]), torch.cat(biases) if biases else None

    def get(self, name: str) -> Tensor | None:
        """Return a tensor, or None if there is none of that name."""
        return self[name] if name in self else None  # noqa: SIM401

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor. Raise `ModelUnavailable` if it holds NaN or infinity, which 8 bit would hide."""
        tensor = self._file_of[name].get_tensor(name)
        if not tensor.isfinite().all():
            raise ModelUnavailable(f"The model's tensor {name} contains NaN or infinity. Download the model again.")
        return tensor
