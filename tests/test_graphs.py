"""`helpers.graphs` against the same operations of torch."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

PRECISIONS = ["fp32", "int8"]
BLOCK_SIZE = 64


@pytest.fixture(autouse=True)
def same_numbers(torch: Any) -> None:
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)


def product(rows: Any, weight: Any, bias: Any = None, precision: str = "fp32") -> Any:
    """Return `rows` times `weight`, as a graph computes it."""
    import torch

    from helpers.graphs import Graph

    graph = Graph(precision)
    parts = (tensor if tensor is None else tensor.numpy() for tensor in (weight, bias))
    session = graph.session(graph.linear(graph.input("rows", "rows", rows.shape[1]), *parts))
    return torch.from_numpy(session.run(None, {"rows": rows.numpy()})[0])


def relative_error(some: Any, others: Any) -> float:
    return float((some - others).norm() / others.norm())


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(("outputs", "inputs"), [(30, 64), (64, 100), (3, 7)])
@pytest.mark.parametrize("rows", [1, 2, 9])
def test_a_product_in_fp32_is_that_of_torch(torch: Any, rows: int, outputs: int, inputs: int, has_bias: bool) -> None:
    rows, weight, bias = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
    expected = torch.nn.functional.linear(rows, weight, bias if has_bias else None)
    torch.testing.assert_close(product(rows, weight, bias if has_bias else None), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("inputs", [BLOCK_SIZE, 100, 300, 7])
def test_a_product_of_numbers_that_8_bits_can_hold_is_exact(torch: Any, inputs: int, has_bias: bool) -> None:
    rows, weight = (torch.randint(-127, 128, (n, inputs)).float() for n in (5, 40))
    for numbers in (rows, weight):
        numbers[:, ::BLOCK_SIZE] = 127  # the largest of each block, so that a step is 1
    bias = torch.randn(40) if has_bias else None
    expected = torch.nn.functional.linear(rows, weight, bias)
    torch.testing.assert_close(product(rows, weight, bias, "int8"), expected, rtol=1e-5, atol=0.01)


def test_a_product_in_8_bits_is_close_to_that_in_fp32(torch: Any) -> None:
    rows, weight = torch.randn(20, 300), torch.randn(100, 300)
    assert 0.001 < relative_error(product(rows, weight, precision="int8"), rows @ weight.t()) < 0.015


def test_large_numbers_spoil_only_their_own_block(torch: Any) -> None:
    rows, weight = torch.randn(20, 4 * BLOCK_SIZE), torch.randn(100, 4 * BLOCK_SIZE)
    rows[:, 0] = 1000
    weight[:, 0] = 0
    found, expected = product(rows, weight, precision="int8"), rows @ weight.t()
    others = rows[:, BLOCK_SIZE:] @ weight[:, BLOCK_SIZE:].t()
    assert relative_error(found, expected) > 0.1
    rows[:, :BLOCK_SIZE] = 0
    assert relative_error(product(rows, weight, precision="int8"), others) < 0.015


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_row_of_the_result_does_not_depend_on_the_others(torch: Any, precision: str) -> None:
    rows, weight = torch.randn(200, 300), torch.randn(100, 300)
    rows[::3] *= 1000
    together = product(rows, weight, precision=precision)
    for n in (1, 2, 3, 4, 5, 8, 33):
        assert torch.equal(product(rows[:n].clone(), weight, precision=precision), together[:n]), f"{n} rows"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_and_weights_of_zeros_give_zeros(torch: Any, precision: str) -> None:
    rows, weight = torch.randn(3, 100), torch.randn(40, 100)
    rows[1], weight[7] = 0, 0
    found = product(rows, weight, precision=precision)
    assert not found[1].any() and not found[:, 7].any() and found[0, :7].all()


def test_the_norm_is_the_root_mean_square_norm(torch: Any) -> None:
    from helpers.graphs import Graph

    some, others, weight = torch.randn(5, 48), torch.randn(5, 48), torch.rand(48)

    def norm(rows: Any) -> Any:
        return torch.nn.functional.rms_norm(rows, (48,), weight, 0.1)

    graph = Graph()
    session = graph.session(graph.norm(graph.input("rows", "rows", 48), weight.numpy(), 0.1))
    torch.testing.assert_close(torch.from_numpy(session.run(None, {"rows": some.numpy()})[0]), norm(some))

    graph = Graph()
    inputs = (graph.input(name, "rows", 48) for name in ("some", "others"))
    session = graph.session(*graph.sum_and_norm(*inputs, weight.numpy(), 0.1))
    found = session.run(None, {"some": some.numpy(), "others": others.numpy()})
    torch.testing.assert_close([torch.from_numpy(array) for array in found], [some + others, norm(some + others)])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_session_has_its_own_copy_of_the_constants(torch: Any, precision: str) -> None:
    """They are freed as soon as it is made."""
    from helpers.graphs import Graph

    graph = Graph(precision)
    rows = graph.linear(graph.input("rows", "rows", 100), *(torch.randn(size).numpy() for size in ((80, 100), (80,))))
    session = graph.session(graph.norm(rows, torch.rand(80).numpy(), 1e-6))
    rows = {"rows": torch.randn(3, 100).numpy()}
    (before,) = session.run(None, rows)
    for array in graph._constants.values():
        array[...] = 7
    assert (session.run(None, rows)[0] == before).all() and before.any()


def test_a_weight_is_at_most_half_a_step_away(torch: Any) -> None:
    from helpers.graphs import quantised

    weight = torch.randn(300, 100)
    steps, sizes = map(torch.from_numpy, quantised(weight.numpy()))
    assert steps.shape == (300, 2, BLOCK_SIZE) and sizes.shape == (300, 2)
    errors = ((steps.float() - 128) * sizes[..., None]).flatten(1)[:, :100] - weight
    assert (errors.abs() <= sizes.repeat_interleave(BLOCK_SIZE, dim=1)[:, :100] * 0.501).all()
    assert (steps[:, 1, 100 - BLOCK_SIZE :] == 128).all()  # what is added to fill the last block is 0


def test_a_weight_in_16_bits_is_quantised_as_in_fp32() -> None:
    import ml_dtypes
    import numpy

    from helpers.graphs import quantised

    weight = numpy.random.default_rng(0).standard_normal((300, 100)).astype(ml_dtypes.bfloat16)
    for some, others in zip(quantised(weight), quantised(weight.astype(numpy.float32)), strict=True):
        assert (some == others).all()


def test_a_large_weight_is_quantised_as_its_parts_are(monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy

    from helpers import graphs

    weight = numpy.random.default_rng(0).standard_normal((300, 100)).astype(numpy.float32)
    whole = graphs.quantised(weight)
    monkeypatch.setattr(graphs, "_VALUES_AT_ONCE", 70 * 100)
    for some, others in zip(graphs.quantised(weight), whole, strict=True):
        assert (some == others).all()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("rows", [1, 5])
def test_nothing_saturates_if_all_numbers_are_the_largest(torch: Any, rows: int, sign: int) -> None:
    ones = torch.ones(1, 4096)
    found = product(ones.repeat(rows, 1), sign * ones.repeat(40, 1), precision="int8")
    torch.testing.assert_close(found, torch.full((rows, 40), 4096.0 * sign))


ROWS = """
import hashlib
import torch
from helpers.graphs import Graph

torch.manual_seed(0)
digest = hashlib.sha256()
for precision in ("fp32", "int8"):
    for inputs, outputs in ((576, 1536), (1536, 576), (576, 3000)):
        graph, weight = Graph(precision), torch.randn(outputs, inputs).numpy()
        session = graph.session(graph.linear(graph.input("rows", "rows", inputs), weight))
        rows = torch.randn(128, inputs).numpy()
        (together,) = session.run(None, {"rows": rows})
        for n in (1, 2, 8, 33):
            assert (session.run(None, {"rows": rows[:n]})[0] == together[:n]).all(), (precision, inputs, outputs, n)
        digest.update(together.tobytes())
print(digest.hexdigest())
"""


def test_the_result_does_not_depend_on_the_number_of_threads() -> None:
    digests = set()
    for threads in ("1", "2"):
        environment = {**os.environ, "OMP_NUM_THREADS": threads}
        command = [sys.executable, "-c", ROWS]
        digests.add(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)
    assert len(digests) == 1


BESIDE_OTHERS = """
import os
import onnxruntime
if "pool" in os.sys.argv:
    onnxruntime.set_global_thread_pool_sizes(1, 1)
import numpy
from helpers.graphs import Graph
graph, ones = Graph(), numpy.ones((1, 8), numpy.float32)
session = graph.session(graph.linear(graph.input("rows", "rows", 8), ones))
print(session.run(None, {"rows": ones})[0], os.environ["ORT_DISABLE_TELEMETRY"])
"""


@pytest.mark.parametrize("words", [[], ["pool"]])
def test_another_library_may_have_set_up_onnx_runtime(words: list[str]) -> None:
    command = [sys.executable, "-c", BESIDE_OTHERS, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[[8.]]", "1"]
