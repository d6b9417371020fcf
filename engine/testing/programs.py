"""Random programs: computation graphs with diamonds, reuse, views, writes in place, detach and checkpoints.

    program = build((3, 4), [(1, 0, True)], [(7, 0, 0, 0), (2, 0, 1, 0)])
    print(program.source())             # Python that one can run
    check_program(program)

A Program is a list of instructions (forms.py has the kinds). Its source is what the engine runs; the same instructions
are interpreted in NumPy over float64 (the oracle of values, and by differences of gradients) and over Rounded numbers
(the bounds). So no part of the engine vouches for another.

Every list of numbers makes a program: an instruction that fits nowhere is left out, and operands are counted back from
the newest. So Hypothesis shrinks lists (strategies.programs), and what remains is a few instructions.

Liu et al. 2023, "NNSmith: Generating Diverse and Valid Test Cases for Deep Learning Compilers", arXiv:2207.13066.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import engine as eg
from engine.testing.checks import check_adjoint, check_bits, check_close, check_second_order
from engine.testing.failure import CheckFailure
from engine.testing.forms import FORMS, Form
from engine.testing.rounded import Number, Rounded

LARGEST = 32.0  # no value of a program is larger: differences resolve what is not steep
MOST_ELEMENTS = 96


def values(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Multiples of 1/32 in [−2, 2]: exact in every type, and few enough to tie now and then."""
    return np.asarray(np.random.default_rng(seed).integers(-64, 65, shape) / 32)


@dataclass(frozen=True)
class Input:
    """A leaf: its values are values(shape, seed). Without grad it is a constant that the program makes itself."""

    shape: tuple[int, ...]
    seed: int
    requires_grad: bool = True

    @property
    def text(self) -> str:
        return f"eg.tensor(np.random.default_rng({self.seed}).integers(-64, 65, {self.shape}) / 32, dtype"


@dataclass(frozen=True)
class Step:
    """One instruction: result = form(operands). Variables count from the inputs on; a write's result is its target."""

    form: str
    operands: tuple[int, ...]
    result: int
    attributes: dict[str, Any] = field(default_factory=dict)

    def text(self) -> str:
        form = FORMS[self.form]
        body = form.text.format(*[f"v{i}" for i in self.operands], **self.attributes)
        return body if form.writes else f"v{self.result} = {body}"


@dataclass(frozen=True)
class Program:
    """Instructions over inputs. blocks: ranges [first, last] of steps that run in one eg.checkpoint each."""

    inputs: tuple[Input, ...]
    steps: tuple[Step, ...] = ()
    blocks: tuple[tuple[int, int], ...] = ()

    # ── what it is ──────────────────────────────────────────────────────────────────────────────────

    def tracked(self) -> set[int]:
        """The variables that gradients flow to, at the end."""
        found = {i for i, given in enumerate(self.inputs) if given.requires_grad}
        for step in self.steps:
            if FORMS[step.form].tracks(step.operands, found):
                found.add(step.result)
        return found

    def hidden(self) -> set[int]:
        """The variables inside checkpoints, but for their results."""
        return {step.result for first, last in self.blocks for step in self.steps[first:last]
                if step.result != self.steps[last].result}

    def outputs(self) -> list[int]:
        """What no later step consumes, or the last step's result: inputs only where there is nothing else."""
        made = [step.result for step in self.steps]
        if not made:
            return [i for i, given in enumerate(self.inputs) if given.requires_grad]
        tracked = self.tracked()
        used = {i for step in self.steps for i in step.operands if i != step.result
                and (FORMS[step.form].through is None or i not in tracked)}
        open_ends = [i for i in dict.fromkeys(made) if i not in used and i not in self.hidden()]
        return open_ends or [made[-1]]

    # ── as Python ───────────────────────────────────────────────────────────────────────────────────

    def body(self, outputs: Sequence[int]) -> list[str]:
        """The lines of the function, from constants to return."""
        lines = [f"v{i} = {given.text})" for i, given in enumerate(self.inputs) if not given.requires_grad]
        starts, inside = dict(self.blocks), -1
        for i, step in enumerate(self.steps):
            if i in starts:
                inside = starts[i]
                taken = self._taken(i, inside)
                lines.append(f"def block{i}({taken}):")
            lines.append("    " * (i <= inside) + step.text())
            if i == inside:
                result = f"v{step.result}"
                lines += [f"    return {result}", f"{result} = eg.checkpoint(block{self._start(i)}, "
                                                  f"{self._taken(self._start(i), i)})"]
        return [*lines, f"return [{', '.join(f'v{i}' for i in outputs)}]"]

    def _start(self, last: int) -> int:
        return next(first for first, end in self.blocks if end == last)

    def _taken(self, first: int, last: int) -> str:
        """The variables that a block takes from outside."""
        made = {step.result for step in self.steps[first:last + 1]}
        used = dict.fromkeys(i for step in self.steps[first:last + 1] for i in step.operands if i not in made)
        return ", ".join(f"v{i}" for i in used)

    def function_source(self, outputs: Sequence[int] | None = None) -> str:
        outputs = self.outputs() if outputs is None else outputs
        leaves = ", ".join(f"v{i}" for i, given in enumerate(self.inputs) if given.requires_grad)
        return f"def program({leaves}):\n" + "".join(f"    {line}\n" for line in self.body(outputs))

    def source(self, dtype: str = "float64", device: str = "cpu") -> str:
        """A program that prints its outputs and the gradients of their sum weighted by 1, 2, 3 ..."""
        leaves = [(f"v{i}", given) for i, given in enumerate(self.inputs) if given.requires_grad]
        names = ", ".join(name for name, _ in leaves)
        run = [*[f"{name} = {given.text}, requires_grad=True)" for name, given in leaves],
               f"ys = program({names})", r"print(*ys, sep='\n')",
               "loss = sum((y * (1.0 + eg.arange(y.size, dtype=dtype).reshape(y.shape))).sum() for y in ys)",
               f"print(eg.grad(loss, [{names}], allow_unused=True))"]
        lines = ["import numpy as np", "import engine as eg", "", f'dtype = "{dtype}"', "", self.function_source(),
                 f'with eg.device("{device}"):', *[f"    {line}" for line in run]]
        return "\n".join(lines) + "\n"

    def compiled(self, dtype: str, outputs: Sequence[int] | None = None) -> Callable[..., list[eg.Tensor]]:
        """The function of the tracked inputs that its source defines; it returns these variables, or its outputs."""
        names: dict[str, Any] = {"np": np, "eg": eg, "dtype": dtype}
        exec(compile(self.function_source(outputs), "program", "exec"), names)
        function: Callable[..., list[eg.Tensor]] = names["program"]
        return function

    def points(self) -> list[np.ndarray]:
        """The values of the tracked inputs."""
        return [values(given.shape, given.seed) for given in self.inputs if given.requires_grad]


# ── the interpreter ───────────────────────────────────────────────────────────────────────────────────

class Cell:
    """A variable in the interpreter: memory that views share, with the error bounds beside it if there are any."""

    def __init__(self, number: Number, dtype: Any = None):
        self.dtype = dtype
        self.value = number.value if isinstance(number, Rounded) else np.asarray(number)
        self.error = number.error if isinstance(number, Rounded) else None
        if dtype is not None and self.error is None:
            self.error = np.zeros(self.value.shape)

    def owned(self) -> Cell:
        """In memory of its own."""
        self.value = np.array(self.value)
        self.error = None if self.error is None else np.array(self.error)
        return self

    def number(self) -> Number:
        return self.value if self.dtype is None else Rounded(self.value, self.error, dtype=self.dtype)

    def seen(self, f: Callable[[np.ndarray], np.ndarray]) -> Cell:
        """A view."""
        made = Cell(f(self.value))
        made.dtype, made.error = self.dtype, None if self.error is None else f(self.error)
        return made

    def write(self, number: Number) -> None:
        self.value[...] = number.value if isinstance(number, Rounded) else number
        if self.error is not None:
            self.error[...] = number.error if isinstance(number, Rounded) else 0.0


class Interpreter:
    """Runs a program's instructions by their formulas.

    dtype: None for plain float64; a type's name to carry the error bounds of computing in it
    held:  decisions of an earlier run to keep to, by step
    """

    def __init__(self, program: Program, dtype: str | None = None, held: dict[int, Any] | None = None):
        self.program, self.dtype, self.given = program, dtype, held
        self.held: dict[int, Any] = {}
        self.certain = self.jumps_certain = True  # whether rounding can turn a decision; one that the result jumps at
        self.tracked = {i for i, given in enumerate(program.inputs) if given.requires_grad}
        self.cells: dict[int, Cell] = {}

    def run(self, xs: Sequence[np.ndarray]) -> list[Number]:
        """The outputs, from the values of the tracked inputs."""
        points = iter(xs)
        for i, given in enumerate(self.program.inputs):
            self.cells[i] = Cell(next(points) if given.requires_grad else values(given.shape, given.seed),
                                 self.dtype).owned()
        with np.errstate(all="ignore"):
            for number, step in enumerate(self.program.steps):
                self.step(number, step)
        return [self.cells[i].number() for i in self.program.outputs()]

    def step(self, number: int, step: Step) -> None:
        form, cells = FORMS[step.form], [self.cells[i] for i in step.operands]
        tracked = bool(self.tracked.intersection(step.operands))
        attributes = dict(step.attributes)
        if form.holds is not None and tracked:
            attributes["held"] = self._decide(number, form, cells, step.attributes)
        if form.view and attributes.get("held") is None:
            self.cells[step.result] = cells[0].seen(lambda v: form.formula(v, **step.attributes))
        else:
            result = form.formula(*[cell.number() for cell in cells], **attributes)
            if form.writes:
                cells[0].write(result)
            else:
                self.cells[step.result] = Cell(result, self.dtype).owned()
        if form.tracks(step.operands, self.tracked):
            self.tracked.add(step.result)

    def _decide(self, number: int, form: Form, cells: list[Cell], attributes: dict[str, Any]) -> Any:
        assert form.holds is not None
        if self.given is not None:
            return self.given[number]
        self.held[number] = form.holds(*[cell.value for cell in cells], **attributes)
        if self.dtype is not None and not form.certain(*[cell.number() for cell in cells], **attributes):
            self.certain = False
            self.jumps_certain = self.jumps_certain and not form.jumps
        return None


# ── making one from numbers ───────────────────────────────────────────────────────────────────────────

class _Builder:
    """Adds instructions where they fit, and keeps what a write in place must know about memory."""

    def __init__(self, inputs: Sequence[Input], forms: Sequence[Form]):
        self.forms = forms
        self.program = Program(tuple(inputs))
        self.steps: list[Step] = []
        self.blocks: list[tuple[int, int]] = []
        self.interpreter = Interpreter(self.program)
        self.interpreter.run(self.program.points())
        self.visible = list(range(len(inputs)))
        self.memory = {i: i for i in self.visible}  # variable -> whose memory it sees
        self.viewed: set[int] = set()  # memory that had a view once
        self.kept: set[int] = set()  # memory that a rule or a checkpoint may have kept
        self.fixed = self.interpreter.tracked.copy()  # memory of leaves, and what perhaps is a view: not written to

    @property
    def next(self) -> int:
        return len(self.program.inputs) + sum(not FORMS[s.form].writes for s in self.steps)

    def add(self, code: int, picks: Sequence[int]) -> None:
        """The form numbered `code` with the first operands that fit, in an order that the picks turn."""
        form = self.forms[code % len(self.forms)]
        newest = self.visible[::-1]
        choices = [newest[p % len(newest):] + newest[:p % len(newest)] for p in picks[:form.operands]]
        for operands in itertools.islice(itertools.product(*choices), 64):
            attributes = form.fits([self.interpreter.cells[i].value for i in operands], picks[-1])
            if attributes is not None and self._may(form, operands):
                step = Step(form.name, operands, operands[0] if form.writes else self.next, attributes)
                if self._tame(form, operands, attributes):
                    self._take(form, step)
                return

    def _tame(self, form: Form, operands: Sequence[int], attributes: dict[str, Any]) -> bool:
        """Whether the result is neither large nor undefined."""
        with np.errstate(all="ignore"):
            y = np.asarray(form.formula(*[self.interpreter.cells[i].value for i in operands], **attributes))
        return y.size <= MOST_ELEMENTS and bool(np.all(np.abs(y) <= LARGEST))

    def _may(self, form: Form, operands: Sequence[int]) -> bool:
        """Whether a write in place is allowed, and seen alike by everything that sees its memory."""
        if not form.writes:
            return True
        memory, tracked = self.memory[operands[0]], self.interpreter.tracked
        if memory in self.fixed or memory in (self.memory[i] for i in operands[1:]):
            return False
        if tracked.intersection(operands):  # then the variable is bound to a new node, which views would not see
            return memory not in self.viewed
        shared = [i for i, owner in self.memory.items() if owner == memory]
        return memory not in self.kept and not tracked.intersection(shared)

    def _take(self, form: Form, step: Step) -> None:
        self.interpreter.step(len(self.steps), step)
        self.steps.append(step)
        touched = {self.memory[i] for i in step.operands}
        if form.writes:
            if step.result in self.interpreter.tracked:  # its memory is new; the old may have been kept
                self.kept |= touched
            return
        self.memory[step.result] = step.result
        if form.moved:
            self.viewed |= {*touched, step.result}
        if form.view:
            owner = self.memory[step.operands[0]]
            self.memory[step.result] = owner
            self.viewed.add(owner)
            if form.view == "perhaps" or form.name == "broadcast_to":
                self.fixed.add(owner)
        if step.result in self.interpreter.tracked:
            self.kept |= {*touched, self.memory[step.result]} if not form.view else touched
        self.visible.append(step.result)

    def enclose(self, count: int) -> None:
        """Put the last `count` steps into one checkpoint, if they have one result and write to nothing of others."""
        first = max(len(self.steps) - count, self.blocks[-1][1] + 1 if self.blocks else 0)
        steps = self.steps[first:]
        if not steps:
            return
        made = [s.result for s in steps]
        if any(FORMS[s.form].writes and s.result not in made[:i] for i, s in enumerate(steps)):
            return
        self.blocks.append((first, len(self.steps) - 1))
        self.kept |= {self.memory[i] for s in steps for i in s.operands}
        self.visible = [i for i in self.visible if i not in made or i == made[-1]]

    def build(self) -> Program:
        return Program(self.program.inputs, tuple(self.steps), tuple(self.blocks))


SHAPES: tuple[Callable[[int, int], tuple[int, ...]], ...] = (
    lambda m, n: (n,), lambda m, n: (m, n), lambda m, n: (m,), lambda m, n: (), lambda m, n: (n, m),
    lambda m, n: (m, 1), lambda m, n: (2, m, n), lambda m, n: (n, n))


def build(sides: tuple[int, int], inputs: Sequence[tuple[int, int, bool]], steps: Sequence[tuple[int, int, int, int]],
          forms: Sequence[str] | None = None) -> Program:
    """A program from numbers.

    sides:  the two lengths that all shapes are made of
    inputs: (which of SHAPES, seed, requires_grad) each; the first one requires grad whatever it says
    steps:  (which form, and three numbers that choose operands and attributes) each; after the forms, one number more
            encloses the last steps in a checkpoint
    forms:  names of FORMS; all of them by default
    """
    chosen = [FORMS[name] for name in forms] if forms is not None else list(FORMS.values())
    builder = _Builder([Input(SHAPES[kind % len(SHAPES)](*sides), seed, grad or i == 0)
                        for i, (kind, seed, grad) in enumerate(inputs)], chosen)
    for code, *picks in steps:
        if code >= len(chosen):
            builder.enclose(1 + picks[0])
        else:
            builder.add(code, picks)
    return builder.build()


# ── the check ─────────────────────────────────────────────────────────────────────────────────────────

def _flat(parts: Sequence[Any]) -> np.ndarray:
    return np.concatenate([np.asarray(part).reshape(-1) for part in parts])


def _joined(ys: Sequence[eg.Tensor]) -> eg.Tensor:
    return eg.concat([y.reshape(-1) for y in ys])


def _failing(program: Program, failure: CheckFailure, options: dict[str, Any], call: str) -> CheckFailure:
    """The failure with the program that shows it."""
    text = (f"{program.source(options.get('dtype', 'float64'), options.get('device', 'cpu'))}\n"
            "# held against its meaning in float64:\n"
            "from engine.testing.programs import Input, Program, Step, check_program\n"
            f"{call}\n")
    return failure.with_reproduction(text, nodes=len(program.steps))


def check_forward(program: Program, dtype: str, device: str = "cpu") -> None:
    """Every output within the bound that running error analysis gives for computing it in dtype."""
    exact = Interpreter(program, dtype)
    wanted = exact.run(program.points())
    if not exact.jumps_certain:
        return
    with eg.device(device):
        leaves = [eg.tensor(x, dtype, requires_grad=True) for x in program.points()]
        found = program.compiled(dtype)(*leaves)
    for i, got, want in zip(program.outputs(), found, wanted, strict=True):
        check_close(got, want.value, want.tolerance, check=f"program: v{i} in {dtype} on {device}",
                    origin="running error analysis")


def check_checkpoints(program: Program, dtype: str) -> None:
    """Outputs and gradients have the same bits with and without checkpoints."""
    results = []
    for run in (program, Program(program.inputs, program.steps)):
        leaves = [eg.tensor(x, dtype, requires_grad=True) for x in program.points()]
        y = _joined(run.compiled(dtype, program.outputs())(*leaves))
        g = eg.tensor(values(y.shape, 1), dtype)
        grads = eg.grad(y, leaves, g, allow_unused=True) if y.requires_grad else []
        results.append([y, *[d for d in grads if d is not None]])
    for plain, got in zip(results[1], results[0], strict=True):
        check_bits(got, plain, check=f"program: checkpointed against plain, {dtype}")


HOST_READ = "elements are read on the host"


def check_capture(program: Program, dtype: str) -> None:
    """eg.capture of the outputs and their gradients gives the bits of the function itself, on other numbers each time;
    or it says that it cannot, where an index is read on the host."""
    function = program.compiled(dtype)

    def both(*leaves: eg.Tensor) -> list[eg.Tensor]:
        y = _joined(function(*leaves))
        g = 1 + eg.arange(y.size, dtype=dtype)
        grads = eg.grad(y, leaves, g.reshape(y.shape), allow_unused=True) if y.requires_grad else ()
        return [y.detach(), *[d for d in grads if d is not None]]

    captured = eg.capture(both)
    for call in range(4):  # as it is, recorded, run again, and run again
        leaves = [eg.tensor(values(given.shape, given.seed + call), dtype, requires_grad=True)
                  for given in program.inputs if given.requires_grad]
        try:
            found = captured(*leaves)
        except RuntimeError as error:
            if HOST_READ in str(error):
                return
            raise
        for want, got in zip(both(*leaves), found, strict=True):
            check_bits(got, want, check=f"program: captured against plain, call {call}, {dtype}")


def check_gradients(program: Program, device: str = "cpu", second_order: bool = False, seed: int = 0) -> None:
    """The adjoint identity (checks.py) for the outputs that gradients flow from, end to end.

    The differences are those of the interpreter, with every decision held as it is at the point itself. Left out if
    rounding could turn one.
    """
    bounded = Interpreter(program, "float64")
    bounds = bounded.run(program.points())
    tracked = [i in bounded.tracked for i in program.outputs()]
    if not bounded.certain or not any(tracked):
        return
    recorded = Interpreter(program)
    recorded.run(program.points())

    def reference(*xs: np.ndarray) -> np.ndarray:
        ys = Interpreter(program, held=recorded.held).run(xs)
        return _flat([y for y, kept in zip(ys, tracked) if kept])

    def f(*xs: eg.Tensor) -> eg.Tensor:
        return _joined([y for y, kept in zip(program.compiled("float64")(*xs), tracked) if kept])

    def vjp(xs: Sequence[np.ndarray], g: np.ndarray) -> tuple[Any, list[np.ndarray]]:
        with eg.device(device):
            leaves = [eg.tensor(x, requires_grad=True) for x in xs]
            y = f(*leaves)
            grads = eg.grad(y, leaves, eg.tensor(g), allow_unused=True, create_graph=second_order)
        return y, [np.zeros(x.shape) if d is None else d.numpy() for x, d in zip(xs, grads)]

    rounding = _flat([b.tolerance for b, kept in zip(bounds, tracked) if kept])
    check_adjoint(f, *program.points(), reference=reference, vjp=vjp, rounding=rounding, seed=seed)
    if second_order:
        check_second_order(f, *program.points(), reference=reference, rounding=rounding, seed=seed)


def check_program(program: Program, *, second_order: bool = False, seed: int = 0) -> None:
    """All that is promised of a program: values in either type and on either device, gradients on either device,
    and the same bits with and without checkpoints, and captured."""
    runs: list[tuple[Callable[..., None], dict[str, Any]]] = [
        (check_forward, {"dtype": "float32"}), (check_forward, {"dtype": "float64"}),
        (check_forward, {"dtype": "float64", "device": "reference"}),
        (check_gradients, {"second_order": second_order, "seed": seed}),
        (check_gradients, {"device": "reference", "seed": seed + 1})]
    if program.blocks:
        runs.insert(3, (check_checkpoints, {"dtype": "float32"}))
    runs.append((check_capture, {"dtype": "float32"}))
    call = f"check_program({program!r}, {second_order=}, {seed=})"
    for check, options in runs:
        try:
            check(program, **options)
        except CheckFailure as failure:
            raise _failing(program, failure, options, call) from None
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raised = CheckFailure("program", got=f"{type(error).__name__}: {error}", want="no error", bound="no error",
                                  origin="every instruction was drawn to fit its operands")
            raise _failing(program, raised, options, call) from error
