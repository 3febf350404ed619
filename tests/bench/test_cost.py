"""What a step costs, in numbers that no busy machine changes: a gate against regressions.

Where a limit is passed on purpose, the commit that raises it says why.
"""

from __future__ import annotations

import collections
import dataclasses
import gc
import itertools
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dinov2_fast import native
from dinov2_fast.bench.arithmetic import fast_flops
from dinov2_fast.bench.contender import FastStep, build, measure_saved_bytes
from dinov2_fast.bench.eager.step import EagerStep
from dinov2_fast.bench.setting import StepSetting
from dinov2_fast.config import OptimizerConfig, ScheduleConfig
from dinov2_fast.ops import _attention_native, _native_cpu
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


class Kernels:
    """Calls of the extension's functions, and bytes of the tensors that it is handed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: collections.Counter[str] = collections.Counter()
        self.bytes = 0
        for name in dir(native.module()):
            if name.endswith("_cpu"):
                monkeypatch.setattr(native.module(), name, self._counted(name))
        run, arguments_of = _native_cpu.run_cpu, _attention_native._arguments

        def measured_run(name: str, **arguments: Any) -> None:
            self.bytes += sum(x.nbytes for x in arguments.values() if isinstance(x, Tensor))
            run(name, **arguments)

        def measured_arguments(tensors: tuple[Tensor, ...], *others: Any) -> tuple[Any, ...]:
            self.bytes += sum(x.nbytes for x in (*tensors, *others) if isinstance(x, Tensor))
            return arguments_of(tensors, *others)

        for name, module in list(sys.modules.items()):
            if name.startswith("dinov2_fast.ops.") and vars(module).get("run_cpu") is run:
                monkeypatch.setattr(module, "run_cpu", measured_run)
        monkeypatch.setattr(_attention_native, "_arguments", measured_arguments)

    def _counted(self, name: str) -> Any:
        compute = getattr(native.module(), name)

        def run(*args: Any, **kwargs: Any) -> Any:
            self.calls[name] += 1
            return compute(*args, **kwargs)

        return run


def cost(step: FastStep | EagerStep, setting: StepSetting) -> Counter:
    batch = setting.batch()
    step(batch, VALUES)
    with Counter() as counter:
        step(batch, VALUES)
    return counter


def test_a_step_makes_no_more_calls_and_memory_than_before():
    counter = cost(build("fast", SETTING), SETTING)
    calls, mib = 1040, 53
    measured = f"{counter.calls} calls, {counter.bytes / 2**20:.1f} MiB"
    assert counter.calls <= calls, measured
    assert counter.bytes <= mib * 2**20, measured


# Two blocks of the student and two of the teacher with their last norms, one head each; gradients
# of two sub-networks in eleven groups of parameters. Attention is called again, with scratch, where
# a thread's stack has too little of it.
KERNELS = {
    "layer_norm_forward_cpu": 10,
    "layer_norm_backward_cpu": 5,
    "attention_forward_cpu": 6,
    "attention_backward_cpu": 4,
    "stochastic_depth_forward_cpu": 8,
    "stochastic_depth_backward_cpu": 4,
    "gelu_forward_cpu": 4,
    "gelu_backward_cpu": 2,
    "sinkhorn_rows_cpu": 2,
    "cross_entropy_in_place_cpu": 2,
    "koleo_forward_cpu": 2,
    "koleo_backward_cpu": 2,
    "optimizer_norm_cpu": 2,
    "optimizer_step_cpu": 11,
}


def test_a_step_asks_the_kernels_for_the_same_work_as_before(monkeypatch: pytest.MonkeyPatch):
    step, batch = build("fast", SETTING), SETTING.batch()
    step(batch, VALUES)
    kernels = Kernels(monkeypatch)
    step(batch, VALUES)
    assert kernels.calls == KERNELS
    mib = 19.5
    assert kernels.bytes <= mib * 2**20, f"{kernels.bytes / 2**20:.2f} MiB"


@dataclasses.dataclass
class Memory:
    """What torch's allocator was asked for."""

    allocations: int
    peak_bytes: int  # beyond what lived at the start


def memory_of(step: FastStep | EagerStep, setting: StepSetting) -> Memory:
    """Of one step, the operators' own scratch included."""
    batch = setting.batch()
    step(batch, VALUES)
    gc.collect()  # no circle of an earlier step is freed in this one
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(batch, VALUES)
    found: Any = profiler.profiler
    events = sorted(
        (event.start_ns(), event.nbytes())
        for event in found.kineto_results.events()
        if event.name() == "[memory]"
    )
    sizes = [size for _, size in events]
    return Memory(
        allocations=sum(size > 0 for size in sizes),
        peak_bytes=max(itertools.accumulate(sizes, initial=0)),
    )


def test_a_step_allocates_no_more_often_and_no_more_at_once_than_before():
    memory = memory_of(build("fast", SETTING), SETTING)
    allocations, mib = 870, 25.5
    measured = f"{memory.allocations} allocations, {memory.peak_bytes / 2**20:.2f} MiB at once"
    assert memory.allocations <= allocations, measured
    assert memory.peak_bytes <= mib * 2**20, measured


def test_a_step_writes_and_holds_a_fraction_of_the_references_memory():
    fast, eager = build("fast", SETTING), build("reference", SETTING)
    assert cost(eager, SETTING).bytes > 2 * cost(fast, SETTING).bytes
    of_ours, of_theirs = memory_of(fast, SETTING), memory_of(eager, SETTING)
    assert of_theirs.allocations > 1.8 * of_ours.allocations
    assert of_theirs.peak_bytes > 2 * of_ours.peak_bytes


def test_products_are_those_that_losses_need():
    # Attention is a kernel of ours that torch does not count; the rest is.
    step = build("fast", SETTING)
    with Products() as counter:
        step(SETTING.batch(), VALUES)
    assert 0.9 * fast_flops(SETTING) <= counter.flops <= fast_flops(SETTING)


@pytest.mark.parametrize(("dtype", "mib"), [("fp32", 10.1), ("bf16", 5.45)])
def test_a_step_keeps_no_more_than_before(dtype: str, mib: float):
    kept = measure_saved_bytes("fast", dataclasses.replace(SETTING, dtype=dtype))["saved_mib"]
    assert kept <= mib, f"{kept:.2f} MiB"
