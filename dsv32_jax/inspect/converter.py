"""Reading Hugging Face folders and folding trees is the converter's job: this is where it is asked."""

import importlib
from typing import Any


def converter(module: str) -> Any:
    """A module of the converter, by its name within; imported when it is first needed."""
    return importlib.import_module(f"dsv32_jax.convert.{module}")
