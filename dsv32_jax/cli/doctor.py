"""`dsv32 doctor`: what is there, what is missing, and what would run. Nothing that is missing makes it fail."""

import argparse
import importlib.metadata
import os
import platform
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import DsvError
from ..system import host
from ..system.files import expand_path, find_home
from .screen import Screen, json_line, one_line, shown

PACKAGES = ("jax", "jaxlib", "flax", "orbax-checkpoint", "numpy", "ml_dtypes", "safetensors", "tokenizers")
OPTIONAL = {"tokenizers": "text needs it: pip install 'dsv32-jax[text]' (token ids work without)"}

Facts = dict[str, Any]

MEMORY = {"memory": "bytes_limit", "in use": "bytes_in_use"}

CONTEXT = 4096
"""Tokens of the row whose cache is counted."""


class Findings:
    """Facts by section, and problems in words. A section that cannot be looked at is a problem too."""

    def __init__(self):
        self.sections: dict[str, Facts] = {}
        self.problems: list[str] = []

    def look(self, name: str, look: Callable[["Findings"], Facts]) -> None:
        """Add what `look` finds."""
        try:
            self.sections[name] = look(self)
        except DsvError as error:
            self.problems += [str(error)] if str(error) not in self.problems else []
        except Exception as error:
            self.problems.append(f"{name}: {type(error).__name__}: {error}")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; always 0."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    findings = Findings()
    for name, look in {"versions": versions, "machine": machine, "devices": devices, "runs": runs}.items():
        findings.look(name, look)
    if arguments.checkpoint is not None:
        findings.look("checkpoint", partial(checkpoint, folder=expand_path(arguments.checkpoint)))
    as_json = json_line({**findings.sections, "problems": findings.problems})
    Screen().result((as_json if arguments.json else text(findings)) + "\n")
    return 0


def text(findings: Findings) -> str:
    """Everything, for a person."""
    lines = []
    width = max((len(what) for facts in findings.sections.values() for what in facts), default=0) + 2
    for name, facts in findings.sections.items():
        lines += [name, *(f"  {what:<{width}}{_fact(fact)}" for what, fact in facts.items())]
    problems = [f"problems ({len(findings.problems)})"] if findings.problems else ["no problems found"]
    return "\n".join([*lines, *problems, *(f"  - {shown(one)}" for one in findings.problems)])


def _fact(fact: Any) -> str:
    if isinstance(fact, Bytes):
        return f"{fact / 1e9:.2f} GB"
    if isinstance(fact, dict):
        return ", ".join(f"{name} {_fact(one)}" for name, one in fact.items())
    return "missing" if fact is None else one_line(str(fact))


class Bytes(int):
    """An amount of memory or disk."""


def versions(findings: Findings) -> Facts:
    """Of Python and the packages it works with."""
    found: Facts = {"python": platform.python_version()}
    for name in ("dsv32-jax", *PACKAGES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
            findings.problems.append(f"{name} is not installed" + (f"; {OPTIONAL[name]}" if name in OPTIONAL else ""))
    return found


def machine(_: Findings) -> Facts:
    """Processor, memory, disks and limits."""
    places = {"here": Path.cwd(), "temporary files": Path(tempfile.gettempdir()), "home": find_home()}
    return {
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "cores": host.count_cores(),
        "memory": Bytes(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")),
        "free memory": Bytes(host.get_free_memory()),
        **{f"free disk, {name}": Bytes(shutil.disk_usage(place).free) for name, place in places.items() if place},
        "open files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    }


def devices(findings: Findings) -> Facts:
    """What JAX computes on, and who else is there."""
    import jax

    from ..system.compilation import require_device

    require_device()
    found: Facts = {"platform": jax.default_backend()}
    for device in jax.local_devices():
        stats = device.memory_stats() or {}
        room = {what: Bytes(stats[name]) for what, name in MEMORY.items() if name in stats}
        found[f"device {device.id}"] = {"kind": device.device_kind, **room}
    others = _gpu_processes()
    if others and found["platform"] == "cpu":
        findings.problems.append("there are NVIDIA GPUs, but JAX computes on the CPU: pip install 'dsv32-jax[gpu]'")
    return {**found, **({"processes on the GPUs": others} if others else {})}


def _gpu_processes() -> list[str] | None:
    """Process id, memory and name of each process on an NVIDIA GPU; None without such a GPU."""
    command = ["nvidia-smi", "--query-compute-apps=pid,used_memory,process_name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.splitlines() if done.returncode == 0 else None


def runs(_: Findings) -> Facts:
    """What computes, and where compiled programs are kept."""
    import jax

    from ..kernels import dispatch
    from ..system.compilation import initialize

    initialize()
    folder, kept = (jax.config.values[f"jax_{name}"] for name in ("compilation_cache_dir", "enable_compilation_cache"))
    found: Facts = {"kernels": dispatch.description(), "arithmetic": "bfloat16 (--dtype float32 for parity)"}
    if not (folder and kept):
        return {**found, "compiled programs": "not kept: the compilation cache of JAX is off"}
    files = [file for file in Path(folder).rglob("*") if file.is_file()] if Path(folder).is_dir() else []
    size = Bytes(sum(file.stat().st_size for file in files))
    return {**found, "compiled programs": {"folder": folder, "files": len(files), "size": size}}


def checkpoint(findings: Findings, folder: Path) -> Facts:
    """Whether a checkpoint would load, be spoken to in text, and fit on one device."""
    from ..chat import Tokenizer
    from ..checkpoint import checksums
    from ..checkpoint.manifest import Manifest
    from ..generation import memory
    from ..generation.weight_shapes import read_weight_shapes
    from ..model.cache import dtype_of

    found = read_weight_shapes(folder)
    findings.problems += [f"{folder}: {one}" for one in checksums.damaged_files(folder, Manifest.read(folder))]
    cfg, context = found.cfg, min(CONTEXT, found.cfg.max_position_embeddings)
    weights = sum(found.device_bytes({}, "bfloat16"))
    cache = memory.compute_row_bytes(cfg, context, dtype_of("bfloat16", None), 0)
    free = memory.get_free_memory()
    facts: Facts = {
        "folder": str(folder),
        "layers": f"{cfg.num_hidden_layers} + {cfg.num_nextn_predict_layers} MTP",
        "parameters": f"{found.parameters / 1e9:.2f} B",
        "weights in memory": Bytes(weights),
        f"cache, {context} tokens": Bytes(cache),
        "fits on one device": f"{'yes' if weights + cache < free else 'no'}, {free / 1e9:.2f} GB free (see dsv32 fit)",
    }
    try:
        facts["tokenizer"] = f"{len(Tokenizer.load(folder, cfg).specials)} special tokens"
    except DsvError as error:
        facts["tokenizer"] = None
        findings.problems.append(str(error))
    return facts
