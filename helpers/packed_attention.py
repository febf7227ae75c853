"""Any causal language model of `transformers`, as a `helpers.packed.PackedModel`.

Its forward pass stays as it is, but its attention handles each chunk of the packed row separately.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .errors import ModelUnavailable
from .kv_cache import KVCache
from .packed import Chunk, forward_packed, last_tokens, positions_of, require_finite


class TransformersModel:
    """`model`, a causal language model of `transformers`, on its device and in evaluation mode."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.num_embeddings: int = model.get_input_embeddings().num_embeddings

    def prepare(self) -> KVCache:
        """Install the packed attention, and try it on two prompts. Return the KV cache of one of them.

        Raise `ModelUnavailable` if the logits are NaN or infinite, or if a forward pass for both gives different
        logits from one for each: the model mixes tokens outside its attention, or uses its own mask.
        """
        model = self.model
        try:
            if "position_ids" not in inspect.signature(model.forward).parameters:
                raise TypeError("it takes no position_ids")
            attention = model.config._attn_implementation.removeprefix("packed_")  # of an earlier engine
            model.set_attn_implementation(attention)
            prompts = [3, 1, 4, 1, 5], [9, 2]
            with torch.inference_mode():
                alone = [model(torch.tensor([prompt], device=model.device)).logits[0, -1] for prompt in prompts]
            model.set_attn_implementation(f"packed_{attention}")
            _pack_head(model)
            return self._try(prompts, expected=torch.stack(alone))
        except ModelUnavailable:
            raise
        except Exception as error:
            raise ModelUnavailable(
                f"{type(model).__name__} cannot be served here ({type(error).__name__}: {error}). Choose a model of "
                "another kind, such as those of Llama, Mistral, Qwen, Gemma or Phi."
            ) from error

    def logits(self, ids: Tensor, chunks: list[Chunk]) -> Tensor:
        """Return the logits after the last token of each chunk, (chunks, vocabulary)."""
        device = self.model.device
        output = self.model(
            input_ids=ids[None].to(device),
            position_ids=positions_of(chunks)[None].to(device),
            logits_to_keep=last_tokens(chunks),
            use_cache=False,
            chunks=chunks,
        )
        return output.logits[0]

    def _try(self, prompts: Sequence[list[int]], *, expected: Tensor) -> KVCache:
        """Read both prompts in two steps, and return the KV cache of the first one.

        Raise `ModelUnavailable` if the expected logits, (2, vocabulary), are NaN or infinite, and `TypeError` unless
        the logits are the expected ones.
        """
        model = self.model
        require_finite(expected, type(model).__name__, model.dtype)
        caches = [KVCache(len(prompt)) for prompt in prompts]
        halves = [(len(prompt) + 1) // 2 for prompt in prompts]
        forward_packed(self, [(cache, prompt[:n]) for cache, prompt, n in zip(caches, prompts, halves, strict=True)])
        batch = [(cache, prompt[n:]) for cache, prompt, n in zip(caches, prompts, halves, strict=True)]
        logits, _ = forward_packed(self, batch)
        if caches[0].num_layers != model.config.get_text_config().num_hidden_layers:
            raise TypeError("it has layers that store something other than keys and values")
        # A model may give tokens that it never generates a logit of -inf.
        expected, logits = (rows.float().cpu().nan_to_num(nan=math.nan, neginf=0) for rows in (expected, logits))
        is_exact = model.dtype == torch.float32 and not getattr(model, "is_quantized", False)
        if not (logits - expected).norm() <= (0.001 if is_exact else 0.1) * expected.norm():  # also if it is NaN
            raise TypeError("it does not keep two prompts apart")
        return caches[0]


def _attend(
    attention: Callable[..., Any],
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    chunks: list[Chunk],
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Call `attention`, one of transformers' own, for each chunk separately. Return (1, tokens, heads, size)."""
    if attention_mask is not None:
        raise TypeError("it uses its own attention mask")
    new = torch.cat((key, value), dim=-1)
    key_size, value_size = key.shape[-1], value.shape[-1]
    outputs, begin = [], 0
    for chunk in chunks:
        stored = chunk.cache.append(module.layer_idx, new.narrow(2, begin, chunk.n))
        keys, values = stored.narrow(3, 0, key_size), stored.narrow(3, key_size, value_size)
        mask = chunk.mask(sliding_window, query)
        outputs.append(attention(module, query.narrow(2, begin, chunk.n), keys, values, mask, **options)[0])
        begin += chunk.n
    return torch.cat(outputs, dim=1), None


def _sdpa(module: Any, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, **options: Any) -> Any:
    if mask is not None or options.get("position_bias") is not None or options.get("softcap") is not None:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, keys, values, mask, **options)
    # One token, the common case: for it, transformers' wrapper takes as long as the kernel.
    output = scaled_dot_product_attention(
        query, keys, values, scale=options.get("scaling"), enable_gqa=query.shape[1] != keys.shape[1]
    )
    return output.transpose(1, 2), None


def _eager(module: Any, *arguments: Any, **options: Any) -> Any:
    """Call the attention that the model's own file defines. Some models need operations that no kernel has."""
    return sys.modules[type(module).__module__].eager_attention_forward(module, *arguments, **options)


for _name, _attention in {"sdpa": _sdpa, "eager": _eager}.items():
    AttentionInterface.register(f"packed_{_name}", partial(_attend, _attention))


class _Head(torch.nn.Module):
    """`head` with its weights rearranged for oneDNN. If the embedding shares the matrix, it is in memory twice."""

    def __init__(self, head: torch.nn.Linear) -> None:
        super().__init__()
        # torch has no public operations for this, so these are those that its compiler calls
        self._weight = torch.ops.mkldnn._reorder_linear_weight(head.weight.detach(), 8)
        self._bias = None if head.bias is None else head.bias.detach()

    def forward(self, rows: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, "none", [], "")


def _pack_head(model: Any) -> None:
    """Let oneDNN compute the logits in fp32 on a CPU. It needs half of MKL's time for up to 16 sequences."""
    head = model.get_output_embeddings()
    if (
        torch.backends.mkldnn.is_available()
        and torch.backends.mkl.is_available()
        and type(head) is torch.nn.Linear
        and (head.weight.device.type, head.weight.dtype) == ("cpu", torch.float32)
    ):
        model.set_output_embeddings(_Head(head))
