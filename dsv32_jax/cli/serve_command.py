"""`dsv32 serve`: the model behind HTTP."""

import argparse
import asyncio
import signal
import socket
import sys
import time
from pathlib import Path

from ..checkpoint.companions import read_sampling
from ..errors import UsageError, require_integer
from ..generation.engine import MAX_ROWS, engine as make_engine
from ..generation.options import Sampling
from .open_checkpoint import OpenedCheckpoint
from .parsers import collect_options
from .prompt_input import read_text
from .terminal import Screen

BACKLOG = 2048
"""Clients that may wait to be let in."""

LOOPBACK = ("127.", "::1", "localhost")


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal ends it, and return the exit code. Everything is checked before weights are read."""
    try:
        from ..serve.app import Server
        from ..serve.connections import DrainingServer, Limits, configure
        from ..serve.driver import Driver, warm_up
        from ..serve.reading import Reader
    except ImportError as error:
        raise UsageError(f"serving needs more libraries ({error}): pip install 'dsv32-jax[serve]'") from error
    screen = Screen(quiet=arguments.quiet)
    opened = OpenedCheckpoint.of(arguments.checkpoint)
    assert opened.tokenizer is not None
    Sampling.from_checkpoint(opened.folder)
    port, waiting = require_integer("port", arguments.port, 0, 65535), require_integer("waiting", arguments.waiting, 0)
    rows, longest = require_integer("rows", arguments.rows, 1, MAX_ROWS), opened.cfg.max_position_embeddings
    context = longest if arguments.context is None else require_integer("context", arguments.context, 1, longest)
    if arguments.timeout <= 0:
        raise UsageError(f"--timeout must be more than 0 seconds, not {arguments.timeout:g}")
    keys, options = read_keys(arguments.api_key_file), collect_options(arguments, ["cache_dtype", "draft"])
    opened.validate(arguments.dtype, [[opened.cfg.bos_token_id]], max_new_tokens=0, capacity=context, **options)
    with bind(arguments.host, port) as listener, screen.show_log():
        model = opened.load(arguments, screen)
        engine = make_engine(model, rows=rows, capacity=context, pages=arguments.pages, **options)
        name = arguments.name or opened.folder.name
        reader = Reader(name, engine, opened.tokenizer, read_sampling(opened.folder))
        begun = time.perf_counter()
        warm_up(engine, reader.room)
        screen.note(f"compiled what first requests need in {time.perf_counter() - begun:.1f} s")
        driver = Driver(engine, len(engine.core.loop.scheduler.places) + waiting)
        limits = Limits(seconds=arguments.timeout)
        config = configure(Server(reader, driver, limits).make_app(keys, screen.note), limits)
        host, port = listener.getsockname()[:2]
        if not keys and not host.startswith(LOOPBACK):
            screen.note(f"warning: anybody who reaches {host} may use the model: see --api-key-file", important=True)
        listener.listen(BACKLOG)
        screen.note(f"serving {name} at http://{f'[{host}]' if ':' in host else host}:{port}/v1 (Ctrl-C ends)")
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        asyncio.run(DrainingServer(config, lambda: driver.rows, screen.note).serve(sockets=[listener]))
    return 0


def bind(host: str, port: int) -> socket.socket:
    """Return a socket with that address that does not listen yet, so that clients are refused. Raises UsageError."""
    listener = None
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        if listener is not None:
            listener.close()
        reason = f"cannot listen on port {port} of {host}: {error}"
        raise UsageError(f"{reason}; choose others with --host and --port") from error
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # or each answer waits 40 ms; connections inherit it
    return listener


def read_keys(file: Path | None) -> list[str]:
    """Return the keys in a file, one a line. Raises UsageError where there are none."""
    if file is None:
        return []
    keys = read_text(file).split()
    if not keys or not all(key.isascii() for key in keys):
        raise UsageError(f"{file} must hold keys of ASCII characters, one on each line")
    return keys
