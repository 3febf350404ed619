"""What scripts do to ViTs: on accelerated ones the original's numbers, or a way out."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from dinov2_fast import accelerate, restore
from tests.drop_in.same_training import assert_close, assert_same_training, original_and_fast
from tests.drop_in.their_models import (
    DROP_RATIO,
    ONE_OF_EACH,
    THIRD_PARTY,
    blocks_of,
    images,
    make,
    run,
)
from tests.inputs import randn

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("on_native", "at_any_size"), *THIRD_PARTY]


def of_twice_the_tokens(original: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that is not the library's."""

    def forward(self: Any, x: Tensor, *args: Any, **options: Any) -> Any:
        return original(self, 2 * x, *args, **options)

    return forward


@pytest.mark.parametrize("accelerated_first", [True, False])
@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_a_forward_that_a_script_gives_a_block_runs(kind, accelerated_first, halves_run):
    models = make(kind), make(kind)
    forward = of_twice_the_tokens(type(blocks_of(models[0])[0]).forward)
    if accelerated_first:
        accelerate(models[1])
    for model in models:
        block = blocks_of(model)[0]
        block.forward = types.MethodType(forward, block)
    report = accelerate(models[1])

    assert_same_training(models, lambda model: run(model, images(kind)))

    assert halves_run == [("owned", "owned")]  # the other block
    assert len(report.left) == len(report.replaced) == 2
    assert {entry.reason for entry in report.left} == {"the block has a forward of its own"}


@pytest.mark.parametrize(("part", "halves"), [("block", []), ("attn", [("library", "owned")] * 2)])
@pytest.mark.parametrize("kind", ["timm dinov2", "official"])
def test_a_forward_that_a_script_gives_a_class_runs(kind, part, halves, monkeypatch, halves_run):
    models, x = original_and_fast(make(kind)), images(kind)
    block = models[0].blocks[0]
    changed = type(block if part == "block" else block.attn)
    monkeypatch.setattr(changed, "forward", of_twice_the_tokens(changed.forward))

    assert_same_training(models, lambda model: model(x))

    assert halves_run == halves
    assert "computes by a forward that is not its library's" in str(accelerate(models[1]))


def test_tokens_may_come_under_the_librarys_name():
    for kind, name in (("hf dinov2", "hidden_states"), ("timm plain", "x"), ("official", "x")):
        models = original_and_fast(make(kind))
        tokens = {name: randn(3, 5, 128)}
        outs = [blocks_of(model)[0](**tokens) for model in models]
        assert_close(outs[1], outs[0])


def test_blocks_are_found_by_their_librarys_name():
    for kind, name in (("hf dinov2", "Dinov2Layer"), ("timm plain", "Block")):
        models = original_and_fast(make(kind))
        found = [
            [path for path, m in model.named_modules() if type(m).__name__ == name]
            for model in models
        ]
        assert found[0] == found[1] != []
        assert f"Fast{name}(" in str(models[1])
        assert f"Fast{name}(" not in str(models[0])


@pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning"
)  # of timm's own questions about sizes
@pytest.mark.filterwarnings("error:.*:torch.jit.TracerWarning:dinov2_fast")
def test_tracing_gives_the_original_and_scripting_a_way_out():
    models, x = original_and_fast(make("timm dinov2").eval()), images("timm dinov2")

    traced = torch.jit.trace(models[1], x)

    assert torch.equal(traced(x), models[0](x))
    with pytest.raises(RuntimeError, match=r"accelerated Block; call restore\(model\) first"):
        torch.jit.script(models[1])
    assert restore(models[1]) == 2
    assert torch.equal(torch.jit.script(models[1])(x), models[0](x))


def test_blocks_of_a_subclass_are_left_and_named():
    model = make("timm plain")
    kind = type("MyBlock", (type(model.blocks[1]),), {"__module__": "my_project"})
    model.blocks[1].__class__ = kind

    report = accelerate(model)

    assert [entry.block for entry in report.replaced] == ["blocks.0"] * 2
    assert [(entry.block, entry.half) for entry in report.left] == [
        ("blocks.1", "attention"),
        ("blocks.1", "feed-forward"),
    ]
    assert "the block is a my_project.MyBlock, a subclass of its library's" in str(report)
    assert type(model.blocks[1]) is kind


@pytest.mark.parametrize(("drop_ratio", "path"), [(0.0, "left"), (DROP_RATIO, "skipping")])
def test_halves_without_kernels_and_samples_to_skip_are_reported_as_left(drop_ratio, path):
    report = accelerate(make("timm plain", drop_ratio).bfloat16())

    assert [entry.block for entry in getattr(report, path)[-2:]] == ["blocks.1"] * 2
    assert "attention of blocks.0" in str(report)
    assert not report.replaced
    assert ("batches" in str(report)) == bool(drop_ratio)  # limits say something only then


def test_features_by_torch_fx():
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    models, x = original_and_fast(make("timm dinov2").eval()), images("timm dinov2")
    names = ["blocks.0.attn.qkv", "blocks.1.mlp.fc1", "blocks.1"]

    original, fast = (extraction.create_feature_extractor(model, names)(x) for model in models)

    assert list(fast) == names
    assert_close(fast, original)


@pytest.mark.parametrize("accelerated_first", [True, False])
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")  # its own future
def test_dynamically_quantised_layers_are_left(accelerated_first):
    model, x = make("timm dinov2").eval(), images("timm dinov2")
    quantise = torch.ao.quantization.quantize_dynamic
    original, fast = quantise(model, {nn.Linear}), copy.deepcopy(model)
    if accelerated_first:
        accelerate(fast)
    fast = quantise(fast, {nn.Linear})
    report = accelerate(fast)

    assert torch.equal(fast(x), original(x))

    assert not report.replaced
    assert "attn.qkv is a torch.ao.nn.quantized.dynamic.modules.linear.Linear" in str(report)


WEIGHTS = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_layers_whose_weight_is_computed_are_left(name, halves_run):
    models, x = original_and_fast(make("timm dinov2")), images("timm dinov2")

    for model in models:
        torch.manual_seed(5)
        WEIGHTS[name](model.blocks[0].attn.qkv)

    assert_same_training(models, lambda model: model(x))
    assert halves_run == [("library", "owned"), ("owned", "owned")]


def test_layers_and_blocks_that_are_used_twice():
    model, x = make("timm dinov2", depth=3), images("timm dinov2")
    model.blocks[1].attn.qkv = model.blocks[0].attn.qkv
    model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight
    model.blocks[2] = model.blocks[0]
    models = original_and_fast(model)

    assert_same_training(models, lambda model: model(x))

    assert models[1].blocks[2] is models[1].blocks[0]
    assert restore(models[1]) == 2
