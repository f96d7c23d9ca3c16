"""`dsv32 bench`: the command lines of what measures. What is measured is imported when it is."""

import argparse
from typing import Any


def add(commands: Any) -> None:
    """Add them to the subparsers `commands`; each sets `run`, which takes the parsed arguments."""
    bench = commands.add_parser("bench", help="measure on this machine").add_subparsers(required=True, metavar="WHAT")
    _add_layer_and_load(bench)
    _add_context(bench)
    _add_model(bench)
    _add_kernels(bench)
    _add_quantize(bench)
    _add_convert(bench)


def _add_layer_and_load(bench: Any) -> None:
    layer = bench.add_parser("layer", help="one attention and one MoE block at the true dimensions (needs 12 GB)")
    layer.set_defaults(run=_layer)
    load = bench.add_parser("load", help="loading a checkpoint against a plain read of its bytes")
    load.add_argument("checkpoint", nargs="?", help="a converted checkpoint (default: a random one of about 1 GB)")
    load.set_defaults(run=_load)


def _add_context(bench: Any) -> None:
    context = bench.add_parser("context", help="what a long context costs, part by part (needs 4 GB)")
    context.add_argument("--section", choices=("decode", "prefill", "batch"), action="append", help="what to do (all)")
    context.add_argument("--prefill", type=int, default=8192, metavar="N", help="tokens of the prompt (8192)")
    context.add_argument("--layers", type=int, default=1, metavar="N", help="layers that read it (1)")
    context.set_defaults(run=_context)


def _add_quantize(bench: Any) -> None:
    quantize = bench.add_parser("quantize", help="weights a second that one core brings to NVFP4 and back")
    quantize.set_defaults(run=_quantize)


def _add_convert(bench: Any) -> None:
    conversion = bench.add_parser("convert", help="layers of the true dimensions -> NVFP4, against cp (20 GB of disk)")
    conversion.add_argument("--layers", default="1+1", metavar="N+M", help="dense and MoE layers (1+1: 12 GB in FP8)")
    conversion.add_argument("--source", choices=("fp8", "nvfp4"), action="append", help="formats to start from (both)")
    conversion.add_argument("--max-memory", default="8GiB", metavar="SIZE", help="limit of the conversion (8GiB)")
    conversion.add_argument("--folder", help="where the checkpoints are written (default: the temporary folder)")
    conversion.set_defaults(run=_convert)


def _add_model(bench: Any) -> None:
    model = bench.add_parser("model", help="layers of the true dimensions with random NVFP4 weights, on any mesh")
    model.add_argument("--config", metavar="FILE", help="another model's config.json")
    model.add_argument("--layers", type=int, metavar="N", help="how many layers (all)")
    model.add_argument("--mesh", metavar="AXES", help="for example expert=4 (one device)")
    model.add_argument("--batch", type=int, action="append", metavar="B", help="rows; may be given again (1 and 8)")
    model.add_argument("--context", type=int, action="append", metavar="N", help="tokens a row has (1024 and 8192)")
    model.add_argument("--cache-dtype", choices=("bfloat16", "fp8"), default="bfloat16", help="storage of the cache")
    model.add_argument("--steps", type=int, metavar="N", help="decode steps a call takes (8, on a GPU 64)")
    model.add_argument("--json", action="store_true", help="a JSON object a line")
    model.set_defaults(run=_model)


def _add_kernels(bench: Any) -> None:
    kernels = bench.add_parser(
        "kernels", help="products with stored weights at the true shapes, with kernels and by XLA alone"
    )
    add = kernels.add_argument
    add("--format", choices=("nvfp4", "fp8", "bf16"), action="append", help="formats of the weights (nvfp4)")
    add("--rows", type=int, action="append", metavar="M", help="rows of activations (1, 2, 4, 8, 16, 64 and 256)")
    add("--weight", action="append", metavar="NAME", help="a weight of the first column (all)")
    add("--by", choices=("auto", "xla", "torch"), action="append", help="what computes (all that is there)")
    kernels.set_defaults(run=_kernels)


def _layer(_: argparse.Namespace) -> int:
    from .layer import print_layer

    print_layer()
    return 0


def _load(arguments: argparse.Namespace) -> int:
    from .load import print_load

    print_load(arguments.checkpoint)
    return 0


def _context(arguments: argparse.Namespace) -> int:
    from .context import SECTIONS, print_context

    print_context(arguments.section or SECTIONS, arguments.prefill, arguments.layers)
    return 0


def _model(arguments: argparse.Namespace) -> int:
    from .model import BATCH, CONTEXT, plan, print_model

    where = (arguments.config, arguments.layers, arguments.mesh)
    sizes = (arguments.batch or BATCH, arguments.context or CONTEXT)
    print_model(plan(*where, *sizes, arguments.cache_dtype, arguments.steps), arguments.json)
    return 0


def _kernels(arguments: argparse.Namespace) -> int:
    from .kernels import ROWS, available, print_kernels

    print_kernels(
        arguments.format or ["nvfp4"], arguments.rows or ROWS, arguments.weight or [], arguments.by or available()
    )
    return 0


def _quantize(_: argparse.Namespace) -> int:
    from .quantize import print_rows

    print_rows()
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    from .convert import print_convert

    print_convert(arguments.layers, arguments.source or ["fp8", "nvfp4"], arguments.max_memory, arguments.folder)
    return 0
