"""The Llama family on a CPU: ONNX Runtime computes the graphs of `helpers.llama_graphs` for many sequences at once.

A step begins with the embeddings of all tokens. Then, for each layer, every sequence attends with its own tokens, and
one graph computes all that lies before the next attention, for the tokens of all sequences. The head reads only the
last token of each sequence. `helpers.packed.forward_packed` counts the tokens as read when all this has succeeded.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Collection, Container, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy
import torch
from torch import Tensor

from .errors import ModelUnavailable
from .kv_cache import KVCache
from .llama_graphs import MEMORY, ROTATIONS, SLOTS, LlamaGraphs
from .packed import Chunk, forward_packed, last_tokens, require_finite
from .prefill import BLOCK


class Llama:
    """A model of the Llama family, as `helpers.packed.PackedModel`. It computes the same logits as `transformers`."""

    def __init__(self, graphs: LlamaGraphs) -> None:
        self.precision, self.num_embeddings = graphs.precision, graphs.num_embeddings
        self._graphs, self._attention = graphs, _Attention(graphs)

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
        logits = torch.from_numpy(self._graphs.head.run(None, {"hidden": hidden.numpy()})[0])
        is_finite = hidden.isfinite().all(dim=-1)
        if not is_finite.all():
            logits[~is_finite] = math.nan  # 8 bit would hide it
        return logits

    def hidden_states(self, ids: Tensor, chunks: list[Chunk]) -> Tensor:
        """Return what the layers make of all tokens, (tokens, hidden size)."""
        hidden = self._graphs.embed(ids.numpy())
        first, *others = self._graphs.between
        (qkv,) = first.run(None, {"hidden": hidden})
        parts = self._attention.divide(chunks, len(others))
        for n, graph in enumerate(others):
            attended: Any = numpy.empty((len(qkv), self._graphs.width), numpy.float32)
            for part in parts:
                part.attend(n, qkv, attended)
            hidden, *rest = graph.run(None, {"hidden": hidden, "attended": attended})
            if rest:
                (qkv,) = rest
        return torch.from_numpy(hidden)


_ENOUGH_FOR_ALL_SLOTS = 5
"""From so many sequences on, one run for `SLOTS` of them takes less time than a run for each."""


class _Attention:
    """The attention of all layers: it rotates q and k, writes k and v into the KV caches, and attends."""

    def __init__(self, graphs: LlamaGraphs) -> None:
        self.graphs = graphs
        self._decoding: list[_Decode] = []

    def divide(self, chunks: Sequence[Chunk], layers: int) -> list[_Prefill | _Decode]:
        """Divide the tokens of a step among what attends with them in each layer, and make it ready.

        Raise `IndexError` if they do not fit into a KV cache.
        """
        several: list[_Prefill] = []
        row_of: dict[KVCache, int] = {}
        end = 0
        for chunk in chunks:
            chunk.cache.require_room(chunk.n)
            start, end = end, end + chunk.n
            if chunk.n > 1:
                several.append(_Prefill(self, chunk, start))
            else:
                row_of[chunk.cache] = start
        self._decoding = self._place(row_of, layers)
        for group in self._decoding:
            group.prepare(row_of)
        return [*several, *self._decoding]

    def _place(self, caches: Collection[KVCache], layers: int) -> list[_Decode]:
        """Give each of these sequences a slot, its own one if it has one, and free all other slots."""
        slots = SLOTS if len(caches) >= _ENOUGH_FOR_ALL_SLOTS else 1
        groups = [group for group in self._decoding if group.slots == slots and group.keep(caches)]
        if len(groups) > len(caches) // slots + 2:
            groups = []  # many slots are empty, so all sequences get new ones
        placed = {cache for group in groups for cache in group.slot_of}
        for cache in caches:
            if cache not in placed and not any(group.add(cache) for group in groups):
                groups.append(_Decode(self, slots, layers))
                groups[-1].add(cache)
        return groups

    def bind(self, slots: int, qkv: Any, attended: Any) -> Any:
        """Return a binding, which tells ONNX Runtime where the inputs and outputs of a run lie.

        The caller keeps the arrays, and binds each slot.
        """
        binding = self.graphs.attention[slots].io_binding()
        binding.bind_input("qkv", "cpu", 0, numpy.float32, (1, *qkv.shape), qkv.ctypes.data)
        for name, array in zip(ROTATIONS, self.graphs.rotations, strict=True):
            binding.bind_input(name, "cpu", 0, numpy.float32, array.shape, array.ctypes.data)
        binding.bind_output("attended", "cpu", 0, numpy.float32, (1, *attended.shape), attended.ctypes.data)
        return binding

    def bind_slot(self, binding: Any, slot: int, cache: KVCache, layer: int, length: Any, last: Any) -> None:
        """Bind the KV cache of a sequence as input and as output, so that new keys and values are written in place.

        `length`: the number of its tokens after this step; `last`: the position of the last one.
        """
        stored = cache.reserve(layer, heads=2 * self.graphs.kv_heads, size=self.graphs.head_size)
        shape = 1, self.graphs.kv_heads, cache.capacity, self.graphs.head_size
        addresses = stored.data_ptr(), stored.data_ptr() + stored.nbytes // 2  # the keys of all heads, then the values
        for name, address in zip(MEMORY, addresses, strict=True):
            binding.bind_input(f"{name}{slot}", "cpu", 0, numpy.float32, shape, address)
            binding.bind_output(f"new_{name}{slot}", "cpu", 0, numpy.float32, shape, address)
        binding.bind_input(f"length{slot}", "cpu", 0, numpy.int32, (), length.ctypes.data)
        binding.bind_input(f"last{slot}", "cpu", 0, numpy.int32, (1,), last.ctypes.data)


class _Prefill:
    """Attends with several tokens of a sequence, in blocks. `start` is the row of the first one."""

    def __init__(self, attention: _Attention, chunk: Chunk, start: int) -> None:
        self._attention, self._chunk, self._start = attention, chunk, start

    def attend(self, layer: int, qkv: Any, attended: Any) -> None:
        """Write what the tokens attend to into their rows, (tokens, heads * head size).

        `qkv`: q, k and v of all tokens, (tokens, (heads + 2 * KV heads) * head size).
        """
        to_row = self._start - self._chunk.positions.start
        for block in _blocks(self._chunk.positions):
            rows = slice(block.start + to_row, block.stop + to_row)
            length, last = (numpy.array([end], numpy.int32) for end in (block.stop, block.stop - 1))
            binding = self._attention.bind(slots=1, qkv=qkv[rows], attended=attended[rows])
            self._attention.bind_slot(binding, 0, self._chunk.cache, layer, length, last)
            self._attention.graphs.attention[1].run_with_iobinding(binding)


class _Decode:
    """Attends with one token of each of up to `slots` sequences: the next one of an answer, or a prompt's last.

    Binding takes longer than attending. So the arrays stay where they are, a sequence keeps its slot from step to step,
    and a slot is bound when a sequence gets it, or loses it: then it reads a dummy. A step only copies rows, and writes
    the lengths.
    """

    def __init__(self, attention: _Attention, slots: int, layers: int) -> None:
        self.slots = slots
        self.slot_of: WeakKeyDictionary[KVCache, int] = WeakKeyDictionary()
        self._attention, self._run = attention, attention.graphs.attention[slots].run_with_iobinding
        self._qkv: Any = numpy.zeros((slots, attention.graphs.qkv_width), numpy.float32)
        self._attended: Any = numpy.empty((slots, attention.graphs.width), numpy.float32)
        self._length: Any = numpy.empty(slots, numpy.int32)
        self._last: Any = numpy.empty(slots, numpy.int32)
        self._bindings = [attention.bind(slots, self._qkv, self._attended) for _ in range(layers)]
        self._dummy, self._on_dummy = KVCache(1), set[int]()
        self._taken: list[int] = []
        self._rows: list[int] = []

    def keep(self, caches: Container[KVCache]) -> bool:
        """Free the slots of all sequences whose KV caches are not among these. Return whether any is still taken."""
        for cache in [cache for cache in self.slot_of if cache not in caches]:
            del self.slot_of[cache]
        return len(self.slot_of) > 0

    def add(self, cache: KVCache) -> bool:
        """Give a sequence a slot. Return False if all are taken."""
        taken = set(self.slot_of.values())
        slot = next((slot for slot in range(self.slots) if slot not in taken), None)
        if slot is None:
            return False
        self._on_dummy.discard(slot)
        self._bind(slot, cache)
        self.slot_of[cache] = slot  # not before: binding takes memory, which may fail
        return True

    def prepare(self, row_of: Mapping[KVCache, int]) -> None:
        """Take the freed slots off the KV caches that they had, and look up the rows and positions of the tokens."""
        for slot in {*range(self.slots)} - {*self.slot_of.values()} - self._on_dummy:
            self._bind(slot, self._dummy)
            self._length[slot], self._last[slot] = 1, 0
            self._on_dummy.add(slot)
        self._taken, self._rows = list(self.slot_of.values()), [row_of[cache] for cache in self.slot_of]
        self._last[self._taken] = [cache.length for cache in self.slot_of]
        self._length[self._taken] = [cache.length + 1 for cache in self.slot_of]

    def attend(self, layer: int, qkv: Any, attended: Any) -> None:
        """Do for one token of each sequence what `_Prefill.attend` does."""
        self._qkv[self._taken] = qkv[self._rows]
        self._run(self._bindings[layer])
        attended[self._rows] = self._attended[self._taken]

    def _bind(self, slot: int, cache: KVCache) -> None:
        places = self._length[slot : slot + 1], self._last[slot : slot + 1]
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
