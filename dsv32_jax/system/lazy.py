"""Packages that import their modules on first use, so that importing the package itself is instant."""

import ast
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def attach(package: str, file: str, *subpackages: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` (PEP 562) of the package whose `__init__` is `file`.

    Its public names are those that its block `if TYPE_CHECKING:` imports, which type checkers read too, and those of
    `subpackages`, which only the build puts into its folder.
    """
    block = next(node for node in ast.parse(Path(file).read_text("utf-8")).body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    sources = {alias.name: ("." * node.level, node.module) for node in imports for alias in node.names}
    sources |= {name: (".", None) for name in subpackages}

    def get(name: str) -> Any:
        if name not in sources:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        dots, module = sources[name]
        found = importlib.import_module(dots + (module or name), package)
        value = getattr(found, name) if module else found
        setattr(sys.modules[package], name, value)
        return value

    return get, lambda: sorted(sources)
