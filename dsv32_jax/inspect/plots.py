"""Figures of what the other files of this room find. Each function returns the figure; needs the extra [notebook].

Colours are Okabe and Ito's, and cividis where a number becomes a colour: both are told apart by colour-blind readers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..quantization.quantize import E2M1, E4M3
from .blocks import Statistics
from .picture import Picture, figure
from .shard_placement import Placement
from .traces import Mass, Trace

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW = "#0072B2 #E69F00 #009E73 #D55E00 #CC79A7 #56B4E9 #F0E442".split()
GREY = "#999999"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, RED, YELLOW, GREY)
MARKERS = "os^Dvph*"
MAP = "cividis"


def codes(found: Statistics) -> Picture:
    """How often each of the 16 values of E2M1 occurs."""
    made, axes = figure()
    order = np.argsort(E2M1, kind="stable")
    share = 100 * found.codes / found.codes.sum()
    values = [f"{value:g}" for value in E2M1]
    values[8] = "-0"
    axes.bar(range(16), share[order], color=[SKY if code == 8 else BLUE for code in order])
    axes.set_xticks(range(16), [values[code] for code in order])
    axes.set(xlabel="element (E2M1, before its scales)", ylabel="share of elements (%)")
    return made


def scales(found: Statistics) -> Picture:
    """The block scales by magnitude; where they are 448 the block is saturated."""
    made, axes = figure()
    counts = found.scales[:127] + found.scales[128:255]
    used = np.flatnonzero(counts)
    axes.vlines(np.maximum(E4M3[used], 2.0**-10), 0, 100 * counts[used] / found.blocks, color=BLUE, linewidth=2)
    axes.axvline(448, color=RED, linestyle="--", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.annotate(
        "448", (448, 1), xycoords=("data", "axes fraction"), xytext=(4, -10), textcoords="offset points", color=RED
    )
    axes.set(xlabel="block scale (E4M3)", ylabel="share of blocks (%)", ylim=(0, None))
    return made


def bars(values: Mapping[str, float], ylabel: str, digits: int = 1, xlabel: str = "") -> Picture:
    """A bar for each name, with its number."""
    made, axes = figure()
    drawn = axes.bar(range(len(values)), list(values.values()), color=BLUE, width=0.6)
    axes.bar_label(drawn, fmt=f"%.{digits}f", padding=2)
    axes.set_xticks(range(len(values)), list(values))
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.margins(y=0.15)
    return made


def heat(
    values: np.ndarray, xlabel: str, ylabel: str, label: str, rows: Sequence[Any] = (), columns: Sequence[Any] = ()
) -> Picture:
    """A matrix as colours; `rows` and `columns` are their names, by default their numbers."""
    made, axes = figure(7, 1.7 + 0.25 * min(len(values), 10))
    image = axes.imshow(values, cmap=MAP, aspect="auto", interpolation="nearest")
    for names, axis in ((rows, axes.yaxis), (columns, axes.xaxis)):
        if len(names):
            axis.set_ticks(range(len(names)), list(map(str, names)))
        else:
            axis.get_major_locator().set_params(integer=True)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    made.colorbar(image, ax=axes, label=label)
    return made


def atlas(errors: np.ndarray, layers: Sequence[int]) -> Picture:
    """The error of every expert [layers, experts], shares of one."""
    return heat(100 * errors, "expert", "layer", "||error|| / ||weight|| (%)", rows=layers)


def load(trace: Trace) -> Picture:
    """How many of the recorded tokens each expert of each layer gets, against an equal share."""
    counts = expert_counts(trace)
    share = counts / counts.sum(axis=1, keepdims=True) * counts.shape[1]
    first = trace.config.first_k_dense_replace
    return heat(share, "expert", "layer", "load (1 = equal share)", rows=range(first, first + len(share)))


def expert_counts(trace: Trace, chosen: np.ndarray | None = None) -> np.ndarray:
    """How often each expert is used [moe layers, experts], by all recorded tokens, or those where `chosen`
    [rows, tokens] is true."""
    expert = trace["expert"]
    chosen = np.ones(expert.shape[1:3], bool) if chosen is None else chosen
    picked = [layer[chosen] for layer in expert]
    return np.stack([np.bincount(one[one >= 0], minlength=trace.config.n_routed_experts) for one in picked])


def kinds(trace: Trace, layer: int, members: Mapping[str, np.ndarray]) -> Picture:
    """Which experts of a layer the tokens of each kind use: their share of the kind's choices, times the number of
    experts. `members` [rows, tokens] says by kind which tokens belong to it."""
    index = layer - trace.config.first_k_dense_replace
    counts = np.stack([expert_counts(trace, chosen)[index] for chosen in members.values()])
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1) * counts.shape[1]
    groups = f"expert of layer {layer}"
    made = heat(share, groups, "kind of token", "use (1 = equal share)", rows=list(members))
    size = trace.config.n_routed_experts // trace.config.n_group
    for border in range(size, trace.config.n_routed_experts, size):
        made.axes[0].axvline(border - 0.5, color="white", linewidth=2)
    return made


def kept(mass: Mass, first: int) -> Picture:
    """The mass that the selected positions keep in each layer, mean over positions from `first` on, beside the best
    choice of as many and the last as many."""
    made, axes = figure()
    names = {"selected by the indexer": mass.kept, "the best choice": mass.best, "the last positions": mass.recent}
    for i, (name, share) in enumerate(names.items()):
        mean = 100 * np.nanmean(share[:, :, first:], axis=(1, 2))
        axes.bar(np.arange(len(mean)) + 0.27 * (i - 1), mean, width=0.25, color=COLOURS[i], label=name)
    axes.set_xticks(range(len(mass.kept)))
    axes.set(xlabel="layer", ylabel="attention mass (%)", ylim=(0, 100))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.22), ncols=3, frameon=False)
    return made


def kept_by_position(mass: Mass, row: int = 0) -> Picture:
    """The mass that the selected positions keep, by layer and position."""
    return heat(100 * mass.kept[:, row], "position", "layer", "attention mass kept (%)")


def selection(trace: Trace, layer: int, row: int = 0, start: int = 0) -> Picture:
    """Which positions each token from `start` on selects, coloured by how high they score among those it sees."""
    length = int(trace["length"][row])
    selected, score = (trace[name][layer, row, start:length] for name in ("selected", "index_score"))
    picture = np.full((length - start, length), np.nan)
    for i, (positions, scores) in enumerate(zip(selected, score, strict=True)):
        real = positions >= 0
        rank = np.argsort(np.argsort(scores[real]))
        picture[i, positions[real]] = (rank + 1) / max(real.sum(), 1)
    made, axes = figure(7, 4)
    image = axes.imshow(
        picture, cmap=MAP, aspect="auto", interpolation="nearest", extent=(0, length, length, start), origin="upper"
    )
    axes.set(xlabel="position that is attended to", ylabel="token that attends", title=f"layer {layer}")
    made.colorbar(image, ax=axes, label="rank of its index score (1 = highest)")
    return made


def needle(ranks: np.ndarray, limit: int, tokens: Sequence[str]) -> Picture:
    """The rank of a marked position among the index scores of the given tokens [layers, tokens]; up to `limit` it is
    selected."""
    made, axes = figure(7, 3.2)
    for layer, rank in enumerate(ranks):
        style = {"color": COLOURS[layer % len(COLOURS)], "marker": MARKERS[layer % len(MARKERS)]}
        axes.plot(rank, **style, markersize=5, linewidth=1, label=f"layer {layer}")
    axes.axhline(limit, color="black", linestyle="--", linewidth=1)
    axes.annotate(f"selected up to {limit}", (0, limit), xytext=(2, 3), textcoords="offset points", fontsize=9)
    axes.set_yscale("log", base=2)
    axes.set_ylim(1.3 * max(ranks.max(), limit), min(ranks.min(), limit) / 1.3)
    axes.yaxis.set_major_formatter("{x:g}")
    names = [ascii(token)[1:-1] if token.strip(" ") else "space" for token in tokens]
    axes.set_xticks(range(len(tokens)), names, rotation=30, ha="right")
    axes.set(xlabel="token", ylabel="rank of the needle (1 = first)")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return made


def sharding(placed: Placement) -> Picture:
    """A weight of any rank as the rectangle of its (at most two) split axes, each piece with its devices; a vector as a
    row or a column."""
    if len(placed.shape) == 1:
        parts = tuple(((0, 1), *part) for part in placed.parts)
        letters, shape, split = "1" + placed.letters, (1, *placed.shape), (None, *placed.split)
        placed = placed._replace(letters=letters, shape=shape, split=split, parts=parts)
    split = [axis for axis, name in enumerate(placed.split) if name is not None]
    down = split[0] if split else 0
    across = split[1] if len(split) > 1 else next(axis for axis in range(len(placed.shape)) if axis != down)
    made, axes = figure(7, 3.4)
    where: dict[tuple, list[int]] = {}
    for device, part in enumerate(placed.parts):
        where.setdefault((part[down], part[across]), []).append(device)
    for i, (((top, bottom), (left, right)), devices) in enumerate(where.items()):
        colour = COLOURS[i % len(COLOURS)]
        size = (right - left, bottom - top)
        axes.add_patch(_rectangle((left, top), *size, facecolor=colour, alpha=0.35, edgecolor="black"))
        middle = (left + size[0] / 2, top + size[1] / 2)
        axes.annotate(_devices(devices), middle, ha="center", va="center", fontsize=9)
    axes.set(xlim=(0, placed.shape[across]), ylim=(placed.shape[down], 0))
    axes.yaxis.get_major_locator().set_params(integer=True)
    names = [f"{placed.letters[axis]} ({placed.split[axis] or 'whole'})" for axis in (across, down)]
    rest = [f"{placed.letters[i]} {n}" for i, n in enumerate(placed.shape) if i not in (across, down)]
    axes.set(
        xlabel=names[0],
        ylabel=names[1],
        title=f"{placed.path}{', each with all of ' + ', '.join(rest) if rest else ''}",
    )
    return made


def _rectangle(*arguments: Any, **options: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(*arguments, **options)


def _devices(devices: Sequence[int]) -> str:
    """Up to four of them by number."""
    shown = ", ".join(map(str, devices[:4]))
    return f"device{'s' if len(devices) > 1 else ''} {shown}{' ...' if len(devices) > 4 else ''}"


def stacks(values: Mapping[str, Mapping[str, float]], ylabel: str) -> Picture:
    """A column for each name, made of named parts."""
    made, axes = figure(7, 3.4)
    bottom = np.zeros(len(values))
    for i, part in enumerate(dict.fromkeys(part for column in values.values() for part in column)):
        heights = np.array([column.get(part, 0.0) for column in values.values()])
        axes.bar(range(len(values)), heights, bottom=bottom, width=0.6, color=COLOURS[i % len(COLOURS)], label=part)
        bottom += heights
    axes.set_xticks(range(len(values)), list(values))
    axes.set(ylabel=ylabel)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, reverse=True)
    return made


def lines(values: Mapping[str, Sequence[float]], xlabel: str, ylabel: str, x: Sequence[float] = ()) -> Picture:
    """A line for each name, over `x`, by default their numbers."""
    made, axes = figure(7, 3)
    for i, (name, heights) in enumerate(values.items()):
        at = x if len(x) else range(len(heights))
        axes.plot(at, heights, color=COLOURS[i % len(COLOURS)], linestyle=("-", "--", ":")[i % 3], label=name)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.legend(frameon=False)
    return made
