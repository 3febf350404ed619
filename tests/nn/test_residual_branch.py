"""Branches that own their memory: equal to the modules under autograd, and leaner."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dinov2_fast.bench.eager.vision_transformer import Block as EagerBlock
from dinov2_fast.bench.saved import saved_bytes
from dinov2_fast.nn import Block
from dinov2_fast.nn.branch_plan import Recompute
from dinov2_fast.packing import Pack
from tests.inputs import randn
from tests.nn.blocks import make_block
from tests.tolerance import assert_within_error_budget

FFNS = ["mlp", "swiglu"]
PACK = Pack.from_groups([(4, 5), (5, 3)])
PLAIN = ("DINOV2_FAST_BLOCK", "plain")


def block(dim: int = 32, num_heads: int = 2, *, ffn: str = "mlp", **options) -> Block:
    layer = make_block(ffn, dim, num_heads, **options).train()
    for name, parameter in layer.named_parameters():
        if "norm" in name or name.endswith("bias"):  # neither all ones nor all zeros
            nn.init.normal_(parameter, mean=float("weight" in name), std=0.1)
    return layer


def gradients(layer: Block, x: Tensor, pack: Pack) -> dict[str, Tensor]:
    """Output and gradients of the input and of every parameter, for one draw of samples."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    out = layer(x, pack, generator=torch.Generator().manual_seed(3))
    (out * randn(*out.shape, seed=5).to(out.dtype)).sum().backward()
    named = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    return {"out": out.detach(), "x": x.grad, **named}


@pytest.mark.parametrize("drop_ratio", [0.0, 0.4])
@pytest.mark.parametrize("ffn", FFNS)
@pytest.mark.parametrize(
    ("dim", "num_heads"),
    [(32, 2), (384, 6), (768, 12), (1024, 16), (1536, 24)],
    ids=["tiny", "S", "B", "L", "g"],
)
def test_gradients_are_those_of_the_modules(monkeypatch, dim, num_heads, ffn, drop_ratio):
    layer = block(dim, num_heads, ffn=ffn, drop_ratio=drop_ratio)
    x = randn(PACK.num_tokens, dim)

    owned = gradients(layer, x, PACK)
    monkeypatch.setenv(*PLAIN)
    truth = gradients(layer.double(), x.double(), PACK)

    assert owned.keys() == truth.keys()
    errors = {
        name: ((owned[name].double() - expected).norm() / expected.norm()).item()
        for name, expected in truth.items()
    }
    assert max(errors.values()) <= 1e-5, errors


@pytest.mark.parametrize("ffn", FFNS)
def test_gradients_in_bfloat16_are_as_good_as_those_of_the_modules(monkeypatch, ffn):
    layer, x = block(64, 2, ffn=ffn, drop_ratio=0.4), randn(PACK.num_tokens, 64)

    with torch.autocast("cpu", torch.bfloat16):
        owned = gradients(layer, x, PACK)
        monkeypatch.setenv(*PLAIN)
        plain = gradients(layer, x, PACK)
    truth = gradients(layer.double(), x.double(), PACK)

    for name, expected in truth.items():
        # Single entries of small sums differ at random; what counts is the whole vector.
        error, plain_error = (
            (found[name].double() - expected).norm() / expected.norm() for found in (owned, plain)
        )
        assert error <= 2 * plain_error + 1e-3, f"{name}: {error:.2g}, modules {plain_error:.2g}"


@pytest.mark.parametrize("ffn", FFNS)
def test_float64_gradients_match_differences(ffn):
    layer = block(16, 2, ffn=ffn, drop_ratio=0.4).double()
    pack = Pack.from_groups([(2, 3), (3, 1)])

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        named = dict(zip((name for name, _ in layer.named_parameters()), parameters, strict=True))
        arguments = (x, pack)
        options = {"generator": torch.Generator().manual_seed(1)}
        return torch.func.functional_call(layer, named, arguments, options)

    parameters = [parameter.detach().clone().requires_grad_() for parameter in layer.parameters()]
    x = randn(pack.num_tokens, 16, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(run, (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("ffn", FFNS)
@pytest.mark.parametrize("recompute", ["mlp", "block"])
def test_recomputing_changes_no_bit(recompute, ffn):
    keeping, saving = (block(ffn=ffn, drop_ratio=0.4, recompute=r) for r in ("none", recompute))
    x = randn(PACK.num_tokens, 32)

    kept, computed = gradients(keeping, x, PACK), gradients(saving, x, PACK)

    assert all(torch.equal(kept[name], computed[name]) for name in kept)


@contextlib.contextmanager
def bf16_by_rules_of(device: str) -> Iterator[None]:
    """Autocast as a device has it; `torch.autocast` refuses where the machine lacks the device."""
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, True)
    torch.set_autocast_dtype(device, torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])
        torch.clear_autocast_cache()


def bytes_we_keep(device: str, drop_ratio: float, recompute: Recompute) -> float:
    """Per token and channel of a block of ViT-g; of a GPU's on tensors without memory."""
    without_memory = FakeTensorMode() if device == "cuda" else contextlib.nullcontext()
    with without_memory, torch.device(device), bf16_by_rules_of(device):
        pack = Pack.from_groups([(5, 257)], device)  # of five, three are kept
        layer = block(1536, 24, ffn="swiglu", drop_ratio=drop_ratio, recompute=recompute)
        x = torch.zeros(pack.num_tokens, 1536, requires_grad=True)
        kept = saved_bytes(layer, lambda: layer(x, pack, generator=torch.Generator("cpu")))
    return kept / x.numel()


def bytes_the_reference_keeps(device: str, drop_ratio: float) -> float:
    """Per token and channel: the same count for the eager reference, on tensors without memory.

    Of so many sequences that its 16-bit copies of weights, which it keeps too, weigh nothing.
    """
    with FakeTensorMode(), torch.device(device), bf16_by_rules_of(device):
        layer = EagerBlock(1536, 24, ffn="swiglu", drop_ratio=drop_ratio, layer_scale=0.7)
        x = torch.empty(1000, 257, 1536, requires_grad=True)
        return saved_bytes(layer, lambda: layer(x)) / x.numel()


# With bf16 activations and SwiGLU, per kept token: two norm outputs 2 + 2, queries, keys and values
# 6, attention output 2, hidden pre-activation 2 * 16 / 3; and 8 bytes of both norms, on a GPU 96 of
# log-sum-exp. The eager reference keeps 53.5 by the rules of a CPU's autocast; a GPU's takes
# softmax in float32, which with N / D = 4 adds 16.
@pytest.mark.parametrize(
    ("drop_ratio", "recompute", "limit", "times_less"),
    [
        (0.0, "none", {"cpu": 22.68, "cuda": 22.8}, {"cpu": 2.35, "cuda": 3.0}),
        (0.4, "none", {"cpu": 13.61, "cuda": 13.7}, {"cpu": 3.9, "cuda": 5.1}),
        (0.4, "mlp", {"cpu": 7.204, "cuda": 7.25}, {"cpu": 7.4, "cuda": 9.6}),
        (0.4, "block", {"cpu": 3.604, "cuda": 3.65}, {"cpu": 14.8, "cuda": 19.1}),
    ],
)
@pytest.mark.parametrize("rules_of", ["cpu", "cuda"])
def test_bytes_kept_per_token_and_channel(rules_of, drop_ratio, recompute, limit, times_less):
    kept = bytes_we_keep(rules_of, drop_ratio, recompute)

    assert kept <= limit[rules_of]
    assert bytes_the_reference_keeps(rules_of, drop_ratio) / kept >= times_less[rules_of]


def test_about_half_of_the_bytes_of_the_modules(monkeypatch):
    pack = Pack.from_groups([(10, 257)])
    layer, x = block(384, 6, drop_ratio=0.0), randn(pack.num_tokens, 384).requires_grad_()

    with torch.autocast("cpu", torch.bfloat16):
        owned = saved_bytes(layer, lambda: layer(x, pack))
        monkeypatch.setenv(*PLAIN)
        plain = saved_bytes(layer, lambda: layer(x, pack))

    assert owned <= 0.51 * plain


@pytest.mark.parametrize("value", [0.0, 1e-4])
def test_a_norm_with_vanishing_weights_still_has_its_gradient(monkeypatch, value):
    layer, x = block(drop_ratio=0.0), randn(PACK.num_tokens, 32)
    with torch.no_grad():
        layer.norm1.weight[3] = value
        layer.norm2.weight[5] = value

    owned = gradients(layer, x, PACK)
    monkeypatch.setenv(*PLAIN)
    plain = gradients(layer, x, PACK)
    truth = gradients(layer.double(), x.double(), PACK)

    for name in ("x", "norm1.weight", "norm2.weight"):
        assert_within_error_budget(
            owned[name], low_precision=plain[name], truth=truth[name], name=name
        )


def test_the_callers_tokens_stay_as_they_are_unless_given_away():
    layer, x = block().eval(), randn(PACK.num_tokens, 32)
    before = x.clone()
    with torch.no_grad():
        out = layer(x, PACK)
        assert torch.equal(x, before)
        given = layer(x, PACK, inplace=True)

    assert torch.equal(given, out)
    assert given.data_ptr() == x.data_ptr()


def test_a_gradient_that_somebody_else_holds_is_not_overwritten():
    layer, x = block(), randn(PACK.num_tokens, 32).requires_grad_()
    incoming = randn(PACK.num_tokens, 32, seed=1)
    before = incoming.clone()

    torch.autograd.grad(layer(x, PACK), x, incoming)

    assert torch.equal(incoming, before)


def test_a_stack_passes_one_gradient_buffer_down(monkeypatch):
    layers = nn.ModuleList(block(drop_ratio=0.4) for _ in range(3))

    def gradient_of_input(x: Tensor, *, inplace: bool) -> Tensor:
        leaf = x.clone().requires_grad_()
        tokens = leaf * 1.0
        for layer in layers:
            tokens = layer(
                tokens, PACK, generator=torch.Generator().manual_seed(0), inplace=inplace
            )
        (gradient,) = torch.autograd.grad(tokens.square().sum(), leaf)
        return gradient

    x = randn(PACK.num_tokens, 32)
    owned = gradient_of_input(x, inplace=True)
    monkeypatch.setenv(*PLAIN)
    plain = gradient_of_input(x, inplace=False)

    assert ((owned - plain).norm() / plain.norm()).item() <= 1e-5


@pytest.mark.parametrize("ffn", FFNS)
def test_a_retained_graph_gives_the_same_gradients_again(ffn):
    layer = block(ffn=ffn, drop_ratio=0.4)
    x = randn(PACK.num_tokens, 32).requires_grad_()
    loss = layer(x, PACK).square().sum()

    first = torch.autograd.grad(loss, (x, *layer.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, (x, *layer.parameters()))

    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_hooks_and_replaced_layers_are_called():
    layer, x = block().eval(), randn(PACK.num_tokens, 32)
    seen: list[str] = []
    handle = layer.mlp.fc1.register_forward_hook(lambda *_: seen.append("hook"))
    layer(x, PACK)
    handle.remove()

    class Adapter(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append("adapter")
            return super().forward(x)

    layer.attn.proj = Adapter(32, 32)
    layer(x, PACK)

    assert seen == ["hook", "adapter"]


def test_frozen_parameters_get_no_gradient():
    layer = block()
    layer.attn.requires_grad_(False)
    layer(randn(PACK.num_tokens, 32), PACK).sum().backward()

    assert layer.attn.qkv.weight.grad is None
    assert layer.mlp.fc1.weight.grad is not None


def test_rejects_an_unknown_recompute_level():
    with pytest.raises(ValueError, match="block: expected recompute"):
        Block(32, 2, recompute="everything")
