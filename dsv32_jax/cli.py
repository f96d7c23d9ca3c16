"""The command `dsv32`. Only what a subcommand needs is imported, so `--help` does not wait for JAX."""

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence

from . import interrupts
from .errors import DsvError, StorageError, printable, refusal
from .evaluation import command as evaluation
from .terminal import subcommands
from .terminal.screen import Screen


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand. Returns the exit code: 0 ok, 1 bug, 2 usage, 3 input damaged or unsupported, 4 verification
    failed, 5 not enough disk, memory or devices, 6 output exists or is locked, 74 I/O error, 130 Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(message)s")
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")
    try:
        if argv[:1] == ["convert"]:
            return _convert(argv[1:])
        with interrupts.raised():
            arguments = parser().parse_args(argv)
            return arguments.run(arguments)
    except DsvError as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(printable(f"error: {refusal(error)}"), file=sys.stderr)
        return StorageError.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    root = argparse.ArgumentParser(prog="dsv32", description="DeepSeek-V3.2 in JAX, running from NVFP4 weights.")
    commands = root.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo", help="convert, load and run the small trained model that is shipped: a minute, no download"
    )
    demo.add_argument("--new-tokens", type=int, default=80, metavar="N", help="tokens to generate at most (80)")
    demo.set_defaults(run=_demo)

    convert = commands.add_parser(
        "convert", help="Hugging Face safetensors -> a checkpoint that `load` reads", add_help=False
    )
    convert.add_argument("rest", nargs=argparse.REMAINDER)
    convert.set_defaults(run=_convert)

    importlib.import_module(".convert.subcommands", __package__).add(commands)
    subcommands.add(commands)
    evaluation.add(commands)

    _add_fit(commands)

    bench = commands.add_parser("bench", help="measure on this machine").add_subparsers(required=True, metavar="WHAT")
    layer = bench.add_parser("layer", help="one attention and one MoE block at the true dimensions (needs 12 GB)")
    layer.set_defaults(run=_bench_layer)
    load = bench.add_parser("load", help="loading a checkpoint against a plain read of its bytes")
    load.add_argument("checkpoint", nargs="?", help="a converted checkpoint (default: a random one of about 1 GB)")
    load.set_defaults(run=_bench_load)
    context = bench.add_parser("context", help="what a long context costs, part by part (needs 4 GB)")
    context.add_argument("--section", choices=("decode", "prefill", "batch"), action="append", help="what to do (all)")
    context.add_argument("--prefill", type=int, default=8192, metavar="N", help="tokens of the prompt (8192)")
    context.add_argument("--layers", type=int, default=1, metavar="N", help="layers that read it (1)")
    context.set_defaults(run=_bench_context)
    _add_bench_model(bench)
    _add_bench_kernels(bench)
    record = bench.add_parser("record", help="what the flight recorder costs in decoding (needs 4 GB)")
    record.set_defaults(run=_bench_record)
    quantize = bench.add_parser("quantize", help="weights a second that one core brings to NVFP4 and back")
    quantize.set_defaults(run=_bench_quantize)
    conversion = bench.add_parser("convert", help="layers of the true dimensions -> NVFP4, against cp (20 GB of disk)")
    conversion.add_argument("--layers", default="1+1", metavar="N+M", help="dense and MoE layers (1+1: 12 GB in FP8)")
    conversion.add_argument("--source", choices=("fp8", "nvfp4"), action="append", help="formats to start from (both)")
    conversion.add_argument("--max-memory", default="8GiB", metavar="SIZE", help="limit of the conversion (8GiB)")
    conversion.add_argument("--folder", help="where the checkpoints are written (default: the temporary folder)")
    conversion.set_defaults(run=_bench_convert)
    return root


def _add_bench_model(bench) -> None:
    model = bench.add_parser("model", help="layers of the true dimensions with random NVFP4 weights, on any mesh")
    model.add_argument("--config", metavar="FILE", help="another model's config.json")
    model.add_argument("--layers", type=int, metavar="N", help="how many layers (all)")
    model.add_argument("--mesh", metavar="AXES", help="for example expert=4 (one device)")
    model.add_argument("--batch", type=int, action="append", metavar="B", help="rows; may be given again (1 and 8)")
    model.add_argument("--context", type=int, action="append", metavar="N", help="tokens a row has (1024 and 8192)")
    model.add_argument("--cache-dtype", choices=("bfloat16", "fp8"), default="bfloat16", help="storage of the cache")
    model.add_argument("--steps", type=int, metavar="N", help="decode steps a call takes (8, on a GPU 64)")
    model.add_argument("--json", action="store_true", help="a JSON object a line")
    model.set_defaults(run=_bench_model)


def _add_bench_kernels(bench) -> None:
    kernels = bench.add_parser(
        "kernels", help="products with stored weights at the true shapes, with kernels and by XLA alone"
    )
    add = kernels.add_argument
    add("--format", choices=("nvfp4", "fp8", "bf16"), action="append", help="formats of the weights (nvfp4)")
    add("--rows", type=int, action="append", metavar="M", help="rows of activations (1, 2, 4, 8, 16, 64 and 256)")
    add("--weight", action="append", metavar="NAME", help="a weight of the first column (all)")
    add("--by", choices=("auto", "xla", "torch"), action="append", help="what computes (all that is there)")
    kernels.set_defaults(run=_bench_kernels)


def _add_fit(commands) -> None:
    fit = commands.add_parser(
        "fit",
        help="whether weights, cache and activations fit in memory",
        description="Predict what a model takes on each device, without loading it. Exit code 5 when it does not fit.",
    )
    fit.add_argument("path", metavar="CHECKPOINT", help="a converted checkpoint, or a config.json")
    fit.add_argument("--context", type=int, metavar="N", help="tokens of a row, prompt included (4096, or the most)")
    fit.add_argument("--batch", type=int, default=1, metavar="B", help="rows at once (1)")
    fit.add_argument("--mesh", metavar="AXES", help="for example expert=8,model=2 (one device)")
    fit.add_argument("--cache-dtype", choices=("bf16", "fp32", "fp8"), help="storage of the cache (as --dtype)")
    fit.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="what is computed in (bf16)")
    fit.add_argument("--draft", type=int, default=0, metavar="K", help="tokens drafted at each step (0)")
    fit.add_argument("--format", choices=("nvfp4", "fp8", "bf16"), help="of a config.json's matrices (nvfp4)")
    fit.add_argument("--device-memory", metavar="SIZE", help="for example 141GB (what is free here)")
    fit.add_argument("--json", action="store_true", help="print one JSON object")
    fit.set_defaults(run=_fit)


def _fit(arguments: argparse.Namespace) -> int:
    from .fit import fit, print_fit

    options = {name: value for name, value in vars(arguments).items() if name not in ("path", "json", "run")}
    screen = Screen()
    screen.status("compiling, to see what programs take")
    try:
        found = fit(arguments.path, **options)
    finally:
        screen.status("")
    return print_fit(found, arguments.json)


def _demo(arguments: argparse.Namespace) -> int:
    from . import demo

    demo.run(arguments.new_tokens)
    return 0


def _convert(argv: list[str]) -> int:
    """`python -m convert`, which has its own command line."""
    from dsv32_jax import convert

    return convert.program(argv)


def _bench_layer(_: argparse.Namespace) -> int:
    from .bench.layer import print_layer

    print_layer()
    return 0


def _bench_load(arguments: argparse.Namespace) -> int:
    from .bench.load import print_load

    print_load(arguments.checkpoint)
    return 0


def _bench_context(arguments: argparse.Namespace) -> int:
    from .bench.context import SECTIONS, print_context

    print_context(arguments.section or SECTIONS, arguments.prefill, arguments.layers)
    return 0


def _bench_model(arguments: argparse.Namespace) -> int:
    from .bench.model import BATCH, CONTEXT, plan, print_model

    where = (arguments.config, arguments.layers, arguments.mesh)
    sizes = (arguments.batch or BATCH, arguments.context or CONTEXT)
    print_model(plan(*where, *sizes, arguments.cache_dtype, arguments.steps), arguments.json)
    return 0


def _bench_kernels(arguments: argparse.Namespace) -> int:
    from .bench.kernels import ROWS, available, print_kernels

    print_kernels(
        arguments.format or ["nvfp4"], arguments.rows or ROWS, arguments.weight or [], arguments.by or available()
    )
    return 0


def _bench_record(_: argparse.Namespace) -> int:
    from .bench.record import print_record

    print_record()
    return 0


def _bench_quantize(_: argparse.Namespace) -> int:
    from .bench.quantize import print_rows

    print_rows()
    return 0


def _bench_convert(arguments: argparse.Namespace) -> int:
    from .bench.convert import print_convert

    print_convert(arguments.layers, arguments.source or ["fp8", "nvfp4"], arguments.max_memory, arguments.folder)
    return 0
