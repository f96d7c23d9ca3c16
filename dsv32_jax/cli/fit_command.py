"""`dsv32 fit`: whether a model fits in memory, as a table or as JSON."""

import argparse
import dataclasses

import jax

from ..errors import CapacityError, argument, pluralize
from ..generation import memory
from ..generation.fit import Fit, fit
from ..generation.pages import PAGE
from ..system.progress import format_count
from ..system.wrapping import wrap_lines
from .terminal import Screen, format_json

NOT_COUNTED = """\
not counted: programs and their constants, temporaries of loading (one parameter,
or 67 MB of small ones), communication buffers, fragmentation, other processes.
Activations are those of this backend's compiler ({backend}); on a mesh, those of a
device that computes its rows alone, an upper bound. Largest batch and longest
context assume that activations grow linearly; a batch is rounded up to a power
of two, and so is a context."""


def run(arguments: argparse.Namespace) -> int:
    """Run the command and return the exit code: CapacityError's if the model does not fit."""
    options = {name: value for name, value in vars(arguments).items() if name not in ("argv", "path", "json", "run")}
    screen = Screen()
    screen.status("compiling, to measure what programs take")
    try:
        found = fit(arguments.path, **options)
    finally:
        screen.status("")
    facts = {**dataclasses.asdict(found), "fits": found.fits}
    screen.result((format_json(facts) if arguments.json else wrap_lines(format_fit(found))) + "\n")
    return 0 if found.fits else CapacityError.exit_code


def format_fit(found: Fit) -> str:
    """Return the table, the verdict and what is not counted."""
    reserve = found.total - found.stored - found.dequantized - found.cache - found.activations
    rows = [
        ("weights", found.stored, f"{format_count(found.parameters)} parameters, as stored"),
        ("W^UK, W^UV", found.dequantized, "dequantized by load"),
        ("cache", found.cache, f"rows of {found.capacity} tokens, {found.token_bytes} bytes each"),
        ("activations", found.activations, "peak temporary memory"),
        ("reserve", reserve, f"caches take at most {memory.CACHE_SHARE:.0%} of what weights leave"),
        ("total", found.total, ""),
        ("resident", found.mapped and found.total - found.mapped, "must stay in memory; weights are mapped files"),
        ("free", found.free, ""),
    ]
    where = f"on each of {found.devices} devices" if found.devices > 1 else "on one device"
    drafting = f", drafting {found.draft}" if found.draft else ""
    verdict = "fits" if found.fits else "does not fit"
    if found.fits and found.total > found.free:
        each = f"{argument('disk_speed')} 2GB estimates the time of a token"
        if found.page_seconds is not None:
            each = f"about {found.page_seconds:.1f} s of reading a token"
        verdict = f"runs, but from the disk, as not all weights stay in memory ({each})"
    return "\n".join(
        [
            f"{'':14}{'GB':>10}   {where}, cache in {found.cache_dtype}{drafting}",
            *(
                f"{name:14}{size / 1e9:10.2f}   {note}".rstrip()
                for name, size, note in rows
                if size or name not in ("reserve", "resident")
            ),
            f"{verdict}: {pluralize(found.batch, 'row')} of {pluralize(found.context, 'token')}",
            f"largest batch at this context: {found.largest_batch or 'none'}",
            f"longest context at this batch: {found.longest_context or 'none'}",
            f"pages of an engine: {found.pages} of {PAGE} tokens, {found.pages * PAGE} tokens of all rows together",
            NOT_COUNTED.format(backend=jax.default_backend()),
        ]
    )
