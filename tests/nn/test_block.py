"""The transformer block: against the formula, packed and not, with and without stochastic depth."""

from __future__ import annotations

import pytest
import torch

from dinov2_fast.packing import pack_tokens, unpack_tokens
from tests.inputs import randn
from tests.nn.blocks import make_block
from tests.tolerance import assert_within_error_budget

FFNS = ["mlp", "swiglu"]


def assert_close_in_float32(out: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to the order of sums and fused roundings."""
    assert ((out - expected).norm() / expected.norm()).item() <= 1e-6


@pytest.mark.parametrize("ffn", FFNS)
def test_is_two_pre_norm_residual_branches(ffn):
    layer, x = make_block(ffn), randn(2, 5, 32)

    middle = x + layer.ls1(layer.attn(layer.norm1(x)))
    expected = middle + layer.ls2(layer.mlp(layer.norm2(middle)))

    assert_close_in_float32(layer(x), expected)


@pytest.mark.parametrize("ffn", FFNS)
def test_a_mixed_pack_equals_separate_batches(ffn):
    # Two crop sizes, a single token and no token at all.
    batches = [randn(2, 17, 32), randn(3, 5, 32), randn(1, 1, 32), randn(2, 0, 32)]
    layer = make_block(ffn)
    tokens, pack = pack_tokens(batches)

    packed = unpack_tokens(layer(tokens, pack), pack)
    separate = [layer(batch) for batch in batches]
    layer.double()
    truths = [layer(batch.double()) for batch in batches]

    for out, low_precision, truth in zip(packed, separate, truths, strict=True):
        assert_within_error_budget(out, low_precision=low_precision, truth=truth, name="block")


def test_training_without_drop_is_evaluation_bitwise():
    layer, x = make_block(drop_ratio=0.0), randn(4, 5, 32)

    assert torch.equal(layer.train()(x), layer.eval()(x))


def test_evaluation_ignores_the_drop_ratio():
    dropping, plain, x = make_block(drop_ratio=0.5), make_block(drop_ratio=0.0), randn(4, 5, 32)

    assert torch.equal(dropping.eval()(x), plain(x))


def test_both_branches_compute_only_the_kept_rows_of_each_group():
    layer = make_block(drop_ratio=0.4).train()
    rows: dict[str, int] = {}
    for name in ("qkv", "proj"):
        getattr(layer.attn, name).register_forward_hook(
            lambda _m, inputs, _out, name=name: rows.update({name: inputs[0].shape[0]})
        )
    layer.mlp.register_forward_hook(lambda _m, inputs, _o: rows.update(mlp=inputs[0].shape[0]))
    tokens, pack = pack_tokens([randn(24, 5, 32), randn(10, 3, 32)])

    layer(tokens, pack, generator=torch.Generator())

    assert rows == dict.fromkeys(("qkv", "proj", "mlp"), 14 * 5 + 6 * 3)


def test_the_branches_draw_separately():
    layer = make_block(drop_ratio=0.5).train()
    source = torch.Generator().manual_seed(0)
    torch.nn.init.zeros_(layer.ls2.gamma)
    only_attention = layer(torch.ones(8, 2, 32), generator=source)
    torch.nn.init.constant_(layer.ls2.gamma, 1.0)
    torch.nn.init.zeros_(layer.ls1.gamma)
    only_mlp = layer(torch.ones(8, 2, 32), generator=torch.Generator().manual_seed(0))

    changed = [(out != 1).any(dim=2).any(dim=1) for out in (only_attention, only_mlp)]

    assert [int(c.sum()) for c in changed] == [4, 4]
    assert not torch.equal(*changed)


def test_the_draws_are_the_generators():
    layer, x = make_block(drop_ratio=0.5).train(), randn(8, 3, 32)

    first, again, other = (
        layer(x, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )

    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("drop_ratio", [0.0, 0.5])
@pytest.mark.parametrize("ffn", FFNS)
def test_gradients_match_float64_differences(ffn, drop_ratio):
    layer = make_block(ffn, drop_ratio=drop_ratio).double().train()
    tokens, pack = pack_tokens([randn(2, 3, 32), randn(2, 1, 32)])
    tokens = tokens.double().requires_grad_()

    def run(x: torch.Tensor) -> torch.Tensor:
        return layer(x, pack, generator=torch.Generator().manual_seed(1))

    assert torch.autograd.gradcheck(run, (tokens,), fast_mode=True)


def test_every_parameter_gets_a_gradient_even_from_one_sample():
    layer = make_block("swiglu", drop_ratio=0.9).train()

    layer(randn(1, 3, 32)).square().sum().backward()

    assert all(parameter.grad.abs().sum() > 0 for parameter in layer.parameters())


def test_keys_are_those_of_dinov2():
    common = ["norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias"]
    common += ["attn.proj.weight", "attn.proj.bias", "ls1.gamma", "norm2.weight", "norm2.bias"]
    mlp = ["mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"]
    swiglu = ["mlp.w12.weight", "mlp.w12.bias", "mlp.w3.weight", "mlp.w3.bias"]

    assert list(make_block("mlp").state_dict()) == [*common, *mlp, "ls2.gamma"]
    assert list(make_block("swiglu").state_dict()) == [*common, *swiglu, "ls2.gamma"]


@pytest.mark.parametrize("drop_ratio", [0.0, 0.5])
def test_without_layer_scale_the_branches_count_fully(drop_ratio):
    bare, unit = (
        make_block(layer_scale=value, drop_ratio=drop_ratio).train() for value in (None, 1.0)
    )
    x = randn(4, 3, 32)

    outs = [layer(x, generator=torch.Generator().manual_seed(0)) for layer in (bare, unit)]

    assert not any("gamma" in key for key in bare.state_dict())
    assert torch.equal(*outs)


def test_compiles_fullgraph():
    layer = make_block("swiglu", drop_ratio=0.5)
    tokens, pack = pack_tokens([randn(2, 5, 32), randn(3, 2, 32)])

    compiled = torch.compile(layer.eval(), fullgraph=True, backend="eager")

    assert_close_in_float32(compiled(tokens, pack), layer(tokens, pack))
