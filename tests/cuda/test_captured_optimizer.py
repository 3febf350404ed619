"""An optimizer's step in a CUDA graph: what it reads anew, and what it must not need any more."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov2_fast import environment
from dinov2_fast.ops import _native_cuda, _optimizer_cuda, _optimizer_triton
from dinov2_fast.ops.optimizer import adamw_ema_reference, clip_coefficient
from tests.cuda import native_on_ptx
from tests.cuda.captured import Captured, captured
from tests.cuda.test_native_optimizer import FEW, Lists, make_lists, same
from tests.inputs import randn
from tests.tolerance import assert_within_error_budget

FROZEN = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8}
# Two steps of schedules, as the tensors hold them: only lr need not be exact in float32.
STEPS = [
    {"lr": 1e-2, "weight_decay": 0.25, "momentum": 0.75, "step": 7},
    {"lr": 3e-3, "weight_decay": 0.5, "momentum": 0.96875, "step": 8},
]
Capture = Callable[[], contextlib.AbstractContextManager[Captured]]


@pytest.fixture(params=["native", "triton"])
def kernels(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Any, Capture]]:
    """A backend's functions, executed without a GPU; and what makes a graph of them."""
    if request.param == "native":
        if reason := native_on_ptx.why_not():
            pytest.skip(reason)
        with native_on_ptx.native_on_ptx():
            yield _optimizer_cuda, lambda: captured(_native_cuda, "call")
        return
    pytest.importorskip("triton")
    if environment.triton_interpreted():
        pytest.skip("Triton interprets")
    from triton.runtime.jit import JITFunction

    from tools.simt.triton_launch import triton_on_cpu

    tables: dict[int, Sequence[Tensor]] = {}
    table_of = _optimizer_triton.table_of

    def known(*args: Any, **options: Any) -> Any:
        table = table_of(*args, **options)
        tables[table.numbers.data_ptr()] = table.tensors
        return table

    @contextlib.contextmanager
    def capture() -> Iterator[Captured]:
        with pytest.MonkeyPatch.context() as patch, captured(JITFunction, "run") as graph:
            patch.setattr(_optimizer_triton, "_is_captured", lambda table: True)
            yield graph

    monkeypatch.setattr(_optimizer_triton, "table_of", known)
    with triton_on_cpu(80, tables=tables):
        yield _optimizer_triton, capture


def clipped_step(functions: Any, lists: Lists, **changing: Any) -> Tensor:
    """As training does, without waiting for the norm."""
    norm = functions.norm(lists["gradients"])
    options = {"gradient_scale": clip_coefficient(norm, 3.0), "skip": norm.isnan()}
    functions.step(*lists.values(), **options, **changing, **FROZEN)
    return norm


def test_replays_make_the_steps_of_their_own_numbers(kernels: tuple[Any, Capture]):
    functions, capture = kernels
    lists, expected = make_lists(FEW), make_lists(FEW)
    changing = {name: torch.tensor(x, dtype=torch.float64) for name, x in STEPS[0].items()}
    with capture() as graph:
        norm = clipped_step(functions, lists, **changing)
    first = clipped_step(functions, expected, **STEPS[0])
    assert torch.equal(norm, first)
    assert same(lists, expected)

    for name, number in STEPS[1].items():
        changing[name].fill_(number)
    for both in zip(lists["gradients"], expected["gradients"], strict=True):
        for gradient in both:
            gradient.copy_(randn(gradient.numel(), seed=99))
    graph.replay()

    second = clipped_step(functions, expected, **STEPS[1])
    assert torch.equal(norm, second)
    assert not torch.equal(first, second)
    assert same(lists, expected)


def test_numbers_that_are_not_tensors_stay_those_of_the_capture(kernels: tuple[Any, Capture]):
    functions, capture = kernels
    lists, expected = make_lists(FEW), make_lists(FEW)
    step = torch.tensor(7.0, dtype=torch.float64)
    with capture() as graph:
        clipped_step(functions, lists, **(STEPS[0] | {"step": step}))
    step.fill_(8)
    graph.replay()
    for number in (7, 8):
        clipped_step(functions, expected, **(STEPS[0] | {"step": number}))
    assert same(lists, expected)


@pytest.mark.parametrize("skip", [None, torch.tensor(False)])
def test_the_reference_waits_for_no_number_either(skip: Tensor | None):
    lists, low, truth = make_lists(FEW), make_lists(FEW), make_lists(FEW)
    truth = {name: [x.double() for x in xs] for name, xs in truth.items()}
    changing = {name: torch.tensor(x, dtype=torch.float64) for name, x in STEPS[0].items()}
    options = {"gradient_scale": 0.5, **FROZEN}
    with captured(_native_cuda, "call"):
        for tensors in zip(*lists.values(), strict=True):
            adamw_ema_reference(*tensors, skip=skip, **options, **changing)
    for group in (low, truth):
        for tensors in zip(*group.values(), strict=True):
            adamw_ema_reference(*tensors, skip=None, **options, **STEPS[0])
    for name, group in lists.items():
        for found, one, exact in zip(group, low[name], truth[name], strict=True):
            assert_within_error_budget(found, low_precision=one, truth=exact, name=name)
