from __future__ import annotations

import json

import pytest

from dinov2_fast.data.collate import Unreadable
from dinov2_fast.data.quarantine import Quarantine, allowed_bad_images
from dinov2_fast.errors import DataError, OutputError


def bad(index: int, name: str | None = None) -> Unreadable:
    return Unreadable(index, name or f"/data/{index}.png", None, "image file is truncated")


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]


@pytest.mark.parametrize(
    ("drawn", "num_images", "allowed"),
    [
        (10, 500, 1),  # 1 of 500 is above 0.1 %, yet a single file never ends a run
        (10**6, 500, 1),  # nor does it in later passes
        (10, 2000, 2),  # 0.1 % of the data, even at the start
        (100, 10**6, 11),  # early on: 0.1 + 5 sqrt(0.1) + 10
        (125_000, 10**6, 190),  # one of 8 ranks after one pass: 125 + 5 sqrt(125) + 10
        (10**6, 10**6, 1000),
        (10**7, 10**6, 1000),  # further passes meet no new files
    ],
)
def test_the_budget_is_that_of_the_data_and_stricter_only_for_floods(drawn, num_images, allowed):
    assert allowed == allowed_bad_images(drawn=drawn, num_images=num_images, max_bad_ratio=0.001)


def test_a_ratio_of_zero_allows_nothing_and_one_allows_everything():
    assert allowed_bad_images(drawn=10, num_images=100, max_bad_ratio=0.0) == 0
    assert allowed_bad_images(drawn=100, num_images=100, max_bad_ratio=1.0) == 100


def test_a_run_within_the_budget_is_not_stopped_by_chance():
    # 0.05 % of a million images are bad, half of the budget; 60 standard runs of a whole pass.
    import numpy as np

    for seed in range(60):
        draws = np.sort(np.random.default_rng(seed).choice(10**6, 500, replace=False))
        for met, drawn in enumerate(draws.tolist(), 1):
            assert met <= allowed_bad_images(drawn=drawn + 1, num_images=10**6, max_bad_ratio=0.001)


def test_one_bad_image_among_the_first_ten_draws_goes_on_and_is_written_down(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    quarantine = Quarantine(path, num_images=200, max_bad_ratio=0.001)
    item = Unreadable(3, "/data/a.tar::b.png", 512, "empty file")
    quarantine.add((item,), step=4, drawn=10)
    quarantine.add((item,), step=9, drawn=20)
    assert lines(path) == [
        {
            "path": "/data/a.tar::b.png",
            "offset": 512,
            "reason": "empty file",
            "step": 4,
            "index": 3,
            "rank": 0,
        }
    ]
    assert len(quarantine) == 1


def test_the_run_ends_once_the_share_is_exceeded_and_says_what_to_do(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    quarantine = Quarantine(path, num_images=3000, max_bad_ratio=0.001)
    for index in range(3):
        quarantine.add((bad(index),), step=index, drawn=3000)
    with pytest.raises(DataError, match=r"4 unreadable images.*max_bad_ratio 0\.001") as error:
        quarantine.add((bad(3, "/data/\x1b[2Jx.png"),), step=3, drawn=3000)
    assert error.value.exit_code == 3
    assert "\x1b" not in str(error.value)
    assert str(path) in str(error.value)
    assert len(lines(path)) == 4  # the one that ended it included


@pytest.mark.parametrize("name", ["a\nb.png", "\x1b[31m", "\x7f\x9b", "\udcff.png", "é.png", '"\\'])
def test_lines_hold_no_control_bytes_and_read_back(tmp_path, name):
    path = tmp_path / "quarantine.jsonl"
    Quarantine(path, num_images=10, max_bad_ratio=1.0).add((bad(0, name),), step=0, drawn=1)
    raw = path.read_bytes()
    assert raw.count(b"\n") == 1
    assert all(32 <= byte < 127 for byte in raw[:-1])
    assert lines(path)[0]["index"] == 0


def test_a_resumed_run_remembers_and_repeats_no_line(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    settings = {"num_images": 2000, "max_bad_ratio": 0.001}
    Quarantine(path, **settings).add((bad(0), bad(1)), step=0, drawn=100)
    resumed = Quarantine(path, **settings)
    resumed.add((bad(1),), step=0, drawn=100)
    assert len(lines(path)) == 2
    with pytest.raises(DataError):
        resumed.add((bad(2),), step=1, drawn=200)


def test_a_line_cut_by_a_kill_is_skipped_and_closed(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    path.write_bytes(b'{"path": "/data/0.png", "offset": null, "rank": 0}\n{"path": "/da')
    quarantine = Quarantine(path, num_images=10_000, max_bad_ratio=0.001)
    assert len(quarantine) == 1
    quarantine.add((bad(5),), step=0, drawn=10)
    kept = path.read_text().splitlines()
    assert len(kept) == 3
    assert json.loads(kept[2])["index"] == 5


def test_ranks_share_the_file_but_not_the_budget(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    settings = {"num_images": 2000, "max_bad_ratio": 0.001}
    ranks = [Quarantine(path, rank=rank, **settings) for rank in range(2)]
    ranks[0].add((bad(0),), step=0, drawn=10)
    ranks[1].add((bad(1),), step=0, drawn=10)
    assert sorted(line["rank"] for line in lines(path)) == [0, 1]
    resumed = Quarantine(path, rank=1, **settings)
    assert len(resumed) == 1
    resumed.add((bad(0),), step=1, drawn=1500)  # known to the file, new to this rank
    assert len(lines(path)) == 2
    assert len(resumed) == 2


def test_without_a_path_the_list_is_kept_in_memory():
    quarantine = Quarantine(None, num_images=100, max_bad_ratio=0.001)
    quarantine.add((bad(0),), step=0, drawn=1)
    with pytest.raises(DataError, match="2 unreadable"):
        quarantine.add((bad(1),), step=1, drawn=2)


def test_an_unwritable_list_is_an_output_error(tmp_path):
    quarantine = Quarantine(tmp_path / "absent" / "q.jsonl", num_images=9, max_bad_ratio=1.0)
    with pytest.raises(OutputError, match="cannot write") as error:
        quarantine.add((bad(0),), step=0, drawn=1)
    assert error.value.exit_code == 7
