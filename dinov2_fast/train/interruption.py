"""SIGTERM and Ctrl-C as a request: finish the step, save, leave with the code that says so."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType

from dinov2_fast.errors import UserError

# The launcher passes a terminal's Ctrl-C on to processes that got it already.
_SAME_REQUEST_S = 0.5


class PreemptedError(UserError):
    """SIGTERM or SIGUSR1 came; the checkpoint is on disk and the same command goes on."""

    exit_code = 75


class StoppedByUserError(UserError):
    """Ctrl-C came; the checkpoint is on disk and the same command goes on."""

    exit_code = 130


STOP_ERRORS: dict[int, type[UserError]] = {
    signal.SIGTERM: PreemptedError,
    signal.SIGUSR1: PreemptedError,
    signal.SIGINT: StoppedByUserError,
}


class Interruption:
    """Collects stop signals inside a `with` block and puts the former handlers back after it.

    `signal_number` is 0 until a signal came. A second Ctrl-C raises KeyboardInterrupt at once.
    """

    def __init__(self) -> None:
        self.signal_number = 0
        self._received_at = 0.0
        self._former: dict[int, object] = {}

    def __enter__(self) -> Interruption:
        """Install the handlers, except outside the main thread, where Python allows none."""
        if threading.current_thread() is threading.main_thread():
            for number in STOP_ERRORS:
                self._former[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Put the former handlers back; one that was not set from Python becomes the default."""
        for number, handler in self._former.items():
            signal.signal(number, handler or signal.SIG_DFL)  # type: ignore[arg-type]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self.signal_number == signal.SIGINT:
            if now - self._received_at > _SAME_REQUEST_S:
                raise KeyboardInterrupt
            return
        if self.signal_number == 0:
            self.signal_number = number
        self._received_at = now
