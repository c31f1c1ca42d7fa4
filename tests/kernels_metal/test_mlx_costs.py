"""What MLX's own way moves: measured where its kernel ships, otherwise never more than it is."""

from __future__ import annotations

import sys

import mlx.core as mx
import numpy as np
import pytest

from localllm.errors import LocalLLMError
from localllm.kernels_metal.emulator import Emulator
from localllm.kernels_metal.emulator.mlx_costs import MlxCost, mlx_cost
from localllm.kernels_metal.emulator.mlx_kernels import Gpu, MlxRun

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the emulator needs Linux")

K, N = 512, 64
WEIGHT_BYTES = N * K // 2 + 2 * N * (K // 64) * 2  # 4-bit codes, scales and biases in half


def normal(*shape: int) -> mx.array:
    random = np.random.default_rng(sum(shape))
    made = mx.array(random.standard_normal(shape), mx.float32).astype(mx.float16)
    mx.eval(made)
    return made


def names(cost: MlxCost) -> list[str]:
    return [step.name for step in cost.steps]


def matmul_cost(rows: int, gpu: Gpu | None = None) -> MlxCost:
    codes, scales, biases = mx.quantize(normal(N, K), 64, 4)
    x, residual = normal(rows, K), normal(rows, N)
    mx.eval(codes, scales, biases)

    def work() -> list[mx.array]:
        y = mx.quantized_matmul(x, codes, scales, biases, group_size=64, bits=4)
        return [y + residual]

    return mlx_cost(Emulator(), work, gpu)


def test_a_quantized_matmul_is_measured_and_the_rest_counted_once() -> None:
    cost = matmul_cost(rows=1)
    assert names(cost) == ["affine_qmv_fast", "Add"]
    matmul, added = cost.steps
    assert matmul.measured
    assert matmul.moved >= WEIGHT_BYTES + 2 * (K + N)
    assert (added.moved, added.measured) == (3 * N * 2, False)
    assert not cost.measured


@pytest.mark.parametrize(
    ("rows", "generation", "kernel"),
    [
        (4, 16, "affine_qmv_wide"),
        (4, 13, "affine_qmv_fast"),
        (16, 16, "affine_qmm_t_splitk"),
    ],
)
def test_the_kernel_is_the_one_that_mlx_picks(rows: int, generation: int, kernel: str) -> None:
    assert matmul_cost(rows, Gpu(generation)).steps[0].name == kernel


def test_gathered_blocks_count_as_read_and_written_and_views_as_nothing() -> None:
    pool = normal(10, 2, 16, 64)
    q = normal(1, 4, 1, 64)
    table = mx.array([3, 1])

    def work() -> list[mx.array]:
        taken = mx.take(pool, table, axis=0).transpose(1, 0, 2, 3).reshape(1, 2, 32, 64)
        return [mx.fast.scaled_dot_product_attention(q, taken, taken, scale=0.125)]

    cost = mlx_cost(Emulator(), work)
    assert names(cost) == ["Gather", "sdpa_vector"]
    assert cost.steps[0].moved == 2 * (2 * 2 * 16 * 64 * 2) + 8


def test_what_mlx_has_no_fused_kernel_for_counts_as_its_parts() -> None:
    q, k = normal(1, 4, 1, 80), normal(1, 4, 16, 80)

    def work() -> list[mx.array]:
        return [mx.fast.scaled_dot_product_attention(q, k, k, scale=0.125)]

    cost = mlx_cost(Emulator(), work)
    assert names(cost).count("Matmul") == 2
    assert not any(step.measured for step in cost.steps)


def test_only_the_matrices_that_are_named_are_read() -> None:
    a, b = normal(3, 1, 8), normal(5, 8, 4)
    index = mx.array([4, 4, 1])

    def work() -> list[mx.array]:
        return [mx.gather_mm(a, b, rhs_indices=index)]

    (step,) = mlx_cost(Emulator(), work).steps
    assert step.moved == 2 * (3 * 8 + 2 * 8 * 4 + 3 * 4) + 12


def test_mlx_is_left_as_it_was() -> None:
    before = mx.quantized_matmul, mx.fast.rms_norm, mx.fast.scaled_dot_product_attention
    with pytest.raises(ZeroDivisionError):
        mlx_cost(Emulator(), lambda: [mx.array(1 // 0)])
    assert (mx.quantized_matmul, mx.fast.rms_norm, mx.fast.scaled_dot_product_attention) == before


def test_a_kernel_called_wrongly_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: object, **options: object) -> MlxRun:
        return MlxRun(mx.zeros((1, N), mx.float16), ())

    module = "localllm.kernels_metal.emulator.mlx_costs.quantized_matmul"
    monkeypatch.setattr(module, wrong)
    with pytest.raises(LocalLLMError, match="differs from MLX's op"):
        matmul_cost(rows=1)


def test_a_kernel_of_mlx_with_a_fault_counts_as_the_least_it_can_be() -> None:
    """37 rows: MLX stores the last ones twice, from two simdgroups, which is a race here."""
    codes, scales, biases = mx.quantize(normal(37, 576), 64, 4)
    x = normal(1, 576)
    mx.eval(codes, scales, biases)
    cost = mlx_cost(
        Emulator(),
        lambda: [mx.quantized_matmul(x, codes, scales, biases, group_size=64, bits=4)],
    )
    (step,) = cost.steps
    assert not step.measured
    assert step.moved == sum(each.nbytes for each in (x, codes, scales, biases)) + 2 * 37
