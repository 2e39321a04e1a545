"""Reads the text of an optimised HLO module: computations, instructions, shapes, and how often each computation runs.

A `while` runs its body as often as the compiler says (`known_trip_count`, CPU and GPU) or as its condition shows: a counter compared with a constant
(TPU, where every `lax.scan` looks like that). What is inside a fusion is one pass over memory and is no computation of its own here.
"""
from collections.abc import Iterator, Mapping
import dataclasses
import math
import re

DTYPE_BYTES = {"pred": 1, "s2": 0.25, "u2": 0.25, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4,
               "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16, "token": 0, "opaque": 0}
HBM = 0   # memory space of a device's main memory; others (`S(1)` in a layout: VMEM on a TPU) are on the chip

_SHAPE = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_TRIP = re.compile(r'known_trip_count"?:\s*\{\s*"?n"?:\s*"?(\d+)')


@dataclasses.dataclass(frozen=True)
class Buffer:
    """One array: dtype, dimensions, memory space."""
    dtype: str
    dims: tuple[int, ...]
    space: int = HBM

    @property
    def bytes(self) -> int:
        """Bytes without the padding of the layout."""
        width = DTYPE_BYTES.get(self.dtype, 1 if self.dtype.startswith("f8") else 4)
        return math.ceil(math.prod(self.dims) * width)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(str(size) for size in self.dims)}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `%name = shape opcode(operands), attributes`; `buffers` are the leaves of its shape."""
    name: str
    opcode: str
    buffers: tuple[Buffer, ...]
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    root: bool

    def called(self, key: str) -> list[str]:
        """Names of the computations of the attribute `key`, as `calls=%a` or `branch_computations={%a, %b}`."""
        match = re.search(rf"\b{key}=(?:\{{([^}}]*)\}}|%?([\w.\-]+))", self.attributes)
        if not match:
            return []
        return _NAME.findall(match[1]) if match[1] is not None else [match[2]]

    @property
    def source(self) -> str:
        """The operation of the traced program that it came from (`op_name`), or its own name."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else self.name

    def bytes(self, space: int = HBM) -> int:
        """Bytes of its results in a memory space."""
        return sum(buffer.bytes for buffer in self.buffers if buffer.space == space)


@dataclasses.dataclass(frozen=True)
class Module:
    """The computations of a module, {name: {instruction's name: instruction}}, and the name of the entry."""
    computations: Mapping[str, Mapping[str, Instruction]]
    entry: str

    def root(self, computation: str) -> Instruction:
        """The instruction that a computation returns."""
        instructions = self.computations[computation]
        return next((one for one in instructions.values() if one.root), next(reversed(instructions.values())))

    def runs(self) -> dict[str, float]:
        """Returns {computation: how often it runs}, of the entry and what it calls; bodies of fusions and reductions are left out.

        Every branch of a conditional counts as taken; a loop whose length is not to be seen counts once.
        """
        counts: dict[str, float] = {}

        def visit(name: str, times: float) -> None:
            counts[name] = counts.get(name, 0.0) + times
            for instruction in self.computations[name].values():
                for called, turns in self._calls(instruction, name):
                    if called in self.computations:
                        visit(called, times * turns)
        visit(self.entry, 1.0)
        return counts

    def _calls(self, instruction: Instruction, where: str) -> Iterator[tuple[str, float]]:
        if instruction.opcode == "while":
            turns = trip_count(self, instruction, where) or 1
            yield instruction.called("body")[0], turns
        elif instruction.opcode == "conditional":
            for key in ("branch_computations", "true_computation", "false_computation"):
                for name in instruction.called(key):
                    yield name, 1
        elif instruction.opcode in ("call", "async-start"):
            for name in instruction.called("to_apply") or instruction.called("calls"):
                yield name, 1


def parse(text: str) -> Module:
    """Parses the text of a module (`compiled.as_text()`).

    Raises:
      ValueError: if it has no entry computation.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    current: dict[str, Instruction] | None = None
    entry = ""
    for line in text.splitlines():
        if current is None:
            header = _HEADER.match(line)
            if header:
                current = computations.setdefault(header[2], {})
                entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        else:
            instruction = _instruction(line.strip())
            if instruction:
                current[instruction.name] = instruction
    if not entry:
        raise ValueError("the text holds no ENTRY computation; give the whole text of a compiled HLO module.")
    return Module(computations, entry)


def shapes(text: str) -> tuple[Buffer, ...]:
    """The arrays of a shape's text, of a tuple all its leaves."""
    found = []
    for dtype, dims, layout in _SHAPE.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(size.lstrip("<=")) for size in dims.split(",") if size.lstrip("<="))
        found.append(Buffer(dtype, sizes, int(space[1]) if space else HBM))
    return tuple(found)


def _instruction(line: str) -> Instruction | None:
    root = line.startswith("ROOT ")
    name, equals, rest = line.removeprefix("ROOT ").partition(" = ")
    if not equals:
        return None
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, parenthesis, _ = rest.partition("(")
    if not parenthesis:
        return None
    close = _closing(rest, len(opcode))
    arguments, attributes = rest[len(opcode) + 1:close], rest[close + 1:]
    return Instruction(name.lstrip("%"), opcode.strip(), shapes(shape), tuple(_NAME.findall(arguments)), arguments, attributes, root)


def _closing(text: str, start: int) -> int:
    """The position of the parenthesis that closes the one at `start`; text in quotes does not count."""
    depth, quoted = 0, False
    for position in range(start, len(text)):
        letter = text[position]
        if letter == '"':
            quoted = not quoted
        elif quoted:
            continue
        elif letter == "(":
            depth += 1
        elif letter == ")":
            depth -= 1
            if depth == 0:
                return position
    return len(text) - 1


def trip_count(module: Module, loop: Instruction, where: str) -> int | None:
    """How often the `while` instruction `loop` of computation `where` runs its body, or None if that depends on data."""
    known = _TRIP.search(loop.attributes)
    if known:
        return int(known[1])
    condition = module.computations[loop.called("condition")[0]]
    compare, constants = _comparison(module, condition)
    if compare is None:
        return None
    match = re.search(r"direction=(LT|LE|GT|GE|NE)", compare.attributes)
    counters = [one for one in compare.operands if one not in constants]
    if match is None or len(counters) != 1 or len(constants) != 1:
        return None
    (limit,) = constants.values()
    index = _tuple_index(condition, counters[0])
    start, step = 0, 1
    if index is not None:
        start = _initial(module, where, loop, index)
        step = _increment(module, loop.called("body")[0], index)
    if not step:
        return None
    span = (limit - start) / step
    if (compare.operands[0] in constants) != (match[1] in ("LE", "GE")):   # a constant on the left, or a limit that is still reached
        span = math.floor(span) + 1 if match[1] in ("LE", "GE") else span
    return max(0, math.ceil(span))


def _comparison(module: Module, condition: Mapping[str, Instruction]) -> tuple[Instruction | None, dict[str, int]]:
    """The comparison that a loop's condition returns (one call or fusion deep), and the constants among its operands."""
    root = next((one for one in condition.values() if one.root), None)
    if root is None:
        return None, {}
    if root.opcode == "compare":
        return root, {name: value for name in root.operands if (value := _constant(condition.get(name))) is not None}
    inner = root.called("calls") or root.called("to_apply")
    if not inner or inner[0] not in module.computations:
        return None, {}
    body = module.computations[inner[0]]
    compare = module.root(inner[0])
    if compare.opcode != "compare":
        return None, {}
    # Operands of the inner comparison are parameters; put the outer operands in their places.
    outer = [root.operands[int(body[name].arguments)] if body[name].opcode == "parameter" else name for name in compare.operands]
    known = {**body, **condition}
    return dataclasses.replace(compare, operands=tuple(outer)), {name: value for name in outer if (value := _constant(known.get(name))) is not None}


def _constant(instruction: Instruction | None) -> int | None:
    if instruction is None or instruction.opcode != "constant" or not re.fullmatch(r"-?\d+", instruction.arguments):
        return None
    return int(instruction.arguments)


def _tuple_index(computation: Mapping[str, Instruction], name: str) -> int | None:
    instruction = computation.get(name)
    while instruction is not None and instruction.opcode in ("copy", "bitcast", "convert"):
        instruction = computation.get(instruction.operands[0])
    if instruction is None or instruction.opcode != "get-tuple-element":
        return None
    match = re.search(r"index=(\d+)", instruction.attributes)
    return int(match[1]) if match else None


def _initial(module: Module, where: str, loop: Instruction, index: int) -> int:
    """The counter's first value; 0 where the compiler computes it."""
    computation = module.computations[where]
    value = computation.get(loop.operands[0])
    if value is not None and value.opcode == "tuple" and index < len(value.operands):
        value = computation.get(value.operands[index])
        while value is not None and value.opcode in ("copy", "bitcast", "convert"):
            value = computation.get(value.operands[0])
        return _constant(value) or 0
    return 0


def _increment(module: Module, body: str, index: int) -> int:
    """By how much the body raises the counter; 1 where that is not plain to see."""
    computation = module.computations[body]
    root = module.root(body)
    if root.opcode == "tuple" and index < len(root.operands):
        update = computation.get(root.operands[index])
        if update is not None and update.opcode == "add":
            for name in update.operands:
                if (value := _constant(computation.get(name))) is not None:
                    return value
    return 1
