"""Compilation: kept on disk between runs by default, and counted."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"


def keep_on_disk() -> None:
    """Store compiled programs under the user's cache folder, unless JAX was already told where, or told not to."""
    if jax.config.values["jax_compilation_cache_dir"] is None and jax.config.values["jax_enable_compilation_cache"]:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(root / "dsv32_jax" / "compiled"))


@dataclasses.dataclass
class Meter:
    """Programs compiled while the meter ran, and the seconds they took (from disk they take less)."""

    count: int = 0
    seconds: float = 0.0


_running: list[Meter] = []


@contextlib.contextmanager
def metered() -> Iterator[Meter]:
    """Count what is compiled inside the `with`."""
    meter = Meter()
    _running.append(meter)
    try:
        yield meter
    finally:
        _running.remove(meter)


def _listen(event: str, duration_secs: float, **_) -> None:
    if event.startswith("/jax/core/compile/"):
        for meter in _running:
            meter.seconds += duration_secs
            meter.count += event == _EVENT


jax.monitoring.register_event_duration_secs_listener(_listen)
