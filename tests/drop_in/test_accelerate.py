"""What `accelerate` leaves as it was: the object, its hooks, its copies, whoever wraps it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from dinov2_fast import accelerate, restore
from dinov2_fast.drop_in.fast_block import FastBlock
from dinov2_fast.drop_in.half_block import HalfBlock
from tests.drop_in import official_model
from tests.drop_in.their_models import (
    DROP_RATIO,
    KINDS,
    ONE_OF_EACH,
    THIRD_PARTY,
    blocks_of,
    images,
    make,
    outputs_and_gradients,
    run,
)
from tests.inputs import randn

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("on_native", "at_any_size"), *THIRD_PARTY]


@pytest.fixture
def paths(monkeypatch):
    """The path of every half that runs in an accelerated block, in order."""
    seen = []
    for name in ("_run_owned", "plain"):
        original = getattr(HalfBlock, name)

        def noted(self, *args, name=name, original=original):
            seen.append((self.kind, name))
            return original(self, *args)

        monkeypatch.setattr(HalfBlock, name, noted)
    return seen


def assert_same_gradients(one: nn.Module, other: nn.Module, x: torch.Tensor) -> None:
    """Equal up to rounding, with the global generator at the same seed."""
    found, expected = (outputs_and_gradients(each, x, seed=4) for each in (one, other))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if not name.endswith("k_proj.bias"):  # its exact gradient is zero: softmax does not see it
            assert (found[name] - value).norm() <= 1e-5 * max(value.norm(), 1), name


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_keys_and_classes_stay_and_restore_undoes_it(kind):
    model = make(kind, DROP_RATIO)
    parameters, classes = dict(model.named_parameters()), [type(m) for m in model.modules()]

    report = accelerate(model)

    assert all(parameters[name] is p for name, p in model.named_parameters())
    assert list(model.state_dict()) == list(make(kind, DROP_RATIO).state_dict())
    assert all(isinstance(m, kind) for m, kind in zip(model.modules(), classes, strict=True))
    assert len(report.replaced) == 4
    assert not report.left
    assert restore(model) == 2
    assert [type(m) for m in model.modules()] == classes
    assert [vars(m).keys() for m in model.modules()] == [
        vars(m).keys() for m in make(kind, DROP_RATIO).modules()
    ]
    assert restore(model) == 0


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_state_dicts_are_read_both_ways(kind):
    fast, original, x = make(kind), make(kind), images(kind)
    accelerate(fast)
    with torch.no_grad():
        for parameter in fast.parameters():
            parameter.mul_(1.5)

    original.load_state_dict(fast.state_dict())
    accelerate(other := make(kind))
    other.load_state_dict(original.state_dict())

    assert_same_gradients(fast, original, x)
    assert_same_gradients(other, original, x)


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_copies_and_pickles_are_fast_and_independent(kind):
    model, x = make(kind, DROP_RATIO), images(kind)
    accelerate(model, recompute="mlp")

    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(blocks_of(other)[0]) is type(blocks_of(model)[0])
        assert_same_gradients(other, model, x)
        restore(other)
        assert not isinstance(blocks_of(other)[0], FastBlock)
    assert isinstance(blocks_of(model)[0], FastBlock)


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_a_hooked_half_keeps_its_own_path_and_hooks_on_blocks_do_not_matter(kind, paths):
    model, x = make(kind), images(kind)
    original = copy.deepcopy(model)
    accelerate(model)
    block, seen = blocks_of(model)[1], []
    block.mlp.register_forward_hook(lambda *_: seen.append("mlp"))
    block.register_forward_hook(lambda *_: seen.append("block"))

    assert_same_gradients(model, original, x)

    assert seen == ["mlp", "block"]
    assert paths == [
        ("attention", "_run_owned"),
        ("gelu", "_run_owned"),
        ("attention", "_run_owned"),
        ("gelu", "plain"),
    ]
    left = accelerate(model).left
    assert [(entry.half, entry.reason) for entry in left] == [
        ("feed-forward", "mlp has a hook or a forward of its own")
    ]


def test_an_intermediate_gradient_is_not_overwritten():
    model, x = make("timm plain"), images("timm plain")
    original = copy.deepcopy(model)
    accelerate(model)
    kept = {}
    for name, each in (("fast", model), ("original", original)):
        tokens = each.blocks[0](each._pos_embed(each.patch_embed(x)))
        tokens.retain_grad()
        each.blocks[1](tokens).square().sum().backward()
        kept[name] = tokens.grad

    assert (kept["fast"] - kept["original"]).norm() <= 1e-5 * kept["original"].norm()


def test_hidden_states_and_attentions_of_transformers():
    model, x = make("hf dinov2"), images("hf dinov2")
    model.set_attn_implementation("eager")
    original = copy.deepcopy(model)
    accelerate(model)
    options = {"output_hidden_states": True, "output_attentions": True}

    found, expected = model(x, **options), original(x, **options)

    for field in ("hidden_states", "attentions"):
        assert len(found[field]) == len(expected[field]) > 0
        for one, other in zip(found[field], expected[field], strict=True):
            assert (one - other).norm() <= 1e-5 * other.norm()


def test_masks_and_flags_are_the_librarys_business(paths):
    model, x = make("timm plain"), images("timm plain")
    original = copy.deepcopy(model)
    accelerate(model)
    mask = torch.zeros(5, 5).index_fill(1, torch.tensor([3]), -torch.inf)

    for options in ({"is_causal": True}, {"attn_mask": mask}):
        assert torch.equal(model(x, **options), original(x, **options))
    assert not paths


def test_what_computes_something_else_is_left_and_named():
    timm = pytest.importorskip("timm", reason="timm is not installed")
    small = {"embed_dim": 128, "num_heads": 2, "depth": 1, "img_size": 32}
    name = "vit_small_patch16_224"
    for options, reason in (
        ({"qk_norm": True}, "attn.q_norm is a timm.layers.norm.LayerNorm"),
        ({"attn_drop_rate": 0.1}, "attn.attn_drop drops 0.1 of its inputs"),
        ({"proj_drop_rate": 0.2}, "mlp.drop1 drops 0.2 of its inputs"),
        ({"act_layer": "gelu_tanh"}, "mlp.act is a timm.layers.activations.GELUTanh"),
        ({"attn_layer": "diff"}, "attn is a timm.layers.diff_attention.DiffAttention"),
    ):
        model = timm.create_model(name, **small, **options)
        assert reason in str(accelerate(model)), options
    parallel = timm.create_model("vit_small_patch16_18x2_224", **{**small, "depth": 2})
    with pytest.raises(ValueError, match="expected a model with timm's Block"):
        accelerate(parallel)


def test_a_changed_copy_of_the_official_layers_is_found_out():
    model = make("official")
    model.blocks[1].attn.__class__ = official_model.CausalAttention

    report = accelerate(model)

    assert {entry.block for entry in report.left} == {"blocks.1"}
    assert "computes something else" in str(report)
    assert not isinstance(model.blocks[1], FastBlock)


@pytest.mark.parametrize("accelerated_first", [True, False])
def test_lora_layers_are_left(accelerated_first, paths):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model, x = make("timm dinov2"), images("timm dinov2")
    config = peft.LoraConfig(target_modules=["qkv"], init_lora_weights=False)
    if accelerated_first:
        accelerate(model)
    wrapped = peft.get_peft_model(model, config)
    report = accelerate(wrapped)
    original = copy.deepcopy(wrapped)
    restore(original)

    assert_same_gradients(wrapped, original, x)

    assert {(entry.half, len(report.left)) for entry in report.left} == {("attention", 2)}
    assert "attn.qkv is a peft.tuners.lora.layer.Linear" in str(report)
    assert paths == [("attention", "plain"), ("gelu", "_run_owned")] * 2


@pytest.mark.parametrize("restored", [True, False])
def test_lora_layers_can_be_merged(restored, paths):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model, x = make("timm dinov2"), images("timm dinov2")
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["qkv"], init_lora_weights=False)
    )
    original = copy.deepcopy(wrapped)
    accelerate(wrapped)
    if restored:
        assert restore(wrapped) == 2

    merged, expected = (each.merge_and_unload().requires_grad_() for each in (wrapped, original))

    assert_same_gradients(merged, expected, x)
    halves = [("attention", "_run_owned"), ("gelu", "_run_owned")]
    assert paths == ([] if restored else halves * 2)


@pytest.mark.parametrize("kind", ["timm dinov2", "hf dinov2"])
def test_gradient_checkpointing_draws_the_same_samples_again(kind):
    model, x = make(kind, DROP_RATIO), images(kind)
    accelerate(model)
    checkpointed = copy.deepcopy(model)
    if kind.startswith("timm"):
        checkpointed.set_grad_checkpointing()
    else:
        checkpointed.gradient_checkpointing_enable()

    assert_same_gradients(checkpointed, model, x)


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_compiles_to_what_the_original_compiles_to(kind):
    model, x = make(kind), images(kind)
    original = copy.deepcopy(model)
    accelerate(model)

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    assert_same_gradients(compiled._orig_mod, original, x)
    assert torch.equal(run(compiled, x), run(original, x))


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_exports_without_operations_of_ours(kind):
    model, x = make(kind).eval(), images(kind)
    original = copy.deepcopy(model)
    accelerate(model)

    program = torch.export.export(model, (x,))

    assert "dinov2_fast" not in program.graph_module.code
    assert torch.equal(run(program.module(), x), run(original, x))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_per_sample_gradients_by_functorch():
    model, x = make("timm plain"), images("timm plain")
    original = copy.deepcopy(model)
    accelerate(model)

    def per_sample(each: nn.Module):
        parameters = {k: v.detach() for k, v in each.named_parameters()}

        def loss(parameters, image):
            return torch.func.functional_call(each, parameters, (image[None],)).square().sum()

        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)

    found, expected = per_sample(model), per_sample(original)

    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("drop_ratio", "batch"),
    [(0.0, 3), (DROP_RATIO, 4)],
)
@pytest.mark.parametrize("kind", ["timm dinov2", "hf dinov2"])
def test_a_fine_tune_of_twenty_steps_gives_the_originals_losses(kind, drop_ratio, batch):
    losses = []
    for fast in (False, True):
        model = make(kind, drop_ratio)
        head = nn.Linear(128, 3)
        if fast:
            accelerate(model, drop_path="masked")
        optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=3e-4)
        nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(5), std=0.1)
        nn.init.zeros_(head.bias)
        torch.manual_seed(6)
        losses.append([])
        for step in range(20):
            x = randn(batch, *images(kind).shape[1:], seed=step % 4)
            tokens = model.forward_features(x) if kind.startswith("timm") else run(model, x)
            loss = nn.functional.cross_entropy(head(tokens[:, 0]), torch.arange(batch) % 3)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())

    original, fast = (torch.tensor(values) for values in losses)
    assert original[-4:].mean() < original[:4].mean()
    torch.testing.assert_close(fast, original, rtol=1e-3, atol=1e-4)


def test_files_of_timm_and_transformers(tmp_path):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model, x = make("timm reg4"), images("timm reg4")
    torch.save(model.state_dict(), tmp_path / "timm.pth")
    loaded = timm.create_model(
        "vit_small_patch14_reg4_dinov2",
        checkpoint_path=str(tmp_path / "timm.pth"),
        **{"img_size": 28, "embed_dim": 128, "num_heads": 2, "depth": 2, "num_classes": 3},
        init_values=0.5,
    )
    accelerate(loaded)
    assert_same_gradients(loaded, model, x)

    model, x = make("hf registers"), images("hf registers")
    model.save_pretrained(tmp_path / "hf")
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "hf").train()
    accelerate(loaded)
    assert_same_gradients(loaded, model, x)
    loaded.save_pretrained(tmp_path / "again")
    again = transformers.AutoModel.from_pretrained(tmp_path / "again").train()
    assert type(blocks_of(again)[0]) is type(blocks_of(model)[0])
    assert_same_gradients(again, model, x)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((torch.zeros(1),), TypeError, "accelerate: expected model to be an nn.Module"),
        ((nn.Linear(2, 2),), ValueError, "without any"),
        ((nn.Linear(2, 2), "fixed"), ValueError, "accelerate: expected drop_path"),
        ((nn.Linear(2, 2), "masked", "all"), ValueError, "accelerate: expected recompute"),
    ],
)
def test_rejects_bad_input(arguments, error, words):
    options = dict(zip(("drop_path", "recompute"), arguments[1:], strict=False))
    with pytest.raises(error, match=words):
        accelerate(arguments[0], **options)


def test_restore_rejects_what_is_no_model():
    with pytest.raises(TypeError, match="restore: expected model to be an nn"):
        restore([nn.Linear(2, 2)])


def test_the_reports_text():
    text = str(accelerate(make("timm dinov2", DROP_RATIO, depth=3)))

    assert text.startswith("accelerate: blocks of timm\n  replaced: attention of 3 blocks, ")
    assert "drop path keeps a fixed number of samples" in text
