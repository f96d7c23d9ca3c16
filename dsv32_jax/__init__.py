"""DeepSeek-V3.2 in JAX, running from NVFP4 weights.

    cfg   = Config.from_json("config.json")
    model = load("checkpoint")                  # made by `dsv32 convert`
    out   = forward(model, tokens_BT)           # logits, cache, what each layer saw
    gen   = generate(model, [[0, 17, 42]])      # tokens, log-probabilities, times

Names are imported when they are first used, so that a tool that needs no JAX does not wait for it.
"""

from typing import TYPE_CHECKING

from .lazy import names

if TYPE_CHECKING:
    from . import chat as chat
    from . import evaluation as evaluation
    from . import inspect as inspect
    from .checkpoint import load as load
    from .config import Config as Config
    from .errors import DsvError as DsvError
    from .generation import astream as astream
    from .generation import generate as generate
    from .generation import stream as stream
    from .model import Model as Model
    from .model import Output as Output
    from .model import forward as forward
    from .result import Generation as Generation
    from .run import Stream as Stream
    from .sampling import Sampling as Sampling
    from .scoring import Score as Score
    from .scoring import score as score
    from .sessions import Session as Session
    from .sessions import load_session as load_session
    from .sessions import session as session
    from .sharding import mesh as mesh
    from .version import __version__ as __version__

_HOME = {
    "Config": ".config",
    "DsvError": ".errors",
    "Generation": ".result",
    "Model": ".model",
    "Output": ".model",
    "Sampling": ".sampling",
    "Score": ".scoring",
    "Session": ".sessions",
    "Stream": ".run",
    "__version__": ".version",
    "astream": ".generation",
    "chat": ".chat",
    "evaluation": ".evaluation",
    "forward": ".model",
    "generate": ".generation",
    "inspect": ".inspect",
    "load": ".checkpoint",
    "load_session": ".sessions",
    "mesh": ".sharding",
    "score": ".scoring",
    "session": ".sessions",
    "stream": ".generation",
}

__all__ = sorted(_HOME)

__getattr__, __dir__ = names(__name__, _HOME)
