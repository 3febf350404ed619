"""The CUDA kernels that work along prototypes, launched by their host code and executed as PTX.

Every claim is made of each op; `ops` has how an op's functions are called and what they return.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov2_fast.ops.cross_entropy import cross_entropy
from dinov2_fast.ops.cross_entropy_prototypes import _LOSSES_AND_GRADIENT
from dinov2_fast.ops.sinkhorn import row_logsumexp, sinkhorn
from tests.cuda import native_on_ptx
from tests.cuda.test_native_rows import equal, in_poison
from tests.inputs import randn
from tests.tolerance import assert_within_error_budget
from tools.kernel_report.cases import Place, as_it_is, exactly
from tools.simt import Fault

pytestmark = pytest.mark.skipif(bool(native_on_ptx.why_not()), reason=native_on_ptx.why_not())

Outputs = dict[str, Tensor]
Types = tuple[torch.dtype, torch.dtype]

# Types of the student's and of the teacher's scores; all others are tried when there is time.
TYPES = [
    (torch.float32, torch.float16),  # how a model trains
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
]
PROTOTYPES = (8192, 65536, 131072)  # of a small head and of the published ones
ROWS = 11  # a prime: the last CTA along rows has three of its four
EDGES = [
    (1, 1),  # nothing to hide behind
    (13, 61),  # primes: no vector width divides them
    (67, 264),  # three parts of a column; one vector past 32 lanes; 67 is a prime
    (2, 2056),  # one vector past the shortest part of a row
]


def run_sinkhorn(sizes: tuple[int, int], types: Types, place: Place, backend: str) -> Outputs:
    """One round, and one more sum of the rows; the scores are a teacher's."""
    logits = place(scores(*sizes, types[1], seed=1))
    log_u, log_v = sinkhorn(logits, temperature=0.05, num_iterations=1, backend=backend)
    terms = randn(sizes[1], seed=2).to(log_u.dtype)
    rows = row_logsumexp(logits, terms, temperature=0.05, backend=backend)
    return {"log_u": log_u, "log_v": log_v, "rows": rows}


def run_cross_entropy(sizes: tuple[int, int], types: Types, place: Place, backend: str) -> Outputs:
    """Losses and gradients of more student rows than teacher rows."""
    rows, prototypes = sizes
    teacher, vectors = teacher_of(sizes, types, place)
    student = place(scores(rows + 2, prototypes, types[0])).requires_grad_()
    loss = cross_entropy(
        student,
        teacher,
        *vectors,
        teacher_rows=torch.arange(rows + 2) * 5 % rows,
        student_temperature=0.1,
        teacher_temperature=0.05,
        backend=backend,
    )
    (gradient,) = torch.autograd.grad(loss, student, randn(rows + 2, seed=3).to(loss.dtype))
    return {"loss": loss.detach(), "gradient": gradient}


def run_in_place(sizes: tuple[int, int], types: Types, place: Place, backend: str) -> Outputs:
    """Losses, and gradients over the scores, of rows with two, one and no teachers."""
    rows, prototypes = sizes
    teacher, vectors = teacher_of(sizes, types, place)
    # The scores of a chunk are float32, whatever the type of what they are made of.
    student = place(scores(rows + 2, prototypes, types[0]).float())
    teacher_rows = torch.arange(2 * (rows + 2)).view(-1, 2) * 5 % (rows + 1) - 1
    weights = randn(rows + 2, seed=3).to(student.dtype)
    losses = _LOSSES_AND_GRADIENT[backend](
        student, teacher, *vectors, teacher_rows, weights, 0.1, 0.05
    )
    return {"losses": losses, "gradient": student}


OPS = {
    "sinkhorn": run_sinkhorn,
    "cross_entropy": run_cross_entropy,
    "in place": run_in_place,
}
# In place are the kernels of cross_entropy, which a quick test need not see twice.
QUICK = ["sinkhorn", "cross_entropy", pytest.param("in place", marks=pytest.mark.slow)]


def scores(rows: int, prototypes: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Scores whose exponents spread over about 16."""
    return randn(rows, prototypes, seed=seed, scale=0.2).to(dtype)


def teacher_of(
    sizes: tuple[int, int], types: Types, place: Place
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Scores of a teacher, and vectors that make each row's targets sum to about 1.

    The vectors have the same values whatever the types, or they would not be a truth's.
    """
    log_u = randn(sizes[1], seed=2, scale=0.1)
    log_v = -torch.logsumexp(scores(*sizes, torch.float32, seed=1) / 0.05 + log_u, dim=1)
    teacher = place(scores(*sizes, types[1], seed=1))
    wide = torch.promote_types(teacher.dtype, torch.float32)
    return teacher, (log_u.to(wide), log_v.to(wide))


def execute(
    op: str, sizes: tuple[int, int], types: Types, place: Place = as_it_is, **options: Any
) -> tuple[Outputs, list[Any]]:
    """What the CUDA kernels compute, and the results of their launches."""
    with native_on_ptx.native_on_ptx(**options) as results:
        return OPS[op](sizes, types, place, "native"), results


def assert_matches_reference(
    op: str, sizes: tuple[int, int], types: Types, out: Outputs, place: Place = as_it_is
) -> None:
    """Errors are within twice those of the reference, which computes in float32 too."""
    low = OPS[op](sizes, types, place, "reference")
    truth = OPS[op](sizes, types, lambda tensor: exactly(place(tensor)), "reference")
    for name, tensor in out.items():
        assert_within_error_budget(
            tensor, low_precision=low[name], truth=truth[name], name=f"{op}.{name}"
        )


@pytest.mark.parametrize(
    ("op", "prototypes", "arch"),
    [
        pytest.param(op, prototypes, arch, marks=[] if quick else [pytest.mark.slow])
        for op in OPS
        for prototypes in PROTOTYPES
        for arch in (80, 90)
        for quick in [prototypes == PROTOTYPES[0] and arch == 80 and op != "in place"]
    ],
)
def test_production_widths_match_the_reference(op: str, prototypes: int, arch: int):
    sizes = ROWS, prototypes
    out, results = execute(op, sizes, TYPES[0], arch=arch)
    assert results
    assert_matches_reference(op, sizes, TYPES[0], out)


@pytest.mark.parametrize(
    ("op", "sizes"),
    [
        ("sinkhorn", (33, 40)),  # two parts of a column
        ("sinkhorn", (2, 2056)),  # two parts of a row
        ("cross_entropy", (2, 2056)),
        ("sinkhorn", (33, 61)),  # a prime: element by element
        ("cross_entropy", (5, 61)),
        pytest.param("in place", (2, 2056), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_order_changes_no_bit(op: str, sizes: tuple[int, int]):
    out, _ = execute(op, sizes, TYPES[0])
    shuffled, _ = execute(op, sizes, TYPES[0], schedule=1)
    assert equal(out, shuffled)


@pytest.mark.parametrize(
    ("op", "sizes", "types"),
    [
        pytest.param(op, sizes, types, marks=[] if quick else [pytest.mark.slow])
        for op in OPS
        for index, sizes in enumerate(EDGES)
        for types in itertools.product((torch.float32, torch.float16, torch.bfloat16), repeat=2)
        for quick in [types == TYPES[0 if op == "in place" else index % 3]]
    ],
    ids=str,
)
def test_edges_of_aligned_and_unaligned_rows_match_the_reference(
    op: str, sizes: tuple[int, int], types: Types
):
    storages: list[tuple[Tensor, Tensor]] = []
    for offset in (0, 1):
        out, _ = execute(op, sizes, types, in_poison(storages, offset))
        assert_matches_reference(op, sizes, types, out)
    for storage, view in storages:
        view.detach().fill_(float("nan"))
        assert storage.isnan().all()  # what lies between the rows was left alone


def test_a_thread_that_adds_several_parts_of_a_column_matches_the_reference():
    sizes = 289, 3  # ten parts, the last of one row, which eight rows of threads add
    out, _ = execute("sinkhorn", sizes, TYPES[0])
    assert_matches_reference("sinkhorn", sizes, TYPES[0], out)


@pytest.mark.parametrize("op", ["cross_entropy", pytest.param("sinkhorn", marks=pytest.mark.slow)])
def test_a_row_of_more_parts_than_a_warp_has_lanes_matches_the_reference(op: str):
    def largest_last(tensor: Tensor) -> Tensor:
        """The student's scores: from the others to the last is further than exp reaches."""
        tensor = tensor.clone()
        if tensor.dtype == torch.float32:
            tensor[:, -1] += 20
        return tensor

    sizes = 1, 33 * 2048 + 4  # parts of 2048 columns, which one warp puts together
    out, _ = execute(op, sizes, TYPES[0], largest_last)
    assert_matches_reference(op, sizes, TYPES[0], out, largest_last)


@pytest.mark.parametrize("op", OPS)
def test_no_rows_match_the_reference(op: str):
    with native_on_ptx.native_on_ptx() as results:
        if op == "sinkhorn":
            out = sinkhorn(torch.empty(0, 64), temperature=0.1, num_iterations=1, backend="native")
            assert torch.equal(out[0], torch.zeros(64))
            assert len(results) == 1  # of columns, which count as 1 each
            return
        student = torch.empty(0, 64)
        rows = torch.empty(0, 2, dtype=torch.int64)
        vectors = torch.zeros(64), torch.zeros(3)
        arguments = (student, torch.zeros(3, 64), *vectors, rows, torch.empty(0), 0.1, 0.1)
        assert _LOSSES_AND_GRADIENT["native"](*arguments).shape == (0,)
        assert not results


def test_nan_in_a_score_reaches_its_column_and_its_row_alone():
    logits, log_u = randn(ROWS, 300), randn(300, seed=1)

    def run() -> list[Tensor]:
        with native_on_ptx.native_on_ptx():
            columns, every_row = sinkhorn(
                logits, temperature=0.1, num_iterations=1, backend="native"
            )
            rows = row_logsumexp(logits, log_u, temperature=0.1, backend="native")
        return [columns, rows, every_row]

    clean = run()
    logits[5, 7] = float("nan")
    columns, rows, every_row = run()
    for dirty, expected, index in ((columns, clean[0], 7), (rows, clean[1], 5)):
        others = torch.arange(len(dirty)) != index
        assert dirty[index].isnan()
        assert torch.equal(dirty[others], expected[others])
    assert every_row.isnan().all()  # the column's term is in the sum of every row


@pytest.mark.parametrize("op", ["cross_entropy", "in place"])
@pytest.mark.parametrize("whose", ["teacher", "student"])
def test_nan_in_a_row_reaches_the_rows_that_read_it_alone(op: str, whose: str):
    sizes, turn = (11, 2100), {"teacher": 0, "student": 1}[whose]
    placed: list[Tensor] = []

    def poison(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        if len(placed) == turn:
            tensor[3, 5] = float("nan")
        placed.append(tensor)
        return tensor

    clean, _ = execute(op, sizes, TYPES[0])
    dirty, _ = execute(op, sizes, TYPES[0], poison)
    per_row = torch.arange(13) * 5 % 11 if op == "cross_entropy" else None
    if per_row is None:
        per_row = torch.arange(26).view(-1, 2) * 5 % 12 - 1
    reads = torch.arange(13) == 3 if whose == "student" else (per_row.view(13, -1) == 3).any(1)
    for name, tensor in dirty.items():
        bad = tensor.view(13, -1).isnan().any(1)
        assert torch.equal(bad, reads), name
        assert torch.equal(tensor[~bad], clean[name][~bad])


@pytest.mark.parametrize("infinite_loss", [False, True])
def test_scores_of_minus_infinity_have_no_weight(infinite_loss: bool):
    # The inverses fit in 24 bits: what is left of them is 0, and infinity times 0 would be NaN.
    options = {"student_temperature": 0.1, "teacher_temperature": 0.04}
    student, teacher = randn(3, 300, scale=0.2), randn(3, 300, seed=1, scale=0.2)
    teacher[:, 200] = -torch.inf
    if infinite_loss:
        student -= 20  # from 0 to the first finite score is further than exp reaches
        student[:, :140] = -torch.inf  # a warp sees nothing else
    log_v = -torch.logsumexp(teacher / 0.04, dim=1)

    def run(dtype: torch.dtype, backend: str) -> list[Tensor]:
        inputs = [student.to(dtype).requires_grad_(), teacher.to(dtype)]
        inputs += [torch.zeros(300, dtype=dtype), log_v.to(dtype)]
        with native_on_ptx.native_on_ptx():
            loss = cross_entropy(*inputs, teacher_rows=torch.arange(3), **options, backend=backend)
            return [loss.detach(), *torch.autograd.grad(loss.sum(), inputs[0])]

    out, low = run(torch.float32, "native"), run(torch.float32, "reference")
    truth = run(torch.float64, "reference")
    assert truth[0].isposinf().all() == infinite_loss
    for name, *values in zip(("loss", "gradient"), out, low, truth, strict=True):
        assert_within_error_budget(
            values[0], low_precision=values[1], truth=values[2], name=f"cross_entropy.{name}"
        )


def test_large_teacher_scores_lose_no_digits():
    # 1/0.06 has digits past 24 bits; without them the exponents here would be off by 6e-4.
    teacher = randn(3, 64, seed=1, scale=0.01) + 1024
    log_v = torch.full((3,), -1024 / 0.06)
    with native_on_ptx.native_on_ptx():
        loss = cross_entropy(
            torch.zeros(3, 64),
            teacher,
            torch.zeros(64),
            log_v,
            teacher_rows=torch.arange(3),
            student_temperature=0.1,
            teacher_temperature=0.06,
            backend="native",
        )
    targets = (teacher.double() / 0.06 + log_v.double().unsqueeze(1)).exp()
    truth = targets.sum(dim=1) * math.log(64)
    # Off by no more than rounding the truth is: the reference would be off by much more.
    assert_within_error_budget(
        loss, low_precision=truth.float(), truth=truth, name="cross_entropy.loss"
    )


def test_sums_over_scores_far_below_zero_and_of_minus_infinity_match_the_reference():
    logits = randn(67, 300, scale=0.2) - 500
    logits[:, 200] = -torch.inf
    logits[:40, :140] = -torch.inf  # warps, and parts of columns, see nothing else

    def run(logits: Tensor, backend: str) -> list[Tensor]:
        with native_on_ptx.native_on_ptx():
            vectors = sinkhorn(logits, temperature=0.1, num_iterations=1, backend=backend)
            terms = torch.zeros(300, dtype=vectors[0].dtype)
            return [*vectors, row_logsumexp(logits, terms, temperature=0.1, backend=backend)]

    runs = run(logits, "native"), run(logits, "reference"), run(logits.double(), "reference")
    for name, out, low, truth in zip(("log_u", "log_v", "rows"), *runs, strict=True):
        assert_within_error_budget(
            out, low_precision=low, truth=truth, name=f"sinkhorn.{name} of tiny scores"
        )


@pytest.mark.parametrize("op", QUICK)
def test_warps_move_whole_sectors_of_each_matrix_once(op: str):
    rows, prototypes = 36, 4096
    if op == "sinkhorn":
        teacher, log_u = rows * prototypes * 2, prototypes * 4
        # Two parts of the columns; rows twice, which share the terms of columns by four.
        sums = prototypes * 4
        row_pass = [(teacher, 8), (log_u * rows // 4, 16)], []
        loads = [[(teacher, 16)], [(4 * sums, 4)], *row_pass, *row_pass]
        stores = [[(4 * sums, 4)], [(2 * sums, 4)], [], [], [], []]
    else:
        chosen = torch.arange(2 * (rows + 2)) * 5 % (rows + 1) - 1
        num_teachers = rows + 2 if op == "cross_entropy" else int((chosen >= 0).sum())
        student = (rows + 2) * prototypes * 4
        once = [(student, 16), (student, 16), (num_teachers * prototypes * 2, 8)]
        loads, stores = [once, [], once], [[], [], [(student, 16)]]
    _, results = execute(op, (rows, prototypes), TYPES[0], profile=True)
    for result, *moved in zip(results, loads, stores, strict=True):
        for kind, matrices in zip(("load", "store"), moved, strict=True):
            sectors = sum(num_bytes for num_bytes, _ in matrices) // 32
            requests = sum(num_bytes // (32 * per_lane) for num_bytes, per_lane in matrices)
            # Whatever else is moved is one number for a warp, or a few in a row.
            others = result.counters[f"global requests, {kind}"] - requests
            assert 0 <= result.counters[f"global sectors, {kind}"] - sectors <= others
            passes = result.counters.get(f"shared passes, {kind}", 0)
            assert passes == result.counters.get(f"shared passes, {kind}, ideal", 0)


@pytest.mark.parametrize("op", QUICK)
def test_every_deleted_barrier_is_reported(op: str):
    sizes = (33, 300)  # several warps a row; columns in two parts
    _, results = execute(op, sizes, TYPES[0])
    deletions = list(native_on_ptx.deletions(results))
    assert deletions
    for edit in deletions:
        with pytest.raises(Fault):
            execute(op, sizes, TYPES[0], edit=edit)
