"""The command line of `dsv32 bench`. A bench is imported when it runs."""

import argparse
import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ..system.interrupts import acknowledge_interrupt


def add(commands: Any) -> None:
    """Add `bench` to the subparsers `commands`; each of its commands sets `run`, which takes the parsed arguments."""
    bench = commands.add_parser("bench", help="measure on this machine").add_subparsers(required=True, metavar="WHAT")
    add = _add_command(bench, "load", "loading a checkpoint, beside a plain read of its bytes")
    add("checkpoint", nargs="?", help="a converted checkpoint (default: a random one of about 1 GB)")

    add = _add_command(bench, "engine", "many requests of ragged lengths, shared beginnings, a long prompt")
    add("--config", metavar="FILE", help="a model's config.json (default: three small layers)")
    add("--requests", type=int, default=256, metavar="N", help="ragged requests (default: 256)")
    add("--rows", type=int, default=16, metavar="B", help="rows at once (default: 16)")

    add = _add_command(bench, "serve", "many clients of a server, beside the engine without HTTP")
    add("checkpoint", type=Path, help="a converted checkpoint")
    add("--clients", type=int, default=200, metavar="N", help="requests at once (default: 200)")
    add("--seconds", type=float, default=60, metavar="S", help="how long (default: 60)")
    add("--rows", type=int, default=16, metavar="B", help="rows at once (default: 16)")

    add = _add_command(bench, "model", "layers of the true dimensions with random NVFP4 weights, on any mesh")
    add("--config", metavar="FILE", help="another model's config.json")
    add("--layers", type=int, metavar="N", help="number of layers (default: all)")
    add("--mesh", metavar="AXES", help="for example expert=4 (default: one device)")
    add("--batch", type=int, action="append", metavar="B", help="rows; may be repeated (default: 1 and 8)")
    add("--context", type=int, action="append", metavar="N", help="tokens of a row (default: 1024 and 8192)")
    add("--cache-dtype", choices=("bfloat16", "fp8"), default="bfloat16", help="cache dtype (default: bfloat16)")
    add("--steps", type=int, metavar="N", help="decode steps a call (default: 64 on a GPU with all experts, else 8)")
    add("--experts", default="device", metavar="WHERE", help="device, host, or host:N (the first N layers)")
    add("--host-memory", metavar="SIZE", help="free memory of the host (default: as the system says)")

    add = _add_command(bench, "kernels", "products with stored weights at the true shapes, beside XLA alone")
    add("--format", choices=("nvfp4", "fp8", "bf16"), action="append", help="weight formats (default: nvfp4)")
    add("--rows", type=int, action="append", metavar="M", help="activation rows (default: 1, 2, 4, 8, 16, 64, 256)")
    add("--weight", action="append", metavar="NAME", help="a weight of the first column (default: all)")
    add("--by", choices=("auto", "xla"), action="append", help="implementation (default: both)")


def _add_command(bench: Any, name: str, summary: str) -> Callable[..., Any]:
    """Add the parser of one bench, and return the function that adds its options."""
    parser = bench.add_parser(name, help=summary, description=f"Measure {summary}.")
    parser.add_argument("--json", action="store_true", help="print JSON, an object a line")
    parser.set_defaults(run=partial(_run, name))
    return parser.add_argument


@acknowledge_interrupt()
def _run(name: str, arguments: argparse.Namespace) -> int:
    importlib.import_module(f".{name}", __package__).run(arguments)
    return 0
