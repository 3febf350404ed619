"""What a step costs, in numbers that no busy machine changes: a gate against regressions.

Where a limit is passed on purpose, the commit that raises it says why.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dinov2_fast.bench.arithmetic import fast_flops
from dinov2_fast.bench.contender import FastStep, build, measure_saved_bytes
from dinov2_fast.bench.eager.step import EagerStep
from dinov2_fast.bench.setting import StepSetting
from dinov2_fast.config import OptimizerConfig, ScheduleConfig
from dinov2_fast.ops import _matmul as matmul
from dinov2_fast.train.schedules import Schedules

SETTING = StepSetting(
    arch="debug", prototypes=256, batch_size=5, threads=1, global_px=112, local_px=42
)
VALUES = Schedules(ScheduleConfig(), OptimizerConfig(), 5).at(60_000)

pytestmark = pytest.mark.usefixtures("on_native", "one_rule_for_bfloat16")


@pytest.fixture
def one_rule_for_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is converted depends on the processor; here it does not."""
    monkeypatch.setattr(matmul, "has_fast_bfloat16", lambda: False)


class Counter(TorchDispatchMode):
    """Counts calls of operators, and bytes of the results that are new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            tensor.untyped_storage().data_ptr()
            for tensor in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(tensor, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        self.calls += 1
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.bytes += tensor.untyped_storage().nbytes()
        return result


class Products(TorchDispatchMode):
    """Sums up the operations of matrix products and convolutions, by torch's own formulas.

    Torch's FlopCounterMode hooks all modules, and blocks whose modules have hooks call them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        return result


def cost(step: FastStep | EagerStep, setting: StepSetting) -> Counter:
    batch = setting.batch()
    step(batch, VALUES)
    with Counter() as counter:
        step(batch, VALUES)
    return counter


def test_a_step_makes_no_more_calls_and_memory_than_before():
    counter = cost(build("fast", SETTING), SETTING)
    calls, mib = 1200, 53
    measured = f"{counter.calls} calls, {counter.bytes / 2**20:.1f} MiB"
    assert counter.calls <= calls, measured
    assert counter.bytes <= mib * 2**20, measured


def test_a_step_writes_a_fraction_of_the_references_memory():
    fast = cost(build("fast", SETTING), SETTING)
    eager = cost(build("reference", SETTING), SETTING)
    assert eager.bytes / fast.bytes > 2


def test_products_are_those_that_losses_need():
    # Attention is a kernel of ours that torch does not count; the rest is.
    step = build("fast", SETTING)
    with Products() as counter:
        step(SETTING.batch(), VALUES)
    assert 0.9 * fast_flops(SETTING) <= counter.flops <= fast_flops(SETTING)


@pytest.mark.parametrize(("dtype", "mib"), [("fp32", 10.2), ("bf16", 14.8)])
def test_a_step_keeps_no_more_than_before(dtype: str, mib: float):
    kept = measure_saved_bytes("fast", dataclasses.replace(SETTING, dtype=dtype))["saved_mib"]
    assert kept <= mib
