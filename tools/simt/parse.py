"""PTX text -> kernels made of instructions, names resolved and source lines attached.

Source: PTX ISA manual, sections 4 (syntax) and 5 (state spaces, types, variables).
"""

from __future__ import annotations

import bisect
import functools
import re
import struct
from collections.abc import Iterator

from tools.simt.program import (
    SPACES,
    TYPE_BYTES,
    Imm,
    Inst,
    Kernel,
    Mem,
    Module,
    Not,
    Operand,
    Pair,
    Reg,
    Symbol,
    Variable,
    Vec,
)

_STATEMENT = re.compile(
    r"(?P<space>\s+)"
    r"|(?P<loc>\.loc\b[^\n]*)"
    r"|(?P<file>\.file\b[^\n]*)"
    r"|(?P<target>\.target\b[^\n]*)"
    r"|(?P<skip>\.(?:version|address_size)\b[^\n]*|\.section[^{]*\{[^}]*\})"
    r"|(?P<header>(?:\.(?:visible|weak|extern)\s+)*\.(?:entry|func)\b)"
    r"|(?P<open>\{)|(?P<close>\})"
    r"|(?P<label>[\w$%]+\s*:(?!:))"
    r"|(?P<statement>[^;]*;)"
)
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_INST = re.compile(r"(?:@(!?)([\w%$]+)\s+)?([a-z]\w*)((?:\.[\w:]+)*)\s*(.*)", re.DOTALL)
_ENTRY = re.compile(r"\s*([\w$]+)\s*(?:\(([^)]*)\))?([^{;]*)([{;])")
_RANGE = re.compile(r"(.*?)<(\d+)>$")
_NUMBERED = re.compile(r"(.*?)(\d+)$")
_NUMBER = re.compile(r"-?(?:0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|0[xX][0-9a-fA-F]+|\d+)U?$")
_DECIMAL = re.compile(r"-?\d+\.\d*(?:[eE][-+]?\d+)?$")


class _Scope:
    """Registers declared between two braces."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.names: dict[str, str] = {}
        self.ranges: dict[str, tuple[str, int]] = {}


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = _COMMENT.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)
        self.newlines = [found.start() for found in re.finditer("\n", self.text)]
        self.files = dict(_files(self.text))
        self.module = Module({}, [], "")
        self.kernel: Kernel | None = None
        self.scopes: list[_Scope] = []
        self.num_scopes = 0
        self.source: tuple[str, int] | None = None

    def parse(self) -> Module:
        at = 0
        while at < len(self.text):
            found = _STATEMENT.match(self.text, at)
            if found is None:
                raise ValueError(f"simt: cannot parse PTX line {self.line(at)}")
            kind, content = found.lastgroup, found[0]
            at = found.end()
            if kind == "loc":
                number, line = content.split()[1:3]
                self.source = (self.files.get(int(number), f"file {number}"), int(line))
            elif kind == "target":
                self.module.target = content.split()[1].rstrip(",")
            elif kind == "header":
                at = self.header(content, at)
            elif kind == "open":
                self.open()
            elif kind == "close":
                self.scopes.pop()
                if not self.scopes:
                    self.kernel = None
            elif kind == "label" and self.kernel:
                place = (self.scopes[-1].number, content[:-1].strip())
                self.kernel.labels[place] = len(self.kernel.insts)
            elif kind == "statement":
                self.statement(content[:-1].strip(), found.start())
        return self.module

    def line(self, at: int) -> int:
        return bisect.bisect_left(self.newlines, at) + 1

    def open(self) -> None:
        self.num_scopes += 1
        self.scopes.append(_Scope(self.num_scopes))

    def header(self, kind: str, at: int) -> int:
        """A kernel's head; functions are skipped, and calling one is an unknown instruction."""
        if kind.endswith(".func"):
            end = re.compile(r"[{;]").search(self.text, at)
            assert end is not None
            return end.end() if end[0] == ";" else self.closing(end.end())
        found = _ENTRY.match(self.text, at)
        assert found is not None
        name, params, _, last = found.groups()
        if last == ";":
            return found.end()
        self.kernel = self.module.kernels[name] = Kernel(name)
        offset = 0
        for declaration in (params or "").split(","):
            if declaration.strip():
                param = _variable(declaration.strip())
                offset = -(-offset // param.align) * param.align
                param.offset = offset
                offset += param.num_bytes
                self.kernel.params.append(param)
        self.open()
        return found.end()

    def closing(self, at: int) -> int:
        depth = 1
        while depth:
            depth += {"{": 1, "}": -1}.get(self.text[at], 0)
            at += 1
        return at

    def statement(self, text: str, at: int) -> None:
        if text.startswith(".reg"):
            self.registers(text)
        elif text.startswith((".pragma", ".callprototype", ".alias")):
            pass
        elif text.startswith(".branchtargets") and self.kernel:
            place, index = list(self.kernel.labels.items())[-1]
            assert index == len(self.kernel.insts)
            self.kernel.tables[place[1]] = re.findall(r"[\w$]+", text[len(".branchtargets") :])
        elif text.startswith("."):
            home = self.kernel.variables if self.kernel else self.module.variables
            home.append(_variable(text))
        elif text:
            at += len(self.text[at:]) - len(self.text[at:].lstrip())
            self.instruction(text, self.line(at))

    def registers(self, text: str) -> None:
        assert self.kernel is not None
        type_name, names = text.split(None, 2)[1:]
        scope = self.scopes[-1]
        suffix = "" if len(self.scopes) == 1 else f"@{scope.number}"
        for name in (part.strip() for part in names.split(",")):
            ranged = _RANGE.match(name)
            if ranged:
                scope.ranges[ranged[1]] = (type_name[1:], int(ranged[2]))
            else:
                scope.names[name] = name + suffix
                self.kernel.regs[name + suffix] = type_name[1:]

    def register(self, name: str) -> Reg | None:
        assert self.kernel is not None
        numbered = _NUMBERED.match(name)
        for scope in reversed(self.scopes):
            if name in scope.names:
                unique = scope.names[name]
                return Reg(unique, self.kernel.regs[unique])
            if numbered and numbered[1] in scope.ranges:
                type_name, count = scope.ranges[numbered[1]]
                if int(numbered[2]) < count:
                    unique = name if len(self.scopes) == 1 else f"{name}@{scope.number}"
                    unique = name if scope is self.scopes[0] else unique
                    self.kernel.regs[unique] = type_name
                    return Reg(unique, type_name)
        return None

    def instruction(self, text: str, line: int) -> None:
        assert self.kernel is not None
        found = _INST.match(text)
        if found is None:
            raise ValueError(f"simt: cannot parse PTX line {line}: {text}")
        negated, guard, op, mods, rest = found.groups()
        mods = mods.replace("shared::cta", "shared")
        operands = tuple(self.operand(part) for part in _split(rest))
        guard_reg = self.register(guard) if guard else None
        self.kernel.insts.append(
            Inst(
                op,
                tuple(mods.split(".")[1:]),
                operands,
                (guard_reg, bool(negated)) if guard_reg else None,
                line,
                self.source,
                " ".join(text.split()),
            )
        )

    def operand(self, text: str) -> Operand:
        text = text.strip()
        if text == "_":
            return None
        if text.startswith("["):
            parts = _split(text[1:-1])
            inner = tuple(self.operand(part) for part in parts[1:])
            base, offset = _base_and_offset(parts[0])
            items = inner[0].items if inner and isinstance(inner[0], Vec) else inner
            return Mem(self.operand(base), offset, items)
        if text.startswith("{"):
            return Vec(tuple(self.operand(part) for part in _split(text[1:-1])))
        if text.startswith("!"):
            return Not(self.operand(text[1:]))
        if "|" in text:
            first, second = text.split("|")
            return Pair(self.operand(first), self.operand(second))
        if _NUMBER.match(text) or _DECIMAL.match(text):
            return _literal(text)
        register = self.register(text)
        if register is not None:
            return register
        name, offset = _base_and_offset(text)
        return Symbol(name, offset, tuple(scope.number for scope in self.scopes))


def _files(text: str) -> Iterator[tuple[int, str]]:
    for number, path in re.findall(r"\.file\s+(\d+)\s+(.*)", text):
        names = re.findall(r'"([^"]*)"', path)
        yield int(number), (names[-1] if names else path).rsplit("/", 1)[-1]


def _split(text: str) -> list[str]:
    """Parts between commas that stand outside brackets."""
    parts, depth, begin = [], 0, 0
    for at, character in enumerate(text):
        if character in "[{(":
            depth += 1
        elif character in "]})":
            depth -= 1
        elif character == "," and not depth:
            parts.append(text[begin:at])
            begin = at + 1
    return [*parts, text[begin:]] if text[begin:].strip() else parts


def _base_and_offset(text: str) -> tuple[str, int]:
    found = re.match(r"(.+?)\s*([+-])\s*(-?\d+|-?0x[0-9a-fA-F]+)$", text.strip())
    if not found:
        return text.strip(), 0
    return found[1], int(found[3], 0) * (-1 if found[2] == "-" else 1)


def _literal(text: str) -> Imm:
    sign = -1 if text.startswith("-") else 1
    digits = text.lstrip("-").rstrip("U")
    if digits[:2] in ("0f", "0F"):
        return Imm(int(digits[2:], 16), "f32")
    if digits[:2] in ("0d", "0D"):
        return Imm(int(digits[2:], 16), "f64")
    if "." in digits:
        return Imm(struct.unpack("<Q", struct.pack("<d", sign * float(digits)))[0], "f64")
    if len(digits) > 1 and digits[0] == "0" and digits.isdigit():
        return Imm(sign * int(digits, 8))
    return Imm(sign * int(digits, 0))


def _variable(text: str) -> Variable:
    declaration, _, initial = text.partition("=")
    words = declaration.split()
    flat = " ".join(words)
    space = next(word[1:] for word in words if word[1:] in SPACES)
    type_name = next(word[1:] for word in words if word[1:] in TYPE_BYTES)
    aligned = re.findall(r"\.align (\d+)", re.sub(r"\.ptr.*?\.align \d+", "", flat))
    sizes = re.findall(r"\[(\d*)\]", flat)
    name = re.sub(r"\[.*", "", flat).split()[-1]
    size = TYPE_BYTES[type_name]
    count = 1
    for part in sizes:
        count *= int(part or 0)
    numbers = re.findall(r"-?\b(?:0[fFdDxX][0-9a-fA-F]+|\d+)\b", initial)
    values = [_literal(number).bits & (1 << 8 * size) - 1 for number in numbers]
    return Variable(
        name,
        space,
        type_name,
        size * count,
        int(aligned[0]) if aligned else size,
        b"".join(value.to_bytes(size, "little") for value in values),
        ".extern" in words,
    )


@functools.lru_cache(maxsize=64)
def parse(text: str) -> Module:
    """Parse PTX; the same text is parsed once."""
    return _Parser(text).parse()
