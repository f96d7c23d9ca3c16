"""Look inside a run, and inside a checkpoint without loading it.

trace = inspect.trace(model, [prompt + answer])      # routing, index scores, attention, predictions of every token
trace.save("run.safetensors")                        # inspect.Trace.load reads it without the model
edited = inspect.edit(model, experts_off=[(3, 17)])   # another model, which shares all other weights
inspect.contrast(model, rows_a, rows_b)              # experts and directions by how differently two texts use them
inspect.patch(model, clean, corrupted, answer)       # what decides the answer: streams of one run put into another
inspect.tree("checkpoint")                           # parameters, equal layers folded; also of a config.json or a model
folder = inspect.Folder("checkpoint")                # converted, or in Hugging Face layout
weight = folder.weight("layers.3.ffn.w_up_EMD", 5)   # one expert of one weight; nothing else is read
inspect.statistics(weight)                           # codes, scales, zero and saturated blocks
inspect.plots.codes(inspect.statistics(weight))      # figures; needs the extra [notebook]
"""

from typing import TYPE_CHECKING

from ..system.lazy import attach

if TYPE_CHECKING:
    from . import plots as plots
    from .contrasts import Contrast as Contrast, contrast as contrast
    from .interventions import edit as edit
    from .patching import Patching as Patching, patch as patch
    from .placements import Placement as Placement, placement as placement
    from .traces import Trace as Trace
    from .tracing import estimate_bytes as estimate_bytes, trace as trace
    from .trees import Tree as Tree, tree as tree
    from .weight_statistics import (
        Statistics as Statistics,
        count_clipped as count_clipped,
        expert_errors as expert_errors,
        statistics as statistics,
    )
    from .weights import Folder as Folder, StoredWeight as StoredWeight

__getattr__, __dir__ = attach(__name__, __file__)

__all__ = __dir__()
