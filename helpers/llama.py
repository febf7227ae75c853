"""The Llama family on a CPU: Llama, SmolLM, Mistral, Qwen 2 and Qwen 3.

`Llama` reads the files that `transformers` reads, and computes the same logits. ONNX Runtime computes them, in graphs
that are made once, while the model loads: one for all that happens between the attention of a layer and that of the
next, and one for the attention itself, the only operation that mixes tokens.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Mapping, Sequence
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
        for n, graph in enumerate(others):
            attended = self._attention(n, qkv, chunks)
            hidden, *rest = graph.run(None, {"hidden": hidden, "attended": attended})
            if rest:
                (qkv,) = rest
        return torch.from_numpy(hidden)


class _Attention:
    """The attention of all layers: it rotates q and k, appends k and v to a KV cache, and attends."""

    def __init__(self, config: Mapping[str, Any], heads: int, kv_heads: int, size: int) -> None:
        self._kv_heads, self._size = kv_heads, size
        self._width, self._qkv_width = heads * size, (heads + 2 * kv_heads) * size
        self._one_token_of: WeakKeyDictionary[KVCache, _OneToken] = WeakKeyDictionary()
        graph = Graph()
        frequencies, magnitude = _rotary_frequencies(config, size)
        angles = torch.outer(torch.arange(config[CONTEXT_LENGTH], dtype=torch.float32), frequencies)
        inputs = [
            graph.input("qkv", 1, "tokens", self._qkv_width),
            *("", ""),  # qkv holds all three
            *(graph.input(name, 1, kv_heads, "capacity", size) for name in ("keys", "values")),
            graph.input("last", 1, type=TensorProto.INT32),
            graph.input("length", type=TensorProto.INT32),
            *(graph.constant(part * magnitude) for part in (angles.cos(), angles.sin())),
        ]
        outputs = ["attended", "new_keys", "new_values"]
        counts = {"num_heads": heads, "kv_num_heads": kv_heads, "do_rotary": 1}
        graph.node("GroupQueryAttention", *inputs, outputs=outputs, domain=MICROSOFT, **counts)
        self._session = graph.session(*outputs)

    def __call__(self, layer: int, qkv: Any, chunks: Sequence[Chunk]) -> Any:
        """Return what all tokens attend to, (tokens, heads * head size), as an array.

        `qkv`: q, k and v of all tokens, (tokens, (heads + 2 * KV heads) * head size), an array.
        """
        attended: Any = numpy.empty((len(qkv), self._width), numpy.float32)
        row = 0
        for chunk in chunks:
            stored = chunk.cache.reserve(layer, chunk.n, heads=2 * self._kv_heads, size=self._size)
            for positions in _blocks(chunk.positions):
                rows = slice(row, row := row + len(positions))
                if len(positions) > 1:
                    length, last = (numpy.array([end], numpy.int32) for end in (positions.stop, positions.stop - 1))
                    self._session.run_with_iobinding(self._bind(stored, qkv[rows], attended[rows], length, last))
                else:
                    self._attend_one_token(chunk, layer, stored, qkv[rows], attended[rows])
        return attended

    def _attend_one_token(self, chunk: Chunk, layer: int, stored: Tensor, qkv: Any, attended: Any) -> None:
        """Attend with one row, through arrays that stay where they are: binding takes longer than attending."""
        if chunk.cache not in self._one_token_of:
            self._one_token_of[chunk.cache] = _OneToken(self._qkv_width, self._width)
        one = self._one_token_of[chunk.cache]
        place = stored.data_ptr(), stored.shape[2]  # not the tensor, which would keep its memory
        if layer not in one.bindings or one.bindings[layer][0] != place:
            one.bindings[layer] = place, self._bind(stored, one.qkv, one.attended, one.length, one.last)
        one.qkv[...], one.length[...], one.last[...] = qkv, chunk.positions.stop, chunk.positions.stop - 1
        self._session.run_with_iobinding(one.bindings[layer][1])
        attended[...] = one.attended

    def _bind(self, stored: Tensor, qkv: Any, attended: Any, length: Any, last: Any) -> Any:
        """Return what tells ONNX Runtime where the inputs and outputs lie. The caller keeps the arrays.

        `stored`: the keys and values of a layer of a KV cache, (1, 2 * KV heads, capacity, head size). It is read, and
        the new ones are written into it.
        """
        binding = self._session.io_binding()
        binding.bind_input("qkv", "cpu", 0, numpy.float32, (1, *qkv.shape), qkv.ctypes.data)
        binding.bind_input("length", "cpu", 0, numpy.int32, (), length.ctypes.data)
        binding.bind_input("last", "cpu", 0, numpy.int32, (1,), last.ctypes.data)
        binding.bind_output("attended", "cpu", 0, numpy.float32, (1, *attended.shape), attended.ctypes.data)
        shape = 1, self._kv_heads, stored.shape[2], self._size
        for name, address in (("keys", stored.data_ptr()), ("values", stored.data_ptr() + stored.nbytes // 2)):
            binding.bind_input(name, "cpu", 0, numpy.float32, shape, address)
            binding.bind_output(f"new_{name}", "cpu", 0, numpy.float32, shape, address)
        return binding


class _OneToken:
    """The arrays for the next token of a sequence; for each layer, the place of its keys and values, and a binding."""

    def __init__(self, qkv_width: int, width: int) -> None:
        self.qkv: Any = numpy.empty((1, qkv_width), numpy.float32)
        self.attended: Any = numpy.empty((1, width), numpy.float32)
        self.length: Any = numpy.empty(1, numpy.int32)
        self.last: Any = numpy.empty(1, numpy.int32)
        self.bindings: dict[int, tuple[tuple[int, int], Any]] = {}


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
