"""The job: safetensors -> Orbax, ready for a CPU or an accelerator mesh.

`convert(src, dst)` is the whole of it; `main(argv)` is the command line (`python -m convert SRC DST`), `program(argv)`
the same for a process that ends with it. They are imported when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsv32_jax.system.meter import Progress as Progress

    from .command import main as main
    from .command import program as program
    from .write.job import convert as convert

_HOME = {"main": ".command", "program": ".command", "Progress": "dsv32_jax.system.meter", "convert": ".write.job"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name], __name__), name)
