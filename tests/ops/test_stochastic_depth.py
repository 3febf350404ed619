from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dinov2_fast import native
from dinov2_fast.errors import BackendUnavailable
from dinov2_fast.ops.stochastic_depth import (
    KeptRows,
    draw_kept_rows,
    gather_rows,
    gather_rows_reference,
    gather_scaled,
    keep_count,
    scatter_add_scaled,
    scatter_add_scaled_,
    scatter_add_scaled_reference,
)
from dinov2_fast.packing import Pack
from tests.inputs import COMPILERS, DTYPES, GROUPS, leaves, randn
from tests.tolerance import assert_within_error_budget

GROUP_LISTS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5)), max_size=4)

# opcheck itself looks at .grad of tensors that are not leaves.
OPCHECK_WARNING = "ignore:The .grad attribute of a Tensor that is not a leaf"


def draw(pack: Pack, drop_ratio: float = 0.4, seed: int = 0) -> KeptRows:
    kept = draw_kept_rows(pack, drop_ratio, torch.Generator().manual_seed(seed))
    assert kept is not None
    return kept


def make_inputs(groups: tuple, dtype: torch.dtype, device: str) -> tuple[list, KeptRows]:
    """x, residual and gamma of a branch that drops 40 % of the sequences, and its rows."""
    pack = Pack.from_groups(groups, device)
    kept = draw(pack)
    x = randn(pack.num_tokens, 24, dtype=dtype, device=device)
    residual = randn(kept.rows.shape[0], 24, dtype=dtype, device=device, seed=1)
    gamma = randn(24, dtype=dtype, device=device, seed=2)
    return [x, residual, gamma], kept


def test_reference_known_values():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    rows, row_scale = torch.tensor([2, 0]), torch.tensor([2.0, 0.5])
    assert torch.equal(gather_rows_reference(x, rows), torch.tensor([[5.0, 6.0], [1.0, 2.0]]))
    residual, gamma = torch.tensor([[1.0, 1.0], [4.0, 8.0]]), torch.tensor([10.0, 1.0])
    out = scatter_add_scaled_reference(x, residual, rows, row_scale, gamma)
    assert torch.equal(out, torch.tensor([[21.0, 6.0], [3.0, 4.0], [25.0, 8.0]]))
    out = scatter_add_scaled_reference(x, residual, rows, row_scale, None)
    assert torch.equal(out, torch.tensor([[3.0, 6.0], [3.0, 4.0], [7.0, 8.0]]))


@pytest.mark.parametrize(
    ("batch_size", "drop_ratio", "kept"),
    [
        (24, 0.4, 14),  # int(14.4): official DINOv2's figures, scale 24 / 14
        (24, 0.3, 16),  # int(16.799999999999997)
        (10, 0.9, 1),  # int(0.9999999999999998) is 0, and an empty branch is not allowed
        (10, 0.1, 9),
        (1, 0.99, 1),
        (5, 0.0, 5),
        (0, 0.4, 0),  # nothing to keep
    ],
)
def test_keep_count_known_values(batch_size: int, drop_ratio: float, kept: int):
    assert keep_count(batch_size, drop_ratio) == kept


def test_draw_known_values():
    kept = draw(Pack.from_groups([(24, 3), (1, 2)]), 0.4)
    assert kept.pack.groups == ((14, 3), (1, 2))
    assert kept.row_scale.tolist() == torch.tensor([24 / 14] * 42 + [1.0] * 2).tolist()
    assert kept.rows[-2:].tolist() == [72, 73]
    assert kept.rows.dtype == torch.int64
    assert kept.row_scale.dtype == torch.float32


@given(GROUP_LISTS, st.floats(0.01, 0.99), st.integers(0, 99))
@settings(deadline=None)
def test_draw_keeps_whole_sequences_of_each_group(
    groups: list[tuple[int, int]], drop_ratio: float, seed: int
):
    pack = Pack.from_groups(groups)
    kept = draw(pack, drop_ratio, seed)
    counts = [keep_count(count, drop_ratio) for count, _ in groups]
    assert kept.pack.groups == tuple((m, n) for m, (_, n) in zip(counts, groups, strict=True))
    assert kept.rows.shape == kept.row_scale.shape == (kept.pack.num_tokens,)
    # Every kept sequence of the small pack is one of the large one, in order, in its group.
    rows = kept.rows.tolist()
    starts = iter(kept.pack.offsets_host)
    first_row = 0
    for (count, length), kept_count in zip(groups, counts, strict=True):
        begins = []
        for _ in range(kept_count):
            begin = next(starts)
            sequence = rows[begin : begin + length]
            if length:
                assert sequence == list(range(sequence[0], sequence[0] + length))
                assert (sequence[0] - first_row) % length == 0
                assert first_row <= sequence[0] < first_row + count * length
                begins.append(sequence[0])
        assert begins == sorted(set(begins))
        first_row += count * length


def test_draw_is_a_function_of_the_generator_alone():
    pack = Pack.from_groups([(32, 2), (64, 1)])
    first = draw(pack, seed=5)
    torch.rand(7)  # the global generator must play no part
    assert torch.equal(first.rows, draw(pack, seed=5).rows)
    assert not torch.equal(first.rows, draw(pack, seed=6).rows)


def test_groups_draw_separately():
    kept = draw(Pack.from_groups([(64, 1), (64, 1)]))
    first, second = kept.rows[:38], kept.rows[38:]
    assert not torch.equal(first, second - 64)


def test_every_sequence_is_kept_equally_often():
    pack, generator = Pack.from_groups([(10, 1)]), torch.Generator().manual_seed(0)
    num_draws = 2000
    counts = torch.zeros(10)
    for _ in range(num_draws):
        kept = draw_kept_rows(pack, 0.4, generator)
        assert kept is not None
        counts[kept.rows] += 1
    # Binomial with p = 0.6: five standard deviations are 0.055.
    assert ((counts / num_draws - 0.6).abs() < 0.055).all()


def test_no_drop_draws_nothing():
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert draw_kept_rows(Pack.from_groups([(4, 2)]), 0.0, generator) is None
    assert torch.equal(generator.get_state(), before)


def test_the_expected_output_is_that_of_the_whole_branch():
    # Averaged over all 6 ways to keep 2 of 4 rows, the scaled sum equals the plain one.
    x, residual = randn(4, 3).double(), randn(4, 3, seed=1).double()
    row_scale = torch.full((2,), 4 / 2)
    total = torch.zeros_like(x)
    for rows in torch.combinations(torch.arange(4), 2):
        total += scatter_add_scaled(x, residual[rows], rows, row_scale, None)
    torch.testing.assert_close(total / 6, x + residual)


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_reference(groups: tuple, dtype: torch.dtype, backend: str, device: str):
    (x, residual, gamma), kept = make_inputs(groups, dtype, device)
    assert torch.equal(gather_rows(x, kept.rows, backend=backend), x[kept.rows])
    out = scatter_add_scaled(x, residual, kept.rows, kept.row_scale, gamma, backend=backend)
    low_precision = scatter_add_scaled_reference(x, residual, kept.rows, kept.row_scale, gamma)
    wide = x.double(), residual.double(), kept.rows, kept.row_scale, gamma.double()
    truth = scatter_add_scaled_reference(*wide)
    assert_within_error_budget(out, low_precision=low_precision, truth=truth, name="scatter_add")


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_match_reference(groups: tuple, dtype: torch.dtype, backend: str, device: str):
    originals, kept = make_inputs(groups, dtype, device)
    incoming = randn(*originals[0].shape, dtype=dtype, device=device, seed=3)

    def gradients(dtype: torch.dtype, gather, scatter, **options) -> list[torch.Tensor]:
        x, residual, gamma = leaves(*originals, dtype=dtype)
        branch = gather(x, kept.rows, **options) * residual
        out = scatter(x, branch, kept.rows, kept.row_scale, gamma, **options)
        return list(torch.autograd.grad(out, (x, residual, gamma), incoming.to(dtype)))

    references = gather_rows_reference, scatter_add_scaled_reference
    out = gradients(dtype, gather_rows, scatter_add_scaled, backend=backend)
    low_precision = gradients(dtype, *references)
    truth = gradients(torch.float64, *references)
    for name, *candidates in zip(
        ("x", "residual", "gamma"), out, low_precision, truth, strict=True
    ):
        assert_within_error_budget(
            candidates[0],
            low_precision=candidates[1],
            truth=candidates[2],
            name=f"stochastic_depth.d{name}",
        )


def test_gradcheck():
    originals, kept = make_inputs(((3, 2), (2, 1)), torch.float64, "cpu")
    inputs = leaves(*(tensor[..., :3] for tensor in originals))

    def branch(x, residual, gamma):
        update = gather_rows(x, kept.rows) * residual
        return scatter_add_scaled(x, update, kept.rows, kept.row_scale, gamma)

    torch.autograd.gradcheck(branch, inputs)


def test_the_stream_keeps_its_type_under_a_narrower_branch(backend: str, device: str):
    (x, residual, gamma), kept = make_inputs(((4, 3),), torch.float32, device)
    arguments = x, residual.bfloat16(), kept.rows, kept.row_scale, gamma
    out = scatter_add_scaled(*arguments, backend=backend)
    assert out.dtype == torch.float32
    truth = scatter_add_scaled_reference(
        x.double(), arguments[1].double(), kept.rows, kept.row_scale, gamma.double()
    )
    low_precision = scatter_add_scaled_reference(*arguments)
    assert_within_error_budget(out, low_precision=low_precision, truth=truth, name="mixed")


def test_rows_that_are_not_kept_stay_bit_equal_and_x_is_not_changed(backend: str, device: str):
    (x, residual, gamma), kept = make_inputs(((5, 7),), torch.float32, device)
    before = x.clone()
    residual[0] = torch.nan
    out = scatter_add_scaled(x, residual, kept.rows, kept.row_scale, gamma, backend=backend)
    dropped = torch.ones(35, dtype=torch.bool, device=device)
    dropped[kept.rows] = False
    assert torch.equal(out[dropped], x[dropped])
    assert torch.equal(x, before)
    assert out[~dropped].isnan().any(dim=1).sum() == 1


@pytest.mark.parametrize("compiler", COMPILERS)
def test_compiles_fullgraph(compiler: str, backend: str, device: str):
    originals, kept = make_inputs(((3, 2), (2, 1)), torch.float32, device)

    def branch(x, residual, gamma):
        update = gather_rows(x, kept.rows, backend=backend) * residual
        return scatter_add_scaled(x, update, kept.rows, kept.row_scale, gamma, backend=backend)

    inputs, eager_inputs = leaves(*originals), leaves(*originals)
    out = torch.compile(branch, fullgraph=True, dynamic=False, backend=compiler)(*inputs)
    expected = branch(*eager_inputs)
    out.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(out, expected)
    for compiled_leaf, eager_leaf in zip(inputs, eager_inputs, strict=True):
        torch.testing.assert_close(compiled_leaf.grad, eager_leaf.grad)


@pytest.mark.filterwarnings(OPCHECK_WARNING)
@pytest.mark.parametrize("with_gamma", [False, True])
def test_opcheck(with_gamma: bool, on_native: None):
    (x, residual, gamma), kept = make_inputs(((3, 2), (2, 1)), torch.float32, "cpu")
    ops, rest = torch.ops.dinov2_fast, (kept.rows, kept.row_scale)
    for inputs in ([x, residual, gamma], leaves(x, residual, gamma)):
        last = inputs[2] if with_gamma else None
        torch.library.opcheck(ops.scatter_add_scaled.default, (*inputs[:2], *rest, last, "native"))
        torch.library.opcheck(ops.gather_rows.default, (inputs[0], kept.rows, "native"))
    torch.library.opcheck(
        ops.scatter_add_scaled_backward.default,
        (x, residual, *rest, gamma if with_gamma else None, "native"),
    )


def test_automatic_choice_takes_the_reference_for_what_the_kernel_refuses(on_native: None):
    rows, ones = torch.tensor([2, 0]), torch.ones(2)
    for x in (randn(4, 16)[:, ::2], randn(4, 8, dtype=torch.float64), randn(4, 8).half()):
        residual = randn(2, 8, dtype=x.dtype)
        out = scatter_add_scaled(x, residual, rows, ones, None)
        assert torch.equal(out, scatter_add_scaled_reference(x, residual, rows, ones, None))
        for call in (
            lambda x=x, r=residual: scatter_add_scaled(x, r, rows, ones, None, backend="native"),
            lambda x=x: gather_rows(x, rows, backend="native"),
            lambda x=x: gather_scaled(x, rows, ones, backend="native"),
        ):
            with pytest.raises(BackendUnavailable, match="backend 'native' cannot compute"):
                call()
    overlapping = torch.zeros(8).expand(4, 8)
    with pytest.raises(BackendUnavailable, match="rows that do not overlap"):
        scatter_add_scaled_(overlapping, randn(2, 8), rows, ones, None, backend="native")


def test_the_extension_itself_refuses_bad_arguments(on_native: None):
    x, residual, ones = torch.full((4, 8), 7.0), torch.ones(2, 8), torch.ones(8)
    rows, far = torch.tensor([3, -1]), torch.tensor([2**63 - 1, -(2**63)])
    tensors = {"x": x, "residual": residual, "rows": rows, "row_scale": ones, "gamma": ones}
    good = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    good |= {"num_x_rows": 4, "num_rows": 2, "channels": 8, "x_row_stride": 8}
    good |= {"residual_row_stride": 8, "x_dtype": "float32", "residual_dtype": "float32"}
    good |= {"threads": 1, "level": "auto"}
    for change, message in [
        ({}, r"rows must be in \[0, 4\), got -1 to 3"),
        ({"rows": far.data_ptr()}, rf"rows must be in \[0, 4\), got {-(2**63)} to {2**63 - 1}"),
        ({"rows": 0, "num_rows": 5}, "num_rows must be at most 4, got 5"),
        ({"rows": 0, "num_rows": -1}, "num_rows must not be negative, got -1"),
        ({"rows": 0, "gamma": 0}, "gamma must not be a null pointer"),
        ({"rows": 0, "threads": 0}, "threads must be at least 1, got 0"),
        ({"rows": 0, "residual_dtype": "int8"}, "residual must be float32 or bfloat16, got int8"),
    ]:
        with pytest.raises(ValueError, match=f"stochastic_depth_forward_cpu: {message}"):
            native.module().stochastic_depth_forward_cpu(**(good | change))
    assert torch.equal(x, torch.full((4, 8), 7.0))


def test_an_explicit_backend_without_a_kernel_raises():
    with pytest.raises(BackendUnavailable, match="stochastic_depth has no triton kernel"):
        gather_rows(randn(2, 3), torch.tensor([0]), backend="triton")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": randn(5)}, ValueError, r"x must have shape \[T, C\]"),
        ({"x": torch.ones(5, 4, dtype=torch.int64)}, TypeError, "x must be of a floating"),
        ({"x": randn(5, 3)}, ValueError, r"residual must have shape \[2, 3\]"),
        ({"residual": randn(3, 4)}, ValueError, r"residual must have shape \[2, 4\]"),
        ({"residual": randn(2, 4, device="meta")}, ValueError, "residual must be on cpu"),
        ({"rows": torch.tensor([0, 1], dtype=torch.int32)}, TypeError, "rows must be an int64"),
        ({"rows": torch.tensor([0, 5])}, ValueError, r"rows must be in \[0, 5\)"),
        ({"row_scale": randn(3)}, ValueError, r"row_scale must have shape \[2\]"),
        ({"row_scale": randn(2, device="meta")}, ValueError, "row_scale must be on cpu"),
        ({"gamma": randn(3)}, ValueError, r"gamma must have shape \[4\]"),
        ({"gamma": randn(4, device="meta")}, ValueError, "gamma must be on cpu"),
        ({"backend": "eager"}, ValueError, "backend must be one of"),
    ],
)
def test_rejects_bad_input(changes: dict, error: type[Exception], message: str):
    good = {
        "x": randn(5, 4),
        "residual": randn(2, 4),
        "rows": torch.tensor([0, 3]),
        "row_scale": torch.ones(2),
        "gamma": randn(4),
    }
    scatter_add_scaled(**good)
    with pytest.raises(error, match=message):
        scatter_add_scaled(**(good | changes))


def test_gather_and_draw_reject_bad_input():
    pack = Pack.from_lengths([3])
    with pytest.raises(ValueError, match=r"gather_rows: x must have shape \[T, C\]"):
        gather_rows(randn(3), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"gather_rows: rows must be in \[0, 3\)"):
        gather_rows(randn(3, 2), torch.tensor([3]))
    with pytest.raises(ValueError, match=r"drop_ratio must be in \[0, 1\), got 1\.0"):
        draw_kept_rows(pack, 1.0, None)
    with pytest.raises(ValueError, match="drop_ratio must be in"):
        keep_count(4, -0.1)
    with pytest.raises(ValueError, match="batch_size must be at least 0"):
        keep_count(-1, 0.1)


@pytest.mark.gpu
def test_draw_rejects_a_generator_of_another_device():
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    with pytest.raises(ValueError, match="generator must be on the cpu"):
        draw_kept_rows(Pack.from_lengths([3]), 0.1, torch.Generator("cuda"))
