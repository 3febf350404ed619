"""Five seconds of arithmetic: every op on every backend of this machine against float64."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dinov2_fast.backends import DTYPES, availability
from dinov2_fast.ops.attention import attention
from dinov2_fast.ops.cross_entropy import cross_entropy
from dinov2_fast.ops.gelu import gelu
from dinov2_fast.ops.koleo import koleo
from dinov2_fast.ops.layer_norm import layer_norm
from dinov2_fast.ops.optimizer import adamw_ema_step
from dinov2_fast.ops.sinkhorn import sinkhorn
from dinov2_fast.ops.stochastic_depth import draw_kept_rows, gather_rows, scatter_add_scaled
from dinov2_fast.ops.swiglu import swiglu
from dinov2_fast.packing import Pack

TIME_LIMIT_S = 5.0

# Largest relative error (Frobenius norm) of a healthy result. float32: sums of a few hundred terms
# lose a few units of 6e-8. Half types: inputs are exact, so what is left is rounding inside the
# reference (bf16 keeps 2^-9) and of the result.
_ERROR_LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}

Trial = Callable[[torch.dtype, str, str], list[Tensor]]


@dataclass(frozen=True)
class Outcome:
    """What one op did on one backend; `passed` is None when time ran out before it."""

    op: str
    backend: str
    device: str
    dtype: str
    passed: bool | None
    error: float
    limit: float
    seconds: float
    message: str


def run_self_test(device_types: tuple[str, ...], *, time_limit_s: float) -> list[Outcome]:
    """Compute every op on every available backend and compare with the reference in float64.

    Args:
        device_types: "cpu" and perhaps "cuda".
        time_limit_s: no new computation starts after this long.
    Returns:
        One outcome for each op, backend, device type and float type.
    """
    begin = time.perf_counter()
    outcomes: list[Outcome] = []
    for op, trial in _TRIALS.items():
        for device in device_types:
            for backend, why_not in availability(op, device).items():
                if why_not:
                    continue
                for dtype in DTYPES.get((op, backend, device), (torch.float32,)):
                    late = time.perf_counter() - begin > time_limit_s
                    outcomes.append(_outcome(op, trial, backend, device, dtype, late=late))
    return outcomes


def _outcome(
    op: str, trial: Trial, backend: str, device: str, dtype: torch.dtype, *, late: bool
) -> Outcome:
    """Run one trial and measure its error; whatever it raises becomes the message."""
    begin = time.perf_counter()
    limit, error, message, passed = _ERROR_LIMITS[dtype], float("nan"), "", False
    if late:
        message, passed = "not run: out of time", None
    else:
        try:
            truth = trial(torch.float64, "cpu", "reference")
            error = max(
                float((out.double().cpu() - true).norm() / true.norm().clamp_min(1e-300))
                for out, true in zip(trial(dtype, device, backend), truth, strict=True)
            )
            passed = error <= limit  # false for NaN
            message = "" if passed else f"relative error {error:.2g} is over {limit:.2g}"
        except Exception as caught:  # a report must outlive whatever is broken
            message = f"{type(caught).__name__}: {caught}"
    seconds = time.perf_counter() - begin
    name = str(dtype).removeprefix("torch.")
    return Outcome(op, backend, device, name, passed, error, limit, seconds, message)


def _numbers(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    """Normal numbers that every dtype of the self-test can hold exactly."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 32).round().div(32).to(device, dtype)


def _with_gradients(out: Tensor, *inputs: Tensor) -> list[Tensor]:
    """An output and the gradients of its inputs under a fixed incoming gradient."""
    incoming = _numbers(*out.shape, dtype=out.dtype, device=str(out.device), seed=9)
    return [out.detach(), *torch.autograd.grad(out, inputs, incoming)]


def _attention(dtype: torch.dtype, device: str, backend: str) -> list[Tensor]:
    pack = Pack.from_lengths([17, 17, 5], device)
    q, k, v = (
        _numbers(39, 2, 16, dtype=dtype, device=device, seed=s).requires_grad_() for s in range(3)
    )
    return _with_gradients(attention(q, k, v, pack, backend=backend), q, k, v)


def _stochastic_depth(dtype: torch.dtype, device: str, backend: str) -> list[Tensor]:
    pack = Pack.from_lengths([5, 5, 5, 3, 3], device)
    kept = draw_kept_rows(pack, 0.4, torch.Generator().manual_seed(0))
    assert kept is not None  # only a ratio of 0 keeps everything
    x = _numbers(pack.num_tokens, 16, dtype=dtype, device=device).requires_grad_()
    gamma = _numbers(16, dtype=dtype, device=device, seed=1).requires_grad_()
    branch = gather_rows(x, kept.rows, backend=backend)
    out = scatter_add_scaled(x, branch, kept.rows, kept.row_scale, gamma, backend=backend)
    return _with_gradients(out, x, gamma)


def _layer_norm(dtype: torch.dtype, device: str, backend: str) -> list[Tensor]:
    x = _numbers(13, 48, dtype=dtype, device=device).requires_grad_()
    weight = _numbers(48, dtype=dtype, device=device, seed=1).requires_grad_()
    bias = _numbers(48, dtype=dtype, device=device, seed=2).requires_grad_()
    return _with_gradients(layer_norm(x, weight, bias, backend=backend), x, weight, bias)


def _gelu(dtype: torch.dtype, device: str, backend: str) -> list[Tensor]:
    x = _numbers(65, 1000, dtype=dtype, device=device).requires_grad_()
    return _with_gradients(gelu(x, backend=backend), x)


def _swiglu(dtype: torch.dtype, device: str, backend: str) -> list[Tensor]:
    x12 = _numbers(65, 2 * 1000, dtype=dtype, device=device).requires_grad_()
    return _with_gradients(swiglu(x12, backend=backend), x12)


def _sinkhorn(dtype: torch.dtype, device: str, backend: str) -> list[Tensor]:
    logits = _numbers(12, 40, dtype=dtype, device=device)
    return list(sinkhorn(logits, temperature=0.5, backend=backend))


def _cross_entropy(dtype: torch.dtype, device: str, backend: str) -> list[Tensor]:
    student = _numbers(8, 40, dtype=dtype, device=device).requires_grad_()
    teacher = _numbers(4, 40, dtype=dtype, device=device, seed=1)
    # The vectors of the targets are float32 at least, as sinkhorn gives them.
    log_v = -teacher.to(torch.promote_types(dtype, torch.float32)).logsumexp(dim=1)
    loss = cross_entropy(
        student,
        teacher,
        log_v.new_zeros(40),
        log_v,
        teacher_rows=torch.arange(8, device=device) % 4,
        student_temperature=0.5,
        teacher_temperature=1.0,
        backend=backend,
    )
    return _with_gradients(loss, student)


def _koleo(dtype: torch.dtype, device: str, backend: str) -> list[Tensor]:
    x = _numbers(9, 24, dtype=dtype, device=device).requires_grad_()
    return _with_gradients(koleo(x, backend=backend), x)


def _optimizer(dtype: torch.dtype, device: str, backend: str) -> list[Tensor]:
    parameter, gradient, first, teacher = (
        _numbers(77, dtype=dtype, device=device, seed=s) for s in range(4)
    )
    second = first.square()
    adamw_ema_step(
        [parameter],
        [gradient],
        [first],
        [second],
        [teacher],
        lr=0.01,
        weight_decay=0.1,
        beta1=0.9,
        beta2=0.99,
        eps=1e-8,
        step=3,
        momentum=0.9,
        backend=backend,
    )
    return [parameter, first, second, teacher]


_TRIALS: dict[str, Trial] = {
    "attention": _attention,
    "stochastic_depth": _stochastic_depth,
    "layer_norm": _layer_norm,
    "gelu": _gelu,
    "swiglu": _swiglu,
    "sinkhorn": _sinkhorn,
    "cross_entropy": _cross_entropy,
    "koleo": _koleo,
    "optimizer": _optimizer,
}
