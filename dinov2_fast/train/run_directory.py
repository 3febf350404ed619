"""The run directory: its layout, files that appear whole or not at all, the owner's lock."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dinov2_fast.errors import OutputError
from dinov2_fast.manifest import SUMMARY_NAME

# What `write_atomic` leaves when it is killed.
_TEMPORARY_NAME = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")


class RunDirectory:
    """Paths of one run and the few ways of writing into them.

    Args:
        root: the folder; made if missing by `locked`.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self.checkpoints = self.root / "checkpoints"
        self.config = self.root / "config.yaml"
        self.metrics = self.root / "metrics.jsonl"
        self.quarantine = self.root / "quarantine.jsonl"
        self.teacher = self.root / "teacher.safetensors"
        self.summary = self.root / SUMMARY_NAME
        self.nonfinite = self.root / "nonfinite"
        self.lock = self.root / "run.lock"

    @contextlib.contextmanager
    def locked(self) -> Iterator[RunDirectory]:
        """Own the directory inside a `with` block; the lock of a dead run is taken over.

        Raises:
            OutputError: another run owns it, or it cannot be written.
        """
        mine = _own_identity()
        with output_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            with _folder_mutex(self.root):
                owner = _read_lock(self.lock)
                if owner is not None and _is_alive(owner):
                    raise OutputError(_lock_message(self.lock, owner))
                write_atomic(self.lock, json.dumps(mine) + "\n")
            for left in self.root.glob(".*.tmp"):
                if _TEMPORARY_NAME.fullmatch(left.name):
                    left.unlink()
        try:
            yield self
        finally:
            with contextlib.suppress(OSError):
                if _read_lock(self.lock) == mine:
                    self.lock.unlink()

    def read_summary(self) -> dict[str, Any] | None:
        """What the finished run left, or None if there is none that can be read."""
        try:
            summary = json.loads(self.summary.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return summary if isinstance(summary, dict) else None


@contextlib.contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn what the file system refuses inside the block into an `OutputError` that names the path.

    Raises:
        OutputError: instead of any OSError.
    """
    try:
        yield
    except OSError as error:
        reasons = {
            errno.ENOSPC: "the disk is full; free some space and give the same command again",
            errno.EDQUOT: "the quota is used up; free some space and give the same command again",
            errno.EACCES: "no permission to write there; choose another --out",
            errno.EROFS: "the file system is read-only; choose another --out",
            errno.ENOTDIR: "a part of the path is a file; choose another --out",
            errno.EEXIST: "a file stands where a folder is needed; choose another --out",
        }
        reason = reasons.get(error.errno or 0, error.strerror or str(error))
        raise OutputError(f"output: cannot write {error.filename or path}: {reason}") from error


def write_atomic(path: Path, text: str) -> None:
    """Write a small file so that a reader, a crash or a full disk never meets half of it.

    Args:
        path: the file; an older one is replaced.
        text: its content, stored as UTF-8.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def append_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Append records to a JSON-lines file in one write, apart from a line cut short earlier."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    with open(path, "a+b") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                text = "\n" + text
        file.write(text.encode("utf-8"))


def _own_identity() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "pid": pid,
        "host": socket.gethostname(),
        "boot": _boot_id(),
        "process_start": _process_start(pid),
        "locked_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "token": uuid.uuid4().hex,
    }


def _is_alive(owner: dict[str, Any]) -> bool:
    """Whether the process that wrote a lock still runs; a lock of another host always counts."""
    if owner.get("host") != socket.gethostname():
        return True
    if owner.get("boot") != _boot_id():
        return False
    pid = owner.get("pid")
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError) as error:
        return isinstance(error, PermissionError)
    # The number may have gone to another process since: compare when each began.
    return _process_start(pid) == owner.get("process_start")


def _process_start(pid: int) -> int | None:
    """Clock ticks from boot to the start of a process; None if it is gone, dead or not told."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # the name before it may hold spaces and brackets
    return None if fields[0] in "ZX" else int(fields[19])


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _read_lock(path: Path) -> dict[str, Any] | None:
    """Who holds a lock; None if there is none, or none that a run wrote whole."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            owner = json.loads(file.read(4096))
    except FileNotFoundError:
        return None
    except ValueError:
        return None
    return owner if isinstance(owner, dict) else None


def _lock_message(path: Path, owner: dict[str, Any]) -> str:
    pid, host, since = (owner.get(key, "?") for key in ("pid", "host", "locked_at"))
    message = f"output: {path.parent} is in use by process {pid} on {host} since {since}"
    if host != socket.gethostname():
        return f"{message}; if that run is gone, delete {path}"
    return f"{message}; wait for it or choose another --out"


@contextlib.contextmanager
def _folder_mutex(folder: Path) -> Iterator[None]:
    """Let one process at a time judge and replace the lock file; the kernel frees it at death."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # Some network file systems know no locks; the lock file itself still works there.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
