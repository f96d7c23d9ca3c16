"""The command line of `dsv32 eval`. Nothing here needs JAX: `--help` does not wait for it."""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..cli.screen import Screen, json_line

VARIANTS = "A and B are CKPT or CKPT:WORD,...: bfloat16, float32 (arithmetic), fp8-cache, bfloat16-cache, float32-cache"


def add(commands: Any) -> None:
    """Add `eval` to the subparsers `commands`."""
    evaluate = commands.add_parser("eval", help="measure quality: perplexity, divergence, error of each layer")
    measures = evaluate.add_subparsers(required=True, metavar="WHAT")

    ppl = measures.add_parser("ppl", help="perplexity of a text", description="Perplexity of a text.")
    ppl.add_argument("checkpoint", metavar="CKPT", help="a converted checkpoint")
    _add_texts(ppl)
    _add_windows(ppl)
    ppl.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="arithmetic (bfloat16)")
    ppl.add_argument("--cache-dtype", choices=("bfloat16", "float32", "fp8"), help="the cache's storage (--dtype)")
    ppl.set_defaults(run=_ppl)

    kl = measures.add_parser(
        "kl",
        help="how far B's predictions are from A's",
        description=f"KL(A || B) of the next token, token by token. {VARIANTS}.",
    )
    kl.add_argument("a", metavar="A", help="what is compared with, for example the source")
    kl.add_argument("b", metavar="B", help="what is compared, for example A:fp8-cache")
    _add_texts(kl)
    _add_windows(kl)
    kl.set_defaults(run=_kl)

    layers = measures.add_parser(
        "layers",
        help="where in the layers B differs from A",
        description="Relative error of B's weights and outputs, part by part, both given A's activations, in float32. "
        "One layer of each is in memory at a time.",
    )
    layers.add_argument("a", metavar="A", help="a converted checkpoint: the source")
    layers.add_argument("b", metavar="B", help="the same model in other formats")
    _add_texts(layers)
    layers.add_argument("--tokens", type=int, metavar="N", help="of the first text, N tokens are read (1024)")
    layers.set_defaults(run=_layers)


def _add_texts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files",
        metavar="FILE",
        nargs="*",
        default=[],
        type=Path,
        help='text, or .jsonl with a "text" a line; each is read on its own (default: the shipped held-out text)',
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _add_windows(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--context", type=int, metavar="N", help="tokens of a window (1024)")
    parser.add_argument("--stride", type=int, metavar="N", help="tokens from window to window (half of --context)")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N windows only")
    parser.add_argument("--batch-size", type=int, default=4, metavar="N", help="windows of a batch (4)")


def _texts(arguments: argparse.Namespace) -> list[str] | None:
    from . import texts

    return texts.read(arguments.files) if arguments.files else None


def _windows(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in ("context", "stride", "limit", "batch_size")}


def _ppl(arguments: argparse.Namespace) -> int:
    from . import show
    from .loss import perplexity
    from .variant import Variant

    screen = Screen()
    variant = Variant(Path(arguments.checkpoint), arguments.dtype, arguments.cache_dtype)
    found = perplexity(variant, _texts(arguments), progress=_status(screen), **_windows(arguments))
    facts = {**dataclasses.asdict(found), "tokens_per_second": found.tokens_per_second}
    screen.result(json_line(facts) + "\n" if arguments.json else show.perplexity(found))
    return 0


def _kl(arguments: argparse.Namespace) -> int:
    from . import show
    from .divergence import kl

    screen = Screen()
    found = kl(arguments.a, arguments.b, _texts(arguments), progress=_status(screen), **_windows(arguments))
    screen.result(json_line(dataclasses.asdict(found)) + "\n" if arguments.json else show.divergence(found))
    return 0


def _layers(arguments: argparse.Namespace) -> int:
    from . import show
    from .layerwise import layers

    screen = Screen()
    found = layers(arguments.a, arguments.b, _texts(arguments), tokens=arguments.tokens)
    if arguments.json:
        screen.result(json_line([dataclasses.asdict(error) for error in found]) + "\n")
        return 0
    for line in show.layers(found):
        screen.result(line + "\n")
    return 0


def _status(screen: Screen) -> Callable[[int, int], None]:
    """Shows how many windows were read, where someone looks."""
    return lambda done, count: screen.status(f"{done} of {count} windows" if done < count else "")
