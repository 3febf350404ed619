"""Packed attention: against its reference, torch's own, and sequence by sequence."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from dinov2_fast import native
from dinov2_fast.errors import BackendUnavailable
from dinov2_fast.ops._attention_kernels import are_of_a_gpu
from dinov2_fast.ops.attention import (
    attention,
    attention_reference,
    attention_varlen,
    attention_weights,
    attention_with_lse,
    lse_reference,
)
from dinov2_fast.packing import Pack, unpack_tokens
from tests.inputs import (
    COMPILERS,
    DTYPES,
    GRADCHECK_GROUPS,
    GROUPS,
    float_types,
    leaves,
    make_qkv,
    randn,
    score_rounding,
)
from tests.tolerance import assert_within_error_budget

Groups = tuple[tuple[int, int], ...]

HEAD_DIM = 64  # of every ViT, and the only one that every backend takes


@pytest.fixture
def dtype(backend: str, device: str) -> torch.dtype:
    """The widest type that the backend takes there."""
    return float_types("attention", backend, device)[0]


def skip_unless_taken(dtype: torch.dtype, backend: str, device: str) -> None:
    if dtype not in float_types("attention", backend, device):
        pytest.skip(f"{backend} attention does not take {dtype} there")


def test_reference_known_values():
    # Sequence 1: one token, the output is its value. Sequence 2: scores 0 and ln 3 against the
    # second query, so its weights are 1/4 and 3/4; the first query is zero and takes the mean.
    log3 = math.log(3)
    q = torch.tensor([[5.0], [0.0], [1.0]]).unsqueeze(1)
    k = torch.tensor([[7.0], [0.0], [log3]]).unsqueeze(1)
    v = torch.tensor([[2.0], [4.0], [8.0]]).unsqueeze(1)
    pack = Pack.from_lengths([1, 2])
    out, lse = attention_with_lse(q, k, v, pack, scale=1.0)
    torch.testing.assert_close(out.flatten(), torch.tensor([2.0, 6.0, 7.0]))
    torch.testing.assert_close(lse, torch.tensor([[35.0, math.log(2), math.log(4)]]))
    weights = attention_weights(q, k, pack, scale=1.0)
    expected = torch.tensor([[[[0.5, 0.5], [0.25, 0.75]]]])
    assert torch.equal(weights[0], torch.ones(1, 1, 1, 1))
    torch.testing.assert_close(weights[1], expected)


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_reference(groups: Groups, dtype: torch.dtype, backend: str, device: str):
    skip_unless_taken(dtype, backend, device)
    pack = Pack.from_groups(groups, device)
    q, k, v = make_qkv(pack, head_dim=HEAD_DIM, dtype=dtype)
    out, lse = attention_with_lse(q, k, v, pack, backend=backend)
    scale = q.shape[2] ** -0.5
    wide = [x.double() for x in (q, k, v)]
    assert_within_error_budget(
        out,
        low_precision=attention_reference(q, k, v, pack, scale=scale),
        truth=attention_reference(*wide, pack, scale=scale),
        name="attention.out",
    )
    assert_within_error_budget(
        lse,
        low_precision=lse_reference(q, k, pack, scale=scale),
        truth=lse_reference(*wide[:2], pack, scale=scale),
        name="attention.lse",
    )
    assert torch.equal(attention(q, k, v, pack, backend=backend), out)


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_match_reference(groups: Groups, dtype: torch.dtype, backend: str, device: str):
    skip_unless_taken(dtype, backend, device)
    pack = Pack.from_groups(groups, device)
    qkv = make_qkv(pack, head_dim=HEAD_DIM, dtype=dtype)
    incoming = randn(*qkv[0].shape, dtype=dtype, device=device, seed=1)

    def gradients(dtype: torch.dtype, function, **options) -> list[torch.Tensor]:
        inputs = leaves(*qkv, dtype=dtype)
        out = function(*inputs, pack, scale=0.25, **options)
        return list(torch.autograd.grad(out, inputs, incoming.to(dtype)))

    out = gradients(dtype, attention, backend=backend)
    low_precision = gradients(dtype, attention_reference)
    truth = gradients(torch.float64, attention_reference)
    rounding = score_rounding(incoming, *qkv, scale=0.25)
    of_weights = 0.0
    if are_of_a_gpu(qkv[0], backend) and qkv[0].numel():
        # Weights are made again as exp(score - lse), and lse is rounded to float32.
        lse = lse_reference(*qkv[:2], pack, scale=0.25).abs().max()
        of_weights = torch.finfo(torch.float32).eps / 2 * float(lse)
    for name, *candidates in zip("qkv", out, low_precision, truth, strict=True):
        # One key has a weight of 1, whatever the query.
        constant = name != "v" and not candidates[2].any()
        largest = float(candidates[2].abs().max()) if candidates[2].numel() else 0.0
        assert_within_error_budget(
            candidates[0],
            low_precision=candidates[1],
            truth=candidates[2],
            name=f"attention.d{name}",
            cancelled=rounding if constant else of_weights * largest,
        )


# 32, 96 and 128 of other ViTs, 72 of so400m and 80 of ViT-H, which no power of two is, 40 between
# two vectors of 32 bytes.
@pytest.mark.parametrize("head_dim", [32, 40, 72, 80, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_head_dimension_matches_reference(
    dtype: torch.dtype, head_dim: int, backend: str, device: str
):
    skip_unless_taken(dtype, backend, device)
    if native.place_of(backend, device) == "cuda" and backend == "native":
        pytest.skip("native attention takes heads of 64 there")
    pack = Pack.from_groups(((2, 7), (1, 65)), device)  # inside a tile, and one past it
    qkv = make_qkv(pack, head_dim=head_dim, dtype=dtype)
    incoming = randn(*qkv[0].shape, dtype=dtype, device=device, seed=1)

    def results(dtype: torch.dtype, backend: str) -> list[torch.Tensor]:
        inputs = leaves(*qkv, dtype=dtype)
        out = attention(*inputs, pack, backend=backend, deterministic=True)
        return [out.detach(), *torch.autograd.grad(out, inputs, incoming.to(dtype))]

    found, low = results(dtype, backend), results(dtype, "reference")
    truth = results(torch.float64, "reference")
    for name, *candidates in zip(("out", "dq", "dk", "dv"), found, low, truth, strict=True):
        out, low_precision, exact = candidates
        assert_within_error_budget(out, low_precision=low_precision, truth=exact, name=name)


def test_gradcheck():
    pack = Pack.from_groups(GRADCHECK_GROUPS)
    inputs = leaves(*make_qkv(pack, head_dim=3), dtype=torch.float64)
    torch.autograd.gradcheck(lambda *qkv: attention_with_lse(*qkv, pack), inputs)


@pytest.mark.parametrize("groups", GROUPS)
def test_equals_attention_of_each_sequence_alone(groups: Groups):
    # Torch's own attention as the independent judge, sequence by sequence, in float64.
    pack = Pack.from_groups(groups)
    q, k, v = (x.double() for x in make_qkv(pack))
    out = attention(q, k, v, pack)
    for begin, end in zip(pack.offsets_host, pack.offsets_host[1:], strict=False):
        heads_first = [x[begin:end].transpose(0, 1) for x in (q, k, v)]
        alone = F.scaled_dot_product_attention(*heads_first).transpose(0, 1)
        torch.testing.assert_close(out[begin:end], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("groups", GROUPS)
def test_weights_sum_to_one_and_give_the_output(groups: Groups):
    pack = Pack.from_groups(groups)
    q, k, v = (x.double() for x in make_qkv(pack))
    weights = attention_weights(q, k, pack)
    assert [tuple(w.shape) for w in weights] == [(s, 2, n, n) for s, n in groups]
    outs = unpack_tokens(attention(q, k, v, pack), pack)
    for weight, value, out in zip(weights, unpack_tokens(v, pack), outs, strict=True):
        torch.testing.assert_close(weight.sum(-1), torch.ones_like(weight.sum(-1)))
        expected = torch.einsum("shij,sjhd->sihd", weight, value)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("poisoned", [0, 1, 2])
def test_nan_in_one_sequence_leaves_the_others_bit_equal(
    poisoned: int, dtype: torch.dtype, backend: str, device: str
):
    if backend == "flash_attn":
        pytest.skip("it loads whole tiles, across the end of a sequence")
    pack = Pack.from_groups([(2, 17), (1, 5)], device)
    clean = make_qkv(pack, head_dim=HEAD_DIM, dtype=dtype)
    expected, expected_lse = attention_with_lse(*clean, pack, backend=backend)
    begin, end = pack.offsets_host[poisoned : poisoned + 2]
    for position in range(3):
        qkv = [x.clone() for x in clean]
        qkv[position][begin + 1] = torch.nan
        out, lse = attention_with_lse(*qkv, pack, backend=backend)
        others = torch.ones(pack.num_tokens, dtype=torch.bool, device=device)
        others[begin:end] = False
        assert torch.equal(out[others], expected[others])
        assert torch.equal(lse[:, others], expected_lse[:, others])
        assert out[begin:end].isnan().any()


def test_order_of_sequences_does_not_matter(dtype: torch.dtype, backend: str, device: str):
    lengths, order = [5, 17, 5, 1], [2, 1, 3, 0]
    pack = Pack.from_lengths(lengths, device)
    moved_pack = Pack.from_lengths([lengths[i] for i in order], device)
    tokens = torch.arange(pack.num_tokens).split(lengths)
    moved = torch.cat([tokens[i] for i in order]).to(device)
    q, k, v = make_qkv(pack, head_dim=HEAD_DIM, dtype=dtype)
    out = attention(q, k, v, pack, backend=backend)
    moved_out = attention(q[moved], k[moved], v[moved], moved_pack, backend=backend)
    assert_within_error_budget(
        moved_out,
        low_precision=out[moved],
        truth=attention(q.double(), k.double(), v.double(), pack)[moved],
        name="attention.moved",
    )


def test_strides_do_not_matter(dtype: torch.dtype, backend: str, device: str):
    pack = Pack.from_groups([(2, 17), (1, 5)], device)
    strided = make_qkv(pack, head_dim=HEAD_DIM, dtype=dtype)
    assert not strided[0].is_contiguous()
    contiguous = [x.contiguous() for x in strided]
    out = attention(*strided, pack, backend=backend)
    assert_within_error_budget(
        out,
        low_precision=attention(*contiguous, pack, backend=backend),
        truth=attention(*(x.double() for x in strided), pack),
        name="attention.strided",
    )


def test_large_scores_do_not_overflow(dtype: torch.dtype, backend: str, device: str):
    pack = Pack.from_lengths([3], device)
    q = torch.full((3, 1, HEAD_DIM), 1e4, dtype=dtype, device=device)
    v = randn(3, 1, HEAD_DIM, dtype=dtype, device=device)
    out, lse = attention_with_lse(q, q, v, pack, backend=backend)
    torch.testing.assert_close(out, v.mean(0, keepdim=True).expand_as(out))
    assert lse.isfinite().all()


@pytest.mark.parametrize("groups", GROUPS)
def test_varlen_equals_the_packed_form(
    groups: Groups, dtype: torch.dtype, backend: str, device: str
):
    pack = Pack.from_groups(groups, device)
    q, k, v = make_qkv(pack, head_dim=HEAD_DIM, dtype=dtype)
    out = attention_varlen(q, k, v, pack.offsets, pack.max_length + 1, backend=backend)
    low_precision = attention(q, k, v, pack, backend=backend)
    truth = attention(q.double(), k.double(), v.double(), pack)
    assert_within_error_budget(out, low_precision=low_precision, truth=truth, name="varlen")


@pytest.mark.parametrize("compiler", COMPILERS)
def test_compiles_fullgraph(compiler: str, dtype: torch.dtype, backend: str, device: str):
    pack = Pack.from_groups([(2, 3), (1, 2)], device)
    q, k, v = make_qkv(pack, head_dim=HEAD_DIM, dtype=dtype)
    inputs, eager_inputs = leaves(q, k, v), leaves(q, k, v)
    compiled = torch.compile(attention, fullgraph=True, dynamic=False, backend=compiler)
    out = compiled(*inputs, pack, backend=backend)
    expected = attention(*eager_inputs, pack, backend=backend)
    out.sum().backward()
    expected.sum().backward()
    truth = attention(q.double(), k.double(), v.double(), pack)
    assert_within_error_budget(out, low_precision=expected, truth=truth, name="compiled")
    for compiled_leaf, eager_leaf in zip(inputs, eager_inputs, strict=True):
        torch.testing.assert_close(compiled_leaf.grad, eager_leaf.grad)


def test_an_explicit_backend_without_a_kernel_raises():
    pack = Pack.from_lengths([2])
    with pytest.raises(BackendUnavailable, match="attention has no triton kernel for cpu"):
        attention(*make_qkv(pack), pack, backend="triton")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": randn(5, 8)}, ValueError, r"q must have shape \[T, H, D\], got \(5, 8\)"),
        ({"q": [1.0]}, TypeError, "q must be a tensor, got list"),
        ({"q": torch.ones(5, 2, 8, dtype=torch.int64)}, TypeError, "q must be of a floating"),
        ({"k": randn(5, 2, 4)}, ValueError, r"k must have shape \[5, 2, 8\]"),
        ({"k": randn(5, 2, 8).double()}, ValueError, "k must have the dtype of q"),
        ({"v": randn(4, 2, 8)}, ValueError, r"v must have shape \[5, 2, 8\]"),
        ({"v": randn(5, 2, 8).double()}, ValueError, "v must have the dtype of q"),
        ({"v": randn(5, 2, 8, device="meta")}, ValueError, "v must be on cpu, got meta"),
        ({"pack": Pack.from_lengths([4])}, ValueError, "pack must have the 5 tokens"),
        ({"pack": [5]}, TypeError, "pack must be a Pack"),
        ({"pack": Pack.from_lengths([5], "meta")}, ValueError, "pack must be on cpu"),
        ({"scale": math.nan}, ValueError, "scale must be finite"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
        (dict.fromkeys("qkv", randn(5, 2, 0)), ValueError, "head dimension must be at least 1"),
    ],
)
def test_rejects_bad_input(changes: dict, error: type[Exception], message: str):
    good = dict.fromkeys("qkv", randn(5, 2, 8)) | {"pack": Pack.from_lengths([3, 2])}
    attention(**good)
    for function in (attention, attention_with_lse):
        with pytest.raises(error, match=message):
            function(**(good | changes))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_opcheck(on_native: None):
    pack = Pack.from_lengths([3, 2])
    for inputs in (make_qkv(pack), leaves(*make_qkv(pack))):
        arguments = (*inputs, pack.offsets, [], 0.25, "native")
        torch.library.opcheck(torch.ops.dinov2_fast.attention.default, arguments)
    q, k, v = make_qkv(pack)
    arguments = (q, q, k, v, None, None, pack.offsets, [], 0.25, "native")
    torch.library.opcheck(torch.ops.dinov2_fast.attention_backward.default, arguments)


@pytest.mark.parametrize(
    ("cu_seqlens", "max_seqlen", "message"),
    [
        (torch.tensor([0, 3, 4], dtype=torch.int32), 3, "number of tokens 5, got 4"),
        (torch.tensor([0, 3, 5]), 3, r"torch\.int32"),
        (torch.tensor([0, 3, 5], dtype=torch.int32), 2, "at least 3"),
        (torch.tensor([0, 6, 5], dtype=torch.int32), 6, "non-decreasing"),
        (torch.tensor([0, 3, 5], dtype=torch.int32, device="meta"), 3, "must be on cpu"),
    ],
)
def test_varlen_rejects_bad_input(cu_seqlens: torch.Tensor, max_seqlen: int, message: str):
    x = randn(5, 2, 8)
    with pytest.raises(ValueError, match=message):
        attention_varlen(x, x, x, cu_seqlens, max_seqlen)


def test_weights_reject_bad_input():
    with pytest.raises(ValueError, match="attention_weights: k must have shape"):
        attention_weights(randn(5, 2, 8), randn(5, 2, 4), Pack.from_lengths([5]))
