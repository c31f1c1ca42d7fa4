"""A program's loss as an MLX function, so that `mx.value_and_grad` and MLX's optimizers work on it.

The whole step is one custom function: MLX sees parameters go in and one number come out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import mlx.core as mx
import numpy as np

from localllm.train.program import Layout, Noise, Program, Rows

Parameters = Mapping[str, mx.array]


def to_parameters(layout: Layout, flat: np.ndarray) -> dict[str, mx.array]:
    """Each parameter of `flat`, float32 [layout.size], as an array of its own."""
    return {name: mx.array(view) for name, view in layout.views(flat).items()}


def to_flat(layout: Layout, parameters: Parameters) -> np.ndarray:
    """float32 [layout.size], in the layout's order. Raises KeyError for a missing parameter."""
    flat = np.empty(layout.size, np.float32)
    for name, view in layout.views(flat).items():
        view[...] = np.array(parameters[name], copy=False)
    return flat


def loss_function(
    program: Program, rows: Rows, weights: np.ndarray, noise: Noise | None = None
) -> Callable[[Parameters], mx.array]:
    """f(parameters) -> -sum(weights * log p(target)), float32 [], differentiable once.

    parameters: every name of the program's layout. weights: float32 [n].

    Under `mx.grad` the program runs once: the forward computes the gradient too and keeps it.
    Outside of it the value alone is asked for, and costs the same.
    """
    layout = program.layout
    names = list(layout.shapes)

    def run(arrays: list[mx.array]) -> tuple[float, np.ndarray]:
        mx.eval(arrays)
        gradient = np.zeros(layout.size, np.float32)
        flat = to_flat(layout, dict(zip(names, arrays, strict=True)))
        return program.gradients(rows, weights, flat, gradient, noise), gradient

    last: list[np.ndarray] = []

    @mx.custom_function
    def step(*arrays: mx.array) -> mx.array:
        loss, gradient = run(list(arrays))
        last[:] = [gradient]
        return mx.array(loss, mx.float32)

    def step_vjp(
        primals: tuple[mx.array, ...], cotangent: mx.array, output: mx.array
    ) -> tuple[mx.array, ...]:
        gradient = last.pop()  # of these primals: MLX differentiates right after the forward
        return tuple(mx.array(view) * cotangent for view in layout.views(gradient).values())

    step.vjp(step_vjp)

    def loss(parameters: Parameters) -> mx.array:
        value: mx.array = step(*(parameters[name] for name in names))  # type: ignore[assignment]
        return value

    return loss
