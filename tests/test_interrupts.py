"""Ctrl-C arrives, wherever the program is."""

import contextlib
import gc
import importlib
import signal
import subprocess
import sys
import threading
import time
import weakref

import pytest

import configs
import convert
from dsv32_jax import cli
from dsv32_jax.checkpoint import random_checkpoint
from dsv32_jax.cli import app
from dsv32_jax.config import Config
from dsv32_jax.system import interrupts

SIGNAL_IN_AN_IMPORT = """
import signal
signal.raise_signal(signal.SIGINT)
done = True
"""


def wait() -> None:
    """Longer than a signal takes to come again."""
    deadline = time.monotonic() + 100 * interrupts.RETRY_SECONDS
    while time.monotonic() < deadline:
        time.sleep(interrupts.RETRY_SECONDS)


def test_at_once():
    with interrupts.raise_on_interrupt(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_out_of_a_destructor():
    """Python would print what it raises, and go on."""

    class Gone:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    with interrupts.raise_on_interrupt(), pytest.raises(KeyboardInterrupt):
        Gone()
        wait()


def test_out_of_the_callback_of_a_weak_reference():
    """Python would print what it raises, and go on; the garbage collector calls many."""

    class Gone:
        pass

    gone = Gone()
    weakref.finalize(gone, signal.raise_signal, signal.SIGINT)
    with interrupts.raise_on_interrupt(), pytest.raises(KeyboardInterrupt):
        del gone
        wait()


def test_out_of_the_garbage_collector():
    """JAX has a hook there."""
    pressed = []

    def hook(*_) -> None:
        if not pressed:
            pressed.append(True)
            signal.raise_signal(signal.SIGINT)

    with interrupts.raise_on_interrupt(), pytest.raises(KeyboardInterrupt):
        gc.callbacks.append(hook)
        try:
            gc.collect()
            wait()
        finally:
            gc.callbacks.remove(hook)
    assert pressed


def test_after_an_import(tmp_path, monkeypatch):
    """The module is whole."""
    (tmp_path / "pressed_while_imported.py").write_text(SIGNAL_IN_AN_IMPORT)
    monkeypatch.syspath_prepend(tmp_path)
    with interrupts.raise_on_interrupt(), pytest.raises(KeyboardInterrupt):
        importlib.import_module("pressed_while_imported")
        wait()
    assert sys.modules["pressed_while_imported"].done


def test_other_handlers_and_threads_are_left_alone():
    """And what was there comes back."""
    before = signal.getsignal(signal.SIGINT)
    with interrupts.raise_on_interrupt(), interrupts.defer_interrupt() as asked:
        signal.raise_signal(signal.SIGINT)
        assert asked()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    own = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        with interrupts.raise_on_interrupt(), interrupts.defer_interrupt() as asked:
            signal.raise_signal(signal.SIGINT)
            assert not asked()
    finally:
        signal.signal(signal.SIGINT, own)
    codes = []
    thread = threading.Thread(target=lambda: codes.append(cli.main(["inspect", "nothing"])))
    thread.start()
    thread.join()
    assert codes == [3] and signal.getsignal(signal.SIGINT) is before


def test_a_command_ends_with_130(monkeypatch, capsys):
    monkeypatch.setattr(app, "parser", lambda: signal.raise_signal(signal.SIGINT))
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


BLOCKED = """
import ctypes, functools, threading
from dsv32_jax.system import interrupts
with interrupts.raise_on_interrupt(), interrupts.acknowledge_interrupt(), interrupts.{scope}():
    libc, lock = ctypes.CDLL(None), ctypes.create_string_buffer(256)
    libc.pthread_mutex_lock(lock)
    threading.Timer(0.3, functools.partial(print, "blocked", flush=True)).start()
    libc.pthread_mutex_lock(lock)
"""
"""Locks a lock twice, a call that no handler of Python's interrupts, as little as a compilation."""


@pytest.mark.parametrize("scope", ["raise_on_interrupt", "defer_interrupt"])
def test_what_cannot_be_left_is_acknowledged_at_once(scope):
    """And the second Ctrl-C ends it."""
    line = [sys.executable, "-c", BLOCKED.format(scope=scope)]
    with subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr and process.stdout.readline() == "blocked\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == interrupts.STOPPING + "\n" and process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30)[1] == "interrupted\n" and process.returncode == 130


@pytest.mark.parametrize("scope", [interrupts.raise_on_interrupt, interrupts.defer_interrupt])
def test_what_stops_at_once_needs_no_word(scope, capfd):
    """However often, nor what another handler stops."""
    with interrupts.raise_on_interrupt(), interrupts.acknowledge_interrupt():
        for _ in range(3):
            with contextlib.suppress(KeyboardInterrupt), scope():
                signal.raise_signal(signal.SIGINT)
        ours = signal.signal(signal.SIGINT, lambda *_: None)
        signal.raise_signal(signal.SIGINT)
        time.sleep(2 * interrupts.PATIENCE)
        signal.signal(signal.SIGINT, ours)
    assert capfd.readouterr() == ("", "")


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A checkpoint with random weights."""
    folder = tmp_path_factory.mktemp("interrupts")
    random_checkpoint.write(folder / "hf", Config.from_json(configs.path("tiny")), "bf16")
    convert.convert(folder / "hf", folder / "out")
    return folder / "out"


@pytest.mark.parametrize("seconds", [0.3, 0.6, 1.2])
def test_a_command_leaves_without_a_word_more(seconds, converted):
    """Whatever it was importing, loading or compiling."""
    asked = ["--ids", "0 1 2", "--max-new-tokens", "4000"]
    line = [sys.executable, "-m", "dsv32_jax", "generate", str(converted), *asked]
    process = subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and said.splitlines()[-1] == "interrupted" and "Traceback" not in said
