"""Puts a model into C, so that a million of its states are explored in a second: ``explore.py`` takes two minutes for them.

protocol.py stays the only source. Its methods keep to a part of Python that says the same in C: whole numbers (those that
are divided are not negative), the state's bytes, ``if`` and ``for``, ``any``, ``all`` and ``sum``, calls of each other. What
does not depend on the state (the setting, where a block begins, the tables of steps) is worked out here and stands as a number
in the C. A method that is overridden, and ``super()``, are those of the model's own class, as in Python. Whatever else a method
has is an error that names it.

``explore.c`` does with the result what ``explore.py`` does with the model. Cython could not: a model is classes that override
methods and tables of these, which Cython leaves to Python. It needs a C compiler and nothing of Python's headers.
"""

from __future__ import annotations

import ast
import builtins
import ctypes
import functools
import inspect
import shutil
import subprocess
import tempfile
import textwrap
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .explore import Found, Process, broken_at, faults_of, processes_of, violation
from .protocol import Protocol, Step

DONE, BROKEN, RESTS_BADLY, STUCK, TOO_LARGE_A_VALUE, TOO_MANY = range(6)
_CORE = Path(__file__).with_name("explore.c")


def compiler() -> str | None:
    """The C compiler of this machine, if it has one."""
    return shutil.which("cc") or shutil.which("gcc")


def explore(model: Protocol, *, optimises: bool = True) -> Found:
    """Visit every state that can be reached; see :func:`.explore.explore`.

    Args:
        model: what to explore.
        optimises: whether the compiler takes its time (a second), which is worth it from 100 000 states on.

    Raises:
        Violation: a property of the model does not hold.
        Untranslatable: a method of the model cannot be said in C.
    """
    started = time.monotonic()
    core = _compile(_Model(model).text(), "-O2" if optimises else "-O0")
    found = _Found()
    try:
        outcome = core.explore(model.initial(), ctypes.byref(found))
        if outcome != DONE:
            raise _error(model, core, found, outcome)
    finally:
        core.discard()
    return Found(found.num_states, found.num_steps, time.monotonic() - started)


def _compile(model: str, optimisation: str) -> ctypes.CDLL:
    command = compiler()
    if command is None:
        raise FileNotFoundError("There is no C compiler (cc or gcc).")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "model.h").write_text(model)
        library = Path(folder, "model.so")
        subprocess.run(
            [command, optimisation, "-shared", "-fPIC", "-I", folder, "-o", str(library), str(_CORE)], check=True
        )
        return ctypes.CDLL(str(library))  # stays mapped without its file


class _Found(ctypes.Structure):
    _fields_ = (
        ("parents", ctypes.POINTER(ctypes.c_uint32)),
        ("num_states", ctypes.c_uint64),
        ("num_steps", ctypes.c_uint64),
        ("here", ctypes.c_uint64),
    )


def _error(model: Protocol, core: ctypes.CDLL, found: _Found, outcome: int) -> Exception:
    if outcome == TOO_MANY:
        return MemoryError(f"{found.num_states} states and {found.num_steps} steps are too many")
    if not found.num_states:
        return OverflowError("a field of the first state is larger than Protocol.largest says")
    way, number = [_state(model, core, found.here)], found.here
    while number:
        number = found.parents[number]
        way.append(_state(model, core, number))
    if outcome == TOO_LARGE_A_VALUE:
        return OverflowError(f"a field is larger than Protocol.largest says, one step after\n{model.describe(way[0])}")
    return violation(model, way[::-1], "" if outcome == STUCK else broken_at(model, way[0]))


def _state(model: Protocol, core: ctypes.CDLL, number: int) -> bytes:
    state = ctypes.create_string_buffer(model.nbytes)
    core.state(ctypes.c_uint64(number), state)
    return state.raw


_BINARY: dict[type[ast.operator], str] = {
    ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.FloorDiv: "/", ast.Mod: "%", ast.LShift: "<<", ast.RShift: ">>",
    ast.BitAnd: "&", ast.BitOr: "|", ast.BitXor: "^",
}  # fmt: skip
_UNARY: dict[type[ast.unaryop], str] = {ast.Not: "!", ast.USub: "-", ast.Invert: "~"}
_COMPARE: dict[type[ast.cmpop], str] = {
    ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=",
}  # fmt: skip
_UNKNOWN = object()


class Untranslatable(Exception):
    """A method has something that is not of the part of Python that this translates."""


class _Model:
    """A model in C.

    Args:
        model: its methods are translated; what does not depend on the state is asked of it.
    """

    def __init__(self, model: Protocol) -> None:
        self.model = model
        self.functions: dict[str, str] = {}
        self.arrays: dict[tuple[int, ...], str] = {}
        self._texts: dict[str, int] = {}

    def text(self) -> str:
        """What explore.c includes."""
        model = self.model
        processes, faults = processes_of(model), faults_of(model)
        takes: list[str] = []

        def put(at: int, step: Step) -> str:
            takes.append(f"static int take_{len(takes)}(u8 *s) {{ return {self._call(step, at)}; }}")
            return f"{{take_{len(takes) - 1}, {int(step.by_user)}}}"

        def put_row(process: Process, pc: int) -> str:
            steps = [put(process.at, each) for each in process.steps[pc]]
            private = [int(kind[pc]) for kind in process.private]
            return f"{{{len(steps)}, {_braces(private)}, {_braces(steps or ['{0}'])}}}"

        rows = [_braces(put_row(process, pc) for pc in range(len(process.steps))) for process in processes]
        fault_steps = [put(at, each) for _, at, each in faults]
        for name in ("normalise", "is_done", "check_rest"):
            takes.append(f"static int {name}(u8 *s) {{ return {self.method(type(model).__mro__, name)}(s); }}")
        most = [max(len(steps) for steps in process.steps) for process in processes]
        sizes = {
            "NUM_MOVERS": len(processes),
            "NUM_FAULTS": len(faults),
            "MAX_AFTER": sum(most) + len(faults),
            "FAULTS_AT": model.faults,
            "MUST_REST_WELL": int(not model.setting.idle_look),
        }
        return "\n".join(
            [
                f"enum {{ {', '.join(f'{name} = {value}' for name, value in sizes.items())} }};",
                *self._packing(),
                *(f"static const u8 {name}[] = {_braces(values)};" for values, name in self.arrays.items()),
                *(function.partition("{")[0] + ";" for function in self.functions.values()),
                *self.functions.values(),
                *takes,
                "typedef struct { int (*take)(u8 *); u8 by_user; } Step;",
                f"typedef struct {{ u8 count, is_private[2]; Step steps[{max(most)}]; }} Row;",
                f"static const int PC_AT[] = {_braces(process.pc for process in processes)};",
                f"static const Row ROWS[][{max(len(process.steps) for process in processes)}] = {_braces(rows)};",
                f"static const Step FAULTS[] = {_braces(fault_steps or ['{0}'])};",
                "",
            ]
        )

    def _packing(self) -> list[str]:
        """How a state becomes few words: each field has as many bits as its largest value, and none lies in two words."""
        pack, unpack, word, used = [], [], 0, 0
        largest = self.model.largest()
        for at, most in enumerate(largest):
            bits = most.bit_length()
            if used + bits > 64:
                word, used = word + 1, 0
            pack += [f"if (s[{at}] > {most}) return 0;", f"w[{word}] |= (u64)s[{at}] << {used};"]
            unpack.append(f"s[{at}] = w[{word}] >> {used} & {(1 << bits) - 1};")
            used += bits
        return [
            f"enum {{ NBYTES = {len(largest)}, WORDS = {word + 1} }};",
            "static int pack(const u8 *s, u64 *w) {",
            *(f"w[{i}] = 0;" for i in range(word + 1)),
            *pack,
            "return 1; }",
            "static void unpack(const u64 *w, u8 *s) {",
            *unpack,
            "}",
        ]

    def _call(self, step: Step, at: int) -> str:
        take: Any = step.take
        values = take.keywords if isinstance(take, functools.partial) else {}
        method = take.func if isinstance(take, functools.partial) else take
        return f"{self.method(type(self.model).__mro__, method.__name__)}({', '.join(map(str, ['s', at, *values.values()]))})"

    def method(self, classes: Sequence[type], name: str) -> str:
        """The C function that is the method of the first of these classes that has it."""
        owner = next(each for each in classes if name in vars(each))
        function = f"{owner.__name__}_{name}"
        if function not in self.functions:
            self.functions[function] = ""  # for those that call each other
            self.functions[function] = _Method(self, owner, vars(owner)[name]).text(function)
        return function

    def array(self, values: Iterable[int]) -> str:
        """A table of numbers."""
        return self.arrays.setdefault(tuple(values), f"table_{len(self.arrays)}")

    def number(self, value: object) -> str:
        """A value that is known, as it stands in C."""
        if isinstance(value, str):
            return str(self._texts.setdefault(value, len(self._texts)))
        if isinstance(value, int):
            return str(int(value))
        raise Untranslatable(f"{value!r} is no number")


class _Method:
    """One method in C. Each value there is an int.

    Args:
        model: whose method it is.
        owner: the class that has it, where ``super()`` begins.
        function: itself.
    """

    def __init__(self, model: _Model, owner: type, function: Any) -> None:
        self._model = model
        self._owner = owner
        self._globals = {**vars(builtins), **function.__globals__, "self": model.model}
        definition = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
        assert isinstance(definition, ast.FunctionDef)
        self._definition = definition
        self._names = {each.arg for each in definition.args.args[1:]}
        self._is_bool = isinstance(definition.returns, ast.Name) and definition.returns.id == "bool"

    def text(self, function: str) -> str:
        """The whole function."""
        parameters = [("u8 *" if each.arg == "s" else "int ") + each.arg for each in self._definition.args.args[1:]]
        stored = {
            node.id: None
            for each in self._definition.body
            for node in ast.walk(each)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        }
        self._names |= set(stored)
        lines = [line for statement in self._definition.body for line in self._statement(statement)]
        variables = [f"int {name} = 0; (void){name};" for name in stored]
        return "\n".join([f"static int {function}({', '.join(parameters)}) {{", *variables, *lines, "return 0;", "}"])

    # -- statements ---------------------------------------------------------------------------------------------

    def _block(self, statements: list[ast.stmt]) -> list[str]:
        return ["{", *(line for statement in statements for line in self._statement(statement)), "}"]

    def _statement(self, node: ast.stmt) -> list[str]:
        match node:
            case ast.Expr(ast.Constant()) | ast.Pass():  # a docstring
                return []
            case ast.Expr(value):
                return [self._value(value) + ";"]
            case ast.Return(None):
                return ["return 0;"]
            case ast.Return(ast.expr() as value):
                return [f"return {self._truth(value) if self._is_bool else self._value(value)};"]
            case ast.Raise(ast.Call(ast.Name("Broken"))):
                return ["broken = 1;", "return 0;"]
            case ast.If(test, body, orelse):
                return [
                    f"if ({self._truth(test)})",
                    *self._block(body),
                    *(["else", *self._block(orelse)] if orelse else []),
                ]
            case ast.For(ast.Name(name), iterable, body, []):
                return [self._for(name, iterable), *self._block(body), "}"]
            case ast.AugAssign(target, operator, value):
                return [f"{self._value(target)} {_BINARY[type(operator)]}= {self._value(value)};"]
            case ast.Assign(targets, value):
                return self._assign(targets, value)
        raise self._no(node)

    def _assign(self, targets: list[ast.expr], value: ast.expr) -> list[str]:
        """All values before all stores, as in Python."""
        if isinstance(targets[0], ast.Tuple) and isinstance(value, ast.Tuple) and len(targets) == 1:
            pairs = list(zip(([each] for each in targets[0].elts), value.elts, strict=True))
        else:
            pairs = [(targets, value)]
        values = [f"int new_{i} = {self._value(each)};" for i, (_, each) in enumerate(pairs)]
        stores = [f"{self._value(each)} = new_{i};" for i, (many, _) in enumerate(pairs) for each in many]
        return ["{", *values, *stores, "}"]

    def _for(self, name: str, iterable: ast.expr) -> str:
        """The head of a loop, with an open brace."""
        known = self._known(iterable)
        if isinstance(known, range):
            start, stop, step = str(known.start), str(known.stop), known.step
        elif known is not _UNKNOWN:
            values = list(known)
            return f"for (int at_ = 0; at_ < {len(values)}; at_++) {{ {name} = {self._model.array(values)}[at_];"
        elif isinstance(iterable, ast.Call) and isinstance(iterable.func, ast.Name) and iterable.func.id == "range":
            bounds = [self._value(each) for each in iterable.args[:2]]
            start, stop = bounds if len(bounds) == 2 else ("0", bounds[0])
            step = self._known(iterable.args[2]) if len(iterable.args) == 3 else 1
        elif isinstance(iterable, ast.Subscript):
            ranges = self._known(iterable.value)
            index = self._value(iterable.slice)
            start, stop = (
                f"{self._model.array(getattr(each, k) for each in ranges)}[{index}]" for k in ("start", "stop")
            )
            step = 1
        else:
            raise self._no(iterable)
        return f"for ({name} = {start}; {name} {'<' if step > 0 else '>'} {stop}; {name} += {step}) {{"

    # -- expressions --------------------------------------------------------------------------------------------

    def _known(self, node: ast.expr) -> Any:
        """The value of what does not depend on the state, or _UNKNOWN."""
        for each in ast.walk(node):
            if isinstance(each, ast.Name) and each.id in self._names:
                return _UNKNOWN
            if isinstance(each, ast.Call) and not (
                isinstance(each.func, ast.Name) and each.func.id in ("range", "len")
            ):
                return _UNKNOWN
        return eval(compile(ast.Expression(node), self._definition.name, "eval"), self._globals)

    def _truth(self, node: ast.expr) -> str:
        """An expression of which only counts whether it is true."""
        if isinstance(node, ast.BoolOp):
            operator = " && " if isinstance(node.op, ast.And) else " || "
            return f"({operator.join(map(self._truth, node.values))})"
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return f"!{self._truth(node.operand)}"
        return self._value(node)

    def _value(self, node: ast.expr) -> str:
        known = self._known(node)
        if known is not _UNKNOWN:
            return self._model.number(known)
        match node:
            case ast.Name(name):
                return name
            case ast.Subscript(ast.Name("s"), index):
                return f"s[{self._value(index)}]"
            case ast.Subscript(container, index):
                return f"{self._table(self._known(container))}[{self._value(index)}]"
            case ast.BinOp(left, operator, right):
                return f"({self._value(left)} {_BINARY[type(operator)]} {self._value(right)})"
            case ast.UnaryOp(ast.Not()):
                return self._truth(node)
            case ast.UnaryOp(operator, operand):
                return f"({_UNARY[type(operator)]}{self._value(operand)})"
            case ast.IfExp(test, body, orelse):
                return f"({self._truth(test)} ? {self._value(body)} : {self._value(orelse)})"
            case ast.Compare(left, operators, others):
                terms = [left, *others]
                return f"({' && '.join(map(self._compare, terms, operators, others))})"
            case ast.Call(ast.Name("any" | "all" | "sum" as name), [ast.GeneratorExp(element, [loop])]):
                return self._generator(name, element, loop)
            case ast.Call(ast.Attribute(ast.Name("self"), name), arguments, []):
                return f"{self._model.method(type(self._model.model).__mro__, name)}({', '.join(map(self._value, arguments))})"
            case ast.Call(ast.Attribute(ast.Call(ast.Name("super")), name), arguments, []):
                classes = type(self._model.model).__mro__
                later = classes[classes.index(self._owner) + 1 :]
                return f"{self._model.method(later, name)}({', '.join(map(self._value, arguments))})"
        raise self._no(node)

    def _compare(self, left: ast.expr, operator: ast.cmpop, right: ast.expr) -> str:
        value = self._value(left)
        if isinstance(operator, ast.In | ast.NotIn):
            any_of = " || ".join(f"{value} == {self._model.number(each)}" for each in self._known(right))
            return f"{'!' if isinstance(operator, ast.NotIn) else ''}({any_of or 0})"
        return f"{value} {_COMPARE[type(operator)]} {self._value(right)}"

    def _generator(self, name: str, element: ast.expr, loop: ast.comprehension) -> str:
        assert isinstance(loop.target, ast.Name)
        head = self._for(loop.target.id, loop.iter)
        test = " && ".join(map(self._truth, loop.ifs)) or "1"
        term = self._value(element) if name == "sum" else self._truth(element)
        body = {
            "any": f"if ({term}) {{ result = 1; break; }}",
            "all": f"if (!{term}) {{ result = 0; break; }}",
            "sum": f"result += {term};",
        }[name]
        variables = f"int result = {int(name == 'all')}, {loop.target.id};"  # its own, as in Python
        return f"({{ {variables} {head} if ({test}) {{ {body} }} }} result; }})"

    def _table(self, container: Any) -> str:
        """A list of numbers, or a dictionary of them by small numbers."""
        if isinstance(container, dict):
            container = [container.get(key, 0) for key in range(max(container) + 1)]
        return self._model.array(container)

    def _no(self, node: ast.AST) -> Untranslatable:
        return Untranslatable(f"{self._owner.__name__}.{self._definition.name}: cannot translate {ast.unparse(node)!r}")


def _braces(values: Iterable[object]) -> str:
    return "{" + ", ".join(map(str, values)) + "}"
