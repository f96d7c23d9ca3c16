"""The command line of a conversion: python -m convert SRC DST."""

import argparse
import json
import os
import shlex
import sys
from typing import Any

from dsv32_jax.checkpoint.manifest import Manifest, is_complete
from dsv32_jax.errors import COMMAND_LINE, DsvError, StorageError, explain_exhaustion
from dsv32_jax.quantization.scale_search import SCALINGS
from dsv32_jax.system.argument_parser import Parser
from dsv32_jax.system.progress import Reporter, make_reporter

from . import report, signals
from .conversion import Options, convert, prepare
from .plan import dry_run
from .plan.policy import PRESETS, TENSOR_SCALES
from .read.weights import TARGETS
from .subcommands import report_to

NAME = "python -m convert" if __package__ == "convert" else "dsv32 convert"

EPILOG = """exit codes: 0 done, 2 usage, 3 input damaged or unsupported, 5 not enough disk, memory or devices,
6 output exists or is locked, 74 I/O error, 75 stopped by a signal, 130 Ctrl-C. After 5, 74, 75 and 130 the same
command continues where it stopped."""

CONTINUE = "completed parts are kept; run the same command again"


def program(argv: list[str] | None = None) -> int:
    """Run `main` in a process that ends with it: signals are ignored once it has returned."""
    code = main(argv)
    signals.ignore_signals()
    return code


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return its exit code (see EPILOG).

    The result goes to stdout, everything else to stderr. A signal ends the process.
    """
    spelling = COMMAND_LINE.set(True)
    try:
        return _main(sys.argv[1:] if argv is None else argv)
    except RuntimeError as error:
        exhausted = explain_exhaustion(error)
        print(f"error: {exhausted}. Nothing was written", file=sys.stderr)
        return exhausted.exit_code
    finally:
        COMMAND_LINE.reset(spelling)


def _main(argv: list[str]) -> int:
    options = _parser().parse_args(argv)
    reporter = make_reporter(options.log_format == "json")
    command = f"{NAME} {shlex.join(argv)}"
    with report_to(reporter, f"Completed parts are kept; to continue, run the same command again:\n  {command}"):
        try:
            _run(options, reporter)
            return 0
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except DsvError as error:
            message, code = str(error), error.exit_code
        except OSError as error:
            message, code = f"{error}; {CONTINUE} to continue", StorageError.exit_code
        except (MemoryError, RuntimeError) as error:
            exhausted = explain_exhaustion(error)
            message, code = f"{exhausted}; {CONTINUE} with a smaller --max-memory", exhausted.exit_code
        reporter.error(message, code)
        return code


def _run(options: argparse.Namespace, reporter: Reporter) -> None:
    show = json.dumps if options.log_format == "json" else report.format_facts
    how: Options = {key: value for key, value in vars(options).items() if key in Options.__annotations__}  # pyright: ignore
    if options.dry_run:
        prepared = prepare(options.src, options.dst, how)
        print(show(dry_run.estimate(*prepared)), flush=True)
        dry_run.require_room(*prepared)
        return
    reporter.event("start", source=options.src, output=options.dst)
    complete = is_complete(options.dst)
    manifest = convert(options.src, options.dst, progress=reporter, **how)
    reporter.close()
    reporter.event("done", output=options.dst, digest=manifest.digest)
    print(show({"complete_already" if complete else "written": options.dst, **_facts(manifest)}), flush=True)


def _facts(manifest: Manifest) -> dict[str, Any]:
    found = manifest.report
    return {
        **report.summarize_model(manifest.config, found["formats"], found["notes"], found["ignored"]),
        "conversions": found["conversions"],
        "relative_rms_errors": {name: kind["relative_rms"] for name, kind in found["errors"]["kinds"].items()},
        "largest_errors": found["errors"]["worst"],
        "nan_scale_bytes": found["nan_scale_bytes"],
        "zero_blocks": found["zero_blocks"],
        "pairs_of_different_tensor_scales": found["pairs_of_different_tensor_scales"],
        "digest": manifest.digest,
    }


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=NAME,
        description="Convert a DeepSeek-V3.2 checkpoint (safetensors: BF16, FP8 or NVFP4) for dsv32_jax. "
        "Weights keep their format unless --to or --policy says otherwise. "
        "An interrupted conversion continues when the same command is run again.",
        epilog=EPILOG,
    )
    add = parser.add_argument
    add("src", metavar="SRC", help="folder with config.json and *.safetensors; never modified")
    add("dst", metavar="DST", help="output folder: new, empty, or an unfinished conversion")
    add("--dry-run", action="store_true", help="check SRC and print plan, memory, disk and time; write nothing")
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
    add("--log-format", choices=("text", "json"), default="text", help="format of stdout and stderr (default: text)")
    _add_formats(parser)
    _add_limits(parser)
    return parser


def _add_formats(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("formats").add_argument
    add("--to", choices=tuple(TARGETS), help="quantize or dequantize the weights that the policy selects")
    add(
        "--policy",
        metavar="POLICY",
        help=f"which weights --to applies to: {', '.join(PRESETS)}, or a JSON or TOML file that maps patterns to "
        'formats or `keep`; the first match decides: {"formats": {"*.o_proj.weight": "nvfp4", "*": "keep"}} '
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


def _add_limits(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("limits").add_argument
    add("--max-memory", metavar="SIZE", help="memory limit, for example 8GiB (default: 80 %% of free memory)")
    add("--workers", metavar="N", type=int, help="threads that read and convert (default: one per core)")
