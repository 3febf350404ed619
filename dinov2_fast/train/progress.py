"""What a person sees while a run goes on: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

# Weight of the newest reading in the rate that the remaining time is estimated from.
_RATE_MEMORY = 0.3


class Progress:
    """Shows records and messages of one run; a closed or full output never stops the run.

    Args:
        total_steps: steps of the whole run.
        images_per_step: global batch size.
        step: steps finished before.
        visible: False shows nothing, for every process but one.
        console: where to; the default is the standard output, plain when that is no terminal.
    """

    def __init__(
        self,
        total_steps: int,
        images_per_step: int,
        *,
        step: int = 0,
        visible: bool = True,
        console: Console | None = None,
    ) -> None:
        self._total_steps = total_steps
        self._images_per_step = images_per_step
        self._step = step
        self._record: dict[str, Any] = {}
        self._steps_per_s = 0.0
        self._read_at = time.monotonic()
        self._read_step = step
        self._live: Live | None = None
        self._console = console or (make_console() if visible else None)

    def __enter__(self) -> Progress:
        """Start the live line if the output is a terminal."""
        console = self._console
        if console is not None and console.is_terminal and not console.is_dumb_terminal:
            from rich.live import Live

            live = Live(console=console, get_renderable=self._live_line, refresh_per_second=4)
            live.start()
            self._live = live
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the last state of the live line on the screen."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def step_done(self, step: int) -> None:
        """Move the live line on; costs nothing on the device."""
        self._step = step

    def log(self, record: dict[str, Any]) -> None:
        """Show one record of `metrics.jsonl`.

        Args:
            record: fields that are missing are not shown.
        """
        now = time.monotonic()
        rate = (record["step"] - self._read_step) / max(now - self._read_at, 1e-9)
        if self._steps_per_s > 0:
            rate = _RATE_MEMORY * rate + (1 - _RATE_MEMORY) * self._steps_per_s
        self._steps_per_s, self._read_at, self._read_step = rate, now, record["step"]
        self._record, self._step = record, record["step"]
        if self._live is None:
            self._print(self._line())

    def message(self, text: str) -> None:
        """Show a line that stays, above the live one; control characters in it are spelled out."""
        self._print("".join(c if c.isprintable() else repr(c)[1:-1] for c in text))

    def _line(self) -> str:
        """The state of the run in one line of plain text."""
        record = self._record
        width = len(str(self._total_steps))
        parts = [f"step {self._step:>{width}}/{self._total_steps}"]
        if not record:
            parts.append("waiting for the first batch")
        parts += [f"{name} {_number(record[key], '.4f')}" for key, name in _LOSSES if key in record]
        for key, text in _RATES:
            if record.get(key) is not None:
                parts.append(text.format(record[key]))
        if self._steps_per_s > 0:
            # From the time of the last record: the live line counts down in between.
            left = (self._total_steps - self._read_step) / self._steps_per_s
            left -= (time.monotonic() - self._read_at) if self._live is not None else 0.0
            parts.append(f"ETA {format_duration(max(left, 0.0))}")
        return "  ".join(parts)

    def _live_line(self) -> Text:
        from rich.text import Text

        text = Text(self._line(), no_wrap=True, overflow="ellipsis")
        text.highlight_regex(r"(?<=  )(loss|dino|ibot|koleo|lr|wait|ETA)(?= )", "dim")
        text.highlight_regex(r"^step +\S+", "bold cyan")
        return text

    def _print(self, text: str) -> None:
        if self._console is None:
            return
        try:
            self._console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)
        except OSError:  # a full disk behind a redirection: go on unseen
            self._console.quiet = True


_LOSSES = (("loss", "loss"), ("dino", "dino"), ("ibot", "ibot"), ("koleo", "koleo"))
_RATES = (
    ("lr", "lr {:.2e}"),
    ("images_per_second", "{:.1f} img/s"),
    ("data_wait_share", "wait {:.0%}"),
    ("memory_mib", "{:.0f} MiB"),
)


def make_console() -> Console:
    """A console on the standard output that outlives its reader; NO_COLOR turns colours off."""
    from rich.console import Console

    class QuietConsole(Console):
        def on_broken_pipe(self) -> None:
            # The default leaves the process; a run must not end because `| head` did.
            self.quiet = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    return QuietConsole()


def format_duration(seconds: float) -> str:
    """Whole seconds as h:mm:ss, with days in front from one day on."""
    days, rest = divmod(round(seconds), 86400)
    clock = f"{rest // 3600}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days} d {clock}" if days else clock


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)
