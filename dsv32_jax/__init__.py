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
    from . import chat as chat, evaluation as evaluation, inspect as inspect
    from .checkpoint.load import load as load
    from .config import Config as Config
    from .errors import DsvError as DsvError
    from .generation.engine import Engine as Engine, engine as engine
    from .generation.generate import astream as astream, generate as generate, stream as stream
    from .generation.options import Options as Options, Sampling as Sampling
    from .generation.result import Generation as Generation
    from .generation.score import Score as Score, score as score
    from .generation.session import Session as Session, load_session as load_session, session as session
    from .generation.stream import Stream as Stream
    from .model.model import Model as Model, Output as Output, forward as forward
    from .parallel.sharding import mesh as mesh

__getattr__, __dir__ = attach(__name__, __file__, "convert")

__all__ = [*__dir__(), "__version__"]
