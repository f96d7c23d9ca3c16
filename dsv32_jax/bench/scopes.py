"""Where a program's time goes, by the names that the model gives its parts (`jax.named_scope`)."""

import re
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData

SCOPES = (
    "projections",
    "attention",
    "index projections",
    "index scores",
    "top-k",
    "gate",
    "experts",
    "feed-forward",
    "head",
    "choice",
)
OTHER = "other"

INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = .*? ([\w-]+)\(", re.MULTILINE)
CONTAINERS = ("while", "call", "conditional", "async-start", "async-done")
NCCL = "nccl"
"""How the names of the kernels begin that exchange between GPUs; of what instruction they are is not asked."""

SUM = "psum"
"""What the model calls every sum over devices. XLA makes kernels of its own of small ones, which look like any other.
"""

COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")


def spent(program: Any, run: Callable[[], Any], times: int) -> dict[str, float]:
    """Seconds of the compiled `program` in each of SCOPES, "collectives" and OTHER, for one of `times` calls of `run`.

    They are the busy seconds of a device (the mean of all); on a CPU those of the threads that run instructions.
    """
    run()
    scope_of = _scopes(program.as_text())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(times):
                jax.block_until_ready(run())
        (file,) = Path(folder).rglob("*.xplane.pb")
        found = _busy(ProfileData.from_file(str(file)), scope_of)
    return {scope: busy / times for scope, busy in found.items()}


def _scopes(text: str) -> dict[str, str]:
    """The scope of each kernel of a program, by its text; an instruction that only holds others has none."""
    found = {}
    for line in text.splitlines():
        match = INSTRUCTION.match(line)
        if match is None or match[2] in CONTAINERS:
            continue
        name = re.search(r'op_name="([^"]*)"', line)
        path = name[1].split("/") if name else [""]
        if match[2].startswith(COLLECTIVES) or path[-1] == SUM:
            found[_kernel(match[1])] = "collectives"
        else:
            found[_kernel(match[1])] = next((piece for piece in path if piece in SCOPES), OTHER)
    return found


def _kernel(instruction: str) -> str:
    """What XLA calls the kernel of an instruction."""
    return re.sub(r"\W", "_", instruction)


def _busy(profile: Any, scope_of: dict[str, str]) -> dict[str, float]:
    devices = [plane for plane in profile.planes if plane.name.startswith("/device:")]
    planes = devices or [plane for plane in profile.planes if plane.name.startswith("/host:CPU")]
    found: dict[str, float] = defaultdict(float)
    for plane in planes:
        for line in plane.lines:
            for event in line.events:
                scope = scope_of.get(_kernel(str(dict(event.stats).get("hlo_op", event.name))))
                if event.name.startswith(NCCL):
                    scope = "collectives"
                if scope is not None:
                    found[scope] += event.duration_ns * 1e-9 / (len(devices) or 1)
    return dict(found)
