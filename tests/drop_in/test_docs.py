"""docs/drop-in.md is run as written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.drop_in.their_models import THIRD_PARTY

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("on_native"), *THIRD_PARTY]

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "drop-in.md"


def test_every_block_of_the_page_runs_in_order(capsys):
    for library in ("timm", "transformers", "peft"):
        pytest.importorskip(library, reason=f"{library} is not installed")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)

    assert names["weights"].shape == (2, 2, 256, 256)
    printed = capsys.readouterr().out
    assert "replaced: attention of blocks.0 and blocks.1" in printed
    assert "attention.q_proj is a peft.tuners.lora.layer.Linear" in printed
