"""Names that end in their axes are held to it: the check behind tests/test_names.py."""

import ast
import contextlib
import dataclasses
import inspect
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import CodeType

UNBOUND = frozenset("BTS")
"""Letters whose size each call chooses."""

KNOBS = frozenset({"top_k", "top_p"})
"""Scalars whose names the public interface fixes."""


def suffix(name: str) -> str | None:
    """The axes at the end of `name`: capitals are sizes of the config, small letters derived ones, 1 is one."""
    *_, last = name.rpartition("_")
    if name in KNOBS or last == name or not re.fullmatch("[A-Za-z1]+", last):
        return None
    return last if any(letter.isupper() for letter in last) or re.fullmatch("[a-z]", last) else None


class Shapes:
    """What was compared: `wrong` says where a name lies, `seen` holds (function, name) pairs that told the truth."""

    def __init__(self, dims: Mapping[str, int], package: str):
        self.dims, self.package = dims, package
        self.wrong: list[str] = []
        self.seen: set[tuple[str, str]] = set()

    def on_event(self, frame, event: str, _) -> None:
        """Compare the locals of a function that returns with their suffixes."""
        if event != "return" or not self._ours(frame.f_globals.get("__name__", "")):
            return
        where = f"{frame.f_globals['__name__']}.{_qualname(frame.f_code)}"
        sizes = dict(self.dims)
        for name, value in list(frame.f_locals.items()):
            self._compare(where, name, value, sizes)

    def _ours(self, module: str) -> bool:
        return module == self.package or module.startswith(self.package + ".")

    def _compare(self, where: str, name: str, value, sizes: dict[str, int]) -> None:
        axes, shape = suffix(name), getattr(value, "shape", None)
        if axes and isinstance(shape, tuple):
            self._compare_array(where, name, axes, shape, sizes)
        elif self._ours(type(value).__module__):
            for field, part in _fields(value):
                if suffix(field):
                    self._compare(where, f"{name}.{field}", part, dict(sizes))

    def _compare_array(self, where: str, name: str, axes: str, shape: tuple[int, ...], sizes: dict[str, int]) -> None:
        letters = [(letter, size) for letter, size in zip(axes, shape, strict=False)]
        if len(axes) != len(shape) or any(
            size != 1 if letter == "1" else sizes.setdefault(letter, size) != size for letter, size in letters
        ):
            known = {letter: sizes[letter] for letter in axes if letter in sizes}
            self.wrong.append(f"{where}: {name} has shape {shape}, but {known}")
        elif unknown := [letter for letter in axes if letter.isupper() and letter not in self.dims.keys() | UNBOUND]:
            self.wrong.append(f"{where}: {name} uses {unknown}, which the glossary does not have")
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
def watched(dims: Mapping[str, int], package: str = "dsv32_jax") -> Iterator[Shapes]:
    """Inside the `with`, every function of `package` is checked as it returns, in this thread and in those that it
    starts; under jit too: tracers have shapes."""
    shapes = Shapes(dims, package)
    before = [(module, module.getprofile()) for module in (sys, threading)]
    for module, _ in before:
        module.setprofile(shapes.on_event)
    try:
        yield shapes
    finally:
        for module, profile in before:
            module.setprofile(profile)


def suffixed_functions(module) -> set[str]:
    """The functions of `module` that have an argument or a local with axes in its name, as `watched` calls them."""
    found = set()

    def visit(node: ast.AST, inside: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef):
                name = f"{inside}.{child.name}"
                if any(suffix(local) for local in _locals(child)):
                    found.add(name)
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
