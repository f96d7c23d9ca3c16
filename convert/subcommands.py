"""The commands around a conversion: dsv32 inspect, verify, export and reshard."""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsv32_jax.system.progress import Watcher


def add(commands: Any) -> None:
    """Add them to the subparsers `commands`; each sets `run`, which takes the parsed arguments."""
    _add_inspect(commands)
    _add_verify(commands)
    _add_export(commands)
    _add_reshard(commands)


def _add_inspect(commands: Any) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="what a folder holds: tree, sizes, formats",
        description="Show what a Hugging Face folder or a converted checkpoint holds, from headers alone.",
    )
    inspect.add_argument("path", metavar="PATH", help="folder of either kind")
    inspect.add_argument("--tensors", metavar="GLOB", help="list tensors by name, for example '*experts.0.*'")
    inspect.add_argument("--stats", action="store_true", help="with --tensors: read them, show amax, odd scales, codes")
    inspect.add_argument("--json", action="store_true", help="print one JSON object")
    inspect.set_defaults(run=_inspect)


def _add_verify(commands: Any) -> None:
    verify = commands.add_parser(
        "verify",
        help="whether a converted checkpoint is what was written",
        description="Read a converted checkpoint and name everything that is damaged; prove that it is lossless. "
        "Exit code 4 when something does not match.",
    )
    verify.add_argument("folder", metavar="DST", help="a converted checkpoint")
    verify.add_argument("--against", metavar="SRC", help="the Hugging Face folder it was made from")
    verify.add_argument("--level", choices=("quick", "full"), default="full", help="quick: no array is read (full)")
    verify.add_argument("--json", action="store_true", help="print one JSON object")
    verify.set_defaults(run=_verify)


def _add_export(commands: Any) -> None:
    export = commands.add_parser(
        "export",
        help="a converted checkpoint -> Hugging Face safetensors",
        description="Write a converted checkpoint as safetensors for vLLM, SGLang, TensorRT-LLM or transformers.",
    )
    export.add_argument("folder", metavar="DST", help="a converted checkpoint; never written")
    export.add_argument("out", metavar="HF_DIR", help="folder to write; must not exist")
    export.add_argument("--format", choices=("modelopt", "compressed-tensors", "bf16"), required=True)
    export.add_argument(
        "--share-scales",
        action="store_true",
        help="give gate and up, and q_a and kv_a, one tensor scale where that changes no value",
    )
    export.set_defaults(run=_export)


def _add_reshard(commands: Any) -> None:
    reshard = commands.add_parser(
        "reshard",
        help="the same checkpoint, laid out for other devices",
        description="Write a converted checkpoint again, so that each device of a mesh reads its own bytes. "
        "Any checkpoint loads on any mesh; this makes loading faster.",
    )
    reshard.add_argument("folder", metavar="DST", help="a converted checkpoint; never written")
    reshard.add_argument("out", metavar="DST2", help="folder to write; must be new, empty or unfinished")
    reshard.add_argument("--mesh", metavar="AXES", help="for example expert=8,model=2 (one device)")
    reshard.set_defaults(run=_reshard)


def _inspect(arguments: argparse.Namespace) -> int:
    import dataclasses

    from dsv32_jax.errors import UsageError

    from . import show
    from .inspect import inspection, listing

    if arguments.stats and not arguments.tensors:
        raise UsageError("--stats reads whole tensors: say which with --tensors GLOB ('*' for all)")
    if arguments.stats:
        rows = listing.statistics(arguments.path, arguments.tensors)
        for text in [json.dumps(list(rows))] if arguments.json else map(show.statistics, rows):
            _print(text)
    elif arguments.tensors:
        found = listing.tensors(arguments.path, arguments.tensors)
        _print(json.dumps(found) if arguments.json else show.tensors(found))
    else:
        whole = inspection.inspect(arguments.path)
        facts = {**dataclasses.asdict(whole), "bits_per_weight": whole.bits}
        _print(json.dumps(facts) if arguments.json else show.inspection(whole))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    import dataclasses

    from . import show
    from .verify.verify import verify

    with _watcher("Nothing was changed.") as watcher:
        report = verify(arguments.folder, against=arguments.against, level=arguments.level, progress=watcher)
    _print(json.dumps(dataclasses.asdict(report)) if arguments.json else show.report(report))
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from dsv32_jax.system.paths import path_of

    from . import show
    from .export.export import export, unfinished

    out = path_of(arguments.out)
    rest = f"what was written lies in {unfinished(out)} until the same command is run again, which starts over"
    with _watcher(f"{out} was not made; {rest}.") as watcher:
        exported = export(
            arguments.folder,
            out,
            arguments.format,
            share_scales=arguments.share_scales,
            progress=watcher,
        )
    _print(show.exported(exported))
    return 0


def _reshard(arguments: argparse.Namespace) -> int:
    os.environ["JAX_PLATFORMS"] = "cpu"
    from dsv32_jax.checkpoint.manifest import is_complete

    from .export.reshard import reshard

    complete = is_complete(arguments.out)
    with _watcher("What was written is kept; run the same command again to continue.") as watcher:
        manifest = reshard(arguments.folder, arguments.out, arguments.mesh, progress=watcher)
    _print(f"{'complete already' if complete else 'written'}: {arguments.out}\ndigest: {manifest.digest}")
    return 0


@contextlib.contextmanager
def _watcher(after_signal: str) -> "Iterator[Watcher]":
    """What shows progress on stderr; a signal ends the process with what `after_signal` says."""
    from dsv32_jax.system.progress import Bar, Lines

    from . import interrupts
    from .read import waiting

    watcher = Bar() if sys.stderr.isatty() else Lines()

    def last_words(name: str, code: int) -> bytes:
        return watcher.last_words(f"{name}: stopped. {after_signal}", code)

    try:
        with interrupts.ending(last_words), waiting.told(watcher.warning):
            yield watcher
    finally:
        watcher.close()


def _print(text: str) -> None:
    from dsv32_jax.errors import printable

    print(printable(text), flush=True)
