"""`dsv32 eval`: perplexity, divergence and errors of layers. JAX is imported when a command runs."""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..system.progress import Progress
from .terminal import Screen, json_line

VARIANTS = "A and B are CHECKPOINT[:WORD,...]: bfloat16, float32 (compute dtype), fp8-cache, bfloat16-cache, ..."


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


def _ppl(arguments: argparse.Namespace) -> int:
    from ..evaluation import report
    from ..evaluation.loss import perplexity
    from ..evaluation.variant import Variant

    screen = Screen()
    variant = Variant(Path(arguments.checkpoint), arguments.dtype, arguments.cache_dtype)
    found = perplexity(variant, _read_texts(arguments), progress=_show_progress(screen), **_windows(arguments))
    facts = {**dataclasses.asdict(found), "tokens_per_second": found.tokens_per_second}
    screen.result(json_line(facts) + "\n" if arguments.json else report.format_perplexity(found))
    return 0


def _kl(arguments: argparse.Namespace) -> int:
    from ..evaluation import report
    from ..evaluation.divergence import kl

    screen = Screen()
    texts, progress = _read_texts(arguments), _show_progress(screen)
    found = kl(arguments.a, arguments.b, texts, progress=progress, **_windows(arguments))
    screen.result(json_line(dataclasses.asdict(found)) + "\n" if arguments.json else report.format_divergence(found))
    return 0


def _layers(arguments: argparse.Namespace) -> int:
    from ..evaluation import report
    from ..evaluation.layer_errors import layers

    screen = Screen()
    found = layers(arguments.a, arguments.b, _read_texts(arguments), tokens=arguments.tokens)
    if arguments.json:
        screen.result(json_line([dataclasses.asdict(error) for error in found]) + "\n")
        return 0
    for line in report.format_layers(found):
        screen.result(line + "\n")
    return 0


def _read_texts(arguments: argparse.Namespace) -> list[str] | None:
    from ..evaluation.corpus import read_texts

    return read_texts(arguments.files) if arguments.files else None


def _windows(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in ("context", "stride", "limit", "batch_size")}


def _show_progress(screen: Screen) -> Callable[[int, int], None]:
    return lambda done, count: screen.progress(Progress(done, count, unit="windows"))
