"""Calls of native kernels that take the same arguments on the CPU and on a GPU."""

from __future__ import annotations

from torch import Tensor

from dinov2_fast.ops._native_cpu import BLOCK_ROWS, Argument, new_partials, on_cuda, run_cpu
from dinov2_fast.ops._native_cuda import new_cuda_partials, run_cuda


def run_native(name: str, **arguments: Argument) -> None:
    """Call the extension's function for the device of the first tensor.

    Args:
        name: of the function, without "_cpu" or "_cuda" at its end.
        arguments: as for `run_cpu`; CUDA functions do not look at those they have no use for.
    """
    for value in arguments.values():
        if isinstance(value, Tensor):
            if on_cuda(value):
                return run_cuda(f"{name}_cuda", reached=(), **arguments)
            break
    run_cpu(f"{name}_cpu", **arguments)


def new_native_partials(like: Tensor) -> Tensor:
    """Scratch for the sums over rows of a matrix [R, F]: [blocks, F] float32."""
    return (new_cuda_partials if on_cuda(like) else new_partials)(like, *like.shape)


def of_partials(like: Tensor, partials: Tensor | None) -> dict[str, Argument]:
    """Arguments that say how rows are divided into partial sums, None if there are none."""
    if on_cuda(like):
        return {"partials": partials, "num_partials": 0 if partials is None else len(partials)}
    return {"partials": partials, "block_rows": BLOCK_ROWS}
