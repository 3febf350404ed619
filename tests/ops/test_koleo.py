"""KoLeo: nearest neighbours, ties, duplicates, gradients through both rows of a pair."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from dinov2_fast import environment
from dinov2_fast.errors import BackendUnavailable
from dinov2_fast.ops.koleo import koleo, koleo_reference
from tests.inputs import COMPILERS, DTYPES, leaves, randn
from tests.tolerance import assert_within_error_budget

OPCHECK_WARNING = "ignore:The .grad attribute of a Tensor that is not a leaf"

# (images, channels)
SHAPES = [
    (64, 384),  # a batch per GPU of ViT-S/14
    (2, 1),  # the fewest images, one channel
    (13, 61),  # primes
    (65, 33),  # one past a tile edge in both
]


def pairwise_loop(x: torch.Tensor, eps: float = 1e-8) -> torch.Tensor:
    """KoLeo pair by pair, for every row on its own."""
    rows = [F.normalize(row, dim=0, eps=eps) for row in x]
    losses = []
    for i, row in enumerate(rows):
        dots = [-math.inf if i == j else (row @ other).item() for j, other in enumerate(rows)]
        nearest = rows[dots.index(max(dots))]
        losses.append(-((row - nearest + eps).square().sum().sqrt() + eps).log())
    return torch.stack(losses).mean()


def test_reference_known_values():
    # Directions 0, 90 and 180 degrees: every nearest neighbour is sqrt(2) away.
    x = torch.tensor([[2.0, 0.0], [0.0, 5.0], [-1.0, 0.0]])
    torch.testing.assert_close(koleo_reference(x, eps=1e-8), torch.tensor(-0.5 * math.log(2)))
    # Opposite directions: distance 2.
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    torch.testing.assert_close(koleo_reference(x, eps=1e-8), torch.tensor(-math.log(2)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_reference(shape: tuple[int, int], dtype: torch.dtype, backend: str, device: str):
    x = randn(*shape, dtype=dtype, device=device)
    out = koleo(x, backend=backend)
    assert out.dtype == torch.float32
    assert_within_error_budget(
        out,
        low_precision=koleo_reference(x.float(), eps=1e-8),
        truth=koleo_reference(x.double(), eps=1e-8),
        name="koleo.loss",
    )


# One channel leaves only the directions 1 and -1, where the gradient is zero but for rounding.
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[1] > 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_match_reference(
    shape: tuple[int, int], dtype: torch.dtype, backend: str, device: str
):
    x = randn(*shape, dtype=dtype, device=device)

    def gradient(dtype: torch.dtype, function, **options) -> torch.Tensor:
        (leaf,) = leaves(x, dtype=dtype)
        return torch.autograd.grad(function(leaf, **options), leaf)[0]

    low_precision = gradient(torch.float32, koleo_reference, eps=1e-8).to(dtype)
    assert_within_error_budget(
        gradient(dtype, koleo, backend=backend),
        low_precision=low_precision,
        truth=gradient(torch.float64, koleo_reference, eps=1e-8),
        name="koleo.gradient",
    )


def test_gradcheck():
    x = randn(6, 4, dtype=torch.float64).requires_grad_()
    torch.autograd.gradcheck(koleo, x)


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_loop_over_pairs(shape: tuple[int, int]):
    looped, batched = leaves(*(randn(*shape, dtype=torch.float64),) * 2)
    expected, out = pairwise_loop(looped), koleo(batched)
    torch.testing.assert_close(out, expected)
    if shape[1] > 1:
        expected.backward()
        out.backward()
        torch.testing.assert_close(batched.grad, looped.grad)


def test_the_lowest_index_wins_a_tie(backend: str, device: str):
    # Row 0 is as near to row 1 as to row 2, so its pull must not reach row 2: without row 2's own
    # term (its nearest is row 3, a duplicate without gradient) row 2 receives nothing.
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0], [0.0, -1.0]], device=device)
    x = x.requires_grad_()
    koleo(x, backend=backend).backward()
    assert x.grad[1, 0] != 0
    assert torch.equal(x.grad[2:], torch.zeros(2, 2, device=device))


def test_opposite_rows_are_nearest_to_each_other(backend: str, device: str):
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], device=device)
    torch.testing.assert_close(koleo(x, backend=backend).item(), -math.log(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equal_rows_give_a_finite_loss_and_no_gradient(
    dtype: torch.dtype, backend: str, device: str
):
    x = randn(1, 384, dtype=dtype, device=device).repeat(8, 1).requires_grad_()
    loss = koleo(x, backend=backend)
    loss.backward()
    expected = -math.log(math.sqrt(384) * 1e-8 + 1e-8)
    torch.testing.assert_close(loss.item(), expected, rtol=1e-5, atol=0.0)
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_equal_rows_leave_the_gradient_of_other_pairs(backend: str, device: str):
    x = randn(6, 16, device=device)
    x[1] = x[0]
    leaf, others = leaves(x, x[2:])
    koleo(leaf, backend=backend).backward()
    assert leaf.grad.isfinite().all()
    # Rows 2 to 5 are nearest to each other or to rows 0 and 1; those two have no pull of their own.
    unit = F.normalize(others, dim=1)
    everyone = torch.cat([F.normalize(x[:2], dim=1), unit])
    similarity = (unit @ everyone.T).detach()
    similarity[:, 2:].fill_diagonal_(-1)
    distance = (unit - everyone[similarity.argmax(dim=1)] + 1e-8).norm(dim=1)
    (-(distance + 1e-8).log().sum() / 6).backward()
    torch.testing.assert_close(leaf.grad[2:], others.grad)


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30])
def test_gradients_of_zero_tiny_and_huge_rows_are_finite(value: float, backend: str, device: str):
    x = randn(4, 8, device=device)
    x[2] = value
    x = x.requires_grad_()
    loss = koleo(x, backend=backend)
    loss.backward()
    assert loss.isfinite()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("batch_size", [0, 1])
def test_fewer_than_two_images_give_zero_with_a_graph(batch_size: int, backend: str, device: str):
    x = torch.full((batch_size, 8), torch.nan, device=device, requires_grad=True)
    loss = koleo(x, backend=backend)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_autocast_changes_nothing(backend: str, device: str):
    x = randn(64, 384, device=device)
    expected = koleo(x, backend=backend)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(koleo(x, backend=backend), expected)


def test_spreading_the_images_lowers_the_loss(backend: str, device: str):
    # A gradient step away from a crowd must help: the sign of the loss is right.
    x = (1 + randn(16, 8, device=device, scale=0.1)).requires_grad_()
    loss = koleo(x, backend=backend)
    (gradient,) = torch.autograd.grad(loss, x)
    assert koleo((x - 0.1 * gradient).detach(), backend=backend) < loss


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_row_shows_in_the_loss(value: float, backend: str, device: str):
    x = randn(5, 8, device=device)
    x[3, 2] = value
    assert not koleo(x, backend=backend).isfinite()


def test_rows_may_be_strided(backend: str, device: str):
    wide = randn(13, 61, device=device)
    expected = koleo(wide[:, 5:40].contiguous(), backend=backend)
    assert torch.equal(koleo(wide[:, 5:40], backend=backend), expected)


def loss_and_gradient(x: torch.Tensor, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = x.clone().requires_grad_()
    loss = koleo(leaf, backend=backend)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("shape", [(64, 384), (13, 61)])
def test_every_instruction_set_is_as_good(shape: tuple[int, int], level: str):
    x = randn(*shape)
    found = loss_and_gradient(x, "native")
    low = loss_and_gradient(x, "reference")
    truth = loss_and_gradient(x.double(), "reference")
    for name, out, low_precision, exact in zip("lg", found, low, truth, strict=True):
        assert_within_error_budget(
            out, low_precision=low_precision, truth=exact, name=f"{level} {name}"
        )


def test_threads_change_no_bit(on_native: None):
    x = randn(259, 384)  # several threads' worth, a prime of rows
    torch.set_num_threads(1)
    expected = loss_and_gradient(x, "native")
    torch.set_num_threads(3)
    try:
        assert all(map(torch.equal, loss_and_gradient(x, "native"), expected))
    finally:
        torch.set_num_threads(1)


@pytest.mark.filterwarnings(OPCHECK_WARNING)
def test_opcheck(on_native: None):
    x = randn(5, 8)
    for leaf in (x, x.clone().requires_grad_()):
        torch.library.opcheck(torch.ops.dinov2_fast.koleo.default, (leaf, 1e-8, "native"))
    kept = torch.ops.dinov2_fast.koleo.default(x, 1e-8, "native")[1:]
    arguments = (torch.tensor(0.5), *kept, 1e-8, "native")
    torch.library.opcheck(torch.ops.dinov2_fast.koleo_backward.default, arguments)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_compiles_fullgraph(compiler: str, backend: str, device: str):
    leaf, eager_leaf = leaves(*(randn(5, 8, device=device),) * 2)
    compiled = torch.compile(koleo, fullgraph=True, dynamic=False, backend=compiler)
    out, expected = compiled(leaf, backend=backend), koleo(eager_leaf, backend=backend)
    out.backward()
    expected.backward()
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(leaf.grad, eager_leaf.grad)


def test_an_explicit_backend_without_a_kernel_raises():
    if environment.triton_interpreted():
        pytest.skip("Triton's interpreter runs the kernels on the CPU")
    with pytest.raises(BackendUnavailable, match="koleo has no triton kernel for cpu"):
        koleo(randn(2, 3), backend="triton")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a tensor"),
        ({"x": randn(4)}, ValueError, r"x must have shape \[B, C\]"),
        ({"x": torch.ones(4, 3, dtype=torch.int64)}, TypeError, "x must be of a floating"),
        ({"eps": 0.0}, ValueError, "eps must be finite and greater than 0"),
        ({"backend": "eager"}, ValueError, "backend must be one of"),
    ],
)
def test_rejects_bad_input(changes: dict, error: type[Exception], message: str):
    good = {"x": randn(4, 3)}
    koleo(**good)
    with pytest.raises(error, match=message):
        koleo(**(good | changes))
