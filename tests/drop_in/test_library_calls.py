"""What timm and transformers offer around their blocks, on accelerated models: the original's."""

from __future__ import annotations

import copy
import math
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dinov2_fast import accelerate, restore
from dinov2_fast.drop_in import limits
from tests.drop_in.same_training import (
    assert_close,
    assert_same_training,
    original_and_fast,
    tensors_of,
)
from tests.drop_in.their_models import (
    DROP_RATIO,
    ONE_OF_EACH,
    THIRD_PARTY,
    blocks_of,
    images,
    make,
    own_memory_at_any_size,
    run,
)
from tests.inputs import randn

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("on_native", "at_any_size"), *THIRD_PARTY]


TIMM_CALLS = {
    "forward_features": lambda model, x: model.forward_features(x),
    "forward_intermediates": lambda model, x: model.forward_intermediates(
        x, indices=[0, 1], return_prefix_tokens=True, norm=True
    ),
    "intermediates only": lambda model, x: model.forward_intermediates(
        x, indices=1, intermediates_only=True, stop_early=True
    ),
    "get_intermediate_layers": lambda model, x: model.get_intermediate_layers(
        x, n=2, reshape=True, return_prefix_tokens=True, norm=True
    ),
    "forward_head": lambda model, x: model.forward_head(model.forward_features(x), pre_logits=True),
}


@pytest.mark.parametrize("name", TIMM_CALLS)
@pytest.mark.parametrize("kind", ["timm reg4", "timm plain"])
def test_calls_of_timm(kind, name):
    models, x = original_and_fast(make(kind, DROP_RATIO)), images(kind)

    assert_same_training(models, lambda model: TIMM_CALLS[name](model, x))


def test_another_classifier_and_checkpointing_in_timm():
    models, x = original_and_fast(make("timm dinov2", DROP_RATIO)), images("timm dinov2")

    for model in models:
        torch.manual_seed(5)
        model.reset_classifier(7, global_pool="avg")
        model.set_grad_checkpointing()

    assert models[1](x).shape == (5, 7)
    assert_same_training(models, lambda model: model(x))


def test_images_of_other_sizes_in_timm():
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_small_patch14_reg4_dinov2",
        **{"img_size": 28, "embed_dim": 128, "num_heads": 2, "depth": 2, "num_classes": 3},
        **{"dynamic_img_size": True, "init_values": 0.5, "drop_path_rate": DROP_RATIO},
    ).train()
    models = original_and_fast(model)

    for px in ((28, 28), (42, 14), (56, 70)):
        assert_same_training(models, lambda model, px=px: model(randn(4, 3, *px)))


def test_feature_wrappers_of_timm():
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(0)
    wrapper = timm.create_model(
        "vit_small_patch16_224",
        **{"img_size": 32, "embed_dim": 128, "num_heads": 2, "depth": 3, "drop_path_rate": 0.4},
        **{"features_only": True, "out_indices": (0, 2)},
    ).train()
    models = original_and_fast(wrapper)

    assert_same_training(models, lambda model: model(randn(4, 3, 32, 32)))
    assert restore(models[1]) == 3


@pytest.mark.parametrize("kind", ["hf dinov2", "hf registers"])
def test_hidden_states_of_transformers_with_drop_path(kind, halves_run):
    models, x = original_and_fast(make(kind, DROP_RATIO)), images(kind)

    assert_same_training(models, lambda model: model(x, output_hidden_states=True).hidden_states)

    # transformers' recorders stay in the attention modules, where these calls do not need them.
    assert models[1].encoder.layer[0].attention._forward_hooks
    assert halves_run == [("owned", "owned")] * 2


def test_what_the_trainer_tells_every_layer_changes_no_path(halves_run):
    model, x = make("hf dinov2", DROP_RATIO), images("hf dinov2")
    accelerate(model)

    model(x)
    told = len(halves_run)
    model(x, num_items_in_batch=torch.tensor(len(x)))

    assert told == len(halves_run) - told == 2


@pytest.mark.parametrize("asked_by", ["call", "config"])
def test_attentions_of_transformers_are_recorded_and_later_calls_are_fast(asked_by, halves_run):
    model, x = make("hf dinov2", DROP_RATIO), images("hf dinov2")
    model.set_attn_implementation("eager")
    models = original_and_fast(model)
    model.config.output_attentions = models[1].config.output_attentions = asked_by == "config"
    asked = {"output_attentions": True} if asked_by == "call" else {}

    for _ in range(2):  # the first call leaves recorders in the attention modules
        assert_same_training(models, lambda model: model(x, **asked).attentions)

    # A call that asks tells so to every layer.
    assert halves_run == ([] if asked_by == "call" else [("library", "owned")] * 4)
    halves_run.clear()
    model.config.output_attentions = models[1].config.output_attentions = False
    assert_same_training(models, lambda model: run(model, x))
    assert halves_run == [("owned", "owned")] * 2
    assert not accelerate(models[1]).left


def test_another_hook_beside_those_of_transformers_is_called(halves_run):
    model, x = make("hf dinov2"), images("hf dinov2")
    accelerate(model)
    model(x, output_hidden_states=True)
    seen = []
    model.encoder.layer[0].attention.register_forward_hook(lambda *_: seen.append(1))
    halves_run.clear()

    model(x)

    assert seen
    assert halves_run == [("library", "owned"), ("owned", "owned")]


@pytest.mark.parametrize("accelerated_first", [True, False])
def test_lora_layers_in_transformers_are_left_and_the_others_stay_fast(accelerated_first):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model, x = make("hf dinov2", DROP_RATIO), images("hf dinov2")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    if accelerated_first:
        accelerate(model, drop_path="masked")
    wrapped = peft.get_peft_model(model, config)
    report = accelerate(wrapped, drop_path="masked")
    original = copy.deepcopy(wrapped)
    restore(original)

    assert_same_training((original, wrapped), lambda model: run(model, x))

    assert [entry.half for entry in report.left] == ["attention"] * 2
    assert [entry.half for entry in report.replaced] == ["feed-forward"] * 2
    assert "attention.q_proj is a peft.tuners.lora.layer.Linear" in str(report)
    trained = [name for name, p in wrapped.named_parameters() if p.grad is not None]
    assert trained
    assert all("lora_" in name for name in trained)


@pytest.mark.parametrize("kind", ["timm dinov2", "hf dinov2"])
def test_every_kind_of_hook_on_blocks_is_called_as_before(kind):
    seen = []
    for model in original_and_fast(make(kind, DROP_RATIO)):
        calls: list[tuple[str, int, Tensor]] = []
        for index, block in enumerate(blocks_of(model)):

            def note(what: str, tensor: Any, index: int = index, calls: Any = calls) -> None:
                calls.append((what, index, next(tensors_of(tensor)).detach().clone()))

            block.register_forward_pre_hook(lambda _m, inputs, note=note: note("before", inputs))
            block.register_forward_hook(lambda _m, _i, out, note=note: note("after", out))
            block.register_full_backward_pre_hook(lambda _m, g, note=note: note("down", g))
            block.register_full_backward_hook(lambda _m, g, _o, note=note: note("up", g))
        torch.manual_seed(4)
        run(model, images(kind)).square().sum().backward()
        seen.append(calls)

    assert [call[:2] for call in seen[1]] == [call[:2] for call in seen[0]]
    assert len(seen[0]) == 8
    assert_close([call[2] for call in seen[1]], [call[2] for call in seen[0]])


@pytest.mark.parametrize("drop_path", ["subset", "masked"])
@pytest.mark.parametrize("kind", ["timm dinov2", "hf dinov2"])
def test_a_run_goes_on_from_a_copy_with_the_generators_state(kind, drop_path):
    model = make(kind, DROP_RATIO)
    accelerate(model, drop_path=drop_path)

    def three_steps(model: nn.Module) -> list[Tensor]:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        losses = []
        for step in range(3):
            loss = run(model, images(kind) + step).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return losses

    three_steps(model)
    pickled = pickle.dumps((model, torch.get_rng_state()))
    copied, draws = copy.deepcopy(model), torch.get_rng_state()
    went_on = three_steps(model)

    for other, state in ((copied, draws), pickle.loads(pickled)):
        torch.set_rng_state(state)
        assert three_steps(other) == went_on
    assert three_steps(copied) != went_on


@pytest.mark.parametrize("drop_path", ["subset", "masked"])
@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_reentrant_checkpointing_draws_the_same_samples_again(kind, drop_path, monkeypatch):
    # Owning memory pays and skipping does not, so the pass without gradients could fall to neither.
    limit = limits.Limits(owned_tokens=0, owned_work=0, saved_work=math.inf)
    monkeypatch.setattr(limits, "limits_of", lambda _: limit)
    model = make(kind, DROP_RATIO)
    accelerate(model, drop_path=drop_path)
    block, results = blocks_of(model)[1], []

    for call in (block, partial(checkpoint, block, use_reentrant=True)):
        torch.manual_seed(4)
        block.zero_grad()
        x = randn(5, 5, 128, seed=1).requires_grad_()
        out = call(x)
        out.square().sum().backward()
        results.append([out, x.grad, *(p.grad for p in block.parameters())])

    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.slow
def test_the_trainer_of_transformers(tmp_path, monkeypatch, halves_run):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    own_memory_at_any_size(monkeypatch)
    config = transformers.Dinov2Config(
        **{"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"image_size": 28, "drop_path_rate": DROP_RATIO, "layerscale_value": 0.5},
    )
    data = [{"pixel_values": randn(3, 28, 28, seed=i), "labels": i % 2} for i in range(16)]
    histories, folders = [], []
    for fast in (False, True):
        torch.manual_seed(0)
        model = transformers.Dinov2ForImageClassification(config)
        if fast:
            accelerate(model, drop_path="masked")
        folders.append(tmp_path / str(fast))
        trainer = transformers.Trainer(
            model=model,
            args=transformers.TrainingArguments(
                str(folders[-1]),
                **{"per_device_train_batch_size": 4, "num_train_epochs": 2, "logging_steps": 1},
                **{"use_cpu": True, "report_to": [], "gradient_checkpointing": True},
                **{"save_steps": 4, "disable_tqdm": True, "learning_rate": 1e-3},
            ),
            train_dataset=data,
        )
        trainer.train()
        trainer.save_model()
        history = trainer.state.log_history
        histories.append(torch.tensor([row["loss"] for row in history if "loss" in row]))

    assert len(histories[0]) == 8
    assert set(halves_run) == {("owned", "owned")}
    torch.testing.assert_close(histories[1], histories[0], rtol=1e-3, atol=1e-4)
    loaded = transformers.AutoModelForImageClassification.from_pretrained(folders[1])
    assert type(loaded).__module__.startswith("transformers.")
    batch = torch.stack([row["pixel_values"] for row in data])
    accelerated = trainer.model.eval()
    assert_close(loaded.eval()(batch).logits, accelerated(batch).logits)
