"""The command line: python -m convert SRC DST makes of a Hugging Face checkpoint one that dsv32_jax loads."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from dsv32_jax.errors import DsvError, StorageError
from dsv32_jax.manifest import Manifest
from dsv32_jax.quantize_search import SCALINGS

from .detect import BECOMES
from .job import convert
from .plan import PlannedLeaf, plan
from .policy import PRESETS, TENSOR_SCALES, recipe
from .progress import Bar, JsonLines, Lines, Watcher, size_text
from .source import Source


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own); the exit code.

    0 done, 2 usage, 3 input damaged or unsupported, 5 not enough disk, 6 output exists or is locked, 74 I/O error,
    130 Ctrl-C. stdout carries the result, stderr everything else.
    """
    options = _parser().parse_args(argv)
    os.environ["JAX_PLATFORMS"] = "cpu"
    watcher = JsonLines() if options.log_format == "json" else Bar() if sys.stderr.isatty() else Lines()
    try:
        result = _dry_run(options) if options.dry_run else _convert(options, watcher)
    except DsvError as error:
        watcher.error(str(error))
        return error.exit_code
    except OSError as error:
        watcher.error(f"{error}; what was written before is kept, rerun the same command to continue")
        return StorageError.exit_code
    except KeyboardInterrupt:
        watcher.error("interrupted; rerun the same command to continue")
        return 130
    finally:
        watcher.close()
    print(json.dumps(result) if options.log_format == "json" else _text(result))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m convert",
        description="Convert a DeepSeek-V3.2 checkpoint (safetensors: BF16, FP8 or NVFP4) for dsv32_jax. "
        "Weights keep their format unless --to or --policy says otherwise. "
        "A killed conversion continues when the same command is run again.",
    )
    add = parser.add_argument
    add("src", metavar="SRC", type=Path, help="folder with config.json and *.safetensors; never written")
    add("dst", metavar="DST", type=Path, help="folder to write; must be new, empty or unfinished")
    _add_formats(parser)
    add("--dry-run", action="store_true", help="check SRC and print what would be done; write nothing")
    add("--log-format", choices=("text", "json"), default="text", help="how stdout and stderr are written")
    return parser


def _add_formats(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("formats").add_argument
    add("--to", choices=tuple(BECOMES), help="quantize or dequantize what the policy names")
    add(
        "--policy",
        metavar="POLICY",
        help=f"what it names: {', '.join(PRESETS)}, or a JSON or TOML file of patterns with formats "
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


def _dry_run(options: argparse.Namespace) -> dict[str, Any]:
    wanted = recipe(options.to, options.policy, options.scales, options.tensor_scales)
    planned = plan(Source(options.src.expanduser().absolute()), recipe=wanted)
    return {
        "would_write": planned.nbytes,
        **_summary(planned.config, planned.formats, list(planned.notes), planned.ignored),
        "conversions": planned.conversions,
        "leaves": {leaf.leaf.path: _arrays(leaf) for leaf in planned.leaves},
        "largest_group": max(sum(leaf.nbytes for leaf in group) for group in planned.groups),
    }


def _arrays(leaf: PlannedLeaf) -> str:
    if leaf.same_as is not None:
        return f"= {leaf.same_as}"
    sizes = ", ".join(f"{name} {dtype} {list(shape)}" for name, (dtype, shape) in leaf.arrays.items())
    return f"{leaf.form.format}, {size_text(leaf.nbytes)}: {sizes}"


def _convert(options: argparse.Namespace, watcher: Watcher) -> dict[str, Any]:
    how = {key: getattr(options, key) for key in ("to", "policy", "scales", "tensor_scales")}
    manifest: Manifest = convert(options.src, options.dst, **how, progress=watcher)
    report = manifest.report
    errors = report["errors"]
    return {
        "written": str(options.dst),
        **_summary(manifest.config, report["formats"], report["notes"], report["ignored"]),
        "conversions": report["conversions"],
        "relative_rms_errors": {name: found["relative_rms"] for name, found in errors["kinds"].items()},
        "largest_errors": errors["worst"],
        "nan_scale_bytes": report["nan_scale_bytes"],
        "zero_blocks": report["zero_blocks"],
        "digest": manifest.digest,
    }


def _summary(config: dict[str, Any], formats: dict[str, int], notes: list[str], ignored: dict[str, int]) -> dict:
    layers = f"{config['num_hidden_layers']} + {config.get('num_nextn_predict_layers', 0)} MTP"
    return {"layers": layers, "formats": formats, "notes": notes, "ignored": ignored}


def _number(value: Any) -> str:
    """Errors are the only fractions in a result."""
    return f"{100 * value:.2f} %" if isinstance(value, float) else str(value)


def _text(result: dict[str, Any]) -> str:
    lines = []
    for key, value in result.items():
        if key in ("would_write", "largest_group"):
            value = size_text(value)
        if isinstance(value, dict):
            lines += [f"{key.replace('_', ' ')}:"] if value else []
            lines += [f"  {name}: {_number(count)}" for name, count in value.items()]
        elif isinstance(value, list):
            lines += [f"{key[:-1]}: {item}" for item in value]
        else:
            lines.append(f"{key.replace('_', ' ')}: {value}")
    return "\n".join(lines)
