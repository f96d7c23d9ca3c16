"""Figures of traces, weights and placements, and charts of any numbers."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..quantization.quantize import E2M1, E4M3
from .charts import (
    BESIDE,
    BLUE,
    COLOURS,
    RED,
    SKY,
    Picture,
    bars as bars,
    groups,
    heat,
    lines as lines,
    stacks as stacks,
)
from .placements import Placement
from .traces import Trace
from .weight_statistics import Statistics

if TYPE_CHECKING:
    from .patching import Patching

MARKERS = "os^Dvph*"


def codes(statistics: Statistics) -> Picture:
    """Plot how often each of the 16 values of E2M1 occurs."""
    picture = Picture("element (E2M1, before its scales)", "share of elements (%)")
    axes, order = picture.axes, [*range(15, 7, -1), *range(8)]
    share = 100 * statistics.codes / statistics.codes.sum()
    axes.bar(range(16), share[order], color=[SKY if code == 8 else BLUE for code in order])
    axes.set_xticks(range(16), ["-0" if code == 8 else f"{E2M1[code]:g}" for code in order])
    return picture


def scales(statistics: Statistics) -> Picture:
    """Plot how many blocks have each scale, by magnitude, and the scales between these that none has; a block with the
    scale 448 (red) is saturated."""
    picture = Picture("block scale (E4M3); x: that of no block", "blocks")
    axes = picture.axes
    counts = statistics.scales[:127] + statistics.scales[128:255]
    used = np.flatnonzero(counts)
    unused = [code for code in range(used[0], used[-1]) if not counts[code]]
    at = np.maximum(E4M3[:127], 2.0**-10)
    axes.vlines(at[used], 0.5, counts[used], color=[RED if code == 126 else BLUE for code in used], linewidth=4)
    axes.plot(at[unused], np.full(len(unused), 0.6), "x", color="black", markersize=5)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.get_major_locator().set_params(subs=(1, 1.5))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylim(0.5)
    return picture


def patching(found: "Patching", tokens: Sequence[str]) -> Picture:
    """Plot what each patch adds to the log-probability of the answer; `tokens` are the texts of the clean prompt's."""
    columns = ["".join(show_token(tokens[i]) for i in group) for group in found.positions]
    labels = "position patched (token of the clean prompt)", "after layer", "change of log p (nats)"
    picture = heat(found.change, *labels, rows=found.layers, columns=columns, centre=0)
    picture.axes.tick_params("x", rotation=60)
    return picture


def show_token(text: str) -> str:
    """Return the text of a token as the label of an axis."""
    return ascii(text)[1:-1] if text.strip(" ") else "space"


def expert_load(trace: Trace) -> Picture:
    """Plot the tokens of each expert of each layer, relative to an equal share."""
    layers = range(trace.config.first_k_dense_replace, trace.config.num_hidden_layers)
    share = _divide_by_equal_share(trace.count_experts())
    return heat(share, "expert", "layer", "load (1 = equal share)", rows=layers, centre=1)


def experts_by_kind(trace: Trace, layer: int, kinds: Mapping[str, np.ndarray]) -> Picture:
    """Plot which experts of a layer each kind of token uses, relative to an equal share. `kinds` has a mask
    [rows, tokens] for each kind. White lines separate groups of experts."""
    index = layer - trace.config.first_k_dense_replace
    counts = np.stack([trace.count_experts(mask)[index] for mask in kinds.values()])
    labels = f"expert of layer {layer}", "kind of token", "use (1 = equal share)"
    picture = heat(_divide_by_equal_share(counts), *labels, rows=list(kinds), centre=1)
    size = trace.config.n_routed_experts // trace.config.n_group
    for border in range(size, trace.config.n_routed_experts, size):
        picture.axes.axvline(border - 0.5, color="white", linewidth=2)
    return picture


def _divide_by_equal_share(counts: np.ndarray) -> np.ndarray:
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1) * counts.shape[1]


def attention_mass(trace: Trace, first: int) -> Picture:
    """Plot the share of dense attention's weight on selected positions, by layer, mean over positions from `first` on,
    beside the best choice of as many positions and the most recent ones."""
    names = {"selected": "selected by the indexer", "best": "best choice", "recent": "most recent"}
    means = {name: np.nanmean(trace[f"mass_{kind}"][:, :, first:], axis=(1, 2)) for kind, name in names.items()}
    shares = {name: {str(i): (100 * share, 0.0) for i, share in enumerate(mean)} for name, mean in means.items()}
    picture = groups(shares, "layer", "attention mass (%)")
    picture.axes.set(ylim=(0, 100))
    return picture


def selection(trace: Trace, layer: int, row: int = 0, start: int = 0) -> Picture:
    """Plot the positions that each token from `start` on selects, coloured by the rank of their index score."""
    length = int(trace["length"][row])
    selected, score = (trace[name][layer, row, start:length] for name in ("selected", "index_score"))
    ranks = np.full((length - start, length), np.nan)
    for i, (positions, scores) in enumerate(zip(selected, score, strict=True)):
        real = positions >= 0
        rank = np.argsort(np.argsort(scores[real]))
        ranks[i, positions[real]] = (rank + 1) / max(real.sum(), 1)
    picture = heat(ranks, "position attended to", "token that attends", "rank of its index score (1 = highest)")
    picture.axes.images[0].set_extent((0, length, length, start))
    picture.axes.set_title(f"layer {layer}")
    return picture


def needle(ranks: np.ndarray, limit: int, tokens: Sequence[str]) -> Picture:
    """Plot the rank of one position among the index scores of the given tokens [layers, tokens]; ranks up to `limit`
    are selected."""
    picture = Picture("token", "rank of the needle (1 = first)", 3.2)
    axes = picture.axes
    for layer, rank in enumerate(ranks):
        style = {"color": COLOURS[layer % len(COLOURS)], "marker": MARKERS[layer % len(MARKERS)]}
        axes.plot(rank, **style, markersize=5, linewidth=1, label=f"layer {layer}")
    axes.axhline(limit, color="black", linestyle="--", linewidth=1)
    axes.annotate(f"selected up to {limit}", (0, limit), xytext=(2, 3), textcoords="offset points", fontsize=9)
    axes.set_yscale("log", base=2)
    axes.set_ylim(1.3 * max(ranks.max(), limit), min(ranks.min(), limit) / 1.3)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xticks(range(len(tokens)), list(map(show_token, tokens)), rotation=30, ha="right")
    axes.legend(**BESIDE)
    return picture


def sharding(placement: Placement) -> Picture:
    """Plot the shards of a weight and their devices, as rectangles of its (at most two) split axes."""
    letters, shape, split, shards = placement.letters, placement.shape, placement.split, placement.shards
    if len(shape) == 1:
        letters, shape, split = "1" + letters, (1, *shape), (None, *split)
        shards = [((0, 1), *shard) for shard in shards]
    axes_split = [axis for axis, name in enumerate(split) if name is not None]
    down = axes_split[0] if axes_split else 0
    across = axes_split[1] if len(axes_split) > 1 else next(axis for axis in range(len(shape)) if axis != down)
    xlabel, ylabel = (f"{letters[axis]} ({split[axis] or 'whole'})" for axis in (across, down))
    picture = Picture(xlabel, ylabel, 3.4)
    axes = picture.axes
    where: dict[tuple, list[int]] = {}
    for device, shard in enumerate(shards):
        where.setdefault((shard[down], shard[across]), []).append(device)
    for i, (((top, bottom), (left, right)), devices) in enumerate(where.items()):
        corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
        axes.fill(*zip(*corners, strict=True), facecolor=COLOURS[i % len(COLOURS)], alpha=0.35, edgecolor="black")
        names = ", ".join(map(str, devices[:4])) + (" ..." if len(devices) > 4 else "")
        text = f"device{'s' if len(devices) > 1 else ''} {names}"
        axes.annotate(text, ((left + right) / 2, (top + bottom) / 2), ha="center", va="center", fontsize=9)
    axes.set_xticks(sorted({edge for _, columns in where for edge in columns}))
    axes.set_yticks(sorted({edge for rows, _ in where for edge in rows}))
    rest = [f"{letters[i]} {n}" for i, n in enumerate(shape) if i not in (across, down)]
    axes.set(
        xlim=(0, shape[across]),
        ylim=(shape[down], 0),
        title=placement.path + (f", each with all of {', '.join(rest)}" if rest else ""),
    )
    return picture
