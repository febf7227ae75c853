"""The Llama family on a CPU, with few operations per token: Llama, SmolLM, Mistral, Qwen 2 and Qwen 3.

`Llama` reads the files that `transformers` reads, and computes the same logits. It does once, while it loads, what
`transformers` does in every step: q, k and v become one matrix, and so do gate and up. `helpers.linear` multiplies with
them, in fp32 or in 8 bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu

from .errors import ModelUnavailable
from .kv_cache import KVCache
from .linear import Fp32Linear, Int8Linear
from .model_files import missing_weights, rope_of
from .packed import Chunk, forward_packed, last_tokens, positions_of, require_finite
from .prefill import BLOCK

Linear = Fp32Linear | Int8Linear

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class _Layer(NamedTuple):
    input_norm: Tensor
    qkv: Linear
    head_norm: Tensor | None
    """(heads of q and k, head size), or None. Qwen 3 has it."""
    output: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


class Llama:
    """A model of the Llama family, as `helpers.packed.PackedModel`.

    - `config`: the content of config.json. `helpers.model_files.is_llama_family` must accept it.
    - `files`: the safetensors files with the weights. The embeddings stay there until they are needed.
    - `precision`: ``fp32`` or ``int8``.

    Only two layers at a time are in memory twice. Raise `ModelUnavailable` if a tensor is missing or has another shape
    than `config` says.
    """

    def __init__(self, config: Mapping[str, Any], files: Sequence[str], precision: str) -> None:
        self.precision = precision
        self.num_embeddings: int = config["vocab_size"]
        self._heads: int = config["num_attention_heads"]
        self._kv_heads: int = config.get("num_key_value_heads") or self._heads
        self._head_size: int = config.get("head_dim") or config["hidden_size"] // self._heads
        self._epsilon = torch.tensor(config.get("rms_norm_eps", 1e-6))
        self._frequencies, self._magnitude = _rotary_frequencies(config, self._head_size)
        weights = _Weights(files)
        embeddings, head = EMBEDDINGS, HEAD
        if config.get("tie_word_embeddings") and HEAD not in weights:
            head = EMBEDDINGS
        elif config.get("tie_word_embeddings") and EMBEDDINGS not in weights:
            embeddings = HEAD
        weights.require(self._tensor_shapes(config, embeddings, head))
        self._embeddings, self._norm = weights[embeddings], weights["model.norm.weight"].float()
        with ThreadPoolExecutor(2, "pack-weights") as pool:  # FBGEMM packs a matrix with one thread
            loading_head = pool.submit(self._load_head, weights[head])
            self._layers = list(pool.map(lambda n: self._load_layer(weights, n), range(config["num_hidden_layers"])))
            self._head = loading_head.result()

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

    def _load_head(self, weight: Tensor) -> Linear:
        return Int8Linear(weight, digits=2) if self.precision == "int8" else Fp32Linear(weight, prepack=True)

    def _load_layer(self, weights: _Weights, n: int) -> _Layer:
        prefix = f"model.layers.{n}."
        attention = f"{prefix}self_attn."

        def merged(*names: str) -> tuple[Tensor, Tensor | None]:
            """Return the weights and the biases of several layers as one layer's."""
            weight = torch.cat([weights[f"{name}.weight"] for name in names])
            biases = [bias for name in names if (bias := weights.get(f"{name}.bias")) is not None]
            return weight, torch.cat(biases) if biases else None

        def linear(weight: Tensor, bias: Tensor | None, digits: int = 1) -> Linear:
            return Int8Linear(weight, bias, digits=digits) if self.precision == "int8" else Fp32Linear(weight, bias)

        pairs = self._pairs_side_by_side
        weight, bias = merged(*(f"{attention}{name}_proj" for name in "qkv"))
        head_norm = None
        if (q_norm := weights.get(f"{attention}q_norm.weight")) is not None:
            k_norm = weights[f"{attention}k_norm.weight"]
            head_norm = pairs(torch.cat([q_norm.repeat(self._heads), k_norm.repeat(self._kv_heads)]))
            head_norm = head_norm.view(-1, self._head_size).float()
        return _Layer(
            input_norm=weights[f"{prefix}input_layernorm.weight"].float(),
            qkv=linear(pairs(weight), None if bias is None else pairs(bias), digits=2),
            head_norm=head_norm,
            output=linear(*merged(f"{attention}o_proj")),
            mlp_norm=weights[f"{prefix}post_attention_layernorm.weight"].float(),
            gate_up=linear(*merged(f"{prefix}mlp.gate_proj", f"{prefix}mlp.up_proj")),
            down=linear(*merged(f"{prefix}mlp.down_proj")),
        )

    def _pairs_side_by_side(self, rows: Tensor) -> Tensor:
        """Return the rows of q and k, and then those of v if there are any, with q and k in another order.

        The rotary embedding rotates pairs of rows. `transformers` has their first halves before their second halves.
        Here the two rows of a pair are neighbours, so that a pair is a complex number.
        """
        n = (self._heads + self._kv_heads) * self._head_size
        ordered = rows[:n].unflatten(0, (-1, 2, self._head_size // 2)).transpose(1, 2).flatten(0, 2)
        return torch.cat([ordered, rows[n:]])

    def prepare(self) -> KVCache:
        """Read a prompt, and return its KV cache.

        Raise `ModelUnavailable` if that fails, or if the logits are NaN or infinite.
        """
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
        """Return the logits for hidden states, (tokens, hidden size)."""
        return self._head(self._normalised(hidden, self._norm))

    def hidden_states(self, ids: Tensor, chunks: list[Chunk]) -> Tensor:
        """Return what the layers make of all tokens, (tokens, hidden size)."""
        angles = torch.outer(positions_of(chunks).float(), self._frequencies)
        rotation = torch.polar(torch.full_like(angles, self._magnitude), angles)[:, None]
        hidden = self._embeddings[ids].float()
        blocks = [_blocks(chunk, self._heads // self._kv_heads) for chunk in chunks]
        for n, layer in enumerate(self._layers):
            heads = layer.qkv(self._normalised(hidden, layer.input_norm)).view(1, len(ids), -1, self._head_size)
            q_and_k = heads.narrow(2, 0, self._heads + self._kv_heads)
            if layer.head_norm is not None:
                q_and_k.copy_(self._normalised(q_and_k, layer.head_norm))
            torch.view_as_complex(q_and_k.view(*q_and_k.shape[:3], -1, 2)).mul_(rotation)
            layer.output.add_to(hidden, self._attention(n, heads.transpose(1, 2), chunks, blocks))
            gate, up = layer.gate_up(self._normalised(hidden, layer.mlp_norm)).chunk(2, dim=-1)
            layer.down.add_to(hidden, _silu(gate).mul_(up))
        return hidden

    def _normalised(self, rows: Tensor, weight: Tensor) -> Tensor:
        """Return the root mean square norm of `rows`, times `weight`."""
        length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        inverse = torch.addcmul(self._epsilon, length, length, value=1 / rows.shape[-1]).rsqrt_()
        return (rows * inverse).mul_(weight)

    def _attention(self, layer: int, heads: Tensor, chunks: list[Chunk], blocks: list[list[_Block]]) -> Tensor:
        """Append k and v to the KV caches, and return what the tokens attend to, (tokens, heads * head size).

        `heads`: q, k and v of all tokens, (1, heads of q, k and v, tokens, head size). Several heads of q share one of
        k and v: they attend as if they were several tokens of one head.
        """
        queries, keys_and_values = heads.split([self._heads, 2 * self._kv_heads], dim=1)
        new = iter(keys_and_values.split([chunk.n for chunk in chunks], dim=2))
        query = iter(queries.split([block.n for blocks_of_chunk in blocks for block in blocks_of_chunk], dim=2))
        outputs = []
        for chunk, blocks_of_chunk in zip(chunks, blocks, strict=True):
            stored = chunk.cache.append(layer, next(new))
            for block in blocks_of_chunk:
                visible = stored if block is blocks_of_chunk[-1] else stored.narrow(2, 0, block.end)
                keys, values = visible.chunk(2, dim=1)
                q = next(query).reshape(1, self._kv_heads, -1, self._head_size)
                attended = scaled_dot_product_attention(q, keys, values, block.mask)
                if block.n > 1:
                    attended = attended.view(1, self._heads, block.n, -1).transpose(1, 2)
                outputs.append(attended.reshape(block.n, -1))
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _silu(rows: Tensor) -> Tensor:
    """Apply SiLU to `rows`, in place, in parts that torch computes in one thread.

    A part for each thread would end within a row, and torch rounds the ends differently, so that a row's result would
    depend on the others.
    """
    for part in rows.split(max(1, 32_767 // rows.shape[-1])):
        silu(part, inplace=True)
    return rows


class _Block(NamedTuple):
    """The n tokens of a chunk that attend together, to the first `end` tokens of their sequence."""

    n: int
    end: int
    mask: Tensor | None
    """0 for what a token attends to and -inf for the rest, (group * n, end): all tokens for each head of a group."""


def _blocks(chunk: Chunk, group: int) -> list[_Block]:
    """Divide a chunk at multiples of `BLOCK`, so that its tokens attend in the same blocks whatever the chunk is."""
    blocks, begin, end = [], chunk.positions.start, chunk.positions.stop
    while begin < end:
        stop = min(end, (begin // BLOCK + 1) * BLOCK)
        n = stop - begin
        mask = None if n == 1 else torch.full((n, stop), float("-inf")).triu_(begin + 1).repeat(group, 1)
        blocks.append(_Block(n, stop, mask))
        begin = stop
    return blocks


def _rotary_frequencies(config: Mapping[str, Any], head_size: int) -> tuple[Tensor, float]:
    """Return the angle by which each position rotates a pair further, (head size / 2,), and a factor for the result."""
    kind, rope = rope_of(config)
    if kind == "default":
        theta = rope.get("rope_theta") or config.get("rope_theta", 10_000.0)
        return theta ** (torch.arange(0, head_size, 2) / -head_size), 1.0
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

    def get(self, name: str) -> Tensor | None:
        """Return a tensor, or None if there is none of that name."""
        return self[name] if name in self else None  # noqa: SIM401

    def __getitem__(self, name: str) -> Tensor:
        return self._file_of[name].get_tensor(name)
