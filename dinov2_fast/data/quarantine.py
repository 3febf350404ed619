"""Bad images: written down, counted, and the end of the run only once there are too many."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path

from dinov2_fast.data.collate import Unreadable
from dinov2_fast.data.image_source import printable
from dinov2_fast.errors import DataError, OutputError


def allowed_bad_images(*, drawn: int, num_images: int, max_bad_ratio: float) -> int:
    """How many different bad images one rank may have met after some draws.

    Two limits hold, the smaller counts:

    - of the data: `max_bad_ratio` of all images, but at least 1: a single bad file never ends a run
      on a small data set;
    - of the draws so far: `max_bad_ratio` of them plus five standard deviations plus 10, which
      stops early when most files of a large data set are bad, and does not strike by chance.

    Args:
        drawn: images drawn by this rank since step 0.
        num_images: images in the source.
        max_bad_ratio: tolerated share; 0 allows no bad image at all.
    """
    if max_bad_ratio <= 0:
        return 0
    expected = max_bad_ratio * min(drawn, num_images)
    of_data = max(1, math.floor(max_bad_ratio * num_images + 1e-9))
    of_draws = math.floor(expected + 5 * math.sqrt(expected) + 10)
    return min(of_data, of_draws)


class Quarantine:
    """The list of bad images of a run, on disk and in memory.

    Every image is written once, as one JSON line (path, offset, reason, step, index, rank) in which
    control characters are escaped. A line is a single append, so ranks may share the file.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        num_images: int,
        max_bad_ratio: float,
        rank: int = 0,
    ) -> None:
        """Reads what earlier runs wrote.

        Args:
            path: of `quarantine.jsonl`; `None` keeps the list in memory.
            num_images: images in the source.
            max_bad_ratio: tolerated share of bad images.
            rank: of this process.
        """
        self._path = path
        self._num_images = num_images
        self._max_bad_ratio = max_bad_ratio
        self._rank = rank
        self._written: set[tuple[str, int | None]] = set()
        self._met: set[tuple[str, int | None]] = set()
        for record in _read_lines(path) if path is not None else ():
            key = (record["path"], record["offset"])
            self._written.add(key)
            if record.get("rank") == rank:
                self._met.add(key)

    def __len__(self) -> int:
        """Different bad images that this rank has met, earlier runs included."""
        return len(self._met)

    def add(self, unreadable: Iterable[Unreadable], *, step: int, drawn: int) -> None:
        """Notes the bad images of a batch.

        Args:
            unreadable: from `Batch.unreadable`.
            step: of the batch.
            drawn: images this rank has drawn since step 0, this batch included.

        Raises:
            DataError: more bad images than `max_bad_ratio` allows.
            OutputError: the list cannot be written.
        """
        last = None
        for last in unreadable:
            key = (printable(last.name), last.offset)
            self._met.add(key)
            if key not in self._written:
                self._written.add(key)
                self._append(last, step)
        if last is None:
            return
        allowed = allowed_bad_images(
            drawn=drawn,
            num_images=self._num_images,
            max_bad_ratio=self._max_bad_ratio,
        )
        if len(self._met) > allowed:
            where = "" if self._path is None else f"; all are listed in {self._path}"
            raise DataError(
                f"data: {len(self._met)} unreadable images after {drawn} draws from "
                f"{self._num_images} images, allowed are {allowed} (data.max_bad_ratio "
                f"{self._max_bad_ratio:g}); the last was {printable(last.name)}: "
                f"{printable(last.reason)}{where}; repair or remove them, or raise the ratio"
            )

    def _append(self, item: Unreadable, step: int) -> None:
        if self._path is None:
            return
        record = {
            "path": printable(item.name),
            "offset": item.offset,
            "reason": printable(item.reason),
            "step": step,
            "index": item.index,
            "rank": self._rank,
        }
        line = json.dumps(record).encode("ascii") + b"\n"
        try:
            descriptor = os.open(
                self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644
            )
            try:
                size = os.fstat(descriptor).st_size
                if size and os.pread(descriptor, 1, size - 1) != b"\n":  # a line cut by a kill
                    line = b"\n" + line
                os.write(descriptor, line)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise OutputError(f"data: cannot write {self._path}: {error}") from error


def _read_lines(path: Path) -> list[dict]:
    """The intact records of a quarantine file; none where there is no file."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise OutputError(f"data: cannot read {path}: {error}") from error
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:  # cut by a kill
            continue
        if isinstance(record, dict) and "path" in record and "offset" in record:
            records.append(record)
    return records
