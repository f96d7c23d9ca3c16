"""DeepSeek-V3.2 in JAX, running from NVFP4 weights.

    cfg   = Config.from_json("config.json")
    model = load("checkpoint")                  # made by `python -m convert`
    out   = forward(model, tokens_BT)           # logits, cache, what each layer saw
    gen   = generate(model, [[0, 17, 42]])      # tokens, log-probabilities, times

Names are imported when they are first used, so that a tool that needs no JAX does not wait for it.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .checkpoint import load as load
    from .config import Config as Config
    from .errors import DsvError as DsvError
    from .generation import Generation as Generation
    from .generation import generate as generate
    from .generation import stream as stream
    from .model import Model as Model
    from .model import Output as Output
    from .model import forward as forward
    from .sampling import Sampling as Sampling

_HOME = {
    "Config": "config",
    "DsvError": "errors",
    "Generation": "generation",
    "Model": "model",
    "Output": "model",
    "Sampling": "sampling",
    "forward": "model",
    "generate": "generation",
    "load": "checkpoint",
    "stream": "generation",
}

__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__():
    return __all__
