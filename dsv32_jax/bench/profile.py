"""The time of a program by part of the model, from a profile: parts are named by `jax.named_scope`."""

import re
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData

SCOPES = (
    *("projections", "attention", "index projections", "index scores", "top-k"),
    *("gate", "experts", "host experts", "feed-forward", "head", "sampling"),
)
OTHER = "other"

INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = .*? ([\w-]+)\(", re.MULTILINE)
CONTAINERS = ("while", "call", "conditional", "async-start", "async-done")
NCCL = "nccl"
"""The prefix of kernels that exchange between GPUs; the profile does not always name their instruction."""

SUM = "psum"
"""The model's name of a sum over devices. XLA compiles small ones to kernels of its own, which look like any other."""

COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")


def profile_scopes(program: Any, run: Callable[[], Any]) -> dict[str, float]:
    """Return the seconds of one `run` of the compiled `program` in each of SCOPES, in "collectives" and OTHER.

    They are busy seconds of a device, the mean of all devices; on a CPU, of the threads that run instructions.
    """
    run()
    scopes = find_scopes(program.as_text())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        (file,) = Path(folder).rglob("*.xplane.pb")
        return sum_by_scope(ProfileData.from_file(str(file)), scopes)


def find_scopes(text: str) -> dict[str, str]:
    """Return the scope of each kernel of a program, from its text. Instructions that contain others have none."""
    found = {}
    for line in text.splitlines():
        match = INSTRUCTION.match(line)
        if match is None or match[2] in CONTAINERS:
            continue
        name = re.search(r'op_name="([^"]*)"', line)
        path = name[1].split("/") if name else [""]
        is_collective = match[2].startswith(COLLECTIVES) or path[-1] == SUM
        scope = "collectives" if is_collective else next((part for part in path if part in SCOPES), OTHER)
        found[_name_kernel(match[1])] = scope
    return found


def sum_by_scope(profile: Any, scopes: dict[str, str]) -> dict[str, float]:
    """Add up the seconds of the events of a profile, given the scope of each kernel."""
    devices = [plane for plane in profile.planes if plane.name.startswith("/device:")]
    planes = devices or [plane for plane in profile.planes if plane.name.startswith("/host:CPU")]
    found: dict[str, float] = defaultdict(float)
    for event in (event for plane in planes for line in plane.lines for event in line.events):
        scope = scopes.get(_name_kernel(str(dict(event.stats).get("hlo_op", event.name))))
        if event.name.startswith(NCCL):
            scope = "collectives"
        if scope is not None:
            found[scope] += event.duration_ns * 1e-9 / (len(devices) or 1)
    return dict(found)


def _name_kernel(instruction: str) -> str:
    """Return XLA's name for the kernel of an instruction."""
    return re.sub(r"\W", "_", instruction)
