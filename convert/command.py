"""The command line: python -m convert SRC DST makes of a Hugging Face checkpoint one that dsv32_jax loads."""

import argparse
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from dsv32_jax.checkpoint.manifest import Manifest, is_complete
from dsv32_jax.errors import CapacityError, DsvError, StorageError
from dsv32_jax.quantization.scale_search import SCALINGS
from dsv32_jax.system.argument_parser import Parser
from dsv32_jax.system.progress import Bar, JsonLines, Lines, Watcher

from . import interrupts, text
from .plan import dry_run
from .plan.policy import PRESETS, TENSOR_SCALES
from .plan.prepare import Options, prepare
from .read import waiting
from .read.stored import BECOMES
from .write.job import convert

EPILOG = """exit codes: 0 done, 2 usage, 3 input damaged or unsupported, 5 not enough disk, memory or devices,
6 output exists or is locked, 74 I/O error, 75 stopped by a signal, 130 Ctrl-C. After 5, 74, 75 and 130 the same
command continues where it stopped."""


def program(argv: list[str] | None = None) -> int:
    """`main` for a process that ends with it: once it is done, nothing interrupts it any more."""
    code = main(argv)
    interrupts.ignore()
    return code


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own); the exit code (see EPILOG).

    stdout carries the result, stderr everything else. A signal ends the process.
    """
    argv = sys.argv[1:] if argv is None else argv
    options = _parser().parse_args(argv)
    os.environ["JAX_PLATFORMS"] = "cpu"
    watcher = JsonLines() if options.log_format == "json" else Bar() if sys.stderr.isatty() else Lines()

    def last_words(signal_name: str, code: int) -> bytes:
        return watcher.last_words(
            f"{signal_name}: stopped. What was written is kept; to continue, run the same command again:\n"
            f"  {_name()} {shlex.join(argv)}",
            code,
        )

    with interrupts.ending(last_words), waiting.told(watcher.warning):
        try:
            _run(options, watcher)
            return 0
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except DsvError as error:
            return _failed(watcher, str(error), error.exit_code)
        except OSError as error:
            kept = "what was written before is kept, run the same command again to continue"
            return _failed(watcher, f"{error}; {kept}", StorageError.exit_code)
        except MemoryError:
            kept = "what was written before is kept, run the same command again with a smaller --max-memory to continue"
            return _failed(watcher, f"memory is exhausted; {kept}", CapacityError.exit_code)
        finally:
            watcher.close()


def _run(options: argparse.Namespace, watcher: Watcher) -> None:
    """Do what is asked for and print the result."""
    show = json.dumps if options.log_format == "json" else text.lines
    how: Options = {key: value for key, value in vars(options).items() if key in Options.__annotations__}  # pyright: ignore
    if options.dry_run:
        prepared = prepare(options.src, options.dst, how)
        print(show(dry_run.expected(prepared)), flush=True)
        dry_run.require_room(prepared)
        return
    watcher.event("start", source=options.src, output=options.dst)
    complete = is_complete(options.dst)
    manifest = convert(options.src, options.dst, progress=watcher, **how)
    watcher.close()
    watcher.event("done", output=options.dst, digest=manifest.digest)
    print(show({"complete_already" if complete else "written": options.dst, **_result(manifest)}), flush=True)


def _failed(watcher: Watcher, message: str, code: int) -> int:
    watcher.error(message, code)
    return code


def _name() -> str:
    """How this command was called."""
    return "dsv32 convert" if Path(sys.argv[0]).name == "dsv32" else "python -m convert"


def _result(manifest: Manifest) -> dict[str, Any]:
    """What there is to tell about a finished conversion."""
    report = manifest.report
    return {
        **text.summary(manifest.config, report["formats"], report["notes"], report["ignored"]),
        "conversions": report["conversions"],
        "relative_rms_errors": {name: found["relative_rms"] for name, found in report["errors"]["kinds"].items()},
        "largest_errors": report["errors"]["worst"],
        "nan_scale_bytes": report["nan_scale_bytes"],
        "zero_blocks": report["zero_blocks"],
        "pairs_of_different_tensor_scales": report["pairs_of_different_tensor_scales"],
        "digest": manifest.digest,
    }


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=_name(),
        description="Convert a DeepSeek-V3.2 checkpoint (safetensors: BF16, FP8 or NVFP4) for dsv32_jax. "
        "Weights keep their format unless --to or --policy says otherwise. "
        "A killed conversion continues when the same command is run again.",
        epilog=EPILOG,
    )
    add = parser.add_argument
    add("src", metavar="SRC", help="folder with config.json and *.safetensors; never written")
    add("dst", metavar="DST", help="folder to write; must be new, empty or unfinished")
    add(
        "--dry-run",
        action="store_true",
        help="check SRC, print plan, memory, disk and time; write nothing",
    )
    add("--layers", metavar="0-N", help="only the first N + 1 layers, as a small model of its own (without MTP)")
    add("--mesh", metavar="AXES", help="lay out chunks for these devices, for example expert=8,model=2")
    add("--strict-index", action="store_true", help="refuse an index that does not list every tensor of the shards")
    add("--verify-source", action="store_true", help="first compare the shards with the SHA-256 that the hub says")
    add("--log-format", choices=("text", "json"), default="text", help="how stdout and stderr are written")
    _add_formats(parser)
    _add_limits(parser)
    return parser


def _add_limits(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("limits").add_argument
    add("--max-memory", metavar="SIZE", help="take at most this much, for example 8GiB (80 %% of what is free)")
    add("--workers", metavar="N", type=int, help="threads that read and convert (one for each core)")


def _add_formats(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("formats").add_argument
    add("--to", choices=tuple(BECOMES), help="quantize or dequantize what the policy names")
    add(
        "--policy",
        metavar="POLICY",
        help=f"what it names: {', '.join(PRESETS)}, or a JSON or TOML file of patterns with formats or `keep`, the "
        'first that matches decides: {"formats": {"*.o_proj.weight": "nvfp4", "*": "keep"}} '
        "(`default` for nvfp4, `full` for fp8 and bf16)",
    )
    add(
        "--scales",
        choices=tuple(SCALINGS),
        default="rtn",
        help="scales of NVFP4 blocks; relative error on Gaussian weights 9.5 %%, 8.1 %%, 8.7 %% (rtn)",
    )
    add(
        "--tensor-scales",
        choices=TENSOR_SCALES,
        default="own",
        help="NVFP4 tensor scales; `shared`: one for gate and up, one for q_a and kv_a (own)",
    )
