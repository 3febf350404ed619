"""Launches of Triton kernels, executed by the interpreter instead of a GPU.

Inside `triton_on_cpu(80)`, `kernel[grid](...)` with CPU tensors compiles for sm_80 and runs the PTX
that a GPU of that kind would get, with every check but one: lanes of a warp that have added the
same numbers in another order all store their sum, and which of them wins is left to the GPU.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tools.simt.faults import Checks
from tools.simt.launch import Result, launch
from tools.simt.memory import Device


@dataclass(frozen=True)
class Compiled:
    """A launch as Triton would give it to a GPU."""

    kernel: str
    constants: dict[str, Any]
    num_warps: int
    shared_bytes: int
    ptx: str
    cubin: bytes


@contextlib.contextmanager
def triton_compiles(arch: int) -> Iterator[list[Compiled]]:
    """Compile Triton's launches here and run none; their tensors may be of the meta device.

    Args:
        arch: 80 or 90.
    Yields:
        All launches so far, those of one variant too.
    """
    launches: list[Compiled] = []

    def note(function: Any, compiled: Any, bound: Mapping[str, Any], _: Any, __: Any) -> None:
        constants = {p.name: bound[p.name] for p in function.params if p.is_constexpr}
        meta, code = compiled.metadata, compiled.asm
        launches.append(
            Compiled(meta.name, constants, meta.num_warps, meta.shared, code["ptx"], code["cubin"])
        )

    with _launches_taken(arch, note):
        yield launches


@contextlib.contextmanager
def triton_on_cpu(
    arch: int = 80, *, tables: Mapping[int, Sequence[Any]] | None = None, **launch_options: Any
) -> Iterator[list[Result]]:
    """Execute Triton's launches here.

    Args:
        arch: 80 or 90.
        tables: tensors that kernels find by their addresses in a table, by its `data_ptr()`.
        launch_options: of simt.launch: checks, schedule, profile.
    Yields:
        The results of all launches so far.
    """
    results: list[Result] = []

    def execute(
        function: Any, compiled: Any, bound: Mapping[str, Any], kinds: Mapping[str, str], grid: Any
    ) -> None:
        del function
        sizes = grid(bound) if callable(grid) else grid
        if 0 in sizes:
            return  # as Triton's own launcher
        device = Device()
        values = [
            _argument(bound[name], device, name, tables or {})
            for name, kind in kinds.items()
            if kind != "constexpr"
        ]
        meta = compiled.metadata
        results.append(
            launch(
                compiled.asm["ptx"],
                meta.name,
                sizes,
                32 * meta.num_warps,
                values,
                meta.shared,
                device=device,
                **launch_options,
            )
        )

    launch_options = {"checks": Checks(same_store=False), **launch_options}
    with _launches_taken(arch, execute):
        yield results


@contextlib.contextmanager
def _launches_taken(arch: int, take: Callable[..., None]) -> Iterator[None]:
    """Inside, launches of Triton are compiled and given to a function; torch can trace them too.

    Args:
        arch: 80 or 90.
        take: (kernel, compiled kernel, arguments by name, their types by name, grid).
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    made: dict[str, Any] = {}

    def run(function: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        del warmup
        kwargs["debug"] = False
        bound, signature, compiled = _compile(function, backend, target, made, args, kwargs)
        take(function, compiled, bound, signature, grid)

    original, active = JITFunction.run, driver._active
    JITFunction.run = run
    driver.set_active(types.SimpleNamespace(get_current_target=lambda: target))
    try:
        yield
    finally:
        driver.set_active(active)
        JITFunction.run = original


def _compile(
    function: Any, backend: Any, target: Any, made: dict[str, Any], args: Any, kwargs: Any
) -> tuple[dict[str, Any], dict[str, str], Any]:
    """Arguments by name, types by name, and the compiled kernel."""
    import triton
    from triton.compiler import ASTSource
    from triton.runtime.jit import create_function_from_signature

    binder = create_function_from_signature(function.signature, function.params, backend)
    bound, specialization, options = binder(*args, **kwargs)
    options, signature, constants, attrs = function._pack_args(
        backend, kwargs, bound, specialization, options
    )
    key = f"{function.cache_key} {specialization} {options}"
    if key not in made:
        source = ASTSource(function, signature, constants, attrs)
        made[key] = triton.compile(source, target=target, options=options.__dict__)
    return bound, signature, made[key]


def _argument(value: Any, device: Device, name: str, tables: Mapping[int, Sequence[Any]]) -> Any:
    """What a kernel is given for an argument, whose memory it may now use."""
    if not hasattr(value, "untyped_storage"):
        return value
    device.adopt_tensor(value, name)
    for place, tensor in enumerate(tables.get(value.data_ptr(), ())):
        device.adopt_tensor(tensor, f"{name}[{place}]")
    return np.uint64(value.data_ptr())
