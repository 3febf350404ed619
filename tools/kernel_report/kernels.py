"""Every instance of our CUDA kernels: compiled, executed, counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tools.kernel_report.cases import Case, as_it_is, exactly
from tools.kernel_report.machine_code import MachineCode, machine_code
from tools.kernel_report.pipes import Work, modelled, work_of
from tools.kernel_report.waiting import modelled_waiting
from tools.simt import Result
from tools.simt.native_launch import SOURCES, native_on_ptx, ptx_of, signature
from tools.simt.parse import parse

ARCHS = (80, 90)


@dataclass
class Execution:
    """One launch of an instance by a case."""

    case: Case
    call: str
    result: Result
    work: Work
    errors: dict[str, dict[str, float]]  # of what the call returned

    @property
    def waits_alone(self) -> bool:
        """Whether one CTA was all, so that its traffic is in its own order, and awaited some."""
        awaited = any(event.kind == "awaited" for event in self.result.traffic)
        return awaited and self.result.num_ctas == 1


@dataclass
class Instance:
    """A kernel with its template arguments, for one architecture."""

    stem: str
    name: str
    arch: int
    code: MachineCode
    num_ptx_instructions: int
    executions: list[Execution] = field(default_factory=list)

    @property
    def issued_share(self) -> float:
        """Machine instructions for one of PTX; 1 where loops that ptxas unrolled hide it."""
        return min(1.0, self.code.num_instructions / max(1, self.num_ptx_instructions))

    @property
    def executed(self) -> bool:
        """Whether a case launched it."""
        return bool(self.executions)

    @property
    def largest(self) -> Execution | None:
        """The execution with the most warp instructions."""
        return _largest(self.executions)

    @property
    def largest_alone(self) -> Execution | None:
        """The largest of one CTA that waits for copies: the only ones whose waiting is modelled."""
        return _largest(each for each in self.executions if each.waits_alone)

    def row(self) -> dict[str, Any]:
        """The instance as JSON."""
        largest = self.largest
        row: dict[str, Any] = {
            "name": self.name,
            "stem": self.stem,
            "arch": self.arch,
            "registers": self.code.registers,
            "spills": self.code.spilled_bytes,
            "stack_bytes": self.code.stack_bytes,
            "shared_bytes": self.code.shared_bytes,
            "sass": self.code.sass,
            "executed": self.executed,
            "shapes": list(dict.fromkeys(each.case.shape for each in self.executions)),
        }
        if largest is not None:
            result = largest.result
            row["shared_bytes"] += max(e.result.dynamic_shared_bytes for e in self.executions)
            row["counted_shape"] = largest.case.shape
            row["error"] = largest.errors
            row["counters"] = {
                "warp instructions": result.num_warp_instructions,
                **dataclasses.asdict(largest.work),
                **result.counters,
            }
            row["modelled_cycles"] = modelled([largest.work])
        alone = self.largest_alone
        if alone is not None:
            found = modelled_waiting(alone.work, alone.result.traffic)
            row["modelled_waiting"] = {"shape": alone.case.shape, **found}
        return row


def stems() -> list[str]:
    """Stems of the files that hold kernels."""
    return [source.stem for source in SOURCES]


def instances(chosen: Iterable[str], archs: Sequence[int] = ARCHS) -> list[Instance]:
    """Every instance of the chosen stems, not yet executed.

    Args:
        chosen: of `stems`.
        archs: 80, 90.
    """
    found: list[Instance] = []
    for stem in chosen:
        (source,) = (source for source in SOURCES if source.stem == stem)
        for arch in archs:
            ptx = ptx_of(source, arch)
            code = machine_code(ptx, arch)
            for entry, kernel in parse(ptx).kernels.items():
                found.append(
                    Instance(stem, plain_name(entry), arch, code[entry], len(kernel.insts))
                )
    return found


def execute(found: Sequence[Instance], cases: Iterable[Case], arch: int) -> None:
    """Run cases and note what they launched with the instances.

    Args:
        found: of `instances`.
        cases: what is run; the launches must be of kernels of `found`.
        arch: 80 or 90.
    """
    by_name = {(each.name, each.arch): each for each in found}
    for case in cases:
        low = list(case.run(case.sizes, case.types, as_it_is, "reference"))
        truth = list(case.run(case.sizes, case.types, exactly, "reference"))
        with native_on_ptx(arch, profile=True) as results:
            calls = case.run(case.sizes, case.types, as_it_is, "native")
            for (call, expected), (_, wanted) in zip(low, truth, strict=True):
                before = len(results)
                _, outputs = next(calls)
                errors = {
                    key: {
                        "error": _error(outputs[key], wanted[key]),
                        "reference_error": _error(expected[key], wanted[key]),
                    }
                    for key in outputs
                }
                for result in results[before:]:
                    instance = by_name[plain_name(result.kernel.name), arch]
                    work = work_of(result, issued_share=instance.issued_share)
                    instance.executions.append(Execution(case, call, result, work, errors))


def plain_name(entry: str) -> str:
    """A kernel and its template arguments: gelu_forward_kernel<float, 4>.

    Args:
        entry: its mangled name.
    """
    return signature(entry).replace("(int)", "").replace("(bool)", "")


def _largest(executions: Iterable[Execution]) -> Execution | None:
    """The execution with the most warp instructions, the first of equal ones."""
    return max(executions, key=lambda each: each.result.num_warp_instructions, default=None)


def _error(out: Tensor, truth: Tensor) -> float:
    """Root-mean-square error of a result over that of the truth's values."""
    difference = (out.double() - truth).square().mean().sqrt()
    return float(difference / truth.square().mean().sqrt())
