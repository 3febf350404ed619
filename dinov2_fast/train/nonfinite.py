"""Steps whose loss or gradients are not finite: told, recorded for later, and counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov2_fast.errors import NumericsError
from dinov2_fast.train.metrics import to_floats
from dinov2_fast.train.parallel import Place
from dinov2_fast.train.run_directory import output_errors, write_atomic


@dataclass
class _Pending:
    """A step whose flag is still on its way to the host."""

    step: int
    sample_indices: Tensor
    values: dict[str, Tensor]
    skipped: Tensor
    arrived: torch.cuda.Event | None


class NonfiniteGuard:
    """Watches the flags of skipped steps, one step behind a GPU so that it never waits for it.

    Args:
        folder: `OUT/nonfinite`; made when the first step is skipped.
        place: this process; all processes must make the same calls.
        max_in_a_row: skipped steps in a row that are allowed.
        tell: shows a message to the user.
    """

    def __init__(
        self, folder: Path, place: Place, *, max_in_a_row: int, tell: Callable[[str], None]
    ) -> None:
        self.in_a_row = 0
        self.total = 0
        self._folder = folder
        self._place = place
        self._max_in_a_row = max_in_a_row
        self._tell = tell
        self._pending: _Pending | None = None

    def watch(
        self, step: int, sample_indices: Tensor, values: dict[str, Tensor], skipped: Tensor
    ) -> None:
        """Take note of a step just started; settles the one before it.

        Args:
            step: number of the step, from 1.
            sample_indices: [B] positions of its images in the data set.
            values: 0-d loss parts and gradient norms.
            skipped: 0-d bool, the same on every process.
        Raises:
            NumericsError: too many skipped steps in a row.
        """
        arrived = None
        flag = skipped.detach()
        if flag.is_cuda:
            # The copy joins the queue behind this step; reading it later waits for nothing newer.
            flag = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(flag, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        before, self._pending = self._pending, _Pending(step, sample_indices, values, flag, arrived)
        self._judge(before)
        if arrived is None:
            self.settle()

    def settle(self) -> None:
        """Wait for the last step's flag, as before a checkpoint.

        Raises:
            NumericsError: too many skipped steps in a row.
        """
        pending, self._pending = self._pending, None
        self._judge(pending)

    def state_dict(self) -> dict[str, int]:
        """The counts, for a checkpoint."""
        return {"in_a_row": self.in_a_row, "total": self.total}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from the counts of a checkpoint."""
        self.in_a_row, self.total = state["in_a_row"], state["total"]

    def _judge(self, pending: _Pending | None) -> None:
        if pending is None:
            return
        if pending.arrived is not None:
            pending.arrived.synchronize()
        if not bool(pending.skipped):
            self.in_a_row = 0
            return
        self.in_a_row += 1
        self.total += 1
        bundles = self._place.gather(
            {
                "sample_indices": pending.sample_indices.tolist(),
                "values": to_floats(pending.values),
            }
        )
        path = self._folder / f"step-{pending.step:08d}.json"
        self._place.on_main(lambda: self._record(path, pending.step, bundles))
        parts = "; ".join(_in_words(bundle["values"]) for bundle in bundles)
        self._tell(f"step {pending.step} skipped, nothing changed: {parts} (details: {path})")
        if self.in_a_row > self._max_in_a_row:
            raise NumericsError(
                f"loss or gradients: expected finite values, got {self.in_a_row} broken steps in a "
                f"row up to step {pending.step} (run.max_nonfinite_steps is {self._max_in_a_row}); "
                f"see {self._folder}; a lower optimizer.base_lr or run.precision fp32 may help"
            )

    def _record(self, path: Path, step: int, bundles: list[dict[str, Any]]) -> None:
        with output_errors(path):
            path.parent.mkdir(exist_ok=True)
            content = {"step": step, "in_a_row": self.in_a_row, "processes": bundles}
            write_atomic(path, json.dumps(content, indent=1) + "\n")


def _in_words(values: dict[str, float | None]) -> str:
    return ", ".join(
        f"{name} {'not finite' if value is None else format(value, '.4g')}"
        for name, value in values.items()
    )
