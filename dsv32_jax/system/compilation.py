"""Compilation: kept on disk between runs by default, and counted."""

import contextlib
import dataclasses
import functools
import logging
import os
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

import jax

from ..errors import CapacityError

LOG = logging.getLogger("dsv32_jax")

_EVENT = "/jax/core/compile/backend_compile_duration"


def prepare() -> None:
    """What every way in does first: find a device, and keep programs on disk. Raises CapacityError without a device."""
    require_device()
    keep_on_disk()


def require_device() -> None:
    """Raise CapacityError where JAX finds no device to compute on."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        asked = jax.config.values["jax_platforms"]
        why = f" ({error})" if str(error) else ""
        raise CapacityError(
            f"JAX finds no device of the platforms it was told to use, JAX_PLATFORMS={asked}{why}. Unset it to compute "
            "on what is there; dsv32 doctor lists that"
        ) from error


def keep_on_disk() -> None:
    """Store compiled programs under the user's cache folder, unless JAX was already told where, or told not to."""
    if jax.config.values["jax_compilation_cache_dir"] is None and jax.config.values["jax_enable_compilation_cache"]:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        if _can_be_written(folder := root / "dsv32_jax" / "compiled"):
            jax.config.update("jax_compilation_cache_dir", str(folder))


@functools.cache
def _can_be_written(folder: Path) -> bool:
    """Whether `folder` is there and can be written; where not, that is said once."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return True
    except OSError:
        pass
    LOG.warning("compiled programs are not kept: %s cannot be written; JAX_COMPILATION_CACHE_DIR names another", folder)
    return False


def kept(words: str) -> str:
    """`words`, which say that programs are kept, where they are."""
    values = jax.config.values
    return words if values["jax_enable_compilation_cache"] and values["jax_compilation_cache_dir"] is not None else ""


@dataclasses.dataclass(eq=False)
class Meter:
    """Programs compiled while the meter ran, and the seconds they took (from disk they take less)."""

    count: int = 0
    seconds: float = 0.0


_running: ContextVar[tuple[Meter, ...]] = ContextVar("_running", default=())


@contextlib.contextmanager
def metered() -> Iterator[Meter]:
    """Count what is compiled inside the `with`, by its thread and by those that run in a copy of its context."""
    meter = Meter()
    before = _running.set((*_running.get(), meter))
    try:
        yield meter
    finally:
        _running.reset(before)


@contextlib.contextmanager
def announced(what: str, meter: Meter, after: float = 2.0) -> Iterator[None]:
    """Log `what` where the `with` is still at it after some seconds and something is being compiled."""

    def say() -> None:
        if meter.seconds:
            LOG.warning("compiling %s%s", what, kept("; programs are kept on disk for next time"))

    timer = threading.Timer(after, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _listen(event: str, duration_secs: float, **_) -> None:
    if event.startswith("/jax/core/compile/"):
        for meter in _running.get():
            meter.seconds += duration_secs
            meter.count += event == _EVENT


jax.monitoring.register_event_duration_secs_listener(_listen)
