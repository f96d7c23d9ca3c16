"""Results of evaluation as text."""

import statistics
from collections.abc import Iterable, Iterator

from ..errors import pluralize
from .divergence import Divergence
from .layer_errors import LayerError
from .loss import Perplexity


def format_perplexity(found: Perplexity) -> str:
    """Return the lines of `dsv32 eval ppl`."""
    size = "" if found.bits_per_byte is None else f", {found.bits_per_byte:.4f} bits per byte"
    return (
        f"perplexity {found.perplexity}, {found.nats} nats per token{size}\n"
        f"{pluralize(found.tokens, 'token')} of {pluralize(found.documents, 'text')} in "
        f"{pluralize(found.windows, 'window')} of {found.context}, {found.stride} apart; {found.read} tokens read in "
        f"{found.seconds:.1f} s ({found.tokens_per_second:.0f} tokens/s), compilation {found.compile_seconds:.1f} s\n"
        "+- is the standard error over windows\n"
    )


def format_divergence(found: Divergence) -> str:
    """Return the lines of `dsv32 eval kl`."""
    percentiles = ", ".join(f"{name} %: {value:.2g}" for name, value in found.percentiles.items())
    lines = [
        f"KL(A || B) {found.kl} nats per token; percentiles {percentiles}",
        f"same most likely token: {100 * found.same_top.mean:.2f} %",
        f"perplexity A {found.perplexity_a}, B {found.perplexity_b}; B - A {found.loss:+} nats per token (paired)",
        f"{pluralize(found.tokens, 'token')} in {pluralize(found.windows, 'window')} of {found.context}, "
        f"{found.stride} apart; +- is the standard error over windows",
        "largest divergence (KL, text:position, actual token and its probability, most likely token of A and of B):",
    ]
    for one in found.worst:
        lines.append(
            f"  {one.kl:6.3f}  {one.document}:{one.position}  {one.before[-40:]!r} {one.token!r} "
            f"{one.probability_a:.3f} -> {one.probability_b:.3f}  {one.top_a!r} -> {one.top_b!r}"
        )
    return "\n".join(lines) + "\n"


def format_layers(found: Iterable[LayerError]) -> Iterator[str]:
    """Yield the lines of `dsv32 eval layers`, each as soon as its part is compared."""
    yield "relative errors in %: worst parameter; outputs, computed from A's activations; routed experts"
    yield f"{'part':10} {'worst parameter':28} {'weights':>7}  {'outputs':34} experts: weights, outputs: median (worst)"
    for error in found:
        known = {path: value for path, value in error.weights.items() if value is not None}
        path = max(known, key=known.__getitem__)
        outputs = ", ".join(f"{name} {_percent(value)}" for name, value in error.outputs.items())
        by_expert = error.expert_weights, error.expert_outputs
        experts = "  ".join(_median_and_worst(errors) for errors in by_expert if errors)
        yield f"{error.part:10} {path:28} {_percent(known[path]):>7}  {outputs:34} {experts}".rstrip()


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def _median_and_worst(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    worst = max(known)
    idle = f", {len(values) - len(known)} idle" if len(known) < len(values) else ""
    return f"{_percent(statistics.median(known))} ({_percent(worst)}: {values.index(worst)}{idle})"
