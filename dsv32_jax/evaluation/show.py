"""What was measured, for a person to read."""

import statistics
from collections.abc import Iterable, Iterator

from .divergence import Divergence
from .estimate import Estimate
from .layerwise import LayerError
from .loss import Perplexity


def perplexity(found: Perplexity) -> str:
    """Lines for `dsv32 eval ppl`."""
    size = "" if found.bits_per_byte is None else f", {found.bits_per_byte:.4f} bits a byte"
    return (
        f"perplexity {_estimate(found.perplexity)}, {_estimate(found.nats)} nats a token{size}\n"
        f"{found.tokens} tokens of {found.documents} texts in {found.windows} windows of {found.context}, "
        f"{found.stride} apart; {found.read} tokens read in {found.seconds:.1f} s, "
        f"{found.tokens_per_second:.0f} a second, after {found.compile_seconds:.1f} s of compiling\n"
        "+- is the standard error over windows\n"
    )


def divergence(found: Divergence) -> str:
    """Lines for `dsv32 eval kl`."""
    spread = ", ".join(f"{name} %: {value:.2g}" for name, value in found.percentiles.items())
    lines = [
        f"KL(A || B) {_estimate(found.kl)} nats a token; percentiles {spread}",
        f"the same likeliest token: {100 * found.same_top.mean:.2f} %",
        f"perplexity A {_estimate(found.perplexity_a)}, B {_estimate(found.perplexity_b)}; "
        f"B - A {_estimate(found.loss, '+')} nats a token (paired)",
        f"{found.tokens} tokens in {found.windows} windows of {found.context}, {found.stride} apart; "
        "+- is the standard error over windows",
        "most different (KL, text and position, what came and its probability, the likeliest of A and of B):",
    ]
    for one in found.worst:
        lines.append(
            f"  {one.kl:6.3f}  {one.document}:{one.position}  {one.before[-40:]!r} {one.token!r} "
            f"{one.probability_a:.3f} -> {one.probability_b:.3f}  {one.top_a!r} -> {one.top_b!r}"
        )
    return "\n".join(lines) + "\n"


def layers(found: Iterable[LayerError]) -> Iterator[str]:
    """Lines for `dsv32 eval layers`, each as soon as its part is compared."""
    yield "relative errors in %: the worst leaf; what the part adds to the stream, its input being A's; routed experts"
    yield f"{'part':10} {'worst leaf':28} {'weights':>7}  {'outputs':34} experts: weights and outputs, median (worst)"
    for error in found:
        known = {leaf: value for leaf, value in error.weights.items() if value is not None}
        leaf = max(known, key=known.__getitem__)
        outputs = ", ".join(f"{name} {_percent(value)}" for name, value in error.outputs.items())
        experts = "  ".join(map(_spread, (error.expert_weights, error.expert_outputs))) if error.expert_weights else ""
        yield f"{error.part:10} {leaf:28} {_percent(known[leaf]):>7}  {outputs:34} {experts}".rstrip()


def _estimate(value: Estimate, sign: str = "") -> str:
    error = "" if value.standard_error is None else f" +- {value.standard_error:.2g}"
    return f"{value.mean:{sign}.4g}{error}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def _spread(values: list[float | None]) -> str:
    """The median, and the worst with its number; how many have no value."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    worst = max(known)
    idle = f", {len(values) - len(known)} idle" if len(known) < len(values) else ""
    return f"{_percent(statistics.median(known))} ({_percent(worst)}: {values.index(worst)}{idle})"
