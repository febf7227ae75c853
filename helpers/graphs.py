"""Graphs that ONNX Runtime computes on a CPU, in fp32 or with matrices in 8 bit.

Except in attention, a graph treats each row of its inputs alone: a row of the result does not depend on the others.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import Any

import numpy
from onnx import TensorProto, helper

from .hardware import cores

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # onnxruntime reads it when it is imported

import onnxruntime

BLOCK_SIZE = 64
"""How many neighbours share a scale in 8 bit, in a row of a matrix and in the activations that it is multiplied by."""

MICROSOFT = "com.microsoft"
"""The domain of ONNX Runtime's own operators: github.com/microsoft/onnxruntime, docs/ContribOperators.md."""

_VALUES_AT_ONCE = 2**21
"""How many weights are quantised at a time. After each such part, a thread waits for Python's lock."""


class Graph:
    """A graph under construction. Its values have names: a method takes the names of its inputs, and returns a new one.

    `precision`: of the matrices, ``fp32`` or ``int8``. Everything else is in fp32.
    """

    def __init__(self, precision: str = "fp32") -> None:
        self._is_int8 = precision == "int8"
        self._inputs: list[Any] = []
        self._nodes: list[Any] = []
        self._constants: dict[str, numpy.ndarray] = {}
        self._integers: list[Any] = []
        self._count = 0

    def input(self, name: str, *shape: int | str, type: int = TensorProto.FLOAT) -> str:
        """Declare an input. A size that is not known yet has a name."""
        self._inputs.append(helper.make_tensor_value_info(name, type, shape))
        return name

    def constant(self, values: Any) -> str:
        """Add an array, in fp32 or uint8."""
        name = self._new_name()
        self._constants[name] = numpy.ascontiguousarray(values)
        return name

    def integers(self, *values: int) -> str:
        """Add a small constant that decides on shapes."""
        name = self._new_name()
        self._integers.append(helper.make_tensor(name, TensorProto.INT64, (len(values),), values))
        return name

    def node(
        self, operator: str, *inputs: str, outputs: Sequence[str] = (), domain: str = "", **attributes: Any
    ) -> str:
        """Add an operator of ONNX, or of `domain`. Return the name of its first output."""
        outputs = outputs or [self._new_name()]
        self._nodes.append(helper.make_node(operator, inputs, outputs, domain=domain, **attributes))
        return outputs[0]

    def linear(self, rows: str, weight: Any, bias: Any = None) -> str:
        """Multiply by `weight`, (outputs, inputs), and add `bias`, (outputs,). They are arrays of any float type."""
        added = [] if bias is None else [self.constant(in_fp32(bias))]
        if not self._is_int8:
            product = self.node("MatMul", rows, self.constant(in_fp32(weight).T))
            return self.node("Add", product, *added) if added else product
        steps, sizes = quantised(weight)
        return self.node(
            "MatMulNBits",
            *(rows, self.constant(steps), self.constant(sizes)),
            *(["", "", *added] if added else []),  # neither zero points nor another order of the inputs
            domain=MICROSOFT,
            K=weight.shape[1],
            N=weight.shape[0],
            bits=8,
            block_size=BLOCK_SIZE,
            accuracy_level=4,  # rounds the activations to 8 bits too
        )

    def norm(self, rows: str, weight: Any, epsilon: float) -> str:
        """Return the root mean square norm of `rows`, times `weight`."""
        return self.node("SimplifiedLayerNormalization", rows, self.constant(in_fp32(weight)), axis=-1, epsilon=epsilon)

    def sum_and_norm(self, rows: str, change: str, weight: Any, epsilon: float) -> tuple[str, str]:
        """Return the sum of `rows` and `change`, and its norm as `norm` returns it."""
        outputs = [self._new_name(), "", "", self._new_name()]
        inputs = rows, change, self.constant(in_fp32(weight))
        self.node("SkipSimplifiedLayerNormalization", *inputs, outputs=outputs, domain=MICROSOFT, epsilon=epsilon)
        return outputs[3], outputs[0]

    def session(self, *outputs: str) -> onnxruntime.InferenceSession:
        """Return the graph, ready to compute `outputs`."""
        described = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
        constants = [_described(name, array) for name, array in self._constants.items()]
        graph = helper.make_graph(self._nodes, "graph", self._inputs, described, [*constants, *self._integers])
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid(MICROSOFT, 1)]
        options = onnxruntime.SessionOptions()
        options.use_per_session_threads = False
        options.log_severity_level = 4  # an error is raised, not logged too
        options.add_session_config_entry("session.use_env_allocators", "1")
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in self._constants.values()]
        options.add_external_initializers(list(self._constants), values)  # it copies or rearranges them
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def _new_name(self) -> str:
        self._count += 1
        return f"value{self._count}"


def _share_threads_and_memory() -> None:
    """Let all sessions of this process share their threads, and their scratch memory."""
    with contextlib.suppress(onnxruntime.capi.onnxruntime_pybind11_state.Fail):  # another library has done it
        onnxruntime.set_global_thread_pool_sizes(cores(), 1)
    kind = onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR
    memory = onnxruntime.OrtMemoryInfo("Cpu", kind, 0, onnxruntime.OrtMemType.DEFAULT)
    onnxruntime.create_and_register_allocator(memory, None)


_share_threads_and_memory()  # here, and so only once


def _described(name: str, array: numpy.ndarray) -> Any:
    """Return the name, type and shape of a constant. The session gets its values separately."""
    described = TensorProto(name=name, dims=array.shape, data_type=helper.np_dtype_to_tensor_dtype(array.dtype))
    described.data_location = TensorProto.EXTERNAL
    described.external_data.add(key="location", value="memory")
    return described


def in_fp32(values: Any) -> Any:
    """Return an array of any float type in fp32."""
    return values.astype(numpy.float32, copy=False)


def quantised(weight: Any) -> tuple[Any, Any]:
    """Return a weight, (outputs, inputs), in 8 bit, and the scales of its blocks, (outputs, blocks), in fp32.

    The weight is in uint8, (outputs, blocks, BLOCK_SIZE): 128 stands for 0. Only a part of it is in fp32 at a time.
    """
    outputs, inputs = weight.shape
    steps = numpy.empty((outputs, -(-inputs // BLOCK_SIZE), BLOCK_SIZE), numpy.uint8)
    sizes = numpy.empty(steps.shape[:2], numpy.float32)
    rows_at_once = max(1, _VALUES_AT_ONCE // inputs)
    for begin in range(0, outputs, rows_at_once):
        rows = slice(begin, begin + rows_at_once)
        blocks = numpy.pad(in_fp32(weight[rows]), ((0, 0), (0, -inputs % BLOCK_SIZE))).reshape(-1, *steps.shape[1:])
        sizes[rows] = numpy.abs(blocks).max(axis=-1) / 127
        blocks /= numpy.maximum(sizes[rows], 1e-30)[..., None]
        steps[rows] = numpy.rint(blocks, out=blocks) + 128
    return steps, sizes
