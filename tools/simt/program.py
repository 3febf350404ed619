"""A PTX program as data: registers, operands, instructions, kernels."""

from __future__ import annotations

from dataclasses import dataclass, field

TYPE_BYTES = {
    "pred": 1,
    **{f"{kind}{bits}": bits // 8 for kind in "usb" for bits in (8, 16, 32, 64)},
    **{"f16": 2, "bf16": 2, "f16x2": 4, "bf16x2": 4, "tf32": 4, "f32": 4, "f64": 8, "b128": 16},
}
SPACES = ("param", "shared", "global", "local", "const", "reg")


@dataclass(frozen=True)
class Reg:
    """A register; `name` is unique within the kernel."""

    name: str
    type: str


@dataclass(frozen=True)
class Imm:
    """A literal: an integer, or the bits of a float of the kind f32 or f64."""

    bits: int
    kind: str = "int"


@dataclass(frozen=True)
class Symbol:
    """A label, a variable (plus bytes), a parameter or a special register."""

    name: str
    offset: int = 0
    scopes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Mem:
    """[base + offset], or [base, {coordinates}] of a tensor copy."""

    base: Operand
    offset: int = 0
    coordinates: tuple[Operand, ...] = ()


@dataclass(frozen=True)
class Vec:
    """{a, b, ...}"""

    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Pair:
    """a|b: two destinations."""

    first: Operand
    second: Operand


@dataclass(frozen=True)
class Not:
    """!p"""

    reg: Operand


Operand = Reg | Imm | Symbol | Mem | Vec | Pair | Not | None  # None is the sink `_`


@dataclass
class Inst:
    """One instruction: `op.mods operands`, guarded by a predicate or not."""

    op: str
    mods: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: tuple[Reg, bool] | None  # register and whether it is negated
    line: int
    source: tuple[str, int] | None
    text: str

    @property
    def type(self) -> str:
        """The last type among the modifiers, which is the type of the sources."""
        return next((mod for mod in reversed(self.mods) if mod in TYPE_BYTES), "b32")

    @property
    def types(self) -> list[str]:
        """Every type among the modifiers, in order."""
        return [mod for mod in self.mods if mod in TYPE_BYTES]

    def __str__(self) -> str:
        """Line, source line and text, for reports."""
        where = f" ({self.source[0]}:{self.source[1]})" if self.source else ""
        return f"PTX line {self.line}{where}: {self.text}"


@dataclass
class Variable:
    """A declared variable or parameter; `offset` is its place among the kernel's parameters."""

    name: str
    space: str
    type: str
    num_bytes: int
    align: int
    data: bytes = b""
    extern: bool = False
    offset: int = 0


@dataclass
class Kernel:
    """An entry: parameters, registers, variables, instructions, and label -> instruction."""

    name: str
    params: list[Variable] = field(default_factory=list)
    regs: dict[str, str] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)
    insts: list[Inst] = field(default_factory=list)
    labels: dict[tuple[int, str], int] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)  # of brx.idx

    def target(self, symbol: Symbol) -> int:
        """The instruction a label stands before, seen from the symbol's scopes."""
        for scope in reversed(symbol.scopes):
            if (scope, symbol.name) in self.labels:
                return self.labels[scope, symbol.name]
        raise KeyError(f"{self.name}: no label {symbol.name}")


@dataclass
class Module:
    """A PTX file."""

    kernels: dict[str, Kernel]
    variables: list[Variable]
    target: str

    def kernel(self, name: str) -> Kernel:
        """The kernel of that name, or the only one whose name contains it."""
        if name in self.kernels:
            return self.kernels[name]
        found = [kernel for key, kernel in self.kernels.items() if name in key]
        if len(found) != 1:
            raise ValueError(f"simt: {len(found)} kernels match {name!r}: {sorted(self.kernels)}")
        return found[0]
