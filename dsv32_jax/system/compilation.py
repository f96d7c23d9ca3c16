"""JAX's compiler: a device is required, programs are cached on disk by default, compilations are counted."""

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
from .files import find_user_folder

LOG = logging.getLogger("dsv32_jax")

_COMPILED = "/jax/core/compile/backend_compile_duration"
_LOADED = "/jax/compilation_cache/cache_hits"


def initialize() -> None:
    """Enable the compilation cache, the first step of every entry point. Raises CapacityError without a device."""
    require_device()
    enable_cache()


def require_device() -> None:
    """Raise CapacityError if JAX finds no device."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        platforms = jax.config.values["jax_platforms"]
        reason = f" ({error})" if str(error) else ""
        raise CapacityError(
            f"JAX finds no device of the requested platforms, JAX_PLATFORMS={platforms}{reason}. Unset it to use "
            "what is there; dsv32 doctor lists that"
        ) from error


def get_device_memory() -> int | None:
    """Return the bytes that this process can still allocate on a device, None on a CPU, whose memory is the host's."""
    stats = jax.local_devices()[0].memory_stats()
    return stats["bytes_limit"] - stats["bytes_in_use"] if stats and "bytes_limit" in stats else None


def enable_cache() -> None:
    """Cache compiled programs in the user's cache folder, unless JAX is already configured to use another or none.

    Small programs are cached too: a model that runs layer by layer has dozens."""
    if jax.config.values["jax_compilation_cache_dir"] is None and jax.config.values["jax_enable_compilation_cache"]:
        folder = _make_cache_folder()
        if folder is not None:
            jax.config.update("jax_compilation_cache_dir", str(folder))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@functools.cache
def _make_cache_folder() -> Path | None:
    """Create the cache folder and return it; if that is impossible, warn and return None."""
    folder = find_user_folder("XDG_CACHE_HOME", ".cache")
    reason = "there is no home folder" if folder is None else f"{folder} is not writable"
    with contextlib.suppress(OSError):
        if folder is not None:
            (folder / "compiled").mkdir(parents=True, exist_ok=True)
            if os.access(folder / "compiled", os.W_OK):
                return folder / "compiled"
    LOG.warning("compiled programs are not cached: %s; set JAX_COMPILATION_CACHE_DIR to another folder", reason)
    return None


def is_cache_enabled() -> bool:
    """Return whether compiled programs are cached on disk."""
    values = jax.config.values
    return values["jax_enable_compilation_cache"] and values["jax_compilation_cache_dir"] is not None


@dataclasses.dataclass(eq=False)
class Compilations:
    """Programs compiled, and the seconds it took; reading them from the cache counts too. `loads`: those read."""

    count: int = 0
    loads: int = 0
    seconds: float = 0.0


_counters: ContextVar[tuple[Compilations, ...]] = ContextVar("_counters", default=())


@contextlib.contextmanager
def count_compilations() -> Iterator[Compilations]:
    """Count the compilations inside the `with`, of its thread and of threads that run in a copy of its context."""
    counter = Compilations()
    token = _counters.set((*_counters.get(), counter))
    try:
        yield counter
    finally:
        _counters.reset(token)


@contextlib.contextmanager
def log_slow_compilation(program: str, counter: Compilations, after: float = 2.0) -> Iterator[None]:
    """Log that `program` is being compiled if the `with` takes more than `after` seconds and `counter` is not zero."""

    def log() -> None:
        if counter.seconds:
            suffix = "; compiled programs are cached for next time" if is_cache_enabled() else ""
            LOG.info("compiling %s%s", program, suffix)

    timer = threading.Timer(after, log)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _listen(event: str, duration_secs: float, **_) -> None:
    if event.startswith("/jax/core/compile/"):
        for counter in _counters.get():
            counter.seconds += duration_secs
            counter.count += event == _COMPILED


def _listen_for_loads(event: str, **_) -> None:
    if event == _LOADED:
        for counter in _counters.get():
            counter.loads += 1


jax.monitoring.register_event_duration_secs_listener(_listen)
jax.monitoring.register_event_listener(_listen_for_loads)
