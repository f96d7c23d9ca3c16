"""Which files a request runs through: `python -m tests.entered` prints them for generate, load and convert.

A file is entered when one of its functions is called; code that runs on import does not count.
"""

import dataclasses
import inspect
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import convert
import dsv32_jax as ds
from tests.models import random_model

REPOSITORY = Path(__file__).parents[1]
DEMO = REPOSITORY / "dsv32_jax" / "demo_checkpoint"
MODEL = ("dsv32_jax/model/", "dsv32_jax/kernels/", "dsv32_jax/quantization/")
"""The rooms of the model itself: what a request enters before and after them is counted apart."""


def files_entered(call: Callable[[], object]) -> list[str]:
    """Return the files of dsv32_jax/ and convert/ with a function that runs during `call`, in this and new threads."""
    entered: set[str] = set()

    def note(frame: FrameType, event: str, _) -> None:
        """Called by Python for every function that is called; within them nothing is traced."""
        if frame.f_code.co_flags & inspect.CO_OPTIMIZED:
            entered.add(frame.f_code.co_filename)

    threading.settrace(note)
    sys.settrace(note)
    try:
        call()
    finally:
        sys.settrace(None)
        threading.settrace(None)
    ours = (REPOSITORY / "dsv32_jax", REPOSITORY / "convert")
    paths = [Path(name) for name in entered]
    return sorted(str(path.relative_to(REPOSITORY)) for path in paths if any(path.is_relative_to(one) for one in ours))


def measure(folder: Path) -> dict[str, list[str]]:
    """Return the files entered by each request on the demo model, working in `folder`. Everything runs once before, so
    that nothing is imported meanwhile."""
    convert.convert(DEMO, folder / "first")
    model = ds.load(folder / "first")
    small = dataclasses.replace(model.cfg, num_hidden_layers=2, num_nextn_predict_layers=0)
    ds.generate(random_model(small), [[0, 17, 42]], max_new_tokens=2)
    return {
        "convert": files_entered(lambda: convert.convert(DEMO, folder / "second")),
        "load": files_entered(lambda: ds.load(folder / "second")),
        "generate": files_entered(lambda: ds.generate(model, [[0, 17, 42], [0, 8]], max_new_tokens=20)),
    }


def outside_of_the_model(files: list[str]) -> list[str]:
    """Return the files that are not of the model, its kernels or its number formats."""
    return [file for file in files if not file.startswith(MODEL)]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        for request, files in measure(Path(scratch)).items():
            outside = outside_of_the_model(files)
            print(f"{request}: {len(files)} files, {len(outside)} outside of the model")
            print("\n".join(f"    {file}" for file in outside))
