"""DeepSeek-V3.2 in JAX, running from NVFP4 weights.

    cfg   = Config.from_json("config.json")
    model = load("checkpoint")                  # made by `dsv32 convert`
    out   = forward(model, tokens_BT)           # logits and the cache
    gen   = generate(model, [[0, 17, 42]])      # tokens, log-probabilities, times

Names are imported when they are first used, so that a tool that needs no JAX does not wait for it.
"""

from typing import TYPE_CHECKING

from .system.lazy import attach

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import chat as chat
    from . import evaluation as evaluation
    from . import inspect as inspect
    from .checkpoint.load import load as load
    from .config import Config as Config
    from .errors import DsvError as DsvError
    from .generation.engine import Engine as Engine
    from .generation.generate import astream as astream
    from .generation.generate import engine as engine
    from .generation.generate import generate as generate
    from .generation.generate import stream as stream
    from .generation.options import Options as Options
    from .generation.options import Sampling as Sampling
    from .generation.result import Generation as Generation
    from .generation.score import Score as Score
    from .generation.score import score as score
    from .generation.session import Session as Session
    from .generation.session import load_session as load_session
    from .generation.session import session as session
    from .generation.stream import Stream as Stream
    from .model.model import Model as Model
    from .model.model import Output as Output
    from .model.model import forward as forward
    from .parallel.sharding import mesh as mesh

_NAMES = {
    ".chat": "chat",
    ".checkpoint.load": "load",
    ".config": "Config",
    ".convert": "convert",
    ".errors": "DsvError",
    ".evaluation": "evaluation",
    ".generation.engine": "Engine",
    ".generation.generate": "astream engine generate stream",
    ".generation.options": "Options Sampling",
    ".generation.result": "Generation",
    ".generation.score": "Score score",
    ".generation.session": "Session load_session session",
    ".generation.stream": "Stream",
    ".inspect": "inspect",
    ".model.model": "Model Output forward",
    ".parallel.sharding": "mesh",
}

__getattr__, __dir__ = attach(__name__, _NAMES)

__all__ = [*__dir__(), "__version__"]
