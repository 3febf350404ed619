"""Training batches by step: the same ones for any number of workers and after any restart."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from dinov2_fast.config import CropConfig, DataConfig, MaskConfig
from dinov2_fast.data.batch_builder import BatchBuilder, Failure
from dinov2_fast.data.collate import Batch
from dinov2_fast.data.image_source import ImageSource
from dinov2_fast.data.quarantine import Quarantine
from dinov2_fast.errors import LoaderError

_POLL_S = 5
"""A dead worker is noticed within this time."""
_MAX_REBUILDS = 3
_REBUILD_WINDOW_S = 3600.0


def default_num_workers(local_world_size: int = 1) -> int:
    """Loader processes for `num_workers = -1`: one per usable core, less one for training.

    Args:
        local_world_size: training processes on this machine, among which its cores are divided.

    Returns:
        0 on a single core, at most 16. Usable are the cores of the process's affinity mask.
    """
    return max(0, min(16, len(os.sched_getaffinity(0)) // local_world_size - 1))


def start_fork_server() -> None:
    """Starts the process that workers are forked from, without waiting for its imports.

    Called early, these run beside whatever else a program has to prepare; later calls do nothing.
    """
    forkserver.set_forkserver_preload([__name__])
    forkserver.ensure_running()


class _Steps(Sampler[int]):
    """Steps from one on, up to another or for ever."""

    def __init__(self, start: int, stop: int | None) -> None:
        self._start = start
        self._stop = stop

    def __iter__(self) -> Iterator[int]:
        step = self._start
        while self._stop is None or step < self._stop:
            yield step
            step += 1


def _start_worker(worker: int) -> None:
    """Leaves Ctrl-C to the training process, which finishes its step first, and ends with it.

    The fork server, a worker's parent in the eyes of the system, outlives a killed training process
    for as long as a worker holds its end of their pipe; so each worker watches for itself.
    """
    del worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    training_process = multiprocessing.parent_process()
    if training_process is not None:
        threading.Thread(target=_exit_after, args=(training_process,), daemon=True).start()


def _exit_after(process: BaseProcess) -> None:
    process.join()
    os._exit(1)


def _as_is(batch: Any) -> Any:
    return batch


def _shared(batch: Batch | Failure) -> Batch | Failure:
    """A worker's batch in shared memory.

    Left to the transfer, a want of memory would be met in a thread that drops the batch, and
    training would wait for it until the workers count as hung.
    """
    if isinstance(batch, Failure):
        return batch
    try:
        return batch.share_memory()
    except RuntimeError as error:
        return Failure(
            f"data: a loader process finds no shared memory (/dev/shm) for its batch: {error}; "
            "give the machine or container more (docker run --shm-size), or use fewer or no loader "
            "processes, --data.num-workers 0, or a smaller --batch-size",
            LoaderError,
        )


class StopRequested(Exception):
    """The wait for a batch was given up because the caller's `stop_requested` said so."""


class _DoneEvent:
    """The event by which torch's iterator tells workers to end, in the training process.

    A worker that is killed may hold the lock of that event for good, even while it only looks at
    it; whoever waits for the lock hangs.
    """

    def __init__(self, event: Any) -> None:
        self._event = event
        self._told = False

    def is_set(self) -> bool:
        """Whether workers were told."""
        return self._told

    def set(self) -> None:
        """Tells them, if none has died with the lock."""
        self._told = True
        teller = threading.Thread(target=self._event.set, daemon=True)
        teller.start()
        teller.join(timeout=1)


class _Watchdog(threading.Thread):
    """Kills the workers when a batch takes too long.

    Waiting with a timeout is not enough: a frozen worker that has announced a batch but does not
    hand over its memory blocks the training process inside of the transfer, until it dies.
    """

    def __init__(self, timeout_s: float) -> None:
        super().__init__(name="loader-watchdog", daemon=True)
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._deadline = math.inf
        self._workers: list[BaseProcess] = []
        self._stopped = threading.Event()

    def run(self) -> None:
        """Looks at the clock until stopped."""
        while not self._stopped.wait(_POLL_S / 5):
            with self._lock:
                if time.monotonic() > self._deadline:
                    for worker in self._workers:
                        worker.kill()
                    self._deadline = math.inf

    @contextlib.contextmanager
    def watching(self, workers: list[BaseProcess]) -> Iterator[None]:
        """The block kills the workers if it is not left in time."""
        with self._lock:
            self._workers, self._deadline = workers, time.monotonic() + self._timeout_s
        try:
            yield
        finally:
            with self._lock:
                self._workers, self._deadline = [], math.inf

    def stop(self) -> None:
        """Ends the thread."""
        self._stopped.set()


class TrainingLoader:
    """Iterates over the batches of one rank, from `start_step` on.

    A batch is a function of (data, configuration, seed, step, rank, world size) alone. Every worker
    builds whole batches with one thread. Workers come from a fork server, a process that has
    imported this project and does nothing else: forking it is safe whatever threads the training
    process runs. When a worker dies, or no batch comes for `timeout_s`, all workers are replaced at
    the same step, at most three times an hour. JPEGs so large that every crop would shrink more
    than fourfold are decoded at 1/2, 1/4 or 1/8.
    """

    def __init__(
        self,
        source: ImageSource,
        *,
        crops: CropConfig,
        masks: MaskConfig,
        patch_size: int,
        seed: int,
        batch_size: int,
        data: DataConfig | None = None,
        recipe: str = "official",
        rank: int = 0,
        world_size: int = 1,
        local_world_size: int | None = None,
        start_step: int = 0,
        stop_step: int | None = None,
        quarantine_path: Path | None = None,
        pin_memory: bool = False,
        timeout_s: float = 300.0,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        """Prepares; workers start with the first batch.

        Args:
            source: the images.
            crops: multi-crop augmentation.
            masks: masks of the global crops.
            patch_size: side of a patch in pixels; crop sizes must be multiples of it.
            seed: of the run.
            batch_size: B, images per rank and step.
            data: workers, size limit and bad-image budget.
            recipe: "official" or "paper".
            rank: of this process.
            world_size: ranks in all.
            local_world_size: ranks on this machine, which share its cores; `world_size` if `None`.
            start_step: first step to give.
            stop_step: step to end before; `None` goes on for ever.
            quarantine_path: where unreadable images are listed.
            pin_memory: put batches into page-locked memory.
            timeout_s: seconds without a batch after which the workers count as hung.
            stop_requested: asked now and then while a batch of the workers does not come.
        """
        data = data or DataConfig()
        self._builder = BatchBuilder(
            source,
            crops=crops,
            masks=masks,
            patch_size=patch_size,
            recipe=recipe,
            seed=seed,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            max_pixels=data.max_pixels,
        )
        self.quarantine = Quarantine(
            quarantine_path,
            num_images=len(source),
            max_bad_ratio=data.max_bad_ratio,
            rank=rank,
        )
        self.num_workers = (
            default_num_workers(local_world_size or world_size)
            if data.num_workers < 0
            else data.num_workers
        )
        self.next_step = start_step
        """Step of the batch that comes next."""
        self.wait_s = 0.0
        """Seconds spent waiting for batches in all; without workers, building them."""
        self._stop_step = stop_step
        self._batch_size = batch_size
        self._prefetch_batches = data.prefetch_batches
        self._pin_memory = pin_memory
        self._timeout_s = timeout_s
        self._stop_requested = stop_requested
        self._batches: Iterator[Batch | Failure] | None = None
        self._watchdog: _Watchdog | None = None
        self._rebuilt_at: list[float] = []
        if self.num_workers:
            start_fork_server()

    def __iter__(self) -> Iterator[Batch]:
        """Batches from `next_step` on; a new iteration goes on where the last one stopped.

        Raises:
            DataError: too many unreadable images.
            LoaderError: workers keep dying, or have no memory to share.
            StopRequested: `stop_requested` said so while workers did not deliver.
            RuntimeError: a bug in building a batch.
        """
        while self._stop_step is None or self.next_step < self._stop_step:
            started = time.perf_counter()
            batch = self._next_batch()
            self.wait_s += time.perf_counter() - started
            self.next_step += 1
            self.quarantine.add(
                batch.unreadable,
                step=batch.step,
                drawn=self.next_step * self._batch_size,
            )
            yield batch

    def close(self) -> None:
        """Ends the workers; a later iteration starts new ones."""
        self._batches = None
        if self._watchdog is not None:
            self._watchdog.stop()
            self._watchdog = None

    def __del__(self) -> None:
        """Ends the watchdog of a loader that was not closed."""
        watchdog = getattr(self, "_watchdog", None)
        if watchdog is not None:
            watchdog.stop()

    def _next_batch(self) -> Batch:
        """The batch of `next_step`, from new workers where the old ones have failed."""
        while True:
            try:
                if self._batches is None:
                    self._batches = self._new_batches()
                batch = self._received(self._batches)
                break
            # The builder returns its failures, so what is raised here comes from the machinery: a
            # dead worker, a broken pipe, no memory to share or to pin.
            except (RuntimeError, OSError, EOFError) as error:
                if self.num_workers == 0:
                    raise
                self._replace_workers(error)
        if isinstance(batch, Failure):
            self.close()
            if batch.error is not None:
                raise batch.error(batch.message)
            raise RuntimeError(f"TrainingLoader: building a batch failed\n{batch.message}")
        return batch

    def _received(self, batches: Iterator[Batch | Failure]) -> Batch | Failure:
        """The next result of the workers; polls, so that a dead one is noticed."""
        if self.num_workers == 0:
            return next(batches)
        if self._watchdog is None:
            self._watchdog = _Watchdog(self._timeout_s)
            self._watchdog.start()
        workers = self._workers()
        with self._watchdog.watching(workers):
            while True:
                polled_at = time.monotonic()
                try:
                    batch = next(batches)
                except RuntimeError:  # also raised when a poll interval has passed
                    interval_is_over = time.monotonic() - polled_at > 0.9 * _POLL_S
                    if self._stop_requested():
                        self._kill_workers()
                        raise StopRequested from None
                    if interval_is_over and all(worker.is_alive() for worker in workers):
                        continue
                    raise
                if isinstance(batch, Batch) and batch.step != self.next_step:
                    raise RuntimeError(f"step {self.next_step} was lost on its way")
                return batch

    def _new_loader(self) -> DataLoader:
        settings: dict[str, Any] = {"collate_fn": _as_is}
        if self.num_workers:
            settings = {
                "num_workers": self.num_workers,
                "prefetch_factor": self._prefetch_batches,
                "multiprocessing_context": "forkserver",
                "timeout": _POLL_S,
                "worker_init_fn": _start_worker,
                "collate_fn": _shared,
            }
        return DataLoader(
            self._builder,
            batch_size=None,
            sampler=_Steps(self.next_step, self._stop_step),
            pin_memory=self._pin_memory,
            generator=torch.Generator(),  # else it would advance the global one
            **settings,
        )

    def _new_batches(self) -> Iterator[Batch | Failure]:
        batches: Any = iter(self._new_loader())
        if self.num_workers:
            batches._workers_done_event = _DoneEvent(batches._workers_done_event)
        return batches

    def _workers(self) -> list[BaseProcess]:
        return list(getattr(self._batches, "_workers", ()))

    def _kill_workers(self) -> None:
        """Ends all workers; a frozen one would not follow a polite request."""
        for worker in self._workers():
            worker.kill()
        self._batches = None

    def _replace_workers(self, error: Exception) -> None:
        """Kills all workers, so that the next attempt starts new ones at the same step."""
        now = time.monotonic()
        self._rebuilt_at = [at for at in self._rebuilt_at if now - at < _REBUILD_WINDOW_S]
        self._kill_workers()
        if len(self._rebuilt_at) >= _MAX_REBUILDS:
            raise LoaderError(
                f"TrainingLoader: workers died or hung {_MAX_REBUILDS + 1} times within an hour, "
                f"last at step {self.next_step}: {error}; the machine may be out of memory or of "
                "shared memory (/dev/shm): use fewer workers, --data.num-workers; a script of your "
                "own must start its work under `if __name__ == '__main__':`"
            ) from error
        self._rebuilt_at.append(now)
