"""The commands around a conversion: dsv32 inspect, verify, export and reshard."""

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any

from dsv32_jax.checkpoint.manifest import is_complete
from dsv32_jax.errors import CapacityError, DsvError, StorageError, UsageError, explain_exhaustion, refusal
from dsv32_jax.system.files import expand_path
from dsv32_jax.system.reporter import Reporter, make_reporter

from . import report, signals

DRY_RUN = "check everything that needs no reading of weights, and say what would be written; write nothing"


def add(commands: Any) -> None:
    """Add the commands to the subparsers `commands`; each sets `run`, which takes the parsed arguments."""
    _add_inspect(commands)
    _add_verify(commands)
    _add_export(commands)
    _add_reshard(commands)


@contextlib.contextmanager
def report_to(reporter: Reporter, describe_state: Callable[[Reporter], str], advice: str = "") -> Iterator[Reporter]:
    """Report stalled reads to `reporter`. A signal ends the process with a last message that describes the state, and
    so does the error that is raised where the disk or the memory fails. `advice`: what helps where memory does not
    suffice."""
    from .read.source_file import warn_on_stalled_reads

    def final_message(signal_name: str, code: int) -> bytes:
        return reporter.final_message(f"{signal_name}: stopped. {describe_state(reporter)}", code)

    try:
        with signals.exit_on_signal(final_message), warn_on_stalled_reads(reporter.warning):
            yield reporter
    except DsvError:
        raise
    except OSError as error:
        raise StorageError(f"{refusal(error)}. {describe_state(reporter)}") from error
    except (MemoryError, RuntimeError) as error:
        raise CapacityError(f"{explain_exhaustion(error)}. {describe_state(reporter)}{advice}") from error
    finally:
        reporter.close()


def _add_parser(commands: Any, name: str, run: Callable[[argparse.Namespace], int], **texts: str) -> Any:
    parser = commands.add_parser(name, **texts)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)
    return parser


def _print(arguments: argparse.Namespace, facts: Any, text: str) -> int:
    print(json.dumps(facts) if arguments.json else text, flush=True)
    return 0


def _add_inspect(commands: Any) -> None:
    inspect = _add_parser(
        commands,
        "inspect",
        _inspect,
        help="show what a checkpoint folder holds: tree, sizes, formats",
        description="Show what a Hugging Face folder or a converted checkpoint holds, from headers alone.",
    )
    inspect.add_argument("path", metavar="PATH", help="folder of either kind")
    inspect.add_argument("--tensors", metavar="GLOB", help="list tensors by name, for example '*experts.0.*'")
    inspect.add_argument("--stats", action="store_true", help="with --tensors: read them and show value statistics")


def _inspect(arguments: argparse.Namespace) -> int:
    from .inspect import folder_tree, tensors

    if arguments.stats and not arguments.tensors:
        raise UsageError("--stats reads whole tensors: select them with --tensors GLOB ('*' for all)")
    if arguments.stats:
        rows = tensors.compute_statistics(arguments.path, arguments.tensors)
        for text in [json.dumps(list(rows))] if arguments.json else map(report.format_statistics, rows):
            print(text, flush=True)
        return 0
    if arguments.tensors:
        found = tensors.list_tensors(arguments.path, arguments.tensors)
        return _print(arguments, found, report.format_tensors(found))
    whole = folder_tree.inspect(arguments.path)
    return _print(arguments, dataclasses.asdict(whole), report.format_inspection(whole))


def _add_verify(commands: Any) -> None:
    verify = _add_parser(
        commands,
        "verify",
        _verify,
        help="check a converted checkpoint against its checksums, or against its source",
        description="Read a converted checkpoint, name everything that is damaged, and prove that it is lossless. "
        "Exit code 4 when something does not match.",
    )
    verify.add_argument("folder", metavar="CHECKPOINT", help="a converted checkpoint")
    verify.add_argument("--against", metavar="SRC", help="the Hugging Face folder it was made from")
    level = {"choices": ("quick", "full"), "default": "full", "help": "quick reads no arrays (default: full)"}
    verify.add_argument("--level", **level)


def _verify(arguments: argparse.Namespace) -> int:
    from .verify.verify import verify

    with report_to(make_reporter(arguments.json), lambda _: "Nothing was changed.") as reporter:
        found = verify(arguments.folder, against=arguments.against, level=arguments.level, progress=reporter)
    return _print(arguments, dataclasses.asdict(found), report.format_verification(found))


def _add_export(commands: Any) -> None:
    export = _add_parser(
        commands,
        "export",
        _export,
        help="a converted checkpoint -> Hugging Face safetensors",
        description="Write a converted checkpoint as safetensors for vLLM, SGLang, TensorRT-LLM or transformers.",
    )
    export.add_argument("folder", metavar="CHECKPOINT", help="a converted checkpoint; never modified")
    export.add_argument("out", metavar="HF_DIR", help="output folder; must not exist")
    formats = ("modelopt", "compressed-tensors", "bf16")
    export.add_argument("--format", choices=formats, required=True, metavar="FORMAT", help=" or ".join(formats))
    share = "give gate and up, and q_a and kv_a, one tensor scale where that is exact"
    export.add_argument("--share-scales", action="store_true", help=share)
    export.add_argument("--dry-run", action="store_true", help=DRY_RUN)


def _export(arguments: argparse.Namespace) -> int:
    from .export.export import export, unfinished

    out = expand_path(arguments.out)
    state = f"{out} was not created; run the same command again to start over and replace {unfinished(out)}."
    with report_to(make_reporter(arguments.json), lambda _: state) as reporter:
        options = {"share_scales": arguments.share_scales, "dry_run": arguments.dry_run}
        exported = export(arguments.folder, out, arguments.format, **options, progress=reporter)
    return _print(arguments, dataclasses.asdict(exported), report.format_export(exported, arguments.dry_run))


def _add_reshard(commands: Any) -> None:
    reshard = _add_parser(
        commands,
        "reshard",
        _reshard,
        help="rewrite a converted checkpoint for another device mesh",
        description="Write a converted checkpoint again, so that each device of a mesh reads its own bytes. "
        "Any checkpoint loads on any mesh; this makes loading faster.",
    )
    reshard.add_argument("folder", metavar="CHECKPOINT", help="a converted checkpoint; never modified")
    reshard.add_argument("out", metavar="OUT", help="output folder: new, empty or unfinished")
    reshard.add_argument("--mesh", metavar="AXES", help="for example expert=8,model=2 (default: one device)")
    reshard.add_argument("--dry-run", action="store_true", help=DRY_RUN)


def _reshard(arguments: argparse.Namespace) -> int:
    from .export.reshard import reshard

    complete = is_complete(arguments.out)

    def describe_state(reporter: Reporter) -> str:
        return f"{reporter.meter.describe_saved()}; run the same command again to continue."

    with report_to(make_reporter(arguments.json), describe_state) as reporter:
        options = {"dry_run": arguments.dry_run, "progress": reporter}
        manifest = reshard(arguments.folder, arguments.out, arguments.mesh, **options)
    nbytes = sum(array.nbytes for leaf in manifest.leaves.values() for array in leaf.arrays.values())
    facts = {"output": arguments.out, "already_complete": complete, "bytes": nbytes, "digest": manifest.digest}
    return _print(arguments, facts, report.format_reshard(facts, arguments.dry_run))
