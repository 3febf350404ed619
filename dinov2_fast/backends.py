"""Which backend computes an op: the preference table, the overrides and the reasons it gives.

Order of precedence: the `backend=` argument, `use_backend`, DINOV2_FAST_BACKEND, then `PREFERENCE`,
which DINOV2_FAST_PREFER lets begin at one backend. An explicit choice never falls back; the table
falls back and says so once.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from dinov2_fast import environment, flash_attention, native
from dinov2_fast.errors import BackendUnavailable

BACKENDS = ("reference", "native", "triton", "flash_attn")

# Op -> device type -> implemented backends, best first. Other device types take the reference.
# Kernels behind the reference are compiled for a GPU and interpreted on the CPU, but not measured
# on a GPU yet: DINOV2_FAST_PREFER=native (or triton) or an explicit backend takes them, Triton's
# also for what native has no kernel for. Before all of them comes what a call names `first` for its
# sizes: attention's does FlashAttention-3.
PREFERENCE: dict[str, dict[str, tuple[str, ...]]] = {
    "attention": {
        "cpu": ("native", "reference"),
        "cuda": ("reference", "native", "triton", "flash_attn"),
    },
    "stochastic_depth": {"cpu": ("native", "reference"), "cuda": ("reference", "native", "triton")},
    "layer_norm": {"cpu": ("native", "reference"), "cuda": ("reference", "native", "triton")},
    "swiglu": {"cpu": ("native", "reference"), "cuda": ("reference", "native", "triton")},
    "gelu": {"cpu": ("native", "reference"), "cuda": ("reference", "native", "triton")},
    "sinkhorn": {"cpu": ("native", "reference"), "cuda": ("reference", "native", "triton")},
    "cross_entropy": {"cpu": ("native", "reference"), "cuda": ("reference", "native", "triton")},
    "koleo": {"cpu": ("native", "reference"), "cuda": ("reference", "native", "triton")},
    "optimizer": {"cpu": ("native", "reference"), "cuda": ("reference", "native", "triton")},
}

# Float types a kernel takes: (op, backend, device type). The reference takes every float type.
DTYPES: dict[tuple[str, str, str], tuple[torch.dtype, ...]] = {
    ("stochastic_depth", "native", "cpu"): (torch.float32, torch.bfloat16),
    ("stochastic_depth", "native", "cuda"): (torch.float32, torch.float16, torch.bfloat16),
    ("stochastic_depth", "triton", "cuda"): (torch.float32, torch.float16, torch.bfloat16),
    ("layer_norm", "native", "cpu"): (torch.float32, torch.bfloat16),
    ("layer_norm", "native", "cuda"): (torch.float32, torch.float16, torch.bfloat16),
    ("layer_norm", "triton", "cuda"): (torch.float32, torch.float16, torch.bfloat16),
    ("attention", "native", "cpu"): (torch.float32, torch.bfloat16),
    ("attention", "native", "cuda"): (torch.float16, torch.bfloat16),
    ("attention", "triton", "cuda"): (torch.float32, torch.float16, torch.bfloat16),
    ("attention", "flash_attn", "cuda"): (torch.float16, torch.bfloat16),
    ("swiglu", "native", "cpu"): (torch.float32, torch.bfloat16),
    ("gelu", "native", "cpu"): (torch.float32, torch.bfloat16),
    ("gelu", "native", "cuda"): (torch.float32, torch.float16, torch.bfloat16),
    ("swiglu", "triton", "cuda"): (torch.float32, torch.float16, torch.bfloat16),
    ("gelu", "triton", "cuda"): (torch.float32, torch.float16, torch.bfloat16),
    ("swiglu", "native", "cuda"): (torch.float32, torch.float16, torch.bfloat16),
    ("sinkhorn", "native", "cuda"): (torch.float32, torch.float16, torch.bfloat16),
    ("sinkhorn", "triton", "cuda"): (torch.float32, torch.float16, torch.bfloat16),
    ("sinkhorn", "native", "cpu"): (torch.float32, torch.bfloat16, torch.float16),
    ("cross_entropy", "native", "cuda"): (torch.float32, torch.float16, torch.bfloat16),
    ("cross_entropy", "triton", "cuda"): (torch.float32, torch.float16, torch.bfloat16),
    ("cross_entropy", "native", "cpu"): (torch.float32, torch.bfloat16),
    ("koleo", "native", "cpu"): (torch.float32,),
    ("koleo", "native", "cuda"): (torch.float32,),
    ("koleo", "triton", "cuda"): (torch.float32,),
    ("optimizer", "native", "cpu"): (torch.float32,),
    ("optimizer", "native", "cuda"): (torch.float32,),
    ("optimizer", "triton", "cuda"): (torch.float32,),
}

_REFERENCE = ("reference",)  # the order on other device types

Refusals = Mapping[str, str] | Callable[[str], str]

_logger = logging.getLogger("dinov2_fast")
# What `use_backend` asks for. A plain global: torch.compile guards on it and traces again.
_forced: str | None = None


@contextmanager
def use_backend(name: str | None) -> Generator[None, None, None]:
    """Compute every op inside the block that is not given a backend with this one.

    The choice is the process's, not the thread's. A compiled function is traced again for it.

    Args:
        name: one of `BACKENDS`; None returns to the environment and the preference table.
    """
    global _forced
    _check_name("use_backend", name)
    before = _forced
    _forced = name
    try:
        yield
    finally:
        _forced = before


def choose_backend(
    op: str,
    tensor: Tensor,
    backend: str | None,
    *,
    refusals: Refusals | None = None,
    first: str | None = None,
) -> str:
    """The backend that computes an op on a tensor; torch.compile folds it into a constant.

    Args:
        op: stem of the op, a key of `PREFERENCE`.
        tensor: the op's main input; its device and dtype decide what is possible.
        backend: explicit choice, or None.
        refusals: backend -> why this call's other arguments rule it out (a stride, a head size);
            a function is asked only about the backends that come into question.
        first: backend that automatic choice tries before the others for this call's sizes.
    Returns:
        A name of `BACKENDS`.
    Raises:
        ValueError: the explicit name is not a backend.
        BackendUnavailable: the explicit choice cannot compute this call.
    """
    requested = _forced if backend is None else backend
    if callable(refusals):
        if not torch.compiler.is_compiling():
            return _choose(op, tensor.device.type, tensor.dtype, requested, refusals, first)
        refusals = {name: refusals(name) for name in BACKENDS if name != "reference"}
    reasons = () if refusals is None else tuple(refusals.items())
    return _chosen(op, tensor.device.type, tensor.dtype, requested, reasons, first)


def native_is_chosen_on_cpu(op: str) -> bool:
    """Whether automatic choice takes native kernels for what they compute of tensors of the CPU.

    For calls too short for `choose_backend`; where it says no, that one says why.
    """
    return (
        _forced is None
        and environment.leaves_choice_to_table()
        and not native.cuda_on_cpu
        and PREFERENCE[op]["cpu"][0] == "native"
        and not _why_not(op, "native", "cpu")
    )


def availability(op: str, device_type: str) -> dict[str, str]:
    """Backend -> "" when it can compute the op on this device type here, else why not."""
    return {name: _why_not(op, name, device_type) for name in BACKENDS}


def order_of(op: str, device_type: str, first: str | None = None) -> tuple[str, ...]:
    """Backends that automatic choice tries, best first.

    Args:
        op: stem of the op.
        device_type: of the tensors.
        first: what a call of its sizes tries before the table.
    Returns:
        The table from the backend on that DINOV2_FAST_PREFER names, then what stands before it:
        who prefers native kernels gets Triton's where those are missing, and then the reference.
    """
    order = PREFERENCE[op].get(device_type, _REFERENCE)
    preferred = environment.preferred_backend()
    if preferred in order:
        at = order.index(preferred)
        order = order[at:] + order[:at]
    if first in order:
        order = tuple(sorted(order, key=lambda name: (name != preferred, name != first)))
    return order


def _chosen(
    op: str,
    device_type: str,
    dtype: torch.dtype,
    requested: str | None,
    refusals: tuple[tuple[str, str], ...],
    first: str | None,
) -> str:
    """`choose_backend` on plain values, which a trace takes for constants."""
    refused = dict(refusals)
    return _choose(op, device_type, dtype, requested, lambda name: refused.get(name, ""), first)


# What torch.compiler.assume_constant_result sets; calling it would import torch._dynamo (1.5 s).
_chosen._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def _choose(
    op: str,
    device_type: str,
    dtype: torch.dtype,
    requested: str | None,
    refused: Callable[[str], str],
    first: str | None,
) -> str:
    """`choose_backend` with a function that says why a backend is ruled out, or ""."""
    # Whoever sets no variable, as most do, pays for one look at the environment and not for three.
    free = requested is None and environment.leaves_choice_to_table()
    explicit = requested if free or requested is not None else environment.backend()
    if explicit is not None:
        _check_name(op, explicit)
        reason = _why_not_this_call(op, explicit, device_type, dtype, refused)
        if reason:
            usable = [
                name
                for name in BACKENDS
                if not _why_not_this_call(op, name, device_type, dtype, refused)
            ]
            raise BackendUnavailable(
                f"{op}: backend {explicit!r} cannot compute this on {device_type}: {reason}; "
                f"available: {', '.join(usable)}"
            )
        return explicit
    order = PREFERENCE[op].get(device_type, _REFERENCE)
    if not free or first is not None:
        if op in environment.disabled_kernels():
            return "reference"
        order = order_of(op, device_type, first)
    for name in order:
        reason = _why_not_this_call(op, name, device_type, dtype, refused)
        if not reason:
            return name
        _log_fallback(op, name, device_type, reason)
    return "reference"


def _why_not_this_call(
    op: str, name: str, device_type: str, dtype: torch.dtype, refused: Callable[[str], str]
) -> str:
    """Why a backend cannot compute an op for this device, dtype and set of arguments, or ""."""
    if name == "reference":
        return ""
    reason = _why_not(op, name, device_type)
    if reason:
        return reason
    place = "cuda" if name == "triton" else native.place_of(name, device_type)
    dtypes = DTYPES.get((op, name, place), ())
    if dtype not in dtypes:
        known = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        return f"it takes {known}, got {str(dtype).removeprefix('torch.')}"
    return refused(name)


@functools.cache
def _why_not(op: str, name: str, device_type: str) -> str:
    """Why a backend cannot compute an op on a device type in this process, or ""."""
    if op not in PREFERENCE:
        raise ValueError(f"backends: expected an op of {', '.join(PREFERENCE)}, got {op!r}")
    if name == "reference":
        return ""
    # Triton's interpreter runs the kernels of the GPU on the CPU, for tests: only on request.
    interpreted = name == "triton" and device_type == "cpu" and environment.triton_interpreted()
    place = native.place_of(name, device_type)
    if name not in PREFERENCE[op].get("cuda" if interpreted else place, ()):
        return f"{op} has no {name} kernel for {device_type}"
    if name == "native":
        return native.why_not_for(op, place)
    if name == "flash_attn":
        return flash_attention.why_not()
    return _why_not_triton(op, interpreted)


def _why_not_triton(op: str, interpreted: bool) -> str:
    """Why Triton cannot compute an op in this process, or ""."""
    if importlib.util.find_spec("triton") is None:
        return "the triton package is not installed"
    if not interpreted and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if importlib.util.find_spec(f"dinov2_fast.kernels.{op}") is None:
        return f"there is no kernels/{op}.py"
    return ""


@functools.cache
def _log_fallback(op: str, name: str, device_type: str, reason: str) -> None:
    """Say once per op, backend and reason that a preferred backend was passed over."""
    _logger.info("%s: backend '%s' not used on %s: %s", op, name, device_type, reason)


def _check_name(where: str, name: str | None) -> None:
    """Refuse a name that is not a backend."""
    if name is not None and name not in BACKENDS:
        raise ValueError(
            f"{where}: backend must be one of {', '.join(BACKENDS)} or None, got {name!r}"
        )
