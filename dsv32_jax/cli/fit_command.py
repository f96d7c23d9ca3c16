"""`dsv32 fit`: whether a model fits in memory, as a table or as JSON."""

import argparse
import dataclasses
import math
from typing import NamedTuple

import jax

from ..bench import roofline
from ..errors import CapacityError, argument, pluralize
from ..generation import memory
from ..generation.fit import Fit, fit
from ..generation.pages import PAGE
from ..system.progress import format_count, parse_size
from ..system.wrapping import wrap_lines
from .terminal import Screen, format_json

NOT_COUNTED = """\
not counted: programs and their constants, temporaries of loading (one parameter,
or 67 MB of small ones), communication buffers, fragmentation, other processes.
Activations are those of this backend's compiler ({backend}); on a mesh, those of a
device that computes its rows alone, an upper bound. Largest batch and longest
context assume that activations grow linearly; a batch is rounded up to a power
of two, and so is a context."""


NOT_OPTIONS = ("argv", "path", "json", "run", "device_speed", "host_speed")


class Speeds(NamedTuple):
    """Bytes a second that a device copies, None if that is not known, and that the host reads; and whether each was
    given or measured."""

    device: int | None
    host: int
    device_origin: str
    host_origin: str

    def __str__(self) -> str:
        device = f"a device copies {(self.device or 0) / 1e9:.0f} GB/s, {self.device_origin}"
        return (
            f"{device if self.device else 'without the devices: give ' + argument('device_speed')}; "
            f"the host reads {self.host / 1e9:.0f} GB/s, {self.host_origin}"
        )


def run(arguments: argparse.Namespace) -> int:
    """Run the command and return the exit code: CapacityError's if the model does not fit."""
    options = {name: value for name, value in vars(arguments).items() if name not in NOT_OPTIONS}
    given = tuple(speed and parse_size(speed) for speed in (arguments.device_speed, arguments.host_speed))
    screen = Screen()
    screen.status("compiling, to measure what programs take")
    try:
        found = fit(arguments.path, **options)
        wanted = found.hosted or any(given)
        speeds = find_speeds(given[0], given[1], arguments.device_memory is None) if wanted else None
    finally:
        screen.status("")
    facts = {**dataclasses.asdict(found), "fits": found.fits}
    if speeds:
        facts |= {"device_speed": speeds.device, "host_speed": speeds.host, "rate": estimate_rate(found, speeds)}
    screen.result((format_json(facts) if arguments.json else wrap_lines(format_fit(found, speeds))) + "\n")
    return 0 if found.fits else CapacityError.exit_code


def find_speeds(device: int | None, host: int | None, are_here: bool) -> Speeds:
    """Return the given speeds; those that are not given are measured, the devices' where they `are_here`."""
    origins = ["given" if speed else "measured here" for speed in (device, host)]
    if device is None and are_here:
        device = int(roofline.measure_move_speed(None))
    return Speeds(device, host or int(roofline.measure_host_speed()), *origins)


def estimate_rate(found: Fit, speeds: Speeds) -> float:
    """Return the most tokens a second of one row."""
    return found.estimate_rate(speeds.device or math.inf, speeds.host)


def format_fit(found: Fit, speeds: Speeds | None = None) -> str:
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
    if found.hosted:
        where = f"experts of the first {pluralize(found.host_layers, 'MoE layer')}"
        rows += [("on the host", found.hosted, where), ("free there", found.host_free, "")]
    where = f"on each of {found.devices} devices" if found.devices > 1 else "on one device"
    drafting = f", drafting {found.draft}" if found.draft else ""
    return "\n".join(
        [
            f"{'':14}{'GB':>10}   {where}, cache in {found.cache_dtype}{drafting}",
            *(
                f"{name:14}{size / 1e9:10.2f}   {note}".rstrip()
                for name, size, note in rows
                if size or name not in ("reserve", "resident")
            ),
            f"{_judge(found)}: {pluralize(found.batch, 'row')} of {pluralize(found.context, 'token')}",
            f"largest batch at this context: {found.largest_batch or 'none'}",
            f"longest context at this batch: {found.longest_context or 'none'}",
            f"pages of an engine: {found.pages} of {PAGE} tokens, {found.pages * PAGE} tokens of all rows together",
            *([f"decoding one row: {estimate_rate(found, speeds):.1f} tokens/s at most ({speeds})"] if speeds else []),
            NOT_COUNTED.format(backend=jax.default_backend()),
        ]
    )


def _judge(found: Fit) -> str:
    if not found.fits:
        remedy = "" if found.split is None else f", but would with {argument('experts', f'host:{found.split}')}"
        return f"does not fit{remedy}"
    if found.total <= found.free:
        return "fits"
    each = f"{argument('disk_speed')} 2GB estimates the time of a token"
    if found.page_seconds is not None:
        each = f"about {found.page_seconds:.1f} s of reading a token"
    return f"runs, but from the disk, as not all weights stay in memory ({each})"
