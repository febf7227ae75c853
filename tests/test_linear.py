"""`helpers.linear`: linear layers in fp32 and in 8 bit, against a reference in whole numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

KERNELS = ["_fbgemm", "_int_mm"]


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest, torch: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let `Int8Linear` multiply with one of its two kernels."""
    use(request.param, monkeypatch)
    return str(request.param)


def use(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `Int8Linear` use `kernel` from now on."""
    from helpers import linear

    if kernel == "_fbgemm" and not linear.has_fbgemm():
        pytest.skip("torch has no FBGEMM on this CPU")
    monkeypatch.setattr(linear, "has_fbgemm", lambda: kernel == "_fbgemm")


@pytest.fixture(autouse=True)
def _seed(torch: Any) -> None:
    torch.manual_seed(0)


def whole_numbers(rows: int, columns: int, largest: int) -> Any:
    """Return a random matrix of whole numbers as fp32. The largest of each row is `largest`."""
    import torch

    numbers = torch.randint(-largest, largest + 1, (rows, columns)).float()
    numbers[torch.arange(rows), torch.randint(0, columns, (rows,))] = float(largest)
    return numbers


def exact_product(rows: Any, weight: Any) -> Any:
    """Return the product of two matrices of whole numbers, computed in whole numbers, as fp32."""
    return (rows.long() @ weight.long().t()).float()


def relative_error(result: Any, expected: Any) -> float:
    """Return the norm of the difference, relative to that of `expected`."""
    return float((result - expected).norm() / expected.norm())


# --- fp32 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prepack", [True, False, None])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("n", [1, 9])
def test_in_fp32_the_result_is_that_of_torch(torch: Any, prepack: bool | None, has_bias: bool, n: int) -> None:
    from helpers.linear import Fp32Linear

    weight, rows, hidden = torch.randn(50, 30), torch.randn(n, 30), torch.randn(n, 50)
    bias = torch.randn(50) if has_bias else None
    linear = Fp32Linear(weight, bias, prepack=prepack)
    expected = torch.nn.functional.linear(rows, weight, bias)
    torch.testing.assert_close(linear(rows), expected, rtol=1e-5, atol=1e-5)
    added = hidden.clone()
    assert linear.add_to(added, rows) is added
    torch.testing.assert_close(added, hidden + expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prepack", [True, False])
def test_weights_in_16_bit_are_computed_in_fp32(torch: Any, prepack: bool) -> None:
    from helpers.linear import Fp32Linear

    weight, rows = torch.randn(50, 30).bfloat16(), torch.randn(3, 30)
    expected = rows @ weight.float().t()
    torch.testing.assert_close(Fp32Linear(weight, prepack=prepack)(rows), expected, rtol=1e-5, atol=1e-5)


# --- int8: exact in whole numbers -----------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5, 33])
def test_whole_numbers_are_multiplied_exactly(torch: Any, kernel: str, n: int) -> None:
    from helpers.linear import LEVELS, Int8Linear

    weight, rows = whole_numbers(70, 300, LEVELS), whole_numbers(n, 300, 127)
    torch.testing.assert_close(Int8Linear(weight)(rows), exact_product(rows, weight), rtol=2e-6, atol=0.01)


@pytest.mark.parametrize("n", [1, 5])
def test_16_bits_are_multiplied_exactly_too(torch: Any, kernel: str, n: int) -> None:
    from helpers.linear import LEVELS, Int8Linear

    weight, high, low = whole_numbers(70, 300, LEVELS), whole_numbers(n, 300, 127), whole_numbers(n, 300, 127)
    low[high.abs() == 127] = 0  # so that the largest number of a row is 127
    rows = high + low / 256
    expected = (exact_product(256 * high + low, weight).double() / 256).float()
    torch.testing.assert_close(Int8Linear(weight, digits=2)(rows), expected, rtol=2e-6, atol=0.01)


@pytest.mark.parametrize("digits", [1, 2])
@pytest.mark.parametrize("sign_of_rows", [1, -1])
@pytest.mark.parametrize("sign_of_weights", [1, -1])
def test_nothing_saturates_if_all_numbers_are_the_largest(
    torch: Any, kernel: str, digits: int, sign_of_rows: int, sign_of_weights: int
) -> None:
    """Without VNNI, FBGEMM adds two products in 16 bits."""
    from helpers.linear import Int8Linear

    weight, rows = torch.full((40, 4096), 1.0 * sign_of_weights), torch.full((3, 4096), 1.0 * sign_of_rows)
    expected = torch.full((3, 40), 4096.0 * sign_of_rows * sign_of_weights)
    torch.testing.assert_close(Int8Linear(weight, digits=digits)(rows), expected, rtol=1e-6, atol=0)


def test_a_number_halfway_between_two_digits_is_rounded_to_a_neighbour(torch: Any, kernel: str) -> None:
    from helpers.linear import Int8Linear

    rows = torch.tensor([[127.0, 0.5, -0.5, 1.5, -1.5, 2.5, -2.5, 126.5]])
    result = Int8Linear(torch.eye(8), digits=2)(rows)
    torch.testing.assert_close(result, rows, rtol=0, atol=1 / 256)


def test_both_kernels_give_the_same(torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from helpers.linear import Int8Linear

    weight, bias, rows = torch.randn(100, 400), torch.randn(100), torch.randn(9, 400)
    results = []
    for kernel in KERNELS:
        use(kernel, monkeypatch)
        results.append([Int8Linear(weight, bias, digits=digits)(rows) for digits in (1, 2)])
    for fbgemm, int_mm in zip(*results, strict=True):
        assert relative_error(int_mm, fbgemm) < 1e-6


DIGEST = """
import hashlib
import torch
from helpers.linear import Int8Linear, has_fbgemm

torch.manual_seed(0)
digest = hashlib.sha256()
for outputs, inputs in ((64, 64), (100, 576), (576, 1536)):
    weight, bias = torch.randn(outputs, inputs), torch.randn(outputs)
    for n in (1, 3, 8, 40):
        rows = torch.randn(n, inputs) * 10.0 ** torch.randint(-3, 4, (n, 1))
        for digits in (1, 2):
            digest.update(Int8Linear(weight, bias, digits=digits)(rows).numpy().tobytes())
print(has_fbgemm(), digest.hexdigest())
"""


@pytest.mark.main
def test_a_cpu_without_vnni_computes_the_same_bit_for_bit(torch: Any) -> None:
    avx2 = {
        "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
    }
    outputs = [
        subprocess.run(
            [sys.executable, "-c", DIGEST], env={**os.environ, **limits}, capture_output=True, text=True, check=True
        ).stdout
        for limits in ({}, avx2)
    ]
    assert outputs[0] == outputs[1]


# --- int8: what a step needs ----------------------------------------------------------------------


@pytest.mark.parametrize("digits", [1, 2])
def test_a_row_gives_the_same_bits_alone_and_in_a_batch(torch: Any, kernel: str, digits: int) -> None:
    from helpers.linear import Int8Linear

    linear = Int8Linear(torch.randn(100, 300), torch.randn(100), digits=digits)
    rows, hidden = torch.randn(33, 300) * 10.0 ** torch.randint(-3, 4, (33, 1)), torch.randn(33, 100)
    alone = torch.cat([linear(row[None]) for row in rows])
    added_alone = torch.cat([linear.add_to(hidden[n : n + 1].clone(), rows[n : n + 1]) for n in range(33)])
    for n in (2, 7, 8, 16, 33):
        assert torch.equal(linear(rows[:n]), alone[:n])
        assert torch.equal(linear.add_to(hidden[:n].clone(), rows[:n]), added_alone[:n])


@pytest.mark.parametrize("digits", [1, 2])
def test_a_row_of_zeros_gives_the_bias(torch: Any, kernel: str, digits: int) -> None:
    from helpers.linear import Int8Linear

    weight, bias, rows, hidden = torch.randn(50, 30), torch.randn(50), torch.randn(3, 30), torch.randn(3, 50)
    rows[1] = 0
    assert torch.equal(Int8Linear(weight, digits=digits)(rows)[1], torch.zeros(50))
    assert torch.equal(Int8Linear(weight, bias, digits=digits)(rows)[1], bias)
    assert torch.equal(Int8Linear(weight, digits=digits).add_to(hidden.clone(), rows)[1], hidden[1])


@pytest.mark.parametrize("digits", [1, 2])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_nan_and_infinity_reach_the_result_of_their_row_alone(torch: Any, kernel: str, digits: int, value: str) -> None:
    from helpers.linear import Int8Linear

    linear, rows = Int8Linear(torch.randn(50, 30), digits=digits), torch.randn(3, 30)
    expected = linear(rows)
    rows[1, 7] = float(value)
    result = linear(rows)
    assert not result[1].isfinite().any()
    assert torch.equal(result[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_nan_and_infinity_in_the_weights_do_not_vanish(torch: Any, kernel: str, value: str) -> None:
    from helpers.linear import Int8Linear

    weight, rows = torch.randn(50, 30), torch.randn(3, 30)
    weight[4, 7] = float(value)
    finite = Int8Linear(weight)(rows).isfinite()
    assert not finite[:, 4].any()
    assert finite[:, :4].all() and finite[:, 5:].all()


def test_an_output_without_weights_is_zero(torch: Any, kernel: str) -> None:
    from helpers.linear import Int8Linear

    weight = torch.randn(50, 30)
    weight[4] = 0
    assert torch.equal(Int8Linear(weight)(torch.randn(3, 30))[:, 4], torch.zeros(3))


def test_two_digits_are_closer_to_fp32_than_one(torch: Any, kernel: str) -> None:
    from helpers.linear import LEVELS, Int8Linear

    weight, rows = whole_numbers(70, 300, LEVELS), torch.randn(9, 300)  # no error by rounding the weights
    one, two = (relative_error(Int8Linear(weight, digits=digits)(rows), rows @ weight.t()) for digits in (1, 2))
    assert two < one / 100
    assert two < 1e-4 < one < 0.02


def test_rounding_the_weights_changes_little(torch: Any, kernel: str) -> None:
    from helpers.linear import Int8Linear

    weight, rows = torch.randn(70, 300), torch.randn(9, 300)
    assert 0.001 < relative_error(Int8Linear(weight, digits=2)(rows), rows @ weight.t()) < 0.02


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_bias_is_added_in_fp32(torch: Any, kernel: str, dtype: str) -> None:
    from helpers.linear import Int8Linear

    weight, bias = torch.randn(50, 30).to(getattr(torch, dtype)), torch.randn(50).to(getattr(torch, dtype))
    rows, hidden = torch.randn(3, 30), torch.randn(3, 50)
    without, linear = Int8Linear(weight), Int8Linear(weight, bias)
    assert torch.equal(linear(rows), without(rows) + bias.float())
    added = hidden.clone()
    assert linear.add_to(added, rows) is added
    torch.testing.assert_close(added, hidden + linear(rows), rtol=1e-6, atol=1e-6)


def test_the_rows_stay_as_they_were(torch: Any, kernel: str) -> None:
    from helpers.linear import Int8Linear

    rows = torch.randn(3, 30)
    before = rows.clone()
    for digits in (1, 2):
        Int8Linear(torch.randn(50, 30), digits=digits)(rows)
    assert torch.equal(rows, before)


def test_rows_need_not_lie_side_by_side(torch: Any, kernel: str) -> None:
    from helpers.linear import Fp32Linear, Int8Linear

    weight, wide = torch.randn(50, 30), torch.randn(3, 60)
    rows = wide.chunk(2, dim=-1)[1]
    for linear in (Int8Linear(weight), Int8Linear(weight, digits=2), Fp32Linear(weight, prepack=True)):
        assert torch.equal(linear(rows), linear(rows.contiguous()))


def test_layers_may_be_made_in_several_threads_at_once(torch: Any) -> None:
    """torch's engine for quantised tensors is one for all threads."""
    from helpers.linear import Int8Linear

    before, rows = torch.backends.quantized.engine, torch.randn(3, 300)
    weights = [torch.randn(200, 300) for _ in range(100)]
    expected = [Int8Linear(weight)(rows) for weight in weights]
    with ThreadPoolExecutor(4) as threads:
        made = list(threads.map(Int8Linear, weights))
    assert torch.backends.quantized.engine == before
    assert all(torch.equal(linear(rows), result) for linear, result in zip(made, expected, strict=True))
