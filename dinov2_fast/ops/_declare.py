"""Registers ops with torch so that compile, export, FSDP and autograd treat them as built in.

`Library.define` and `impl` cost a quarter of `custom_op` per call, which counts when a step makes
hundreds of calls. The dispatcher itself takes three times as long as a kernel of a few tokens, and
all it would find on the CPU is the kernel: a call that nothing watches goes to the kernel directly.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.overrides import has_torch_function

from dinov2_fast import native
from dinov2_fast.errors import BackendUnavailable

Kernel = Callable[..., Any]

# Any: torch.library is annotated in parts only.
_library: Any = torch.library
_LIBRARY = _library.Library("dinov2_fast", "FRAGMENT")
_torch: Any = torch
_C, _autograd = _torch._C, _torch.autograd
_PLAIN_TENSORS = frozenset((Tensor, torch.nn.Parameter))


def declare(
    schema: str,
    *,
    kernels: Mapping[tuple[str, str], Kernel],
    fake: Kernel,
    setup_context: Kernel | None = None,
    backward: Kernel | None = None,
) -> Any:
    """Register `torch.ops.dinov2_fast.<name>` and return what calls it.

    Args:
        schema: in torch's notation without the namespace; the last argument is `str backend`, so
            that a traced graph holds the choice as a constant.
        kernels: (backend, device type) -> function taking the arguments before `backend`.
        fake: the same arguments -> outputs with the right shapes, strides and dtypes, uncomputed.
        setup_context: (ctx, inputs, output), keeps what `backward` needs.
        backward: (ctx, *output gradients) -> one gradient or None for each argument of the schema.
            An op without one refuses to be differentiated.
    Returns:
        The call of the op, with every argument of the schema; the first is a tensor.
    """
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema)
    devices = dict.fromkeys(device for _, device in kernels)
    runs = {device: _dispatcher(name, device, kernels) for device in devices}
    for device, run_on_device in runs.items():
        _LIBRARY.impl(name, run_on_device, device.upper())
    qualified = f"dinov2_fast::{name}"

    def without_backend(*arguments: Any) -> Any:
        return fake(*arguments[:-1])

    _library.register_fake(qualified, without_backend, lib=_LIBRARY)
    if ("triton", "cuda") in kernels:
        traced = _traced(kernels["triton", "cuda"])
        _library.register_torch_dispatch(qualified, FunctionalTensorMode, traced, lib=_LIBRARY)
    gradients = backward if backward is not None else _refusal(name)
    _library.register_autograd(qualified, gradients, setup_context=setup_context, lib=_LIBRARY)
    op = getattr(torch.ops.dinov2_fast, name).default
    run = runs["cpu"]
    node = _node(name, run, setup_context, gradients)
    schema_types = [str(argument.type) for argument in op._schema.arguments]
    tensors = operator.itemgetter(*[i for i, t in enumerate(schema_types) if "Tensor" in t], 0)

    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling() or not nothing_watches(tensors(arguments)):
            return op(*arguments)
        if torch.is_grad_enabled() and _C._any_requires_grad(*arguments):
            return node.apply(*arguments)
        return run(*arguments)

    return call


def nothing_watches(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether the dispatcher would find nothing but autograd and a kernel of the CPU for a call.

    Args:
        tensors: that an op takes.
    Returns:
        False under a tracer, transform, mode or profiler, for subclasses and other devices.
    """
    if has_torch_function(tensors):
        return False
    for each in tensors:  # a loop, as generators cost what every call asks
        if each is not None and not (type(each) in _PLAIN_TENSORS and each.is_cpu):
            return False
    return not (
        _C._len_torch_dispatch_stack()
        or _C._are_functorch_transforms_active()
        or _C._is_tracing()
        or _autograd._profiler_enabled()
        or _autograd.forward_ad._current_level >= 0
    )


def _node(name: str, run: Kernel, setup_context: Kernel | None, backward: Kernel) -> Any:
    """The autograd function of calls that do without the dispatcher, as it would make one."""

    def forward(ctx: Any, *arguments: Any) -> Any:
        outputs = run(*arguments)
        if setup_context is not None:
            setup_context(ctx, arguments, outputs)
        return outputs

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), methods)


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
