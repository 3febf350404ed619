"""Products under autocast: PyTorch's own where they are fast, float32 arithmetic elsewhere."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from dinov2_fast.nn import PatchEmbed
from dinov2_fast.nn.linear import Linear
from dinov2_fast.ops import _matmul as matmul
from tests.inputs import randn
from tests.tolerance import assert_within_error_budget


def results(layer: nn.Module, x: Tensor, grad: Tensor, *, autocast: bool) -> dict[str, Tensor]:
    """Output and all gradients for an incoming gradient."""
    layer, x = copy.deepcopy(layer), x.detach().requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = layer(x)
    out.backward(grad.to(out.dtype))
    grads = {name: p.grad for name, p in layer.named_parameters()}
    return {"out": out.detach(), "x": x.grad, **grads}


@pytest.fixture(params=[True, False], ids=["fast bfloat16", "slow bfloat16"])
def either_processor(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest):
    monkeypatch.setattr(matmul, "has_fast_bfloat16", lambda: request.param)


@pytest.mark.usefixtures("either_processor")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(394, 256), (2, 7, 256), (0, 256)])
def test_as_exact_as_the_layer_of_pytorch(shape, bias):
    own = Linear(256, 96, bias=bias)
    torch_layer = nn.Linear(256, 96, bias=bias)
    torch_layer.load_state_dict(own.state_dict())
    x, grad = randn(*shape).bfloat16().float(), randn(*shape[:-1], 96).bfloat16().float()

    ours = results(own, x, grad, autocast=True)
    low = results(torch_layer, x, grad, autocast=True)
    truth = results(torch_layer.double(), x.double(), grad.double(), autocast=False)

    for name, value in ours.items():
        assert_within_error_budget(value, low_precision=low[name], truth=truth[name], name=name)


def test_without_autocast_it_is_the_layer_of_pytorch():
    layer, x = Linear(64, 32), randn(5, 64)

    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_slow_processors_keep_no_copy_of_the_weight(monkeypatch):
    monkeypatch.setattr(matmul, "has_fast_bfloat16", lambda: False)
    layer, kept = Linear(64, 32), []

    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
        torch.autocast("cpu", torch.bfloat16),
    ):
        layer(randn(5, 64).requires_grad_(True))

    kept_bytes = {t.untyped_storage().data_ptr(): t.nbytes for t in kept}
    kept_bytes.pop(layer.weight.data_ptr())
    assert sum(kept_bytes.values()) == 5 * 64 * 2  # x in bfloat16


@pytest.mark.usefixtures("either_processor")
def test_a_compiled_layer_gives_the_same():
    layer, x = Linear(64, 32), randn(5, 64)

    with torch.autocast("cpu", torch.bfloat16):
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
        plain = layer(x)

    truth = layer.double()(x.double())
    assert_within_error_budget(compiled, low_precision=plain, truth=truth, name="compiled")


@pytest.mark.usefixtures("either_processor")
def test_patches_under_autocast_are_as_exact_as_the_convolution():
    embed = PatchEmbed(patch_size=14, embed_dim=32)
    images, grad = randn(2, 3, 28, 42).bfloat16().float(), randn(2, 6, 32).bfloat16().float()

    def convolve(x: Tensor) -> Tensor:
        return embed_low.proj(x).flatten(2).transpose(1, 2)

    embed_low = copy.deepcopy(embed)
    with torch.autocast("cpu", torch.bfloat16):
        low = convolve(images)
    low.backward(grad.bfloat16())
    ours = results(embed, images, grad, autocast=True)
    truth = results(embed.double(), images.double(), grad.double(), autocast=False)

    lows = {"out": low.detach(), **{n: p.grad for n, p in embed_low.named_parameters()}}
    for name, value in lows.items():
        assert_within_error_budget(ours[name], low_precision=value, truth=truth[name], name=name)
