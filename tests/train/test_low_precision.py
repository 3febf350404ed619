"""Low-precision copies of weights: written by every optimizer step, taken by every product."""

from __future__ import annotations

import pytest
import torch

from dinov2_fast.config import OptimizerConfig
from dinov2_fast.ops import _matmul as matmul
from dinov2_fast.train import optimizer as optimizer_module
from dinov2_fast.train.optimizer import build_optimizer
from dinov2_fast.train.schedules import StepValues
from dinov2_fast.train.student_teacher import student_losses, teacher_targets
from tests.train.batches import build_pair, synthetic_batch

VALUES = StepValues(
    lr=1e-2,
    weight_decay=0.3,
    momentum=0.9,
    teacher_temperature=0.05,
    last_layer_lr_factor=1.0,
)


def backward(pair) -> None:
    """Gradients of the losses of a batch."""
    batch = synthetic_batch()
    targets = teacher_targets(pair, batch, temperature=VALUES.teacher_temperature)
    student_losses(pair, batch, targets)["total"].backward()


@pytest.fixture
def fast_bfloat16(monkeypatch):
    for module in (matmul, optimizer_module):
        monkeypatch.setattr(module, "has_fast_bfloat16", lambda: True)


@pytest.mark.usefixtures("fast_bfloat16")
def test_bf16_products_take_copies_that_every_step_writes(monkeypatch):
    pair = build_pair(precision="bf16")
    optimizer = build_optimizer(pair, OptimizerConfig(), global_batch_size=3)
    linears = [m for m in pair.modules() if isinstance(m, torch.nn.Linear)]
    cast_weights = []

    def noting_cast(weight, dtype):
        copy = uncounted(weight, dtype)
        if isinstance(weight, torch.nn.Parameter) and weight.ndim == 2:
            cast_weights.append((weight, copy))
        return copy

    uncounted = matmul._cast
    monkeypatch.setattr(matmul, "_cast", noting_cast)
    for _ in range(2):
        backward(pair)
        optimizer.step(VALUES)

    for module in linears:
        copy = module.weight.low_precision
        assert copy.is_current(module.weight)
        assert torch.equal(copy.tensor, module.weight.bfloat16())
    kept = {id(module.weight.low_precision.tensor) for module in linears}
    used = [id(copy) for weight, copy in cast_weights if hasattr(weight, "low_precision")]
    assert used
    assert set(used) <= kept  # no product cast a weight of its own
    assert len(used) > 2 * len(linears)  # also in the backward passes


@pytest.mark.usefixtures("fast_bfloat16")
@pytest.mark.parametrize("skip", [True, False])
def test_a_weight_that_somebody_else_changed_is_cast_until_a_step_writes_the_copy(skip):
    pair = build_pair(precision="bf16")
    optimizer = build_optimizer(pair, OptimizerConfig(), global_batch_size=3)
    weight = pair.student.backbone.blocks[0].attn.qkv.weight
    backward(pair)
    with torch.no_grad():
        weight.mul_(2)

    stale = weight.low_precision.is_current(weight)
    cast = matmul._cast(weight, torch.bfloat16)
    optimizer.step(VALUES, skip=torch.tensor(skip))

    assert not stale
    assert torch.equal(cast, (weight if skip else cast).bfloat16())
    assert weight.low_precision.is_current(weight) is not skip
    assert torch.equal(matmul._cast(weight, torch.bfloat16), weight.bfloat16())


@pytest.mark.parametrize(("precision", "fast"), [("fp32", True), ("bf16", False)])
def test_no_copies_where_products_do_not_take_them(monkeypatch, precision, fast):
    monkeypatch.setattr(optimizer_module, "has_fast_bfloat16", lambda: fast)
    pair = build_pair(precision=precision)

    build_optimizer(pair, OptimizerConfig(), global_batch_size=3)

    assert not any(hasattr(parameter, "low_precision") for parameter in pair.parameters())
