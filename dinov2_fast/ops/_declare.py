"""Registers ops with torch so that compile, export, FSDP and autograd treat them as built in.

`Library.define` and `impl` cost a quarter of `custom_op` per call, which counts when a step makes
hundreds of calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode

from dinov2_fast import native
from dinov2_fast.errors import BackendUnavailable

Kernel = Callable[..., Any]

# Any: torch.library is annotated in parts only.
_library: Any = torch.library
_LIBRARY = _library.Library("dinov2_fast", "FRAGMENT")


def declare(
    schema: str,
    *,
    kernels: Mapping[tuple[str, str], Kernel],
    fake: Kernel,
    setup_context: Kernel | None = None,
    backward: Kernel | None = None,
) -> Any:
    """Register `torch.ops.dinov2_fast.<name>` and return the callable overload.

    Args:
        schema: in torch's notation without the namespace; the last argument is `str backend`, so
            that a traced graph holds the choice as a constant.
        kernels: (backend, device type) -> function taking the arguments before `backend`.
        fake: the same arguments -> outputs with the right shapes, strides and dtypes, uncomputed.
        setup_context: (ctx, inputs, output), keeps what `backward` needs.
        backward: (ctx, *output gradients) -> one gradient or None for each argument of the schema.
            An op without one refuses to be differentiated.
    Returns:
        The op; call it with every argument of the schema.
    """
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema)
    for device_type in dict.fromkeys(device for _, device in kernels):
        _LIBRARY.impl(name, _dispatcher(name, device_type, kernels), device_type.upper())
    qualified = f"dinov2_fast::{name}"

    def without_backend(*arguments: Any) -> Any:
        return fake(*arguments[:-1])

    _library.register_fake(qualified, without_backend, lib=_LIBRARY)
    if ("triton", "cuda") in kernels:
        traced = _traced(kernels["triton", "cuda"])
        _library.register_torch_dispatch(qualified, FunctionalTensorMode, traced, lib=_LIBRARY)
    _library.register_autograd(
        qualified,
        backward if backward is not None else _refusal(name),
        setup_context=setup_context,
        lib=_LIBRARY,
    )
    return getattr(torch.ops.dinov2_fast, name).default


def _dispatcher(name: str, device_type: str, kernels: Mapping[tuple[str, str], Kernel]) -> Kernel:
    """The function torch calls on one device type: takes the backend off and runs its kernel."""

    def run(*arguments: Any) -> Any:
        backend = arguments[-1]
        kernel = kernels.get((backend, native.place_of(backend, device_type)))
        if kernel is None:
            known = ", ".join(backend for backend, device in kernels if device == device_type)
            raise BackendUnavailable(
                f"{name}: expected a backend of {known} on {device_type}, got {backend!r}"
            )
        return kernel(*arguments[:-1])

    return run


def _traced(kernel: Kernel) -> Kernel:
    """What torch calls while it makes a graph: Triton's launches go into it, not the op.

    So inductor sees the kernels, as it does those of `torch.library.triton_op`: it launches them
    itself, and packs them into what it compiles ahead of time. An exported program keeps the op.
    """

    def run(
        mode: Any, op: Any, types: tuple[type, ...], arguments: tuple[Any, ...], options: Any
    ) -> Any:
        if arguments[-1] != "triton" or _stays_whole():
            return mode.__torch_dispatch__(op, types, arguments, options)
        known = (FakeTensor, FunctionalTensor)
        if not all(kind is torch.Tensor or issubclass(kind, known) for kind in types):
            return NotImplemented
        with mode:
            return kernel(*arguments[:-1])

    return run


def _stays_whole() -> bool:
    """Whether ops of Triton's kernels go into graphs as they are."""
    from torch.export._trace import custom_triton_ops_decomposition_disabled

    from dinov2_fast.kernels.launches import INTERPRETED

    return INTERPRETED or custom_triton_ops_decomposition_disabled()


def _refusal(name: str) -> Kernel:
    """A backward that says how to get a derivative the op does not have."""

    def backward(ctx: Any, *gradients: Any) -> Any:
        raise BackendUnavailable(
            f"{name}: expected no further derivative of what a kernel computed; "
            "backend='reference' can be differentiated any number of times"
        )

    return backward
