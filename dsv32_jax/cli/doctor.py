"""`dsv32 doctor`: what is installed, what is missing, and what would run. Nothing that is missing stops it."""

import argparse
import functools
import importlib.metadata
import os
import platform
import resource
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import DsvError, VerificationError, printable
from ..system import host
from ..system.files import expand_path, find_home
from ..system.progress import format_count, format_size
from ..system.wrapping import wrap_lines
from .terminal import Screen, format_json, shorten

PACKAGES = ("jax", "jaxlib", "flax", "orbax-checkpoint", "numpy", "ml_dtypes", "safetensors", "tokenizers")
OPTIONAL = {"tokenizers": "text needs it: pip install 'dsv32-jax[text]' (token ids work without)"}

CONTEXT = 4096
"""Tokens of the row whose cache is counted."""

Facts = dict[str, Any]
Problems = list[str]


class Bytes(int):
    """An amount of memory or disk."""


def run(arguments: argparse.Namespace) -> int:
    """Run the command and return the exit code: VerificationError's if problems were found."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    sections: dict[str, Facts] = {}
    problems: Problems = []
    examinations = {"versions": _find_versions, "machine": _examine_machine}
    examinations |= {"devices": _find_devices, "runs": _find_backends}
    if arguments.checkpoint is not None:
        examinations["checkpoint"] = functools.partial(_examine_checkpoint, folder=arguments.checkpoint)
    for name, examine in examinations.items():
        try:
            sections[name] = examine(problems)
        except DsvError as error:
            problems += [str(error)] if str(error) not in problems else []
        except Exception as error:
            problems.append(f"{name}: {type(error).__name__}: {error}")
    as_json = format_json({**sections, "problems": problems})
    Screen().result((as_json if arguments.json else _format(sections, problems)) + "\n")
    return VerificationError.exit_code if problems else 0


def _format(sections: dict[str, Facts], problems: Problems) -> str:
    width = max((len(name) for facts in sections.values() for name in facts), default=0) + 2
    lines = []
    for section, facts in sections.items():
        lines += [section, *(f"  {name:<{width}}{_format_fact(fact)}" for name, fact in facts.items())]
    lines.append(f"problems ({len(problems)})" if problems else "no problems found")
    return wrap_lines("\n".join([*lines, *(f"  - {printable(problem)}" for problem in problems)]), 4)


def _format_fact(fact: Any) -> str:
    if isinstance(fact, Bytes):
        return format_size(fact)
    if isinstance(fact, dict):
        return ", ".join(f"{name} {_format_fact(value)}" for name, value in fact.items())
    return "missing" if fact is None else shorten(str(fact))


def _find_versions(problems: Problems) -> Facts:
    found: Facts = {"python": platform.python_version(), "dsv32_jax": __version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
            problems.append(f"{name} is not installed" + (f"; {OPTIONAL[name]}" if name in OPTIONAL else ""))
    return found


def _examine_machine(_: Problems) -> Facts:
    places = {"here": Path.cwd(), "temporary files": Path(tempfile.gettempdir()), "home": find_home()}
    return {
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "cores": host.count_cores(),
        "memory": Bytes(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")),
        "free memory": Bytes(host.get_free_memory()),
        **{f"free disk, {name}": Bytes(shutil.disk_usage(place).free) for name, place in places.items() if place},
        "open files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    }


def _find_devices(problems: Problems) -> Facts:
    import jax

    from ..system.compilation import require_device

    require_device()
    found: Facts = {"platform": jax.default_backend()}
    for device in jax.local_devices():
        stats = device.memory_stats() or {}
        keys = {"memory": "bytes_limit", "in use": "bytes_in_use"}
        memory = {name: Bytes(stats[key]) for name, key in keys.items() if key in stats}
        found[f"device {device.id}"] = {"kind": device.device_kind, **memory}
    processes = _list_gpu_processes()
    if processes and found["platform"] == "cpu":
        problems.append("there are NVIDIA GPUs, but JAX computes on the CPU: pip install 'dsv32-jax[gpu]'")
    return {**found, **({"processes on the GPUs": processes} if processes else {})}


def _list_gpu_processes() -> list[str] | None:
    """Return each process on an NVIDIA GPU; None without such a GPU."""
    command = ["nvidia-smi", "--query-compute-apps=pid,used_memory,process_name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.splitlines() if done.returncode == 0 else None


def _find_backends(_: Problems) -> Facts:
    """Return which kernels compute, and where compiled programs are cached."""
    import jax

    from ..kernels import dispatch
    from ..system.compilation import initialize, is_cache_enabled

    initialize()
    found: Facts = {"kernels": dispatch.describe(), "arithmetic": "bfloat16 (--dtype float32 for parity)"}
    if not is_cache_enabled():
        return {**found, "compiled programs": "not cached: JAX's compilation cache is off"}
    folder = jax.config.values["jax_compilation_cache_dir"]
    files = [file for file in Path(folder).rglob("*") if file.is_file()] if Path(folder).is_dir() else []
    size = Bytes(sum(file.stat().st_size for file in files))
    return {**found, "compiled programs": {"folder": folder, "files": len(files), "size": size}}


def _examine_checkpoint(problems: Problems, folder: Path) -> Facts:
    """Return whether a checkpoint would load, has a tokenizer, and fits on one device."""
    from ..chat import Tokenizer
    from ..checkpoint import checksums
    from ..checkpoint.manifest import Manifest
    from ..checkpoint.weight_shapes import read_weight_shapes
    from ..generation import memory
    from ..model.cache import dtype_of

    folder = expand_path(folder)
    found = read_weight_shapes(folder)
    problems += [f"{folder}: {damage}" for damage in checksums.find_damaged_files(folder, Manifest.read(folder))]
    cfg, context = found.cfg, min(CONTEXT, found.cfg.max_position_embeddings)
    weights = sum(found.device_bytes({}, "bfloat16"))
    cache = memory.compute_row_bytes(cfg, context, dtype_of("bfloat16", None), 0)
    free = memory.get_free_memory()
    fits = "yes" if weights + cache < free else "no"
    facts: Facts = {
        "folder": str(folder),
        "layers": f"{cfg.num_hidden_layers} + {cfg.num_nextn_predict_layers} MTP",
        "parameters": format_count(found.parameters),
        "weights in memory": Bytes(weights),
        f"cache, {context} tokens": Bytes(cache),
        "fits on one device": f"{fits}, {format_size(free)} free (see dsv32 fit)",
    }
    try:
        facts["tokenizer"] = f"{len(Tokenizer.load(folder, cfg).specials)} special tokens"
    except DsvError as error:
        facts["tokenizer"] = None
        problems.append(str(error))
    return facts
