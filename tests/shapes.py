"""Names that end in their axes are held to it: the check behind tests/test_names.py."""

import ast
import contextlib
import dataclasses
import inspect
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import CodeType

UNBOUND = frozenset("BTS")
"""Letters whose size each call chooses."""

KNOBS = frozenset({"top_k", "top_p"})
"""Scalars whose names the public interface fixes."""

BLOCKS = re.compile("[nbozp1]{3,}")
"""The axes of kernels, which know nothing of the model: beside single letters the only suffixes without a capital."""

Rule = Callable[[Mapping[str, int]], int]
"""The size of a letter as it follows from other sizes; KeyError where one of these is not known."""


def suffix(name: str) -> str | None:
    """The axes at the end of `name`: capitals are sizes of the config, small letters derived ones, 1 is one."""
    *_, last = name.rpartition("_")
    if name in KNOBS or last == name or not re.fullmatch("[A-Za-z1]+", last):
        return None
    letters = any(letter.isupper() for letter in last) or re.fullmatch("[a-z]", last) or BLOCKS.fullmatch(last)
    return last if letters else None


class Shapes:
    """What was compared: `wrong` says where a name lies, `seen` holds (function, name) pairs that told the truth."""

    def __init__(self, dims: Mapping[str, int], rules: Mapping[str, Rule | None], package: str):
        self.dims, self.rules, self.package = dims, rules, package
        self.known = {*dims, *rules, *UNBOUND, "1"}
        self.wrong: list[str] = []
        self.seen: set[tuple[str, str]] = set()

    def on_call(self, frame, event: str, _) -> Callable | None:
        """Watch a function of the package until it returns: Python calls this for all that are called."""
        if not self._ours(frame.f_globals.get("__name__", "")):
            return None
        frame.f_trace_lines = False
        return self._on_event

    def _on_event(self, frame, event: str, _) -> None:
        """Compare the locals of a function that returns with their suffixes."""
        if event != "return":
            return
        where = f"{frame.f_globals['__name__']}.{_qualname(frame.f_code)}"
        sizes = dict(self.dims)
        values = list(frame.f_locals.items())
        for name, value in sorted(values, key=lambda item: suffix(item[0]) is None):
            self._compare(where, name, value, sizes)
        self._derive(where, sizes)

    def _ours(self, module: str) -> bool:
        return module == self.package or module.startswith(self.package + ".")

    def _compare(self, where: str, name: str, value, sizes: dict[str, int]) -> None:
        axes, shape = suffix(name), getattr(value, "shape", None)
        if axes and isinstance(shape, tuple):
            self._compare_array(where, name, axes, shape, sizes)
        elif self._ours(type(value).__module__):
            own = dict(sizes)
            for field, part in _fields(value):
                if suffix(field):
                    self._compare(where, f"{name}.{field}", part, own)
            self._derive(f"{where}: {name}", own)

    def _derive(self, where: str, sizes: Mapping[str, int]) -> None:
        """Compare the lowercase letters of a call with what they follow from."""
        for letter, rule in self.rules.items():
            with contextlib.suppress(KeyError):
                if rule and letter in sizes and sizes[letter] != rule(sizes):
                    self.wrong.append(f"{where}: {letter} is {sizes[letter]}, but should be {rule(sizes)}")

    def _compare_array(self, where: str, name: str, axes: str, shape: tuple[int, ...], sizes: dict[str, int]) -> None:
        letters = [(letter, size) for letter, size in zip(axes, shape, strict=False)]
        if len(axes) != len(shape) or any(
            size != 1 if letter == "1" else sizes.setdefault(letter, size) != size for letter, size in letters
        ):
            known = {letter: sizes[letter] for letter in axes if letter in sizes}
            self.wrong.append(f"{where}: {name} has shape {shape}, but {known}")
        elif unknown := sorted(set(axes) - self.known):
            self.wrong.append(f"{where}: {name} uses {unknown}, which no table has")
        else:
            self.seen.add((where, name))


def _fields(value) -> list[tuple[str, object]]:
    if dataclasses.is_dataclass(value):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    if hasattr(value, "_fields"):
        return list(value._asdict().items())
    return []


def _qualname(code: CodeType) -> str:
    return code.co_qualname.replace(".<locals>", "")


@contextlib.contextmanager
def watched(dims: Mapping[str, int], rules: Mapping[str, Rule | None], package: str = "dsv32_jax") -> Iterator[Shapes]:
    """Inside the `with`, every function of `package` is checked as it returns, in this thread and in those that it
    starts; under jit too: tracers have shapes."""
    shapes = Shapes(dims, rules, package)
    before = [(module, module.gettrace()) for module in (sys, threading)]
    for module, _ in before:
        module.settrace(shapes.on_call)
    try:
        yield shapes
    finally:
        for module, trace in before:
            module.settrace(trace)


def suffixed_functions(module) -> dict[str, set[str]]:
    """The functions of `module` that have an argument or a local with axes in its name, as `watched` calls them, and
    the suffixes in each."""
    found = {}

    def visit(node: ast.AST, inside: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef):
                name = f"{inside}.{child.name}"
                if suffixes := {axes for local in _locals(child) if (axes := suffix(local))}:
                    found[name] = suffixes
                visit(child, name)
            else:
                visit(child, f"{inside}.{child.name}" if isinstance(child, ast.ClassDef) else inside)

    visit(ast.parse(Path(inspect.getfile(module)).read_text()), module.__name__)
    return found


NESTED = (ast.FunctionDef, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
"""What has locals of its own."""


def _locals(function: ast.FunctionDef) -> set[str]:
    """Names bound in `function` itself."""
    names = {arg.arg for arg in function.args.args + function.args.kwonlyargs}
    pending = list(function.body)
    while pending:
        node = pending.pop()
        if isinstance(node, NESTED):
            continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        pending.extend(ast.iter_child_nodes(node))
    return names
