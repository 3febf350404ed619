from __future__ import annotations

import json
import math
import resource
import time

import pytest
import torch

from dinov2_fast.losses.targets import SoftTargets
from dinov2_fast.ops.sinkhorn import sinkhorn
from dinov2_fast.train.metrics import (
    Meter,
    memory_mib,
    read_metrics,
    target_statistics,
    to_floats,
    truncate_metrics,
)


def test_a_file_cut_at_any_byte_is_read_up_to_its_last_whole_line_and_can_be_resumed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = [{"step": step, "loss": step / 7} for step in range(1, 8)]
    content = "".join(json.dumps(record) + "\n" for record in records).encode()
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut])
        # A line counts once its closing brace is there, with or without its line feed.
        whole = sum(end - 1 <= cut for end in ends)
        assert read_metrics(path) == records[:whole]
        if cut % 7:  # every truncation is flushed to the disk, which takes its time
            continue
        truncate_metrics(path, 4)
        assert path.read_bytes() == content[: ends[min(whole, 4) - 1] if whole else 0]


def test_lines_after_the_checkpoint_go_and_the_rest_is_not_rewritten(tmp_path):
    path = tmp_path / "metrics.jsonl"
    truncate_metrics(path, 3)
    assert not path.exists()
    path.write_text('{"step": 1}\n{"step": 3}\n{"step": 4}\nnoise\n[1]\n{"loss": 2}\n')
    truncate_metrics(path, 3)
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'
    inode = path.stat().st_ino
    truncate_metrics(path, 3)
    assert path.stat().st_ino == inode


def targets_of(probabilities: torch.Tensor) -> SoftTargets:
    rows, prototypes = probabilities.shape
    return SoftTargets(probabilities.log(), torch.zeros(prototypes), torch.zeros(rows), 1.0)


def test_statistics_of_known_targets():
    uniform = targets_of(torch.full((4, 8), 1 / 8))
    one_prototype = targets_of(torch.eye(8)[[3, 3, 3]])
    each_its_own = targets_of(torch.eye(8))
    expected = [(uniform, math.log(8), 0.0), (one_prototype, 0.0, math.log(8))]
    for targets, entropy, divergence in [*expected, (each_its_own, 0.0, 0.0)]:
        statistics = target_statistics(targets)
        assert statistics["teacher_entropy"].item() == pytest.approx(entropy, abs=1e-6)
        assert statistics["target_mean_kl"].item() == pytest.approx(divergence, abs=1e-6)


def test_statistics_do_not_depend_on_how_many_rows_are_looked_at_together():
    logits = torch.randn(37, 16, generator=torch.Generator().manual_seed(0))
    targets = SoftTargets(logits, *sinkhorn(logits, temperature=0.5), temperature=0.5)
    whole = target_statistics(targets, rows_at_once=37)
    parts = target_statistics(targets, rows_at_once=5)
    for name, value in whole.items():
        assert parts[name].item() == pytest.approx(value.item(), rel=1e-5, abs=1e-6)


def test_statistics_of_no_rows_are_not_an_error():
    empty = SoftTargets(torch.zeros(0, 4), torch.zeros(4), torch.zeros(0), 1.0)
    assert target_statistics(empty)["teacher_entropy"].item() == 0


def test_numbers_that_are_not_finite_become_null_so_that_every_line_is_json():
    values = {"a": torch.tensor(1.5), "b": torch.tensor(math.nan), "c": torch.tensor(-math.inf)}
    assert to_floats(values) == {"a": 1.5, "b": None, "c": None}
    assert to_floats({}) == {}


def test_the_meter_counts_images_and_waiting_per_window_and_seconds_over_processes(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    meter = Meter(8, earlier_seconds=50.0)
    for _ in range(2):
        with meter.waiting():
            clock[0] += 1.0
        clock[0] += 3.0
        meter.step_done()
    assert meter.read() == {"images_per_second": 2.0, "data_wait_share": 0.25, "seconds": 58.0}
    clock[0] += 4.0
    meter.step_done()
    assert meter.read() == {"images_per_second": 2.0, "data_wait_share": 0.0, "seconds": 62.0}


def test_memory_of_this_process_is_plausible():
    # No growth is measured: a kernel that reclaims idle pages can take as much meanwhile.
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    assert 16 < memory_mib(torch.device("cpu")) <= peak_mib + 1
