"""One forward pass for many sequences, without padding: packed attention.

Attention is the only operation of a language model that mixes tokens. So `forward_packed` packs the unread
ids of all sequences into one row, one chunk after the other, and the attention handles each chunk separately, with the
KV cache of its sequence. When a sequence is admitted or finishes, no other one moves.
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
from .kv_cache import Ids, KVCache

NOT_FINITE_FIX = "Serve it with --precision bf16 or fp32, and download it again if that does not help."
"""What to do with a model whose logits are NaN or infinite: float16 overflows, or the weights are damaged."""


def install_packed_attention(model: Any) -> KVCache:
    """Make `model`, a `transformers` causal language model, ready for `forward_packed`, and try it on two prompts.

    Return the KV cache of one of them. Raise `ModelUnavailable` if the logits are NaN or infinite, or if a forward pass
    for both gives different logits from one for each: the model mixes tokens outside its attention, or uses its own
    mask.
    """
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
        return _try(model, prompts, expected=torch.stack(alone))
    except ModelUnavailable:
        raise
    except Exception as error:
        raise ModelUnavailable(
            f"{type(model).__name__} cannot be served here ({type(error).__name__}: {error}). Choose a model of "
            "another kind, such as those of Llama, Mistral, Qwen, Gemma or Phi."
        ) from error


def _try(model: Any, prompts: Sequence[list[int]], *, expected: Tensor) -> KVCache:
    """Read both prompts in two steps, and return the KV cache of the first one.

    Raise `ModelUnavailable` if the expected logits, (2, vocabulary), are NaN or infinite, and `TypeError` unless the
    logits are the expected ones.
    """
    if not expected.max(dim=-1).values.isfinite().all():
        raise ModelUnavailable(
            f"{type(model).__name__} computes logits that are NaN or infinite, in {model.dtype}. {NOT_FINITE_FIX}"
        )
    caches = [KVCache(len(prompt)) for prompt in prompts]
    halves = [(len(prompt) + 1) // 2 for prompt in prompts]
    forward_packed(model, [(cache, prompt[:n]) for cache, prompt, n in zip(caches, prompts, halves, strict=True)])
    batch = [(cache, prompt[n:]) for cache, prompt, n in zip(caches, prompts, halves, strict=True)]
    logits, _ = forward_packed(model, batch)
    if caches[0].num_layers != model.config.get_text_config().num_hidden_layers:
        raise TypeError("it has layers that store something other than keys and values")
    # A model may give tokens that it never generates a logit of -inf.
    expected, logits = (rows.float().cpu().nan_to_num(nan=math.nan, neginf=0) for rows in (expected, logits))
    is_exact = model.dtype == torch.float32 and not getattr(model, "is_quantized", False)
    if not (logits - expected).norm() <= (0.001 if is_exact else 0.1) * expected.norm():  # also if it is NaN
        raise TypeError("it does not keep two prompts apart")
    return caches[0]


@torch.inference_mode()
def forward_packed(model: Any, batch: Sequence[tuple[KVCache, Ids]]) -> tuple[Tensor, list[int | None]]:
    """Run the model once: each sequence reads its next ids, one or more, after those that its KV cache holds.

    Return the logits after the last id of each sequence, (sequences, vocabulary), and the most likely id of each, or
    None if its logits contain NaN or infinity. If this raises, every KV cache is as long as before.
    """
    device = model.device
    chunks = [_Chunk(cache, len(ids)) for cache, ids in batch]
    positions = [position for cache, ids in batch for position in range(cache.length, cache.length + len(ids))]
    output = model(
        input_ids=torch.tensor([[token_id for _, ids in batch for token_id in ids]], device=device),
        position_ids=torch.tensor([positions], device=device),
        logits_to_keep=torch.tensor([chunk.n for chunk in chunks]).cumsum(0) - 1,
        use_cache=False,
        chunks=chunks,
    )
    logits = output.logits[0]
    highest, indices = logits.max(dim=-1)  # faster than argmax; NaN is higher than any number
    most_likely = [  # an error on a GPU is raised here
        index if math.isfinite(value) else None for index, value in zip(indices.tolist(), highest.tolist(), strict=True)
    ]
    for chunk in chunks:
        chunk.cache.length += chunk.n
    return logits, most_likely


class _Chunk:
    """The n tokens that one sequence reads in a forward pass, after those that `cache` holds."""

    def __init__(self, cache: KVCache, n: int) -> None:
        self.cache, self.n = cache, n
        self._masks: dict[tuple[int | None, torch.device], Tensor | None] = {}

    def mask(self, window: int | None, like: Tensor) -> Tensor | None:
        """Return a mask, (1, 1, n, length + n), of 0 for what a token attends to, and -inf for the rest.

        `window` is how far back a layer looks, or None. Return None if a single token attends to everything.
        """
        key = window, like.device
        if key not in self._masks:
            end = self.cache.length + self.n
            is_narrow = window is not None and window < end
            if self.n == 1 and not is_narrow:
                self._masks[key] = None
            else:
                hidden = torch.ones(self.n, end, dtype=torch.bool, device=like.device).triu(self.cache.length + 1)
                if window is not None and is_narrow:
                    hidden |= torch.ones_like(hidden).tril(self.cache.length - window)
                self._masks[key] = like.new_zeros(1, 1, self.n, end).masked_fill_(hidden, float("-inf"))
        return self._masks[key]


def _attend(
    attention: Callable[..., Any],
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    chunks: list[_Chunk],
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


class _PrepackedLinear(torch.nn.Module):
    """A `torch.nn.Linear` in fp32 on a CPU, computed by oneDNN. Its weights are rearranged for oneDNN once.

    torch's own way, MKL, takes two to three times as long for up to 16 rows: 14 instead of 5 ms for 8 sequences and
    SmolLM2's 576 × 49,152 (on one core of an AMD EPYC), a tenth of their step. The two private operations are those
    that torch's compiler calls. If the embedding shares the matrix, it is in memory twice.
    """

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.bias = linear.bias
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 8)

    def forward(self, rows: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(rows, self._weight, self.bias, "none", [], "")


def _pack_head(model: Any) -> None:
    """Replace the layer from the last hidden state to the logits by a `_PrepackedLinear`, if that can compute it."""
    head = model.get_output_embeddings()
    if (
        type(head) is torch.nn.Linear
        and (head.weight.device.type, head.weight.dtype) == ("cpu", torch.float32)
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
    ):
        model.set_output_embeddings(_PrepackedLinear(head))
