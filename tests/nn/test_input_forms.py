"""Lists and packs in every layer: one call on all tokens, and what each tensor gives alone."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from dinov2_fast.nn import (
    Attention,
    Block,
    DINOHead,
    DropPath,
    LayerNorm,
    LayerScale,
    Mlp,
    PatchEmbed,
    SwiGLUFFN,
    SwiGLUFFNFused,
    input_forms,
)
from dinov2_fast.packing import Pack, pack_tokens
from tests.inputs import randn
from tests.tolerance import assert_within_error_budget

WIDTH = 32
LAYERS = {
    "attention": lambda: Attention(WIDTH, 2, qkv_bias=True),
    "block": lambda: Block(WIDTH, 2, init_values=0.7),
    "block swiglu": lambda: Block(WIDTH, 2, init_values=0.7, ffn_layer=SwiGLUFFNFused),
    "mlp": lambda: Mlp(WIDTH, 48, 24),
    "swiglu": lambda: SwiGLUFFN(WIDTH, 48, 24),
    "layer_scale": lambda: LayerScale(WIDTH, 0.7),
    "layer_norm": lambda: LayerNorm(WIDTH),
    "head": lambda: DINOHead(WIDTH, 12, hidden_dim=24, bottleneck_dim=16),
    "drop_path": lambda: DropPath(0.4),
}
TOKEN_WISE = ["mlp", "swiglu", "layer_scale", "layer_norm", "head"]
# Rows whose arithmetic knows no other rows, and no product whose tiles depend on their number.
EXACT = ["layer_scale", "layer_norm", "drop_path"]
# Two global and five local crops, a single token, and no image at all.
SHAPES = [(2, 17, WIDTH), (5, 5, WIDTH), (1, 1, WIDTH), (0, 5, WIDTH)]


class Operations(TorchDispatchMode):
    """Counts what PyTorch executes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return LAYERS[name]().train()


def batches_of(name: str = "") -> list[Tensor]:
    """Tokens for a layer; token-wise ones also take rows [R, C] and maps [B, h, w, C]."""
    batches = [randn(*shape, seed=seed) for seed, shape in enumerate(SHAPES)]
    if name in TOKEN_WISE:
        batches += [randn(3, WIDTH, seed=7), randn(2, 3, 4, WIDTH, seed=8)]
    return batches


def outputs_and_gradients(layer: nn.Module, batches: list[Tensor], *, together: bool):
    """Outputs for each batch, gradients of each and of the parameters."""
    batches = [batch.clone().requires_grad_() for batch in batches]
    torch.manual_seed(3)
    outs = layer(batches) if together else [layer(batch) for batch in batches]
    weights = [randn(*out.shape, seed=9 + i).to(out.dtype) for i, out in enumerate(outs)]
    loss = sum((out * weight).sum() for out, weight in zip(outs, weights, strict=True))
    gradients = torch.autograd.grad(loss, [*batches, *layer.parameters()])
    return [*outs, *gradients]


@pytest.mark.parametrize("name", LAYERS)
def test_a_list_gives_what_each_of_its_tensors_gives(name):
    layer, batches = make(name), batches_of(name)

    together = outputs_and_gradients(layer, batches, together=True)
    alone = outputs_and_gradients(layer, batches, together=False)

    assert isinstance(layer(batches), list)
    assert [out.shape for out in together] == [out.shape for out in alone]
    for index, (found, expected) in enumerate(zip(together, alone, strict=True)):
        if name in EXACT and index < 2 * len(batches):  # all but sums over rows
            assert torch.equal(found, expected)
    exact = [batch.double() for batch in batches]
    truths = outputs_and_gradients(layer.double(), exact, together=False)
    for found, low_precision, truth in zip(together, alone, truths, strict=True):
        assert_within_error_budget(found, low_precision=low_precision, truth=truth, name=name)


@pytest.mark.parametrize("name", LAYERS)
def test_a_pack_gives_what_the_list_gives(name):
    layer, batches = make(name), batches_of()
    tokens, pack = pack_tokens(batches)

    torch.manual_seed(3)
    packed = layer(tokens, pack)
    torch.manual_seed(3)
    listed = layer(batches)

    assert torch.equal(packed, torch.cat([out.flatten(0, 1) for out in listed]))


@pytest.mark.parametrize("name", LAYERS)
def test_a_list_is_one_call_of_every_operation(name):
    layer, batches = make(name), batches_of()[:3]
    counts = []

    for given in (batches[0], batches):
        with torch.no_grad(), Operations() as operations:
            layer(given)
        counts.append(operations.seen)

    layout = {"cat", "view", "reshape", "_unsafe_view", "split_with_sizes", "split", "clone"}
    layout |= {"lift_fresh", "detach", "_to_copy", "as_strided", "unsqueeze", "alias", "empty_like"}
    if name == "drop_path":  # the sample of each token, from the pack's offsets
        layout |= {"diff", "slice", "sub", "repeat_interleave", "index_select"}
    one, several = ({k: n for k, n in seen.items() if k not in layout} for seen in counts)
    assert several == one
    assert one
    assert counts[1]["cat"] == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LAYERS)
def test_lists_under_autocast(name, dtype):
    layer, batches = make(name), batches_of(name)
    exact = copy.deepcopy(layer).double()

    with torch.autocast("cpu", dtype):
        together = outputs_and_gradients(layer, batches, together=True)
        alone = outputs_and_gradients(layer, batches, together=False)

    truths = outputs_and_gradients(exact, [b.double() for b in batches], together=False)
    assert [out.dtype for out in together] == [out.dtype for out in alone]
    for found, low_precision, truth in zip(together, alone, truths, strict=True):
        assert_within_error_budget(found, low_precision=low_precision, truth=truth, name=name)


@pytest.mark.parametrize("name", LAYERS)
def test_checkpointing_a_list_changes_no_bit(name):
    layer, batches = make(name), batches_of(name)

    kept = outputs_and_gradients(layer, batches, together=True)
    forward = layer.forward
    layer.forward = partial(checkpoint, forward, use_reentrant=False)
    again = outputs_and_gradients(layer, batches, together=True)

    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "drop_path"])
def test_a_list_compiles_fullgraph(name):
    layer, batches = make(name).eval(), batches_of()[:2]

    compiled = torch.compile(layer, fullgraph=True, backend="eager")(batches)

    for found, expected in zip(compiled, layer(batches), strict=True):
        assert (found - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("name", LAYERS)
def test_a_tensor_pays_nothing_for_lists(name):
    layer, x, entered = make(name), batches_of()[0], []

    sys.setprofile(
        lambda frame, event, _: entered.append(frame.f_code) if event == "call" else None
    )
    try:
        layer(x)
    finally:
        sys.setprofile(None)

    ours = {code.co_name for code in entered if code.co_filename == input_forms.__file__}
    assert ours == ({"as_packed"} if name.startswith(("attention", "block")) else set())


def test_a_hook_sees_a_list_once():
    layer, batches, seen = make("mlp"), batches_of()[:2], []
    layer.register_forward_hook(lambda _module, inputs, out: seen.append((inputs[0], out)))

    outs = layer(batches)

    assert len(seen) == 1
    assert seen[0][0] is batches
    assert seen[0][1] is outs


def test_unit_vectors_of_a_list_come_with_the_prototypes_once():
    head, batches = make("head"), batches_of("head")

    vectors, prototypes = head(batches, scored=False)
    scores = head(batches)

    assert torch.equal(prototypes, head.last_layer.weight)
    for vector, score in zip(vectors, scores, strict=True):
        torch.testing.assert_close(vector @ prototypes.T, score)


def test_attention_gives_probabilities_in_every_form():
    layer, batches = make("attention"), batches_of()[:3]

    of_list = layer(batches, return_attention=True)
    of_pack = layer(*pack_tokens(batches), return_attention=True)
    alone = [layer(batch, return_attention=True) for batch in batches]

    assert [each.shape for each in of_list] == [(2, 2, 17, 17), (5, 2, 5, 5), (1, 2, 1, 1)]
    for listed, packed, one in zip(of_list, of_pack, alone, strict=True):
        assert torch.equal(listed, packed)
        assert (listed - one).norm() <= 1e-6 * one.norm()


def test_a_branch_is_skipped_for_samples_of_a_list():
    layer, seen = DropPath(0.4).train(), []
    batches = [randn(10, 3, 8), randn(5, 2, 8, seed=1)]

    def branch(tokens, pack):
        seen.append((tokens.shape[0], pack.groups))
        return 2 * tokens

    outs = layer.add(batches, branch, generator=torch.Generator().manual_seed(0))
    packed = layer.add(
        *(pack_tokens(batches)[0], branch, pack_tokens(batches)[1]),
        generator=torch.Generator().manual_seed(0),
    )

    assert seen[0] == (6 * 3 + 3 * 2, ((6, 3), (3, 2)))
    assert torch.equal(packed, torch.cat([out.flatten(0, 1) for out in outs]))
    for out, x, kept in zip(outs, batches, (6, 3), strict=True):
        changed = (out != x).flatten(1).any(dim=1)
        assert int(changed.sum()) == kept
        torch.testing.assert_close(out[changed], x[changed] * (1 + 2 * len(x) / kept))
    layer.eval()
    assert torch.equal(layer.add(batches, branch)[1], 3 * batches[1])


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("options", [{}, {"norm_layer": LayerNorm, "flatten_embedding": False}])
def test_images_of_several_sizes_are_embedded_by_one_product(options, autocast):
    torch.manual_seed(0)
    embed = PatchEmbed(28, 14, embed_dim=16, **options)
    # A crop in the layout of channels last, one that is wider than high, and no image.
    batches = [randn(2, 3, 28, 28).contiguous(memory_format=torch.channels_last)]
    batches += [randn(3, 3, 14, 42, seed=1), randn(0, 3, 14, 14, seed=2)]

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        together = outputs_and_gradients(embed, batches, together=True)
        alone = outputs_and_gradients(embed, batches, together=False)
        with Operations() as operations:
            embed(batches)

    truths = outputs_and_gradients(embed.double(), [b.double() for b in batches], together=False)
    for found, low_precision, truth in zip(together, alone, truths, strict=True):
        assert found.dtype == low_precision.dtype
        assert_within_error_budget(found, low_precision=low_precision, truth=truth, name="embed")
    assert sum(operations.seen[name] for name in ("mm", "addmm", "linear")) == 1
    assert not operations.seen["convolution"]


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_layer_scale_still_scripts_and_scales_in_place():
    scripted, x = torch.jit.script(LayerScale(3, 0.5)), randn(2, 3)

    assert torch.equal(scripted(x), 0.5 * x)
    out = LayerScale(3, 0.5, inplace=True).requires_grad_(False)(x)
    assert out is x


PACK = Pack.from_lengths([3])
X = torch.zeros(2, 3, WIDTH)
REFUSED = [
    (([],), ValueError, "expected at least one tensor in the list, got none"),
    (([X, [X]],), TypeError, "expected a list of tensors, got a list at position 1; a list within"),
    ((PACK,), TypeError, r"got a Pack; give its tokens \[T, C\] in front of it"),
    ((None,), TypeError, "expected x to be a tensor or a list of tensors, got a NoneType"),
    (([X], PACK), ValueError, "got one beside a list of 1; leave it out"),
    (([X, X[..., :8]],), ValueError, "expected 32 channels in every batch, got 8; call it"),
    (
        ([X, X.half()],),
        ValueError,
        r"torch.float32 on cpu .* got torch.float16 on cpu; convert",
    ),
    (([X, X.to("meta")],), ValueError, "got torch.float32 on meta"),
    ((X[0, :2], PACK), ValueError, r"the 3 tokens of its pack, got \(2, 32\)"),
]


@pytest.mark.parametrize(("arguments", "error", "words"), REFUSED)
@pytest.mark.parametrize("name", LAYERS)
def test_rejects_bad_input_by_the_layers_name(name, arguments, error, words):
    with pytest.raises(error, match=f"^{name.split()[0]}: .*{words}"):
        make(name)(*arguments)


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("attention", ([X, X[0]],), r"attention: expected \[S, N, C\], got \(3, 32\)"),
        ("mlp", ([X, torch.tensor(1.0)],), r"mlp: expected tensors \[..., C\]"),
    ],
)
def test_rejects_tensors_without_sequences(name, arguments, words):
    with pytest.raises(ValueError, match=words):
        make(name)(*arguments)


def test_rejects_rows_of_a_list_and_lists_that_are_no_images():
    with pytest.raises(ValueError, match="layer_norm: expected no rows beside a list"):
        LayerNorm(WIDTH)([X], rows=torch.zeros(1, dtype=torch.int64))
    with pytest.raises(TypeError, match="patch_embed: expected a list of tensors, got a list at"):
        PatchEmbed()([torch.zeros(1, 3, 16, 16), [X]])
    with pytest.raises(ValueError, match=r"patch_embed: expected images \[B, 3, H, W\]"):
        PatchEmbed()([torch.zeros(1, 3, 16, 16), X])
