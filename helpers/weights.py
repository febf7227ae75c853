"""The tensors in a model's safetensors files, as arrays of numpy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy

from .errors import ModelUnavailable
from .model_files import missing_weights, safetensors_header

_TYPES: dict[str, Any] = {
    "F64": numpy.float64,
    "F32": numpy.float32,
    "F16": numpy.float16,
    "BF16": ml_dtypes.bfloat16,
}


class Weights:
    """The tensors in `files`, by name. They stay in the files, which are mapped into memory, until they are used.

    The package safetensors holds Python's lock while it reads, and a service that starts imports modules meanwhile.
    """

    def __init__(self, files: Sequence[str]) -> None:
        self._info: dict[str, Any] = {}
        self._bytes: dict[str, Any] = {}
        for file in files:
            header, begin = safetensors_header(Path(file))
            mapped = numpy.asarray(numpy.memmap(file, numpy.uint8, "r"))[begin:]
            for name, info in header.tensors.items():
                self._info[name], self._bytes[name] = info, mapped[slice(*info.data_offsets)]

    def __contains__(self, name: str) -> bool:
        return name in self._info

    def require(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise `ModelUnavailable` if a tensor is missing, or has another shape or a type that is not known here."""
        if missing := [name for name in shapes if name not in self]:
            raise missing_weights(missing)
        for name, shape in shapes.items():
            if (found := tuple(self._info[name].shape)) != shape:
                raise ModelUnavailable(
                    f"The model's tensor {name} has the shape {found}, and by its config.json {shape}. "
                    "Download the model again."
                )
            if (kind := self._info[name].dtype) not in _TYPES:
                raise ModelUnavailable(
                    f"The model's tensor {name} is stored as {kind}. Choose a model in {', '.join(_TYPES)}."
                )

    def of_linear(self, *names: str) -> tuple[Any, Any]:
        """Return the weights of several layers as if they were one, and their biases, or None if they have none."""
        biases = [bias for name in names if (bias := self.get(f"{name}.bias")) is not None]
        return _joined([self[f"{name}.weight"] for name in names]), _joined(biases) if biases else None

    def get(self, name: str) -> Any:
        """Return a tensor, or None if there is none of that name."""
        return self[name] if name in self else None  # noqa: SIM401

    def __getitem__(self, name: str) -> Any:
        """Return a tensor. Raise `ModelUnavailable` if it holds NaN or infinity, which 8 bit would hide."""
        info = self._info[name]
        tensor = self._bytes[name].view(_TYPES[info.dtype]).reshape(info.shape)
        if not numpy.isfinite(tensor).all():
            raise ModelUnavailable(f"The model's tensor {name} contains NaN or infinity. Download the model again.")
        return tensor


def _joined(parts: Sequence[Any]) -> Any:
    return parts[0] if len(parts) == 1 else numpy.concatenate(parts)
