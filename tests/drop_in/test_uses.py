"""What people do with models, on accelerated ones: the results of the original."""

from __future__ import annotations

import copy

import pytest
import torch

from dinov2_fast import accelerate
from dinov2_fast.models import create_model
from tests.drop_in.same_training import assert_close, original_and_fast
from tests.drop_in.their_models import (
    ONE_OF_EACH,
    THIRD_PARTY,
    blocks_of,
    images,
    make,
    run,
)
from tests.inputs import randn

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("on_native", "at_any_size"), *THIRD_PARTY]


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_a_graph_that_is_kept_gives_the_same_gradients_again(kind):
    model = make(kind)
    accelerate(model)
    parameters = [p for name, p in model.named_parameters() if "mask_token" not in name]
    loss = run(model, images(kind)).square().sum()

    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    second = torch.autograd.grad(loss, parameters)

    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert sum(gradient.abs().sum() for gradient in first) > 0


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_outputs_of_blocks_that_hooks_keep_stay_as_they_were(kind):
    features = []
    for model in original_and_fast(make(kind)):
        seen = []
        for block in blocks_of(model):
            block.register_forward_hook(lambda module, inputs, out, seen=seen: seen.append(out))
        run(model, images(kind)).sum().backward()
        features.append(seen)

    for original, found in zip(*features, strict=True):
        assert_close(found, original)


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_outputs_of_blocks_may_be_changed_in_place(kind):
    gradients = []
    for model in original_and_fast(make(kind)):
        first, second = blocks_of(model)
        tokens = first(randn(3, 5, 128, seed=1))
        tokens += 1
        tokens.mul_(2)
        second(tokens).square().sum().backward()
        gradients.append([p.grad for p in first.parameters()])

    for original, found in zip(*gradients, strict=True):
        if original.abs().max() > 1e-2:  # the bias of keys has none but rounding
            assert_close(found, original)


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_other_parameters_by_functional_call(kind):
    outputs = []
    for model in original_and_fast(make(kind)):
        others = {name: 1.1 * p.detach() for name, p in model.named_parameters()}
        for value in others.values():
            value.requires_grad_()
        out = torch.func.functional_call(model, others, (images(kind),))
        out = out if isinstance(out, torch.Tensor) else out.last_hidden_state
        weight = next(v for name, v in others.items() if name.endswith("fc1.weight"))
        outputs.append((out, *torch.autograd.grad(out.square().sum(), weight)))

    for original, found in zip(*outputs, strict=True):
        assert_close(found, original)


def test_second_derivatives_are_refused():
    model, x = make("timm dinov2"), images("timm dinov2").requires_grad_()
    accelerate(model)
    (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)

    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_model_may_be_accelerated_before_its_parameters_have_memory():
    model, x = make("timm dinov2"), images("timm dinov2")
    empty = copy.deepcopy(model).to("meta")
    accelerate(empty)

    filled = empty.to_empty(device="cpu")
    filled.load_state_dict(model.state_dict())

    assert_close(filled(x), model(x))
    assert len(accelerate(filled).replaced) == 4


def test_wrapped_blocks_and_our_own_models_get_a_way_out():
    model = make("timm plain")
    for block in model.blocks:
        block.__class__ = type("FSDPBlock", (type(block),), {})  # as fully_shard does

    with pytest.raises(ValueError, match=r"FSDPBlock, a subclass of one; accelerate before fully_"):
        accelerate(model)
    with pytest.raises(ValueError, match="blocks are fast as they are"):
        accelerate(create_model("vits14", depth=1))
