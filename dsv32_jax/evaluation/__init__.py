"""Measure quality: perplexity, divergence between two models, and errors layer by layer.

perplexity("converted")                            # on the bundled held-out text
perplexity(model, texts, tokenizer=tokenizer)
kl("bf16", "nvfp4")                                # how far the second model's predictions are from the first's
kl("nvfp4", "nvfp4:fp8-cache")                     # one checkpoint, computed in two ways
for layer in layers("bf16", "nvfp4"): ...          # one layer of each in memory at a time

`LmEval` runs lm-evaluation-harness (extra [eval]) on a checkpoint.
"""

from typing import TYPE_CHECKING

from ..system.lazy import attach

if TYPE_CHECKING:
    from .divergence import Divergence as Divergence, kl as kl
    from .layer_errors import LayerError as LayerError, layers as layers
    from .lm_eval_adapter import LmEval as LmEval
    from .perplexities import Perplexity as Perplexity, perplexity as perplexity
    from .variant import Variant as Variant

__getattr__, __dir__ = attach(__name__, __file__)

__all__ = __dir__()
