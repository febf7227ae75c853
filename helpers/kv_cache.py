"""What the attention remembers, kept apart for each sequence, and one run of the model for all of them.

Only in its attention does a model look from one token at another. Everywhere else a row of tokens may
as well belong to many sequences, so `run` lays what each of them has to be read end to end, as one row,
and the attention gives each its own past: its keys and values. Nothing is padded, and a sequence that
joins or leaves moves none of the others.
"""

from __future__ import annotations

import inspect
import sys
from functools import partial
from typing import Any, Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from . import access
from .errors import ModelUnavailable

Ids = Sequence[int]


class KeyValues:
    """The keys and values of one sequence's first `length` tokens, with room for `capacity`.

    For each layer they lie side by side in one tensor, of shape (1, heads, capacity, size of a key + size of a
    value), and never move: adding a token costs the same however many are there.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._layers: dict[int, Tensor] = {}

    def add(self, layer: int, new: Tensor) -> Tensor:
        """Store what follows `length`, (1, heads, n, size), and return all up to it, (1, heads, length + n, size).

        `length` stays as it is until every layer has stored its own.
        """
        if layer not in self._layers:
            self._layers[layer] = new.new_empty(*new.shape[:2], self.capacity, new.shape[3])
        stored, n = self._layers[layer], new.shape[2]
        stored.narrow(2, self.length, n).copy_(new)
        return stored.narrow(2, 0, self.length + n)

    def grow(self, capacity: int) -> None:
        """Make room for `capacity` tokens, one layer after the other, so that only one is there twice at a time."""
        for layer, stored in self._layers.items():
            larger = stored.new_empty(*stored.shape[:2], capacity, stored.shape[3])
            larger.narrow(2, 0, self.length).copy_(stored.narrow(2, 0, self.length))
            self._layers[layer] = larger
        self.capacity = capacity

    def beginning(self, length: int, *, capacity: int) -> KeyValues:
        """A copy of the first `length` tokens, with room for `capacity`."""
        copy = KeyValues(capacity)
        for layer, stored in self._layers.items():
            copy.add(layer, stored.narrow(2, 0, length))
        copy.length = length
        return copy

    @property
    def layers(self) -> int:
        return len(self._layers)

    @property
    def bytes_per_token(self) -> dict[torch.device, int]:
        """By device: of a model that is spread over several, each holds its own layers' keys and values."""
        sizes: dict[torch.device, int] = {}
        for stored in self._layers.values():
            sizes[stored.device] = sizes.get(stored.device, 0) + stored.nbytes // self.capacity
        return sizes


class Kept:
    """Keys and values of sequences that have ended, for those that begin alike: the next turn of a
    conversation, another question under the same system prompt. The least recently used goes first."""

    MOST = 256
    """How many are kept, however small they are: whoever joins is compared with each."""

    def __init__(self) -> None:
        self._entries: list[tuple[Ids, KeyValues]] = []  # the latest used is the last

    def __iter__(self) -> Iterator[tuple[Ids, KeyValues]]:
        return iter(self._entries)

    @property
    def tokens(self) -> int:
        """For how many tokens memory is taken."""
        return sum(past.capacity for _, past in self._entries)

    def add(self, ids: Ids, past: KeyValues) -> None:
        """Keep `past`, of which `ids` are the tokens, in the place of all that are a beginning of it."""
        self._entries = [entry for entry in self._entries if common_beginning(entry[0], ids) < len(entry[0])]
        self._entries.append((ids, past))
        del self._entries[: -self.MOST]

    def take(self, past: KeyValues) -> bool:
        """Keep `past` no longer; whether it was kept."""
        before = len(self._entries)
        self._entries = [entry for entry in self._entries if entry[1] is not past]
        return len(self._entries) < before

    def used(self, past: KeyValues | None) -> None:
        self._entries.sort(key=lambda entry: entry[1] is past)  # stable: it alone moves, to the end

    def shrink(self, tokens: int) -> bool:
        """Let go of as many as it takes to hold at most `tokens`; whether there was any to let go of."""
        before = len(self._entries)
        while self._entries and self.tokens > tokens:
            del self._entries[0]
        return len(self._entries) < before


def common_beginning(some: Ids, others: Ids) -> int:
    """How many ids from the first on are the same in both."""
    same, end = 0, min(len(some), len(others))
    while same < end:  # by halves: slices are compared much quicker than one id after the other
        middle = (same + end + 1) // 2
        if some[same:middle] == others[same:middle]:
            same = middle
        else:
            end = middle - 1
    return same


def spare_tokens(trial: KeyValues, *, window: int) -> int:
    """For how many tokens to have room where nobody says how many: most of what is free on each GPU; of RAM,
    which other programs want too, half of it and at most 2 GiB, or one full `window` where that is more."""

    def spare(device: torch.device, per_token: int) -> int:
        if device.type == "cuda":
            return torch.cuda.mem_get_info(device)[0] * 4 // 5
        return min(access.ram()[1] // 2, max(2 * 2**30, window * per_token))

    return min(spare(device, per_token) // per_token for device, per_token in trial.bytes_per_token.items())


# --- One run of the model for many sequences ------------------------------------------------------


class _Part:
    """What one sequence feeds in a run: n tokens, after those whose keys and values it has."""

    def __init__(self, past: KeyValues, n: int) -> None:
        self.past, self.n = past, n
        self._masks: dict[tuple[int | None, torch.device], Tensor | None] = {}

    def mask(self, window: int | None, like: Tensor) -> Tensor | None:
        """0 where a token may look and -inf where not, (1, 1, n, length + n), in a layer that looks back at most
        `window` tokens; None for one token that may look at all that was before."""
        key = window, like.device
        if key not in self._masks:
            end = self.past.length + self.n
            narrow = window is not None and window < end
            if self.n == 1 and not narrow:
                self._masks[key] = None
            else:
                hidden = torch.ones(self.n, end, dtype=torch.bool, device=like.device).triu(self.past.length + 1)
                if narrow:
                    hidden |= torch.ones_like(hidden).tril(self.past.length - window)
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
    parts: list[_Part],
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """`attention`, one of transformers' own, for each part by itself; (1, tokens, heads, size)."""
    if attention_mask is not None:
        raise TypeError("it masks in a way of its own")
    new = torch.cat((key, value), dim=-1)
    key_size, value_size = key.shape[-1], value.shape[-1]
    outputs, begin = [], 0
    for part in parts:
        past = part.past.add(module.layer_idx, new.narrow(2, begin, part.n))
        keys, values = past.narrow(3, 0, key_size), past.narrow(3, key_size, value_size)
        mask = part.mask(sliding_window, query)
        outputs.append(attention(module, query.narrow(2, begin, part.n), keys, values, mask, **options)[0])
        begin += part.n
    return torch.cat(outputs, dim=1), None


def _sdpa(module: Any, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, **options: Any) -> Any:
    if mask is not None or options.get("position_bias") is not None or options.get("softcap") is not None:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, keys, values, mask, **options)
    # one token, as nearly always: at this size the way through transformers takes as long as the kernel
    output = scaled_dot_product_attention(
        query, keys, values, scale=options.get("scaling"), enable_gqa=query.shape[1] != keys.shape[1]
    )
    return output.transpose(1, 2), None


def _eager(module: Any, *arguments: Any, **options: Any) -> Any:
    """The attention that a model's own file brings, for what no kernel can do."""
    return sys.modules[type(module).__module__].eager_attention_forward(module, *arguments, **options)


for _name, _attention in {"sdpa": _sdpa, "eager": _eager}.items():
    AttentionInterface.register(f"packed_{_name}", partial(_attend, _attention))


class _PackedLinear(torch.nn.Module):
    """A `torch.nn.Linear` in fp32 on a CPU, by oneDNN, with its weights laid out for that once.

    For up to 16 rows torch's own way through MKL takes about twice as long with a matrix as large as that from
    the last layer to the vocabulary: a tenth of a step for 8 readers. torch's compiler makes the same two calls.
    Where the matrix is also that of the embedding, it is in memory twice.
    """

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.bias = linear.bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 8)

    def forward(self, rows: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(rows, self._packed, self.bias, "none", [], "")


def _pack_head(model: Any) -> None:
    """Where it helps, replace the layer that turns what the model has come to into logits."""
    head = model.get_output_embeddings()
    if (
        type(head) is torch.nn.Linear
        and (head.weight.device.type, head.weight.dtype) == ("cpu", torch.float32)
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
    ):
        model.set_output_embeddings(_PackedLinear(head))


def prepare(model: Any) -> KeyValues:
    """Make `model`, a `transformers` causal language model, ready for `run`, and try it on two short texts.

    Returns the keys and values of one of them. Raises `ModelUnavailable` for a model that does not say the same
    of two texts in one run as of each alone: its layers look from one token at another in a way of their own.
    """
    attention = model.config._attn_implementation.removeprefix("packed_")
    first, second = [3, 1, 4, 1, 5], [9, 2]
    try:
        if "position_ids" not in inspect.signature(model.forward).parameters:
            raise TypeError("it takes no positions")
        model.set_attn_implementation(attention)
        with torch.inference_mode():
            alone = [model(torch.tensor([ids], device=model.device)).logits[0, -1] for ids in (first, second)]
        model.set_attn_implementation(f"packed_{attention}")
        _pack_head(model)
        trial, other = KeyValues(5), KeyValues(2)
        run(model, [(trial, first[:3]), (other, second[:1])])
        logits, _ = run(model, [(trial, first[3:]), (other, second[1:])])
        if trial.layers != model.config.get_text_config().num_hidden_layers:
            raise TypeError("it has layers that keep something else than keys and values")
        expected, got = torch.stack(alone).float().cpu(), logits.float().cpu()
        exact = model.dtype == torch.float32 and not getattr(model, "is_quantized", False)
        if (got - expected).norm() > (0.001 if exact else 0.1) * expected.norm():
            raise TypeError("its layers do not keep two texts apart")
    except Exception as error:
        raise ModelUnavailable(
            f"{type(model).__name__} cannot be served here ({type(error).__name__}: {error}). Choose a model of "
            "another kind, such as those of Llama, Mistral, Qwen, Gemma or Phi."
        ) from error
    return trial


@torch.inference_mode()
def run(model: Any, feeds: Sequence[tuple[KeyValues, Ids]]) -> tuple[Tensor, list[int]]:
    """Run the model once: each sequence reads its next ids, one or more, after those that it remembers.

    Returns the logits after the last id of each, of shape (sequences, vocabulary), and the likeliest id of each.
    Where this raises, no sequence has read anything.
    """
    device = model.device
    parts = [_Part(past, len(ids)) for past, ids in feeds]
    positions = [position for past, ids in feeds for position in range(past.length, past.length + len(ids))]
    output = model(
        input_ids=torch.tensor([[token_id for _, ids in feeds for token_id in ids]], device=device),
        position_ids=torch.tensor([positions], device=device),
        logits_to_keep=torch.tensor([part.n for part in parts]).cumsum(0) - 1,
        use_cache=False,
        parts=parts,
    )
    logits = output.logits[0]
    likeliest = logits.max(dim=-1).indices.tolist()  # quicker than argmax; on a GPU, what failed shows here
    for part in parts:
        part.past.length += part.n
    return logits, likeliest
