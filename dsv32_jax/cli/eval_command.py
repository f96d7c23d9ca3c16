"""`dsv32 eval`: perplexity, divergence and errors of layers. JAX is imported when a command runs."""

import argparse
import dataclasses
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..system.interrupts import acknowledge_interrupt
from .terminal import Screen, format_json

if TYPE_CHECKING:
    from ..evaluation.layer_errors import LayerError

VARIANTS = "A and B are CHECKPOINT[:WORD,...]: bfloat16, float32 (compute dtype), fp8-cache, bfloat16-cache, ..."

WORST = "largest divergence (KL, text:position, actual token and its probability, most likely token of A and of B):"


def add(commands: Any) -> None:
    """Add `eval` to the subparsers `commands`."""
    evaluate = commands.add_parser("eval", help="measure quality: perplexity, divergence, errors of layers")
    measures = evaluate.add_subparsers(required=True, metavar="MEASURE")

    ppl = measures.add_parser("ppl", help="perplexity of a text", description="Perplexity of a text.")
    ppl.add_argument("checkpoint", metavar="CHECKPOINT", help="converted checkpoint")
    _add_texts(ppl)
    _add_windows(ppl)
    add = ppl.add_argument
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="compute dtype (default: bfloat16)")
    add("--cache-dtype", choices=("bfloat16", "float32", "fp8"), help="KV cache storage (default: --dtype)")
    ppl.set_defaults(run=_ppl)

    kl = measures.add_parser(
        "kl",
        help="divergence of B's predictions from A's",
        description=f"KL(A || B) of the next token, token by token. {VARIANTS}",
    )
    kl.add_argument("a", metavar="A", help="reference, for example the source")
    kl.add_argument("b", metavar="B", help="compared with it, for example A:fp8-cache")
    _add_texts(kl)
    _add_windows(kl)
    kl.set_defaults(run=_kl)

    layers = measures.add_parser(
        "layers",
        help="errors of B against A, layer by layer",
        description="Relative errors of B's weights and outputs, part by part, both computed from A's activations in "
        "float32. One layer of each is in memory at a time.",
    )
    layers.add_argument("a", metavar="A", help="converted checkpoint: the source")
    layers.add_argument("b", metavar="B", help="the same model in other formats")
    _add_texts(layers)
    layers.add_argument("--tokens", type=int, metavar="N", help="tokens to read of the first text (default: 1024)")
    layers.set_defaults(run=_layers)


def _add_texts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files",
        metavar="FILE",
        nargs="*",
        default=[],
        type=Path,
        help='text, or .jsonl with a "text" on each line; each is read on its own (default: the bundled held-out text)',
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _add_windows(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--context", type=int, metavar="N", help="tokens in a window (default: 1024)")
    add("--stride", type=int, metavar="N", help="tokens from window to window (default: half of --context)")
    add("--limit", type=int, metavar="N", help="read the first N windows only")
    add("--batch-size", type=int, default=4, metavar="N", help="windows in a batch (default: 4)")


@acknowledge_interrupt()
def _ppl(arguments: argparse.Namespace) -> int:
    from ..evaluation.perplexities import perplexity
    from ..evaluation.variant import Variant

    variant = Variant(Path(arguments.checkpoint), arguments.dtype, arguments.cache_dtype)
    found = perplexity(variant, **_collect_options(arguments))
    return _print(arguments, {**dataclasses.asdict(found), "tokens_per_second": found.tokens_per_second}, [repr(found)])


@acknowledge_interrupt()
def _kl(arguments: argparse.Namespace) -> int:
    from ..evaluation.divergence import kl

    found = kl(arguments.a, arguments.b, **_collect_options(arguments))
    worst = (
        f"  {one.kl:6.3f}  {one.document}:{one.position}  {one.before[-40:]!r} {one.token!r} "
        f"{one.probability_a:.3f} -> {one.probability_b:.3f}  {one.top_a!r} -> {one.top_b!r}"
        for one in found.worst
    )
    return _print(arguments, dataclasses.asdict(found), [repr(found), WORST, *worst])


@acknowledge_interrupt()
def _layers(arguments: argparse.Namespace) -> int:
    from ..evaluation.layer_errors import layers

    found = layers(arguments.a, arguments.b, _read_texts(arguments), tokens=arguments.tokens)
    return _print(arguments, map(dataclasses.asdict, found), format_layers(found))


def _print(arguments: argparse.Namespace, facts: Any, lines: Iterable[str]) -> int:
    """Print the facts as JSON if that was asked for, else each line as soon as it is there."""
    screen = Screen()
    for line in [format_json(facts if isinstance(facts, dict) else list(facts))] if arguments.json else lines:
        screen.result(line + "\n")
    return 0


def _read_texts(arguments: argparse.Namespace) -> list[str] | None:
    from ..evaluation.corpus import read_texts

    return read_texts(arguments.files) if arguments.files else None


def _collect_options(arguments: argparse.Namespace) -> dict[str, Any]:
    windows = {name: getattr(arguments, name) for name in ("context", "stride", "limit", "batch_size")}
    return {"texts": _read_texts(arguments), **windows}


def format_layers(found: "Iterable[LayerError]") -> Iterator[str]:
    """Yield the lines of `dsv32 eval layers`, each as soon as its part is compared."""
    yield "relative errors in %: worst parameter; outputs, computed from A's activations; routed experts"
    yield f"{'part':10} {'worst parameter':28} {'weights':>7}  {'outputs':34} experts: weights, outputs: median (worst)"
    for error in found:
        known = {path: value for path, value in error.weights.items() if value is not None}
        path = max(known, key=known.__getitem__)
        outputs = ", ".join(f"{name} {_format_percent(value)}" for name, value in error.outputs.items())
        by_expert = error.expert_weights, error.expert_outputs
        experts = "  ".join(_format_spread(errors) for errors in by_expert if errors)
        yield f"{error.part:10} {path:28} {_format_percent(known[path]):>7}  {outputs:34} {experts}".rstrip()


def _format_percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def _format_spread(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    worst = max(known)
    idle = f", {len(values) - len(known)} idle" if len(known) < len(values) else ""
    return f"{_format_percent(statistics.median(known))} ({_format_percent(worst)}: {values.index(worst)}{idle})"
