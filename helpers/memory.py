"""How much memory a model needs at each precision: an estimate from its number of parameters."""

from __future__ import annotations

from .errors import InvalidRequest

PRECISIONS: dict[str, float] = {"fp32": 4.0, "bf16": 2.0, "int8": 1.07, "nf4": 0.66}
"""Precision → bytes per parameter, from the most exact to the smallest.

int8 and nf4 quantise only the linear layers; bitsandbytes leaves the embeddings and ``lm_head`` in 16 bit. These hold
4 % of the parameters of Llama 2 7B and 13 % of Llama 3 8B; we count 7 %. A quantised parameter takes 1 byte in int8,
and in nf4 half a byte plus a 4-byte scale for each block of 64:
``0.93 * 1 + 0.07 * 2`` and ``0.93 * (0.5 + 4 / 64) + 0.07 * 2``.
"""

QUANTISED = ("int8", "nf4")
"""The precisions that need bitsandbytes. On a CPU, the Llama family needs it for nf4 only."""

_RUNTIME_BYTES = 500_000_000  # the libraries' own memory on the device, and activations
_CACHE_SHARE = 0.16
"""Values in the KV cache per parameter of the model. Llama 2 7B at its full context of 4096 tokens holds
4096 * 2 * 32 layers * 4096 = 1.07e9 values. Several long conversations at once need more than that."""


def memory_needed(parameters: int, precision: str, device: str = "cuda") -> int:
    """Return the estimated bytes that a model needs: weights, a KV cache for about one full context, and 0.5 GB.

    The KV cache is in 16 bit; at fp32, and at int8 on the CPU (`device` is ``cpu``), it is in 32 bit.

    Raise `InvalidRequest` for an unknown precision.
    """
    require_precision(precision)
    is_cache_in_fp32 = precision == "fp32" or (precision, device) == ("int8", "cpu")
    cache = _CACHE_SHARE * (4 if is_cache_in_fp32 else 2)
    return round(parameters * (PRECISIONS[precision] + cache)) + _RUNTIME_BYTES


def fits(parameters: int, precision: str, device: str = "cuda", *, free: int) -> bool:
    """Return whether `memory_needed` is at most `free` bytes."""
    return memory_needed(parameters, precision, device) <= free


def require_precision(precision: str) -> None:
    """Raise `InvalidRequest` if `precision` is not a key of `PRECISIONS`."""
    if precision not in PRECISIONS:
        known = ", ".join(["auto", *PRECISIONS])
        raise InvalidRequest(f"{precision!r} is not a precision. Choose one of: {known}.")


def check_precision(precision: str) -> None:
    """Raise `InvalidRequest` if `precision` is neither "auto" nor a key of `PRECISIONS`."""
    if precision != "auto":
        require_precision(precision)


def format_gb(size: int) -> str:
    """Return `size`, in bytes, as a text such as "13.5 GB" (1 GB is 1e9 bytes)."""
    return f"{size / 1e9:.1f} GB"
