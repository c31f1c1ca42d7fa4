"""A contest is judged by its truth, its lane orders and the bytes that it moves."""

from __future__ import annotations

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from localllm.kernels_metal.contest import Contest
from localllm.kernels_metal.emulator import KernelFault
from localllm.kernels_metal.emulator.measure import contests_of, measure, measure_mlx
from localllm.kernels_metal.kernel import Launch
from localllm.kernels_metal.registry import KERNELS
from scripts.metal_sources import Tracing, trace
from scripts.metal_tables import put
from tests.kernels_metal.inline import InlineKernel

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the emulator needs Linux")

N = 96
ADD = InlineKernel(
    "uint i = thread_position_in_grid.x; if (i < uint(a_shape[0])) out[i] = T(a[i] + b[i]);",
    name="small",
    inputs=["a", "b"],
    outputs=["out"],
)
# Every thread reads what the one before it writes: the answer depends on who goes first.
RACE = InlineKernel(
    "uint i = thread_position_in_threadgroup.x;\n"
    "threadgroup float kept[96];\n"
    "kept[i] = 0;\n"
    "threadgroup_barrier(mem_flags::mem_threadgroup);\n"
    "kept[i] = a[i] + b[i];\n"
    "out[i] = T(kept[(i + 1) % 96]);",
    name="small",
    inputs=["a", "b"],
    outputs=["out"],
)
A, B = (mx.array(np.arange(N) * scale, mx.float16) for scale in (1.0, 0.5))


def contest(kernel: InlineKernel = ADD, *, scaled: float = 1.0, extra: bool = False) -> Contest:
    def ours() -> list[mx.array]:
        launch = Launch(
            inputs=[A, B * 2 if extra else B],
            grid=(N, 1, 1),
            threadgroup=(N, 1, 1),
            output_shapes=[(N,)],
            output_dtypes=[mx.float16],
            template=[("T", mx.float16)],
        )
        return kernel(launch)

    return Contest(
        kernel="small",
        work="96 sums",
        ours=ours,
        mlx=lambda: [A + B],
        truth=lambda: [scaled * np.array(A + B, np.float64)],
        tolerance=1e-3,
        least_bytes=3 * N * 2,
    )


def test_a_right_kernel_is_right_in_every_order() -> None:
    found = measure(contest(), ("forward", "reverse", "random"))
    assert found.right
    assert found.error == 0
    assert found.dispatches == 1
    assert found.moved >= found.contest.least_bytes


def test_a_wrong_truth_makes_it_wrong() -> None:
    assert not measure(contest(scaled=1.01)).right


def test_what_mlx_does_around_the_kernel_counts_too() -> None:
    plain, with_more = measure(contest()), measure(contest(extra=True))
    assert plain.around == 0
    assert with_more.moved == plain.moved
    assert with_more.around >= 2 * N * 2


def test_a_kernel_whose_bits_depend_on_the_order_is_a_fault() -> None:
    with pytest.raises(KernelFault):
        measure(contest(RACE), ("forward", "reverse"))


def test_mlx_is_counted_on_the_same_work() -> None:
    cost = measure_mlx(contest())
    assert cost is not None
    assert cost.moved == 3 * N * 2
    assert not cost.measured


@pytest.mark.parametrize("kernel", KERNELS)
def test_contests_have_names_and_bounds(kernel: str) -> None:
    contests = contests_of(kernel, mx.float16)
    if contests is None:
        pytest.skip(f"there is no {kernel} yet")
    assert contests
    works = [(each.kernel, each.work) for each in contests]
    assert len(set(works)) == len(works)
    assert all(each.least_bytes > 0 and each.tolerance > 0 for each in contests)


def test_a_kernel_that_does_not_exist_has_none() -> None:
    assert contests_of("no_such_kernel", mx.float16) is None


def test_the_source_for_apples_compiler_is_complete() -> None:
    tracing = Tracing()
    trace([contest(), contest()], tracing, "float16")
    ((name, (about, text)),) = tracing.sources.items()
    assert name.startswith("small_")
    assert "T = float16" in about
    assert "[[kernel]] void" in text
    assert "out[i] = T(a[i] + b[i])" in text


def test_a_table_is_put_between_its_markers() -> None:
    page = "# Page\n<!-- table: bytes -->\nold\n<!-- end -->\nrest <!-- end -->\n"
    assert put(page, "bytes", "| new |") == page.replace("old", "\n| new |\n")
    assert put(page, "bytes", None) == page.replace("old\n", "")
    with pytest.raises(ValueError, match="0 places"):
        put(page, "other", None)


def test_the_page_has_a_place_for_every_table() -> None:
    from scripts.metal_tables import PAGE, TABLES

    page = Path(PAGE).read_text("utf-8")
    for name in TABLES:
        put(page, name, None)
