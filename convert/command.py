"""The command line of a conversion: python -m convert SRC DST."""

import argparse
import json
import shlex
import sys
import time
from typing import Any

from dsv32_jax.checkpoint.companions import TOKENIZER
from dsv32_jax.checkpoint.manifest import Manifest, is_complete
from dsv32_jax.errors import DsvError
from dsv32_jax.quantization.scale_search import SCALINGS
from dsv32_jax.system.argument_parser import Parser
from dsv32_jax.system.exit_codes import run_command
from dsv32_jax.system.reporter import Reporter, make_reporter

from . import dry_run, report, signals
from .conversion import Options, convert, judge, prepare
from .plan.policy import PRESETS, TENSOR_SCALES
from .read.weights import TARGETS
from .subcommands import report_to

NAME = "python -m convert" if __package__ == "convert" else "dsv32 convert"

EPILOG = """exit codes: 0 done, 2 usage, 3 input missing, damaged or unsupported, 4 the output is complete and damaged,
5 not enough disk, memory or devices, 6 output exists or is locked, 74 I/O error, 75 stopped by a signal, 130 Ctrl-C.
After 5, 74, 75 and 130 the same command continues where it stopped."""

TEXTS: Any = {
    "description": "Convert a DeepSeek-V3.2 checkpoint (safetensors: BF16, FP8 or NVFP4) for dsv32_jax. "
    "Weights keep their format unless --to or --policy says otherwise. "
    "An interrupted conversion continues when the same command is run again.",
    "epilog": EPILOG,
}


def add(commands: Any) -> None:
    """Add the command to the subparsers `commands`; it sets `run`, which takes the parsed arguments."""
    parser = commands.add_parser("convert", help="Hugging Face safetensors -> a checkpoint that `load` reads", **TEXTS)
    add_arguments(parser)
    parser.set_defaults(run=lambda arguments: end(run(arguments, f"dsv32 {shlex.join(arguments.argv)}")))


def program(argv: list[str] | None = None) -> int:
    """Run `main` in a process that ends with it."""
    return end(main(argv))


def end(code: int) -> int:
    """Ignore signals from now on, as the process ends with this exit code."""
    signals.ignore_signals()
    return code


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return its exit code (see EPILOG).

    The result goes to stdout, everything else to stderr. A signal ends the process.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(prog=NAME, **TEXTS)
    add_arguments(parser)
    return run_command(lambda: run(parser.parse_args(argv), f"{NAME} {shlex.join(argv)}"), "--json" in argv)


def run(options: argparse.Namespace, command: str) -> int:
    """Run the `command` with these options and return its exit code."""

    def describe_state(reporter: Reporter) -> str:
        return f"{reporter.meter.describe_saved()}; to continue, run the same command again:\n  {command}"

    given: Any = {key: value for key, value in vars(options).items() if key in Options.__annotations__}
    advice = "\nwith a smaller --max-memory"
    with report_to(make_reporter(options.json), describe_state, advice) as reporter:
        reporter.stage(f"reading the headers of {options.src}")
        facts, refusal = (_estimate if options.dry_run else _convert)(options.src, options.dst, given, reporter)
    if refusal is None or not options.json:
        print(json.dumps(facts) if options.json else report.format_conversion(facts, options.verbose), flush=True)
    if refusal is not None:
        refusal.facts = facts
        raise refusal
    return 0


def _convert(src: str, dst: str, options: Options, reporter: Reporter) -> tuple[dict[str, Any], None]:
    reporter.event("start", source=src, output=dst)
    start, complete = time.monotonic(), is_complete(dst)
    manifest = convert(src, dst, progress=reporter, **options)
    reporter.event("done", output=dst, digest=manifest.digest)
    return _list_facts(dst, manifest, complete, round(time.monotonic() - start, 3)), None


def _estimate(src: str, dst: str, options: Options, reporter: Reporter) -> tuple[dict[str, Any], DsvError | None]:
    """Return what the conversion would do, and the error that it would raise."""
    plan, budget, folder = prepare(src, dst, options)
    reporter.stage("measuring disks, and a sample of the weights")
    try:
        found, refusal = judge(plan, budget, folder), None
    except DsvError as error:
        found, refusal = None, error
    if isinstance(found, Manifest):
        return _list_facts(dst, found, True, 0.0), None
    estimated, problem = dry_run.estimate(plan, budget, folder, found)
    return {"source": src, "output": dst, **estimated}, refusal or problem


def _list_facts(dst: str, manifest: Manifest, already_complete: bool, seconds: float) -> dict[str, Any]:
    found = manifest.report
    arrays = [array for leaf in manifest.leaves.values() for array in leaf.arrays.values()]
    return {
        "output": dst,
        "already_complete": already_complete,
        "seconds": seconds,
        "bytes": sum(array.nbytes for array in arrays),
        **report.summarize_model(manifest.config, found["formats"], found["notes"], found["ignored"]),
        "conversions": found["conversions"],
        "tokenizer": TOKENIZER in found["companions"],
        "relative_rms_errors": {name: kind["relative_rms"] for name, kind in found["errors"]["kinds"].items()},
        "largest_errors": found["errors"]["worst"],
        "nan_scale_bytes": found["nan_scale_bytes"],
        "zero_blocks": found["zero_blocks"],
        "pairs_of_different_tensor_scales": found["pairs_of_different_tensor_scales"],
        "digest": manifest.digest,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a conversion."""
    add = parser.add_argument
    add("src", metavar="SRC", help="folder with config.json and *.safetensors; never modified")
    add("dst", metavar="DST", help="output folder: new, empty, or an unfinished conversion")
    add("--dry-run", action="store_true", help="check SRC and DST, estimate memory, disk and time; write nothing")
    add("--verbose", action="store_true", help="with --dry-run: list every parameter")
    add("--layers", metavar="0-N", help="convert only the first N + 1 layers, as a small model of its own without MTP")
    add("--mesh", metavar="AXES", help="lay out arrays for these devices, for example expert=8,model=2")
    add("--strict-index", action="store_true", help="refuse an index that does not list every tensor of the shards")
    add(
        "--ignore-config",
        metavar="KEY",
        action="append",
        help="ignore a key of config.json that could change the model, and does not; may be repeated",
    )
    add(
        "--ignore-tensors",
        metavar="PATTERN",
        action="append",
        help="leave out tensors that the model can do without, for example '*.lora_*'; may be repeated",
    )
    add("--verify-source", action="store_true", help="first check the shards against the hub's SHA-256")
    add("--json", action="store_true", help="print one JSON object, and progress as JSON lines to stderr")
    _add_formats(parser)
    limits = parser.add_argument_group("limits").add_argument
    limits("--max-memory", metavar="SIZE", help="memory limit, for example 8GB (default: 80 %% of free memory)")
    limits("--workers", metavar="N", type=int, help="threads that read and convert (default: one per core)")


def _add_formats(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("formats").add_argument
    add("--to", choices=tuple(TARGETS), help="quantize or dequantize weights; --policy says which")
    add(
        "--policy",
        metavar="POLICY",
        help=f"which weights --to applies to: {', '.join(PRESETS)}; or a JSON or TOML file that maps patterns to "
        "formats or `keep`, where the first match decides, and --to is for weights that match none: "
        '{"formats": {"*.o_proj.weight": "nvfp4", "*": "keep"}} '
        "(default: `default` for nvfp4, `full` for fp8 and bf16)",
    )
    add(
        "--scales",
        choices=tuple(SCALINGS),
        default="rtn",
        help="how NVFP4 block scales are chosen; relative error on Gaussian weights 9.5 %%, 8.1 %%, 8.7 %% "
        "(default: rtn)",
    )
    add(
        "--tensor-scales",
        choices=TENSOR_SCALES,
        default="own",
        help="NVFP4 tensor scales: one a matrix, or one shared by gate and up and one by q_a and kv_a (default: own)",
    )
