"""`python -m tools.accelerate_report`: counts are those of real blocks; what follows of them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from dinov2_fast import accelerate
from dinov2_fast.bench.saved import saved_bytes
from dinov2_fast.nn import residual_branch
from tests.drop_in.their_models import THIRD_PARTY, own_memory_at_any_size
from tests.inputs import randn
from tools.accelerate_report import __main__ as command
from tools.accelerate_report import counting, timing
from tools.kernel_report import flash_attention
from tools.kernel_report.pipes import bound
from tools.simt.report import A100, H100

pytestmark = [pytest.mark.parity, *THIRD_PARTY]

# Two heads of 64. Real blocks: 5 images, of which 3 stay, of a 98 px crop's length. Counted ones:
# the batch of the report, beside which passes over weights are little; it costs as much as one.
SMALL = command.Model("small", 128, 2, 2)
IMAGES, TOKENS = 5, 50
BATCH, KEPT = 64, 38


@pytest.fixture(params=command.LIBRARIES)
def library(request: pytest.FixtureRequest) -> str:
    """Every library whose blocks are modelled."""
    pytest.importorskip(request.param, reason=f"{request.param} is not installed")
    return request.param


def counts(library: str, drop_ratio: float, images: int = BATCH, tokens: int = timing.TOKENS):
    """A block of the library before and after."""
    make, _ = command.LIBRARIES[library]
    with counting.without_memory():
        before = counting.count_original(make(SMALL, drop_ratio), images, tokens)
        after = counting.count_accelerated(make(SMALL, drop_ratio), images, tokens)
    return before, after


def attended(sequences: int) -> list[tuple[str, tuple[int, ...]]]:
    """Calls of attention in a step of `SMALL`."""
    return [(each, (sequences, 2, timing.TOKENS, 64)) for each in ("forward", "backward")]


@pytest.mark.parametrize("drop_ratio", [0.0, 0.4])
def test_kept_bytes_are_those_of_a_real_block(library, drop_ratio, on_native, monkeypatch):
    own_memory_at_any_size(monkeypatch)
    # As on a GPU, which the counts are for.
    monkeypatch.setattr(residual_branch, "backward_reads_lse", lambda *args, **options: True)
    make, _ = command.LIBRARIES[library]
    found = []

    for fast in (False, True):
        block = make(SMALL, drop_ratio)
        if fast:
            accelerate(block)
        x = randn(IMAGES, TOKENS, SMALL.width).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            found.append(saved_bytes(block, lambda block=block, x=x: block(x)))

    counted = counts(library, drop_ratio, IMAGES, TOKENS)
    assert [each.kept_bytes for each in counted] == found


def test_without_drop_path_only_bytes_differ(library):
    before, after = counts(library, 0.0)

    flops = [sum(flops for flops, _ in each.products) for each in (before, after)]
    assert flops[0] == flops[1] == 3 * 2 * 12 * SMALL.width**2 * BATCH * timing.TOKENS
    assert before.attention == after.attention == attended(BATCH)
    assert after.moved_bytes < before.moved_bytes
    # A row keeps norms, queries, keys, values, mixed values and the hidden layer in bfloat16, two
    # deviations and a sum for each head; separate layers of q, k, v are kept side by side.
    row = 2 * (2 + 3 + 1 + 4) * SMALL.width + 4 * (2 + SMALL.heads)
    copies = {"timm": 0, "transformers": 4 * 3 * SMALL.width * (SMALL.width + 1)}[library]
    assert after.kept_bytes == BATCH * timing.TOKENS * row + copies


def test_dropped_samples_are_not_computed(library):
    whole, (before, after) = counts(library, 0.0), counts(library, 0.4)

    assert before.products == whole[0].products
    assert before.moved_bytes > whole[0].moved_bytes  # drop path itself
    flops = [sum(flops for flops, _ in each.products) for each in (after, whole[1])]
    assert BATCH * flops[0] == KEPT * flops[1]
    assert after.attention == attended(KEPT)
    assert 0.59 < after.kept_bytes / whole[1].kept_bytes < 0.61  # 38 of 64, and weights


def test_bytes_of_one_operation_are_those_of_its_tensors():
    counted = counting.Counted()
    with counting.without_memory(), counting._Operations(counted):
        x, gamma = torch.empty(3, 8, dtype=torch.bfloat16), torch.empty(8)
        _ = x * gamma  # read 2 and write 4 bytes each, and gamma
        assert counted.moved_bytes == 24 * (2 + 4) + 32
        x.t().view(8, 3)
        assert counted.moved_bytes == 24 * (2 + 4) + 32
        torch.empty(3, 8).copy_(x)  # overwritten unread
        assert counted.moved_bytes == 2 * 24 * (2 + 4) + 32
        torch.stack([x, x])
        assert counted.moved_bytes == 2 * 24 * (2 + 4) + 32 + 24 * (2 + 2 + 4)
        gamma.expand(3, 8).clone()  # read once
        assert counted.moved_bytes == 2 * 24 * (2 + 4) + 32 + 24 * (2 + 2 + 4) + 32 + 24 * 4
        _ = x @ torch.empty(8, 5, dtype=torch.bfloat16)
    assert counted.products == [(2 * 3 * 8 * 5, 2 * (3 * 8 + 8 * 5 + 3 * 5))]


def test_bytes_of_our_kernels_are_what_they_read_and_write():
    # 3 of 6 rows of 8 channels: a stream in float32, 96 bytes of it, branches in bfloat16, 48.
    counted = counting.Counted()
    kernels, moved = counting._StandIns(counted), []
    with counting.without_memory():
        stream, weight, rows = torch.empty(6, 8), torch.empty(8), torch.empty(3, dtype=torch.int64)
        branch, of_rows = torch.empty(3, 8, dtype=torch.bfloat16), torch.empty(3)
        norm = (weight, weight)
        for run in (
            lambda: kernels.layer_norm_forward(
                stream, *norm, eps=1e-6, rows=rows, out_dtype=torch.bfloat16
            ),
            lambda: kernels.layer_norm_backward_(
                stream, branch, branch, of_rows, *norm, rows=rows, normalised=branch
            ),
            lambda: kernels.scatter_add_scaled_(stream, branch, rows, of_rows, weight),
            lambda: kernels.gather_scaled(stream, rows, of_rows, out_dtype=torch.bfloat16),
            lambda: kernels.gelu(branch),
            lambda: kernels.gelu_backward_(branch, branch),
            lambda: kernels.swiglu(branch),
        ):
            before = counted.moved_bytes
            run()
            moved.append(counted.moved_bytes - before)

    index, scale, vector = 24, 12, 32
    assert moved == [
        96 + 48 + index + scale + 2 * vector,
        2 * 96 + 2 * 48 + index + scale + 4 * vector,
        2 * 96 + 48 + index + scale + vector,
        96 + 48 + index + scale + vector,
        2 * 48,
        4 * 48 + vector,
        48 + 24,
    ]


def test_seconds_of_known_work():
    shape = (2, 3, timing.TOKENS, 64)
    counted = counting.Counted([(10**12, 1), (1, 10**9)], 10**9, [("forward", shape)])
    cycles = {(timing.OUR_ATTENTION, "forward"): 1000.0}

    parts = timing.seconds(counted, A100, cycles, timing.OUR_ATTENTION)

    tensor = 2048 * 108 * 1.41e9  # 312 TFLOP/s
    of_bytes = 1e9 / (2039e9 * timing.HBM_SHARE)
    assert parts["the rest"] == pytest.approx(of_bytes)
    assert parts["products"] == pytest.approx(1e12 / (tensor * timing.PRODUCT_SHARE) + of_bytes)
    expected = 6 * 1000 / (108 * 1.41e9) / timing.ATTENTION_SHARE
    assert parts["attention"] == pytest.approx(expected)


def test_more_drop_path_is_less_time_and_memory(library, monkeypatch):
    monkeypatch.setattr(command, "DROP_RATIOS", (0.0, 0.3, 0.5))

    rows = command.made([library], [SMALL], BATCH)

    for gpu in ("A100", "H100"):
        same = [row for row in rows if row["gpu"] == gpu]
        after = [sum(row["modelled_ms_after"].values()) for row in same]
        before = [sum(row["modelled_ms_before"].values()) for row in same]
        assert after == sorted(after, reverse=True)
        assert after[2] < 0.9 * after[0]
        assert before == sorted(before)
        kept = [row["mib_kept_after"] for row in same]
        assert kept == sorted(kept, reverse=True)
        assert kept[0] < 0.6 * same[0]["mib_kept_before"]
        ratios = [b / a for b, a in zip(before, after, strict=True)]
        assert [row["ratio"] for row in same] == pytest.approx(ratios)


def test_timms_ratio_grows_and_that_of_transformers_does_not():
    assert command.growing(0.4, 3) == [0.0, 0.2, 0.4]
    assert command.constant(0.4, 3) == [0.4] * 3


def test_the_command_prints_a_row_for_each_gpu(monkeypatch, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("timm", reason="timm is not installed")
    monkeypatch.setattr(command, "MODELS", (SMALL,))

    assert command.main(["--library", "timm", "--images", "4", "--json"]) == 0
    rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    monkeypatch.setattr(command, "made", lambda *_: rows)
    assert command.main([]) == 0
    printed = capsys.readouterr().out

    assert printed.startswith("Modelled lower bounds, not measured")
    assert "a training step of 4 images of 224 px" in printed
    assert [(row["gpu"], row["drop_path"]) for row in rows] == [
        *(("A100", 0.0), ("H100", 0.0), ("A100", 0.4), ("H100", 0.4))
    ]
    for row in rows:
        cells = f"| timm | small | {row['drop_path']} | {row['gpu']} |"
        (line,) = (line for line in printed.splitlines() if line.startswith(cells))
        assert f"{row['ratio']:.2f}" in line


def test_cycles_of_attention_are_those_of_the_page():
    page = command.KERNELS.read_text(encoding="utf-8")

    cycles = timing.attention_cycles(page, A100)

    theirs = {
        direction: bound(flash_attention.COUNTED["FlashAttention-2", direction, "257"], A100)[0]
        for direction in ("forward", "backward")
    }
    for direction, expected in theirs.items():
        assert cycles["FlashAttention-2", direction] == round(expected)
        assert 0 < cycles["ours", direction] < expected
    with pytest.raises(ValueError, match="a row of H100, forward, 257 tokens"):
        timing.attention_cycles(page.replace("| H100 |", "| H200 |"), H100)
