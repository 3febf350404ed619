"""No batch is made slower: which path it takes, and that it never computes more than before."""

from __future__ import annotations

import copy
import sys
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dinov2_fast import accelerate
from dinov2_fast.drop_in import limits
from dinov2_fast.drop_in.half_block import HalfBlock
from tests.drop_in.their_models import (
    DROP_RATIO,
    ONE_OF_EACH,
    THIRD_PARTY,
    WIDTH,
    blocks_of,
    images,
    make,
    outputs_and_gradients,
    own_memory_at_any_size,
    run,
)
from tests.inputs import randn

# A tenth of what the block of timm makes itself.
MOST_EXTRA_CALLS = 16

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("on_native"), *THIRD_PARTY]


class Operations(TorchDispatchMode):
    """Counts what PyTorch executes, and the multiplications of its matrix products."""

    def __init__(self):
        super().__init__()
        self.seen, self.products = Counter(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen[str(function)] += 1
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            left, right = args[-2:]
            self.products += left.numel() * right.shape[1]
        return function(*args, **(kwargs or {}))


@pytest.fixture
def paths(monkeypatch):
    """The path of every half that accelerated blocks looked at, in order."""
    seen = []
    original = HalfBlock.path

    def noted(self, *args):
        seen.append(original(self, *args))
        return seen[-1]

    monkeypatch.setattr(HalfBlock, "path", noted)
    return seen


@pytest.fixture
def slow_bfloat16(monkeypatch):
    """A processor of the kind on which the library's bfloat16 products are slow."""
    monkeypatch.setattr(limits, "multiplies_bfloat16_slowly", lambda: True)


def calls_of_python(run):
    """How many Python functions a call of a function enters."""
    entered = []
    sys.setprofile(lambda frame, event, _: entered.append(frame) if event == "call" else None)
    try:
        run()
    finally:
        sys.setprofile(None)
    return len(entered)


def block_and_tokens(kind: str, batch: int, num_tokens: int, drop_ratio: float = 0.0):
    """The last block of a model, which has the whole drop ratio, and an input."""
    return blocks_of(make(kind, drop_ratio))[-1], randn(batch, num_tokens, WIDTH, seed=1)


@pytest.mark.parametrize(
    ("least", "num_tokens", "channels", "owned"),
    [
        (limits.FLOAT32, 2056, 384, True),  # eight images of 224 px through ViT-S
        (limits.FLOAT32, 1999, 1024, False),  # passes over weights cost too much
        (limits.FLOAT32, 12207, 128, False),  # 2e8 / 128^2 is 12207.03
        (limits.FLOAT32, 12208, 128, True),
        (limits.SLOW_BFLOAT16, 61, 128, False),  # 1e6 / 128^2 is 61.04
        (limits.SLOW_BFLOAT16, 62, 128, True),
    ],
)
def test_owned_limits(least, num_tokens, channels, owned):
    assert least.owned_pays(num_tokens, channels) == owned


@pytest.mark.parametrize(
    ("num_tokens", "channels", "dropped_ratio", "skipping"),
    [
        (100, 128, 0.4, False),  # 100 * 128 * (51.2 - 16) is 4.5e5
        (444, 128, 0.4, True),  # 2.0006e6
        (443, 128, 0.4, False),
        (10**6, 128, 0.125, False),  # copies of rows cost as much as products are saved
        (10**6, 384, 0.0, False),
    ],
)
def test_skipping_limits(num_tokens, channels, dropped_ratio, skipping):
    assert limits.FLOAT32.skipping_pays(num_tokens, channels, dropped_ratio) == skipping


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "autocast"])
@pytest.mark.parametrize("mode", ["train", "frozen", "inference"])
@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_below_the_limits_the_same_operations_run(kind, mode, dtype, slow_bfloat16, monkeypatch):
    # 5 images of 5 tokens: the size of a toy, with drop path 0.4.
    model, x = make(kind, DROP_RATIO).train(mode == "train"), images(kind)
    if mode == "frozen":
        model.requires_grad_(False)
    fast = copy.deepcopy(model)
    accelerate(fast)
    looked = []
    for block in blocks_of(fast):
        monkeypatch.setattr(type(block), "halves", staticmethod(looked.append))
    counts, outputs = [], []

    for each in (model, fast):
        with Operations() as operations, torch.autocast("cpu", dtype, enabled=dtype is not None):
            if mode == "inference":
                with torch.inference_mode():
                    torch.manual_seed(4)
                    outputs.append({"out": run(each, x)})
            else:
                outputs.append(outputs_and_gradients(each, x, seed=4))
        counts.append(operations.seen)

    assert counts[0] == counts[1]
    assert sum(counts[0].values()) > 20
    assert not looked  # the decision needs no look at a block's modules
    assert all(torch.equal(outputs[0][name], outputs[1][name]) for name in outputs[0])


@pytest.mark.parametrize("batch", [5, 26])
@pytest.mark.parametrize("mode", ["train", "inference"])
@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_below_the_limits_a_block_costs_a_few_calls_of_python(kind, mode, batch):
    # 25 tokens, and 130, of which drop path could save just as little: a later question says so.
    block, x = block_and_tokens(kind, batch, 5, DROP_RATIO)
    block.train(mode == "train")
    calls = [0, 0]

    for fast in range(2):
        if fast:
            accelerate(block)
        with torch.inference_mode(mode == "inference"):
            block(x)  # whatever is imported or remembered at the first call
            calls[fast] = calls_of_python(lambda: block(x))

    assert calls[0] > MOST_EXTRA_CALLS
    assert calls[1] - calls[0] <= MOST_EXTRA_CALLS


@pytest.mark.parametrize(
    ("batch", "drop_path", "expected"),
    [(89, "subset", "skipping"), (85, "subset", "library"), (89, "masked", "skipping")],
)
def test_skipping_begins_where_it_saves_work(batch, drop_path, expected, paths):
    # 5 tokens each, 128 channels: 445 tokens save 2.0e6, 425 save 1.9e6; three fifths stay.
    block, x = block_and_tokens("timm dinov2", batch, 5, DROP_RATIO)
    original = copy.deepcopy(block)
    accelerate(block, drop_path=drop_path)
    products = []

    for each in (original, block):
        torch.manual_seed(0)
        with Operations() as operations:
            each(x).square().sum().backward()
        products.append(operations.products)

    assert paths == (["skipping"] * 2 if expected == "skipping" else [])
    if expected == "skipping":
        assert products[1] < 0.75 * products[0]
    else:
        assert products[1] == products[0]


@pytest.mark.parametrize("recompute", ["none", "mlp"])
@pytest.mark.parametrize("kind", [*ONE_OF_EACH, "hf swiglu"])
def test_owned_halves_compute_the_same_products(kind, recompute, monkeypatch, paths):
    own_memory_at_any_size(monkeypatch)
    block, x = block_and_tokens(kind, 5, 5)
    original = copy.deepcopy(block)
    accelerate(block, recompute=recompute)
    products = []

    for each in (original, block):
        with Operations() as operations:
            each(x.clone().requires_grad_()).square().sum().backward()
        products.append(operations.products)

    assert paths == ["owned"] * 2
    first_layers = type(block).halves(block)[1].first
    again = x.shape[0] * x.shape[1] * sum(layer.weight.numel() for layer in first_layers)
    assert products[1] - products[0] == (again if recompute == "mlp" else 0)


@pytest.mark.parametrize("training", [True, False], ids=["train", "inference"])
@pytest.mark.parametrize(("batch", "expected"), [(12, "library"), (13, "owned")])
@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_autocast_to_slow_bfloat16(kind, batch, expected, training, slow_bfloat16, paths):
    # 60 and 65 tokens: on either side of the limit for 128 channels.
    block, x = block_and_tokens(kind, batch, 5)
    block.train(training)
    original = copy.deepcopy(block)
    accelerate(block)

    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode(not training):
        found, low_precision = block(x), original(x)

    truth = original.double()(x.double())
    errors = [(each.double() - truth).norm().item() for each in (found, low_precision)]
    assert set(paths) <= {expected}
    assert bool(paths) == (expected == "owned")
    assert errors[0] <= 2 * errors[1]
    assert found.requires_grad == training


def test_autocast_to_bfloat16_elsewhere_has_the_limits_of_float32(monkeypatch, paths):
    monkeypatch.setattr(limits, "multiplies_bfloat16_slowly", lambda: False)
    block, x = block_and_tokens("timm dinov2", 13, 5)
    accelerate(block)

    with torch.autocast("cpu", torch.bfloat16):
        block(x)
        with torch.no_grad():
            block(x)

    assert not paths


@pytest.mark.parametrize(
    ("owning", "dropping", "expected"),
    [
        (
            True,
            False,
            "halves of 128 channels own their memory from 12208 tokens in a batch on in training, "
            "from 62 under autocast to bfloat16, inference included; they leave smaller batches to "
            "their library's modules, which are as fast there",
        ),
        (
            False,
            True,
            "halves of 128 channels skip dropped samples where that saves 140 tokens or more; they "
            "leave smaller batches to their library's modules, which are as fast there",
        ),
    ],
)
def test_the_limits_in_words(owning, dropping, expected, slow_bfloat16):
    assert limits.in_words(128, "cpu", owning=owning, dropping=dropping) == expected


def test_the_report_names_the_limits_of_the_model():
    notes = accelerate(make("hf dinov2", DROP_RATIO)).notes

    assert any("own their memory from 12208 tokens" in note for note in notes)
    assert any("skip dropped samples where that saves 140 tokens" in note for note in notes)
