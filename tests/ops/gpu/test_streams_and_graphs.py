"""Kernels for a GPU on a stream that is not the default one, and captured in a CUDA graph."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dinov2_fast.backends import availability
from dinov2_fast.ops.attention import attention_backward, attention_forward
from dinov2_fast.ops.cross_entropy import cross_entropy
from dinov2_fast.ops.gelu import gelu, gelu_backward_
from dinov2_fast.ops.koleo import koleo
from dinov2_fast.ops.layer_norm import layer_norm_backward_, layer_norm_forward
from dinov2_fast.ops.optimizer import adamw_ema_step, clip_coefficient, gradient_norm
from dinov2_fast.ops.sinkhorn import sinkhorn
from dinov2_fast.ops.stochastic_depth import gather_scaled, scatter_add_scaled_
from dinov2_fast.ops.swiglu import swiglu, swiglu_backward_
from dinov2_fast.packing import Pack
from tests.inputs import randn

pytestmark = pytest.mark.gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, WIDTH = 307, 384  # a crop of 257 tokens and one of 50
BUSY_CYCLES = 50_000_000  # some 30 ms, in which a kernel on another stream would be done


@functools.cache
def pack() -> Pack:
    return Pack.from_groups([(1, 257), (1, 50)], DEVICE)


@functools.cache
def every_second_row() -> Tensor:
    return torch.arange(0, ROWS, 2, device=DEVICE)


def run_attention(x: Tensor, backend: str) -> list[Tensor]:
    q, k, v = x.view(ROWS, 3, -1, 64).unbind(1)
    options = {"scale": 0.125, "backend": backend}
    out, lse = attention_forward(q, k, v, pack(), **options)
    d_q, d_k, d_v = (torch.empty_like(out) for _ in range(3))
    gradients = {"d_q": d_q, "d_k": d_k, "d_v": d_v}
    attention_backward(out, q, k, v, lse, pack(), out=out, **gradients, **options)
    return [out, lse, d_q, d_k, d_v]


def run_cross_entropy(x: Tensor, backend: str) -> list[Tensor]:
    student = x.detach().requires_grad_()
    rows = every_second_row()
    loss = cross_entropy(
        student,
        x,
        x.new_zeros(WIDTH, dtype=torch.float32),
        x.new_zeros(ROWS, dtype=torch.float32),
        teacher_rows=torch.cat((rows, rows))[:ROWS],
        student_temperature=1.0,
        teacher_temperature=4.0,  # targets without vectors of their own: finite ones
        backend=backend,
    )
    return [loss.detach(), *torch.autograd.grad(loss.sum(), student)]


def run_gelu(x: Tensor, backend: str) -> list[Tensor]:
    da, dx = x.flip(0), x.clone()
    return [gelu(x, backend=backend), gelu_backward_(da, dx, backend=backend), dx]


def run_koleo(x: Tensor, backend: str) -> list[Tensor]:
    leaf = x.float().requires_grad_()
    loss = koleo(leaf, backend=backend)
    return [loss.detach(), *torch.autograd.grad(loss, leaf)]


def run_layer_norm(x: Tensor, backend: str) -> list[Tensor]:
    weight, bias, dx = x[0].clone(), x[1].clone(), x.clone()
    y, rstd = layer_norm_forward(x, weight, bias, eps=1e-6, backend=backend)
    return [y, dx, *layer_norm_backward_(dx, x, y, rstd, weight, bias, backend=backend)]


def run_optimizer(x: Tensor, backend: str) -> list[Tensor]:
    """A clipped step of every row, with numbers that the device alone knows, and of some copies."""
    gradients = x.float().unbind()
    states = [[row.clone() for row in gradients] for _ in range(4)]
    parameters, averages, squares, teachers = states
    copies = [row.bfloat16() if i % 2 else None for i, row in enumerate(parameters)]
    norm = gradient_norm(gradients, backend=backend)
    lr, momentum = x[0, 0].abs() / 100, x[0, 1].sigmoid()
    adamw_ema_step(
        parameters,
        gradients,
        averages,
        [square.square_() for square in squares],
        teachers,
        lr=lr,
        weight_decay=lr * 4,
        beta1=0.9,
        beta2=0.99,
        eps=1e-8,
        step=lr.new_full((), 7),
        momentum=momentum,
        gradient_scale=clip_coefficient(norm, 3.0),
        skip=norm.isnan(),
        copies=copies,
        backend=backend,
    )
    return [norm, *(x for state in states for x in state), *(x for x in copies if x is not None)]


def run_sinkhorn(x: Tensor, backend: str) -> list[Tensor]:
    return list(sinkhorn(x, temperature=4.0, backend=backend))


def run_stochastic_depth(x: Tensor, backend: str) -> list[Tensor]:
    rows, out, gamma = every_second_row(), x.clone(), x[0].float()
    scale = gamma.new_full((len(rows),), 2.0)
    scatter_add_scaled_(out, x[: len(rows)], rows, scale, gamma, backend=backend)
    return [out, *gather_scaled(x, rows, scale, out_dtype=x.dtype, backend=backend)]


def run_swiglu(x: Tensor, backend: str) -> list[Tensor]:
    dh, dx12 = x[:, : WIDTH // 2].clone(), x.clone()
    return [swiglu(x, backend=backend), swiglu_backward_(dh, dx12, backend=backend), dx12]


# stem -> calls on [ROWS, WIDTH] (attention: three times as wide), its outputs and gradients
CALLS: dict[str, Callable[[Tensor, str], list[Tensor]]] = {
    "attention": run_attention,
    "cross_entropy": run_cross_entropy,
    "gelu": run_gelu,
    "koleo": run_koleo,
    "layer_norm": run_layer_norm,
    "optimizer": run_optimizer,
    "sinkhorn": run_sinkhorn,
    "stochastic_depth": run_stochastic_depth,
    "swiglu": run_swiglu,
}


def given(stem: str, seed: int) -> Tensor:
    width = WIDTH * (3 if stem == "attention" else 1)
    return randn(ROWS, width, dtype=torch.bfloat16, device=DEVICE, seed=seed)


@pytest.fixture(params=["native", "triton"])
def compiled(request: pytest.FixtureRequest, stem: str) -> str:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    if reason := availability(stem, "cuda")[request.param]:
        pytest.skip(reason)
    return request.param


@pytest.mark.parametrize("stem", CALLS)
def test_work_waits_for_its_own_stream(stem: str, compiled: str):
    late = given(stem, 1)
    expected = CALLS[stem](late, compiled)  # compiled and chosen before the stream is busy
    x, side = given(stem, 0), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(BUSY_CYCLES)
        x.copy_(late)
        found = CALLS[stem](x, compiled)
    side.synchronize()
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("stem", CALLS)
def test_a_captured_graph_computes_what_came_since(stem: str, compiled: str):
    first, second = given(stem, 0), given(stem, 1)
    expected = CALLS[stem](second, compiled)
    x, side = first.clone(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        CALLS[stem](x, compiled)  # libraries allocate what they keep
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = CALLS[stem](x, compiled)
    x.copy_(second)
    graph.replay()
    assert all(map(torch.equal, found, expected))
