"""Launches of the extension's CUDA kernels, executed by the interpreter instead of a GPU.

Inside `native_on_ptx(80)` the binding checks its arguments and chooses kernel, grid and Params as
on a GPU; what it would launch is noted and the PTX of the same source executed on tensors of the
CPU, at their own addresses, with every check on.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dinov2_fast import backends, native
from dinov2_fast.ops import _native_cuda
from tools import simt
from tools.simt.compile import extension_folders
from tools.simt.parse import parse
from tools.simt.program import Inst
from tools.simt.proofs.deletions import synchronises, without

ROOT = Path(__file__).parents[2]
_DEVICE, _STREAM = 3, 0x5EED  # which nobody gets who forgets to say where to launch
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


@contextlib.contextmanager
def native_on_ptx(
    arch: int = 80,
    *,
    edit: Callable[[str], str] | None = None,
    num_multiprocessors: int = 108,
    **launch_options: Any,
) -> Iterator[list[simt.Result]]:
    """Compute native ops on tensors of the CPU with the CUDA kernels.

    Args:
        arch: 80 or 90.
        edit: changes the PTX before it is executed.
        num_multiprocessors: of the GPU that is not there, as many as an A100 has; CTAs of a kernel
            that walks through its problems are no more.
        launch_options: of simt.launch: checks, schedule, profile.
    Yields:
        The results of all launches so far, in order.
    """
    reason = why_not()
    if reason:
        raise RuntimeError(f"native_on_ptx: {reason}")
    results: list[simt.Result] = []

    def call(
        name: str, plain: Mapping[str, Any], tensors: Mapping[str, Tensor], reached: Any
    ) -> None:
        module = native.module()
        module.record_launches_cuda(True, num_multiprocessors)
        try:
            getattr(module, name)(**plain, device=_DEVICE, stream=_STREAM)
            launches = module.take_launches_cuda()
        finally:
            module.record_launches_cuda(False)
        device = simt.Device()
        named = {**tensors, **{f"reached {i}": tensor for i, tensor in enumerate(reached)}}
        for label, tensor in named.items():
            device.adopt_tensor(tensor, label)
        for kernel, grid, block, shared_bytes, params, *where in launches:
            if where != [_DEVICE, _STREAM]:
                told = f"expected device {_DEVICE} and stream {_STREAM}, got {where}"
                raise RuntimeError(f"native_on_ptx: {name} launched elsewhere: {told}")
            ptx, entry = entry_of(name, kernel, arch)
            ptx = ptx if edit is None else edit(ptx)
            result = simt.launch(
                ptx, entry, grid, block, [params], shared_bytes, device=device, **launch_options
            )
            results.append(result)

    before = _native_cuda.call
    _native_cuda.call, native.cuda_on_cpu = call, True
    backends._why_not.cache_clear()
    try:
        yield results
    finally:
        _native_cuda.call, native.cuda_on_cpu = before, False
        backends._why_not.cache_clear()


def why_not() -> str:
    """Empty when CUDA kernels can be executed here, else why not."""
    if native.why_not():
        return native.why_not()
    if not native.cuda_archs():
        return "the extension was built without CUDA"
    try:
        ptx_of(SOURCES[0], 80)
    except FileNotFoundError as error:
        return str(error)
    return ""


@functools.cache
def ptx_of(source: Path, arch: int) -> str:
    """The PTX of a file of ours."""
    return simt.compile_cu(source, f"compute_{arch}", include=extension_folders(ROOT))


@functools.cache
def entry_of(function: str, kernel: str, arch: int) -> tuple[str, str]:
    """PTX, and the entry in it, of a kernel that a function of the extension launches.

    Args:
        function: layer_norm_forward_cuda; its kernel stands in a file of that stem.
        kernel: mangled name of the type KernelName<kernel>.
        arch: 80 or 90.
    """
    wanted = signature(kernel)
    stems = [source for source in SOURCES if function.startswith(f"{source.stem}_")]
    stem = max(stems, key=lambda source: len(source.stem)).stem
    for source in (source for source in SOURCES if source.stem.startswith(stem)):
        ptx = ptx_of(source, arch)
        for entry in parse(ptx).kernels:
            if signature(entry) == wanted:
                return alone(ptx, entry), entry
    raise LookupError(f"native_on_ptx: no kernel {wanted} in the files of {stem}")


def deletions(results: Iterable[simt.Result]) -> Iterator[Callable[[str], str]]:
    """Edits that each take one executed wait or barrier out of the kernels of these launches.

    Args:
        results: of launches inside `native_on_ptx`, whose `edit` they are for.
    """

    def delete(ptx: str, name: str, inst: Inst) -> str:
        return without(ptx, inst) if f".entry {name}(" in ptx else ptx

    seen = set()
    for result in results:
        for inst, count in result.instructions:
            place = result.kernel.name, inst.line
            if count and synchronises(inst) and place not in seen:
                seen.add(place)
                yield functools.partial(delete, name=result.kernel.name, inst=inst)


def alone(ptx: str, entry: str) -> str:
    """The PTX without the other entries, on the same lines: an edited one is soon parsed again.

    Args:
        ptx: of a file.
        entry: the one that stays.
    """

    def emptied(found: re.Match[str]) -> str:
        return found[0] if found[1] == entry else "\n" * found[0].count("\n")

    return re.sub(r"^(?:\.visible )?\.entry (\w+)\(.*?^}$", emptied, ptx, flags=re.M | re.S)


def signature(mangled: str) -> str:
    """A kernel and its template arguments without namespaces and parameters.

    Host and device mangle an anonymous namespace differently, and the host's name is a type's.
    """
    demangle = ctypes.CDLL("libstdc++.so.6").__cxa_demangle
    demangle.restype = ctypes.c_char_p
    status = ctypes.c_int()
    plain = demangle(mangled.encode(), None, None, ctypes.byref(status)).decode()
    for noise in ("dinov2_fast::", "(anonymous namespace)::", "KernelName<&", "void "):
        plain = plain.replace(noise, "")
    plain = plain.removeprefix("(")
    # The type of a kernel without template arguments does not spell its parameters out.
    return plain[: plain.rindex("(")] if "(" in plain else plain.removesuffix(">")
