"""What is inside: of a run, and of a checkpoint that is not loaded.

trace = inspect.trace(model, [prompt + answer])       # routing, index scores, attention, predictions of every token
trace.save("run.safetensors")                        # inspect.Trace.load reads it without the model
inspect.tree("checkpoint")                           # parameters, equal layers folded; also of a config.json or a model
folder = inspect.Folder("checkpoint")                # converted, or in Hugging Face layout
weight = folder.weight("layers.3.ffn.w_up_EMD", 5)   # one expert of one leaf; nothing else is read
inspect.statistics(weight)                           # codes, scales, zero and saturated blocks
inspect.plots.codes(inspect.statistics(weight))      # figures; needs the extra [notebook]
"""

from typing import TYPE_CHECKING

from ..system.lazy import attach

if TYPE_CHECKING:
    from . import plots as plots
    from .blocks import Statistics as Statistics
    from .blocks import atlas as atlas
    from .blocks import clipped as clipped
    from .blocks import statistics as statistics
    from .replay import kept_mass as kept_mass
    from .replay import trace as trace
    from .shard_placement import Placement as Placement
    from .shard_placement import held as held
    from .shard_placement import placement as placement
    from .traces import Mass as Mass
    from .traces import Trace as Trace
    from .trees import Tree as Tree
    from .trees import tree as tree
    from .weights import Folder as Folder
    from .weights import StoredWeight as StoredWeight

_HOME = {
    "Folder": ".weights",
    "Mass": ".traces",
    "Placement": ".shard_placement",
    "Statistics": ".blocks",
    "StoredWeight": ".weights",
    "Trace": ".traces",
    "Tree": ".trees",
    "atlas": ".blocks",
    "clipped": ".blocks",
    "held": ".shard_placement",
    "kept_mass": ".replay",
    "placement": ".shard_placement",
    "plots": ".plots",
    "statistics": ".blocks",
    "trace": ".replay",
    "tree": ".trees",
}

__all__ = sorted(_HOME)

__getattr__, __dir__ = attach(__name__, _HOME)
