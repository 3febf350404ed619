"""Delete the synchronisation of programs that are right, one instruction at a time.

Every deletion must be reported, though most of them change no result.
"""

from __future__ import annotations

from dataclasses import dataclass

from tools.simt.faults import Fault
from tools.simt.program import Inst
from tools.simt.proofs.own_programs import Program

TRUE = "setp.eq.u32 {}, 0, 0;"  # what a wait that has been deleted says


@dataclass
class Deletion:
    """One deleted instruction, and the kind of fault that was reported ("" for none)."""

    program: str
    inst: str
    reported: str
    error: float


def synchronises(inst: Inst) -> bool:
    """Whether an instruction orders something or waits for something."""
    if inst.op in ("bar", "barrier", "membar", "fence"):
        return "mbarrier_init" not in inst.mods
    if inst.op == "mbarrier":
        return inst.mods[0] != "inval"
    if inst.op == "wgmma":
        return inst.mods[0] != "mma_async"
    waits = {"commit_group", "wait_group", "wait_all", "mbarrier"}
    return inst.op == "cp" and bool(waits & set(inst.mods)) and "tensor" not in inst.mods


def without(ptx: str, inst: Inst) -> str:
    """The program without one instruction, on the same lines."""
    lines = ptx.split("\n")
    index = inst.line - 1
    text = inst.text.split(None, 1)
    replacement = ""
    if inst.op == "mbarrier" and inst.mods[0] in ("try_wait", "test_wait"):
        replacement = TRUE.format(text[1].split(",")[0])
    statement = " ".join(lines[index].split())
    assert inst.text in statement, (inst.text, statement)
    lines[index] = statement.replace(inst.text + ";", replacement, 1)
    return "\n".join(lines)


def delete_each(program: Program) -> list[Deletion]:
    """Run a program without each of the synchronising instructions that it executes."""
    ptx = program.ptx()
    error, result = program.run(ptx)
    assert error <= program.tolerance, program.name
    outcomes = []
    for inst, count in result.instructions:
        if count and synchronises(inst):
            reported = ""
            try:
                error, _ = program.run(without(ptx, inst))
            except Fault as fault:
                reported, error = fault.kind, float("nan")
            outcomes.append(Deletion(program.name, str(inst), reported, error))
    return outcomes
