"""The graphs of the Llama family: Llama, SmolLM, Mistral, Qwen 2 and Qwen 3.

`LlamaGraphs` reads the files that `transformers` reads. It makes a graph for all that happens between the attention of
a layer and that of the next. The attention itself, the only operation that mixes tokens, has no weights, so all layers
share its graphs: one for the tokens of one sequence, and one for a token of each of `SLOTS` sequences. This module
imports torch only for scaled rotary embeddings, so a service makes its graphs while it imports torch and Jina.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy
from onnx import TensorProto

from .graphs import MICROSOFT, Graph, in_fp32
from .model_files import CONTEXT_LENGTH, head_size_of, rope_of
from .weights import Weights

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SLOTS = 8
"""For how many sequences the attention can read one token of each in a single run. An empty slot costs little."""
ROTATIONS, MEMORY = ("cos", "sin"), ("keys", "values")


class LlamaGraphs:
    """A model of the Llama family, as graphs.

    - `config`: the content of config.json. `helpers.model_files.is_llama_family` must accept it.
    - `files`: the safetensors files with the weights.
    - `precision`: ``fp32`` or ``int8``. The embeddings keep the type in which they are stored.

    `between` are the graphs from one attention to the next, `attention` those of all attentions, by their number of
    slots, and `rotations` the cosines and sines that they read, (positions, head size / 2).

    Only two layers at a time are in memory more than once. Raise `ModelUnavailable` if a tensor is missing, has another
    shape than `config` says, or contains NaN or infinity.
    """

    def __init__(self, config: Mapping[str, Any], files: Sequence[str], precision: str) -> None:
        self.precision = precision
        self.num_embeddings: int = config["vocab_size"]
        self.heads: int = config["num_attention_heads"]
        self.kv_heads: int = config.get("num_key_value_heads") or self.heads
        self.head_size = head_size_of(config)
        self._hidden: int = config["hidden_size"]
        self._epsilon: float = config.get("rms_norm_eps", 1e-6)
        self.attention = {slots: self._make_attention(slots) for slots in (1, SLOTS)}
        weights = Weights(files)
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
            self.between = list(pool.map(lambda n: self._make_between(weights, n, layers), range(layers + 1)))
            self.head = making_head.result()
        self.rotations = _rotations(config, self.head_size)

    @property
    def width(self) -> int:
        """Return the size of the attention's output for a token, of all heads."""
        return self.heads * self.head_size

    @property
    def qkv_width(self) -> int:
        """Return the size of q, k and v of all heads."""
        return (self.heads + 2 * self.kv_heads) * self.head_size

    def embed(self, ids: Any) -> Any:
        """Return the embeddings of an array of ids, (tokens, hidden size)."""
        return in_fp32(self._embeddings[ids])

    def _tensor_shapes(self, config: Mapping[str, Any], embeddings: str, head: str) -> dict[str, tuple[int, ...]]:
        """Return the tensors that the model must have, and their shapes."""
        kind, bias, mlp_bias = config["model_type"], bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
        hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
        q, k = self.heads * self.head_size, self.kv_heads * self.head_size
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
            in_layer |= {"self_attn.q_norm.weight": (self.head_size,), "self_attn.k_norm.weight": (self.head_size,)}
        for name, (outputs, inputs, has_bias) in linear.items():
            in_layer[f"{name}.weight"] = (outputs, inputs)
            if has_bias:
                in_layer[f"{name}.bias"] = (outputs,)
        shapes = {embeddings: (vocabulary, hidden), head: (vocabulary, hidden), "model.norm.weight": (hidden,)}
        for n in range(config["num_hidden_layers"]):
            shapes |= {f"model.layers.{n}.{name}": shape for name, shape in in_layer.items()}
        return shapes

    def _make_head(self, norm: Any, weight: Any) -> Any:
        """Return the graph from hidden states to logits."""
        graph = Graph(self.precision)
        rows = graph.norm(graph.input("hidden", "tokens", self._hidden), norm, self._epsilon)
        return graph.session(graph.linear(rows, weight))

    def _make_between(self, weights: Weights, n: int, layers: int) -> Any:
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

    def _add_mlp(self, graph: Graph, weights: Weights, prefix: str, hidden: str) -> tuple[str, str]:
        """Add what a layer does after its attention. Return the hidden states, and what the MLP adds to them."""
        attended = graph.input("attended", "tokens", self.width)
        output = graph.linear(attended, *weights.of_linear(f"{prefix}.self_attn.o_proj"))
        norm = weights[f"{prefix}.post_attention_layernorm.weight"]
        hidden, rows = graph.sum_and_norm(hidden, output, norm, self._epsilon)
        gate, up = (graph.linear(rows, *weights.of_linear(f"{prefix}.mlp.{name}_proj")) for name in ("gate", "up"))
        gate = graph.node("QuickGelu", gate, domain=MICROSOFT, alpha=1.0)  # with this alpha, it is SiLU
        return hidden, graph.linear(graph.node("Mul", gate, up), *weights.of_linear(f"{prefix}.mlp.down_proj"))

    def _add_head_norms(self, graph: Graph, qkv: str, q_norm: Any, k_norm: Any) -> str:
        """Return q, k and v with a norm for each head of q and k. Qwen 3 has them."""
        sizes = [heads * self.head_size for heads in (self.heads, self.kv_heads, self.kv_heads)]
        parts = ["q", "k", "v"]
        graph.node("Split", qkv, graph.integers(*sizes), outputs=parts, axis=-1)
        for index, weight in enumerate((q_norm, k_norm)):
            heads = graph.node("Reshape", parts[index], graph.integers(0, -1, self.head_size))
            heads = graph.norm(heads, weight, self._epsilon)
            parts[index] = graph.node("Reshape", heads, graph.integers(0, sizes[index]))
        return graph.node("Concat", *parts, axis=-1)

    def _make_attention(self, slots: int) -> Any:
        """Return the graph for the tokens of one sequence, or for one token of each of several: of each slot.

        ONNX Runtime's GroupQueryAttention rotates, stores and attends. It takes the position of the last token
        (``seqlens_k``) and the number of tokens (``total_sequence_length``).
        """
        graph = Graph()
        qkv = graph.input("qkv", 1, "tokens", self.qkv_width)
        rotations = [graph.input(name, "positions", self.head_size // 2) for name in ROTATIONS]
        parts, attended = [qkv], ["attended"]
        if slots > 1:
            parts, attended = ([f"{name}{slot}" for slot in range(slots)] for name in ("qkv", "attended"))
            graph.node("Split", qkv, graph.integers(*[1] * slots), outputs=parts, axis=1)
        stored = []
        for slot in range(slots):
            inputs = [
                *(parts[slot], "", ""),  # holds q, k and v
                *(graph.input(f"{name}{slot}", 1, self.kv_heads, "capacity", self.head_size) for name in MEMORY),
                graph.input(f"last{slot}", 1, type=TensorProto.INT32),
                graph.input(f"length{slot}", type=TensorProto.INT32),
            ]
            outputs = [attended[slot], *(f"new_{name}{slot}" for name in MEMORY)]
            counts = {"num_heads": self.heads, "kv_num_heads": self.kv_heads, "do_rotary": 1}
            graph.node("GroupQueryAttention", *inputs, *rotations, outputs=outputs, domain=MICROSOFT, **counts)
            stored += outputs[1:]
        if slots > 1:
            graph.node("Concat", *attended, outputs=["attended"], axis=1)
        return graph.session("attended", *stored)


def _rotations(config: Mapping[str, Any], head_size: int) -> list[Any]:
    """Return the cosines and the sines by which a rotary embedding rotates, each (positions, head size / 2)."""
    frequencies, magnitude = _rotary_frequencies(config, head_size)
    angles = numpy.outer(numpy.arange(config[CONTEXT_LENGTH], dtype=numpy.float32), frequencies)
    return [part * numpy.float32(magnitude) for part in (numpy.cos(angles), numpy.sin(angles))]


def _rotary_frequencies(config: Mapping[str, Any], head_size: int) -> tuple[Any, float]:
    """Return the angle by which each position rotates a pair further, (head size / 2,), and a factor for the result."""
    kind, rope = rope_of(config)
    if kind == "default":
        theta = rope.get("rope_theta") or config.get("rope_theta", 10_000.0)
        return theta ** (numpy.arange(0, head_size, 2, dtype=numpy.float32) / -head_size), 1.0
    import torch
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, magnitude = ROPE_INIT_FUNCTIONS[kind](AutoConfig.for_model(**config), torch.device("cpu"))
    return frequencies.numpy(), magnitude
