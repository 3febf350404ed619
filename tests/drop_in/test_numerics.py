"""Accelerated models against the originals: outputs and every gradient, in every mode."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from dinov2_fast import accelerate
from dinov2_fast.drop_in.fast_block import FastBlock
from dinov2_fast.drop_in.half_block import HalfBlock
from tests.drop_in.their_models import (
    DROP_RATIO,
    KINDS,
    ONE_OF_EACH,
    THIRD_PARTY,
    assert_equal_to_original,
    blocks_of,
    images,
    keep_the_samples_that_subset_keeps,
    make,
    outputs_and_gradients,
    own_memory_as_shipped,
    run,
)

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("on_native", "at_any_size"), *THIRD_PARTY]


class RowsOfLayers(TorchFunctionMode):
    """Notes of how many samples every Linear layer is computed."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.linear:
            self.seen.append(len(args[0]))
        return function(*args, **(kwargs or {}))


@pytest.fixture
def owned(monkeypatch):
    """Counts halves that ran as nodes that own their memory."""
    count = []
    original = HalfBlock._run_owned

    def noted(self, *args):
        count.append(self.kind)
        return original(self, *args)

    monkeypatch.setattr(HalfBlock, "_run_owned", noted)
    return count


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_the_originals(kind, training, owned):
    model = make(kind).train(training)

    fast = assert_equal_to_original(accelerate, model, images(kind))

    assert all(isinstance(block, FastBlock) for block in blocks_of(fast))
    assert len(owned) == 2 * len(blocks_of(fast))


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_kept_samples_give_what_masked_drop_path_gives(kind, monkeypatch, owned):
    model = make(kind, DROP_RATIO)
    keep_the_samples_that_subset_keeps(monkeypatch, model)

    assert_equal_to_original(accelerate, model, images(kind))

    assert owned


@pytest.mark.parametrize("kind", ["timm dinov2", "official"])
def test_masked_drop_path_draws_what_the_library_draws(kind, owned):
    # transformers draws in the model's own type: another draw in float64, see below.
    model = make(kind, DROP_RATIO)

    assert_equal_to_original(partial(accelerate, drop_path="masked"), model, images(kind))

    assert owned


def test_masked_drop_path_draws_what_transformers_draws(owned):
    model, x = make("hf dinov2", DROP_RATIO), images("hf dinov2")
    fast = copy.deepcopy(model)
    accelerate(fast, drop_path="masked")

    found, expected = (outputs_and_gradients(each, x, seed=4) for each in (fast, model))

    assert owned
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-5 * max(value.norm(), 1), name


def test_all_samples_dropped_leave_zero_gradients():
    model, x = make("timm plain", 0.99), images("timm plain", batch=1)
    accelerate(model, drop_path="masked")

    found = outputs_and_gradients(model, x, seed=1)

    assert found["blocks.1.attn.qkv.weight"].abs().max() == 0
    assert found["blocks.0.attn.qkv.weight"].abs().max() > 0


@pytest.mark.parametrize("drop_ratio", [0.0, DROP_RATIO])
@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_under_autocast_to_bfloat16(kind, drop_ratio, monkeypatch, owned):
    model, x = make(kind, drop_ratio), images(kind)
    keep_the_samples_that_subset_keeps(monkeypatch, model)
    fast = copy.deepcopy(model)
    accelerate(fast)

    with torch.autocast("cpu", torch.bfloat16):
        found, original = (outputs_and_gradients(each, x) for each in (fast, model))
    truth = outputs_and_gradients(copy.deepcopy(model).double(), x.double())

    assert owned
    for name, expected in truth.items():
        if name.endswith("k_proj.bias"):
            continue
        # Single entries of small sums differ at random; what counts is the whole vector.
        errors = [
            ((each[name].double() - expected).norm() / expected.norm()).item()
            for each in (found, original)
        ]
        assert errors[0] <= 2 * errors[1] + 1e-3, (name, errors)


@pytest.mark.parametrize("drop_ratio", [0.0, DROP_RATIO])
@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_under_autocast_to_float16_the_librarys_modules_run(kind, drop_ratio, monkeypatch, owned):
    model, x = make(kind, drop_ratio), images(kind)
    keep_the_samples_that_subset_keeps(monkeypatch, model)
    fast = copy.deepcopy(model)
    accelerate(fast)
    rows = RowsOfLayers()

    with torch.autocast("cpu", torch.float16):
        original = outputs_and_gradients(model, x)
        with rows:
            found = outputs_and_gradients(fast, x)

    assert not owned
    assert any(count in (2, 3) for count in rows.seen) == bool(drop_ratio)  # of 5 samples
    for name, expected in original.items():
        if drop_ratio == 0:
            assert torch.equal(found[name], expected), name
        elif not name.endswith("k_proj.bias"):
            assert (found[name] - expected).norm() <= 0.01 * max(expected.norm(), 1), name


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_weights_in_bfloat16_run_as_the_library_wrote_them(kind, owned):
    model, x = make(kind).bfloat16(), images(kind).bfloat16()
    fast = copy.deepcopy(model)
    report = accelerate(fast)

    found, expected = (outputs_and_gradients(each, x) for each in (fast, model))

    assert not owned
    assert "parameters or tokens in bfloat16" in str(report)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_without_a_kernel_dropped_samples_are_still_skipped(kind, dtype, monkeypatch, owned):
    model, x = make(kind, DROP_RATIO).to(dtype), images(kind).to(dtype)
    keep_the_samples_that_subset_keeps(monkeypatch, model)
    fast = copy.deepcopy(model)
    accelerate(fast)
    rows = RowsOfLayers()

    with rows:
        found = outputs_and_gradients(fast, x)
    expected = outputs_and_gradients(model, x)

    assert not owned
    assert sum(count in (2, 3) for count in rows.seen) >= 4  # qkv, proj, both layers of the MLP
    for name, value in expected.items():
        limit = 1e-12 if dtype == torch.float64 else 0.05
        assert (found[name] - value).norm() <= limit * max(value.norm(), 1), name


@pytest.mark.parametrize("recompute", ["mlp", "block"])
@pytest.mark.parametrize("kind", ["timm dinov2", "hf swiglu"])
def test_recomputing_changes_no_bit(kind, recompute):
    keeping, saving, x = make(kind), make(kind), images(kind)
    accelerate(keeping)
    accelerate(saving, recompute=recompute)

    kept, computed = (outputs_and_gradients(each, x) for each in (keeping, saving))

    assert all(torch.equal(kept[name], computed[name]) for name in kept)


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_without_gradients_every_bit_is_the_originals(kind, owned):
    model, x = make(kind).eval(), images(kind)
    fast = copy.deepcopy(model)
    accelerate(fast)

    with torch.no_grad():
        assert torch.equal(run(fast, x), run(model, x))
    assert not owned


def test_a_real_size(monkeypatch, owned):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch14_dinov2", img_size=224, depth=1, init_values=0.5)
    fast = copy.deepcopy(model)
    accelerate(fast)
    own_memory_as_shipped(monkeypatch)
    x = torch.randn(8, 3, 224, 224)  # 2056 tokens: enough

    found, expected = run(fast, x), run(model, x)

    assert owned == ["attention", "gelu"]
    assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("drop_ratio", [0.0, DROP_RATIO])
@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_small_batches_run_by_the_librarys_modules(kind, drop_ratio, monkeypatch, owned):
    own_memory_as_shipped(monkeypatch)
    model, x = make(kind, drop_ratio), images(kind)
    keep_the_samples_that_subset_keeps(monkeypatch, model)

    assert_equal_to_original(accelerate, model, x)

    assert not owned


@pytest.mark.parametrize("frozen", ["all", "weights"])
@pytest.mark.parametrize("kind", ["timm dinov2", "official swiglu"])
def test_frozen_parameters_get_no_gradient(kind, frozen):
    model, x = make(kind), images(kind)
    for name, parameter in model.named_parameters():
        if "blocks" in name and (frozen == "all" or parameter.ndim == 2):
            parameter.requires_grad_(False)

    assert_equal_to_original(accelerate, model, x)


def test_lists_of_batches_need_no_xformers():
    model = make("official")
    accelerate(model)
    block = model.blocks[0]
    batches = [torch.randn(2, 7, 128), torch.randn(3, 4, 128)]

    together, alone = block(batches), [block(batch) for batch in batches]

    for one, other in zip(together, alone, strict=True):
        assert (one - other).norm() <= 1e-6 * other.norm()
