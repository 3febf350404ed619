"""Every DINOV2_FAST_* environment variable: its meaning, its default and its only reader."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dinov2_fast.errors import ConfigError


@dataclass(frozen=True)
class Variable:
    """One environment variable; `choices` empty means free text."""

    name: str
    default: str
    choices: tuple[str, ...]
    meaning: str
    read_by: str


BACKEND = Variable(
    "DINOV2_FAST_BACKEND",
    "auto",
    ("auto", "reference", "native", "triton", "flash_attn"),
    "backend of every op that is not given one; auto takes the preference table",
    "ops",
)
PREFER = Variable(
    "DINOV2_FAST_PREFER",
    "auto",
    ("auto", "reference", "native", "triton", "flash_attn"),
    "backend at which automatic choice begins its order, for the ops that have it",
    "ops",
)
DISABLE_KERNELS = Variable(
    "DINOV2_FAST_DISABLE_KERNELS",
    "",
    (),
    "comma-separated ops that automatic choice computes with the reference",
    "ops",
)
CPU_LEVEL = Variable(
    "DINOV2_FAST_CPU_LEVEL",
    "auto",
    ("auto", "baseline", "avx2", "avx512", "avx512_bf16", "amx"),
    "instruction set of the native CPU kernels; auto takes the widest this processor has",
    "ops",
)
BLOCK = Variable(
    "DINOV2_FAST_BLOCK",
    "auto",
    ("auto", "plain"),
    "plain computes transformer blocks module by module under autograd, keeping every activation",
    "nn",
)
BUILD = Variable(
    "DINOV2_FAST_BUILD",
    "auto",
    ("auto", "cpu", "cuda"),
    "what the extension is built with; auto means CUDA where nvcc is found",
    "build",
)
CUDA_ARCHS = Variable(
    "DINOV2_FAST_CUDA_ARCHS",
    "80;90",
    (),
    "compute capabilities the extension is built for, as in 80;90a, and any later than all of them",
    "build",
)
_NO_OPS: frozenset[str] = frozenset()
VARIABLES = (BACKEND, PREFER, DISABLE_KERNELS, CPU_LEVEL, BLOCK, BUILD, CUDA_ARCHS)
_ENCODED_NAMES = {each.name: os.environ.encodekey(each.name) for each in VARIABLES}


def value(variable: Variable) -> str:
    """The variable's value now, checked against its choices; empty counts as unset.

    Raises:
        ConfigError: the environment holds a value that is not among the choices.
    """
    # Every call of an op asks for several variables that hardly ever are set, and `os.environ.get`
    # raises and catches an error for each: the dictionary behind it, where there is one, says so
    # in a quarter of the time.
    known = getattr(os.environ, "_data", None)
    if known is not None and _ENCODED_NAMES[variable.name] not in known:
        return variable.default
    text = os.environ.get(variable.name) or variable.default
    if variable.choices and text not in variable.choices:
        raise ConfigError(
            f"{variable.name}: expected one of {', '.join(variable.choices)}, got {text!r}; "
            f"unset it for {variable.default!r}"
        )
    return text


def leaves_choice_to_table() -> bool:
    """Whether none of the variables is set that the choice of an op's backend depends on."""
    known = getattr(os.environ, "_data", None)
    return known is not None and not (
        _ENCODED_NAMES[BACKEND.name] in known
        or _ENCODED_NAMES[PREFER.name] in known
        or _ENCODED_NAMES[DISABLE_KERNELS.name] in known
    )


def backend() -> str | None:
    """Backend that the environment asks for; None leaves the choice to the preference table."""
    text = value(BACKEND)
    return None if text == "auto" else text


def preferred_backend() -> str | None:
    """Backend at which automatic choice begins; None leaves the order of the table."""
    text = value(PREFER)
    return None if text == "auto" else text


def disabled_kernels() -> frozenset[str]:
    """Ops that automatic choice must compute with the reference."""
    text = value(DISABLE_KERNELS)
    return frozenset(name.strip() for name in text.split(",") if name.strip()) if text else _NO_OPS


def cpu_level() -> str:
    """Instruction set for the native CPU kernels: one of the choices of `CPU_LEVEL`."""
    return value(CPU_LEVEL)


def plain_blocks() -> bool:
    """Whether transformer blocks must run module by module under autograd."""
    return value(BLOCK) == "plain"


def triton_interpreted() -> bool:
    """Whether Triton interprets its kernels on the CPU: TRITON_INTERPRET, which Triton reads."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in {"1", "true", "on", "yes", "y"}


def extended(extra: Mapping[str, str]) -> dict[str, str]:
    """This process's environment with some variables more, for a child process."""
    return {**os.environ, **extra}


def unknown_variables() -> list[str]:
    """DINOV2_FAST_* names in the environment that nothing reads: most likely misspelt."""
    known = {variable.name for variable in VARIABLES}
    return sorted(n for n in os.environ if n.startswith("DINOV2_FAST_") and n not in known)


def describe(read: Callable[[Variable], str] = value) -> list[dict[str, str]]:
    """One row per variable for reports: name, value, default, meaning and who reads it."""
    rows: list[dict[str, str]] = []
    for variable in VARIABLES:
        try:
            text = read(variable)
        except ConfigError as error:
            text = f"invalid ({error})"
        rows.append(
            {
                "name": variable.name,
                "value": text,
                "default": variable.default,
                "meaning": variable.meaning,
                "read_by": variable.read_by,
            }
        )
    return rows
