"""Errors a user can cause or must act on; each carries the exit code of the command line."""

from __future__ import annotations

import difflib


class UserError(Exception):
    """A message for the user, shown without a traceback; `exit_code` is that of the process."""

    exit_code = 1


class ConfigError(UserError):
    """Wrong command line or configuration."""

    exit_code = 2


class DataError(UserError):
    """No images found, or more broken ones than the budget allows."""

    exit_code = 3


class NumericsError(UserError):
    """Non-finite loss or gradients beyond the budget."""

    exit_code = 4


class CheckpointError(UserError):
    """A checkpoint or weight file is missing, damaged or does not fit the model."""

    exit_code = 5


class LoaderError(UserError):
    """The processes that load images have no memory to hand over batches, or keep dying."""

    exit_code = 6


class OutputError(UserError):
    """The output directory cannot be written, is full, or is in use by another run."""

    exit_code = 7


class BackendUnavailable(UserError):
    """An explicitly chosen backend cannot run this op here; the message says why and what can."""

    exit_code = 2


def nearest_name(name: str, known: list[str]) -> str:
    """` (did you mean NAME?)` with the known name closest to another, or nothing."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {near[0]}?)" if near else ""
