"""An installed flash-attn: the functions of it that attention calls, or the reason why not."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from importlib import metadata
from typing import Any, NamedTuple

import torch

from dinov2_fast.errors import BackendUnavailable

_PACK = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale")
_FORWARD = ("q", "k", "v", *_PACK)
_GRADIENTS = ("dq", "dk", "dv", "deterministic")
_BACKWARD = ("dout", "q", "k", "v", "out", "softmax_lse", *_GRADIENTS, *_PACK)

# Every other parameter that a release may have without a default, and what asks for nothing.
_NOTHING: dict[str, Any] = {
    "dropout_p": 0.0,
    "causal": False,
    "is_causal": False,
    "window_size": (-1, -1),
    "window_size_left": -1,
    "window_size_right": -1,
    "softcap": 0.0,
    "return_softmax": False,
    **dict.fromkeys(("alibi_slopes", "k_new", "v_new", "qv", "out", "cu_seqlens_k_new")),
    **dict.fromkeys(("seqused_q", "seqused_k", "sequed_q", "sequed_k", "page_table")),
    **dict.fromkeys(("kv_batch_idx", "leftpad_k", "rotary_cos", "rotary_sin")),
    **dict.fromkeys(("seqlens_rotary", "q_descale", "k_descale", "v_descale")),
}


class Generation(NamedTuple):
    """Where a FlashAttention is installed and on which GPUs it runs.

    Args:
        number: 2 or 3.
        distribution: name that pip knows.
        module: holds the functions.
        functions: forward and backward of sequences laid end to end.
        needs: parameters of the forward that older releases lack, whose results come in another
            form.
        capabilities: major numbers of the GPUs it has code for.
    """

    number: int
    distribution: str
    module: str
    functions: tuple[str, str]
    needs: tuple[str, ...]
    capabilities: range


# The faster one first.
GENERATIONS = (
    Generation(
        3,
        "flash-attn-3",
        "flash_attn_interface",
        ("_flash_attn_forward", "_flash_attn_backward"),
        (),
        range(9, 10),
    ),
    Generation(
        2,
        "flash-attn",
        "flash_attn.flash_attn_interface",
        ("_flash_attn_varlen_forward", "_flash_attn_varlen_backward"),
        ("window_size_left",),
        range(8, 100),
    ),
)


class Installed(NamedTuple):
    """A FlashAttention that runs here.

    Args:
        generation: 2 or 3.
        name: of the distribution, with its version.
        forward: takes q, k, v and the layout by keyword -> out, lse and what nobody reads.
        backward: takes also dout, out, softmax_lse and deterministic, and writes dq, dk, dv.
    """

    generation: int
    name: str
    forward: Callable[..., Any]
    backward: Callable[..., Any]


def why_not() -> str:
    """Empty when a FlashAttention runs on the current GPU, else why none does."""
    return _load()[1]


def installed() -> Installed:
    """The fastest FlashAttention that runs on the current GPU.

    Raises:
        BackendUnavailable: there is none.
    """
    found, reason = _load()
    if found is None:
        raise BackendUnavailable(f"flash_attn: expected an installed flash-attn, but {reason}")
    return found


@functools.cache
def _load() -> tuple[Installed | None, str]:
    """What `installed` gives and "", or None and why not."""
    present = [g for g in GENERATIONS if importlib.util.find_spec(g.module.partition(".")[0])]
    if not present:
        names = " or ".join(generation.distribution for generation in GENERATIONS)
        return None, f"no flash-attn is installed ({names})"
    major = _capability()
    if major is None:
        return None, "torch sees no CUDA device"
    reasons: list[str] = []
    for generation in present:
        found = _open(generation, major)
        if isinstance(found, Installed):
            return found, ""
        reasons.append(found)
    return None, "; ".join(reasons)


def _capability() -> int | None:
    """Major number of the current GPU's compute capability; None without a GPU."""
    return torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else None


def _open(generation: Generation, major: int) -> Installed | str:
    """One generation's functions, or why they cannot be called here."""
    if major not in generation.capabilities:
        return f"{generation.distribution} has no code for compute capability {major}"
    try:
        module = importlib.import_module(generation.module)
    except Exception as error:  # of compiled code for another torch or CUDA: whatever it raises
        return f"{generation.distribution} failed to import: {error}"
    name = f"{generation.distribution} {_version(generation)}"
    functions: list[Callable[..., Any]] = []
    wanted = (_FORWARD, _BACKWARD), (generation.needs, ())
    for function, given, needs in zip(generation.functions, *wanted, strict=True):
        found: Callable[..., Any] | None = getattr(module, function, None)
        problem = "no such function" if found is None else _misfit(found, given, needs)
        if found is None or problem:
            return f"{name} is not one that is known: {function}: {problem}"
        others = _NOTHING.keys() & _parameters(found).keys() - set(given)
        functions.append(functools.partial(found, **{key: _NOTHING[key] for key in others}))
    return Installed(generation.number, name, *functions)


def _version(generation: Generation) -> str:
    """The version that is installed."""
    try:
        return metadata.version(generation.distribution)
    except metadata.PackageNotFoundError:
        return "of no known version"


def _misfit(function: Callable[..., Any], given: tuple[str, ...], needs: tuple[str, ...]) -> str:
    """What a function lacks of the parameters it is called with, and asks for besides, or ""."""
    parameters, known = _parameters(function), {*given, *_NOTHING}
    missing = (f"no parameter {key}" for key in (*given, *needs) if key not in parameters)
    unknown = (key for key, default in parameters.items() if not default and key not in known)
    return ", ".join([*missing, *(f"unknown parameter {key} without a default" for key in unknown)])


def _parameters(function: Callable[..., Any]) -> dict[str, bool]:
    """Name of each parameter -> whether it has a default."""
    overload = getattr(function, "_opoverload", None)
    if overload is not None:  # an op of torch.library, whose __call__ takes anything
        return {each.name: each.has_default_value() for each in overload._schema.arguments}
    found = inspect.signature(function).parameters
    return {key: each.default is not each.empty for key, each in found.items()}
