"""Linear layers on a CPU, in fp32 and in 8 bit, each by the fastest kernel of torch.

A layer is called with a tensor of (rows, inputs), and returns (rows, outputs), both in fp32. Its weights are rearranged
for the kernel once.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

LEVELS = 64
"""Weights in 8 bit are whole numbers from -64 to 64. Without VNNI, a CPU adds products of pairs in 16 bits, and
255 * 64 * 2 still fits. So the product is the same on all CPUs."""

_ROWS_AT_ONCE = 256


class Fp32Linear:
    """A linear layer with weights in fp32.

    oneDNN computes it, with rearranged weights, or MKL, with weights as they are: see `is_mkl_faster`. torch has no
    public operation for rearranged weights, so this class calls those that torch's compiler calls.

    - `weight`: (outputs, inputs). `bias`: (outputs,) or None.
    - `prepack`: True for oneDNN, False for MKL, None for the faster one.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, prepack: bool | None = None) -> None:
        if prepack is None:
            prepack = not is_mkl_faster()
        self._prepack = prepack and torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
        weight = weight.detach().float()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, 8) if self._prepack else weight
        self._bias = None if bias is None else bias.detach().float()

    def __call__(self, rows: Tensor) -> Tensor:
        if self._prepack:
            return torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, "none", [], "")
        return torch.nn.functional.linear(rows, self._weight, self._bias)

    def add_to(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Add the product to `hidden`, (rows, outputs), and return it."""
        return hidden.add_(self(rows))


@functools.cache
def is_mkl_faster() -> bool:
    """Return whether MKL multiplies a matrix by one row faster than oneDNN: on Intel's CPUs, and not on AMD's.

    A step for one sequence of SmolLM2 reads its weights at 20 GB/s with MKL and 15 with oneDNN on an Intel Xeon, and at
    9 and 12 GB/s on an AMD EPYC. For 8 sequences, oneDNN is faster on both.
    """
    cpuinfo = Path("/proc/cpuinfo")
    return "Intel" in (cpuinfo.read_text() if cpuinfo.exists() else platform.processor())


class Int8Linear:
    """A linear layer with integer weights and integer activations, multiplied exactly.

    Each row of the weights has its own scale, and so has each row of the input. So the result for a token does not
    depend on the other tokens of a step. (torch's own dynamic quantisation has one scale for all rows of the input.)

    - `weight`: (outputs, inputs), in any floating type. `bias`: (outputs,) or None.
    - `digits`: 1 rounds the activations to 8 bits; 2 rounds them to 16 bits, as two rows of 8-bit digits, for layers
      that lose too much otherwise.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, digits: int = 1) -> None:
        self._multiply = (_fbgemm if has_fbgemm() else _int_mm)(*quantised(weight.detach()))
        self._bias = None if bias is None else bias.detach().float()
        self._digits = digits

    def __call__(self, rows: Tensor) -> Tensor:
        product, scale = self._scaled(rows)
        product.mul_(scale)
        return product if self._bias is None else product.add_(self._bias)

    def add_to(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Add the product to `hidden`, (rows, outputs), and return it."""
        product, scale = self._scaled(rows)
        hidden.addcmul_(product, scale)
        return hidden if self._bias is None else hidden.add_(self._bias)

    def _scaled(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return two tensors whose product is that of `rows` and the weight: (rows, outputs) and (rows, 1).

        In a row of zeros, the second is 0, and the first is a finite number.
        """
        scale = rows.abs().amax(dim=-1, keepdim=True)
        if self._digits == 1:
            return self._multiply(rows / scale, 127), scale
        scale.mul_(128 / 127)  # steps of 1 / 128 are exact in fp32, so the kernel rounds to the same digits
        steps = rows.mul(128).div_(scale)
        rest = (steps - steps.round()).mul_(2)  # from -1 to 1 again
        high, low = self._multiply(torch.cat((steps.mul_(1 / 128), rest)), 128).chunk(2)
        return torch.add(high, low, alpha=1 / 256), scale


def has_fbgemm() -> bool:
    """Return whether torch has FBGEMM's kernels: on x86, and as long as torch has quantised tensors."""
    return (
        "fbgemm" in torch.backends.quantized.supported_engines
        and hasattr(torch, "_make_per_channel_quantized_tensor")
        and hasattr(torch.ops.quantized, "linear_with_input_q_dq_qweight_dq_output_fp32")
    )


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return a weight, (outputs, inputs), as whole numbers of steps in int8, and the step of each output, (outputs,).

    Only a part of it is in fp32 at a time.
    """
    steps, sizes = [], []
    for rows in weight.split(_ROWS_AT_ONCE):
        rows = rows.float()
        low, high = rows.aminmax(dim=1)
        size = torch.maximum(-low, high).clamp_min(1e-30) / LEVELS
        steps.append(rows.div(size[:, None]).round_().to(torch.int8))
        sizes.append(size)
    return torch.cat(steps), torch.cat(sizes)


def _fbgemm(steps: Tensor, size: Tensor) -> Callable[[Tensor, int], Tensor]:
    """Return a function that multiplies rows, with values from -1 to 1, by the weight that `quantised` returned.

    The function's second argument is the number of digits between 0 and 1 to which it rounds the rows. FBGEMM does all
    of it in one operation.
    """
    torch.backends.quantized.engine = "fbgemm"  # stays so, because another thread may be packing too
    zeros = torch.zeros(len(steps), dtype=torch.long)
    weight = torch._make_per_channel_quantized_tensor(steps, size.double(), zeros, 0)
    packed = torch.ops.quantized.linear_prepack(weight)
    multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
    return lambda rows, digits: multiply(rows, 1 / digits, 128, packed)


def _int_mm(steps: Tensor, size: Tensor) -> Callable[[Tensor, int], Tensor]:
    """Return the same function as `_fbgemm`, made of operations that torch has for every CPU."""
    transposed = steps.t()

    def multiply(rows: Tensor, digits: int) -> Tensor:
        rounded = (rows * digits).round_().clamp_(-128, 127)  # with 128 digits, 1 does not fit into 8 bits
        return torch._int_mm(rounded.to(torch.int8), transposed) * (size / digits)

    return multiply
