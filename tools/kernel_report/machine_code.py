"""What ptxas makes of kernels: registers, spills, shared memory and the mix of instructions."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tools.simt.compile import assemble

# Opcodes whose width or function says what matters, and the modifiers that say it.
_WIDE = {"LDG", "STG", "LDS", "STS", "LDL", "STL", "LDGSTS"}
_NAMED = {"MUFU", "LDSM", "STSM"}
_WIDTHS = re.compile(r"\.(?:[US])?(8|16|64|128)\b")


@dataclass(frozen=True)
class MachineCode:
    """One kernel as ptxas left it."""

    registers: int
    spilled_bytes: int  # stores and loads of registers in local memory
    stack_bytes: int
    shared_bytes: int  # static
    sass: dict[str, int]  # opcode -> how often it stands in the code

    @property
    def num_instructions(self) -> int:
        """Instructions that stand in the code."""
        return sum(self.sass.values())


def machine_code(ptx: str, arch: int) -> dict[str, MachineCode]:
    """Entry -> its machine code.

    Args:
        ptx: of a file, with all its entries.
        arch: 80 or 90.
    """
    cubin, said = assemble(ptx, f"sm_{arch}")
    mixes = dict(_mixes(_said_of(cubin, "-sass")))
    found: dict[str, MachineCode] = {}
    for entry, words in _of_entries(said):
        stack, stores, loads = (
            int(number)
            for number in re.findall(
                r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", words
            )[0]
        )
        shared = re.search(r"(\d+) bytes smem", words)
        found[entry] = MachineCode(
            registers=int(re.findall(r"Used (\d+) registers", words)[0]),
            spilled_bytes=stores + loads,
            stack_bytes=stack,
            shared_bytes=int(shared.group(1)) if shared else 0,
            sass=mixes[entry],
        )
    return found


def of_cubin(cubin: bytes) -> MachineCode:
    """The only kernel of a cubin; what it spills is counted in its instructions.

    Args:
        cubin: as Triton keeps it; its shared memory is dynamic and not told here.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        said = _said_of(path, "-res-usage", "-sass")
    ((_, sass),) = _mixes(said)
    registers, stack, shared = (
        int(re.findall(rf"\b{name}:(\d+)", said)[0]) for name in ("REG", "STACK", "SHARED")
    )
    local = {opcode: n for opcode, n in sass.items() if opcode.startswith(("LDL.", "STL."))}
    spilled = sum(int(opcode.split(".")[1]) // 8 * count for opcode, count in local.items())
    return MachineCode(registers, spilled, stack, shared, sass)


def short(opcode: str) -> str:
    """An opcode with the modifiers that a mix tells apart: LDG.E.128.CONSTANT is LDG.128.

    Args:
        opcode: as the disassembler spells it.
    """
    base = opcode.split(".")[0]
    if base in _WIDE:
        width = _WIDTHS.search(opcode)
        return f"{base}.{width.group(1) if width else 32}"
    if base in _NAMED:
        return f"{base}.{opcode.split('.')[-1 if base != 'MUFU' else 1]}"
    return base


def _of_entries(said: str) -> Iterator[tuple[str, str]]:
    """Every entry with what ptxas says of it."""
    parts = re.split(r"Compiling entry function '(\w+)'", said)
    yield from zip(parts[1::2], parts[2::2], strict=True)


def _said_of(cubin: Path, *options: str) -> str:
    """What the disassembler that comes with Triton says of a cubin."""
    import triton

    command = [triton.knobs.nvidia.cuobjdump.path, *options, str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _mixes(listing: str) -> Iterator[tuple[str, dict[str, int]]]:
    """Every entry with the instructions of its code, without the padding behind it."""
    parts = re.split(r"Function : (\w+)", listing)
    for entry, code in zip(parts[1::2], parts[2::2], strict=True):
        lines = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", code)
        mix = Counter(short(opcode) for opcode in lines if opcode != "NOP")
        yield entry, dict(sorted(mix.items()))
