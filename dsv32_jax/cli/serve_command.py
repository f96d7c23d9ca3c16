"""`dsv32 serve`: the model behind HTTP."""

import argparse
import asyncio
import signal
import socket
import sys
from pathlib import Path

from ..checkpoint.companions import read_sampling
from ..errors import UsageError, require_integer
from ..generation.generate import MAX_ROWS, engine as make_engine
from ..generation.options import Sampling
from .open_checkpoint import OpenedCheckpoint
from .parsers import collect_options
from .prompt_input import read_text
from .terminal import Screen

LOOPBACK = ("127.", "::1", "localhost")


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal ends it, and return the exit code. Everything is checked before weights are read."""
    try:
        import uvicorn

        from ..serve.app import Limits, Server
        from ..serve.driver import Driver
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
    with listen(arguments.host, port) as listener, screen.show_log():
        model = opened.load(arguments, screen)
        engine = make_engine(model, rows=rows, capacity=context, pages=arguments.pages, **options)
        name = arguments.name or opened.folder.name
        reader = Reader(name, engine, opened.tokenizer, read_sampling(opened.folder))
        driver = Driver(engine, len(engine.loop.scheduler.places) + waiting)
        app = Server(reader, driver, Limits(seconds=arguments.timeout)).make_app(keys)
        host, port = listener.getsockname()[:2]
        if not keys and not host.startswith(LOOPBACK):
            screen.note(f"warning: anybody who reaches {host} may use the model: see --api-key-file", important=True)
        screen.note(f"serving {name} at http://{f'[{host}]' if ':' in host else host}:{port}/v1 (Ctrl-C ends)")
        config = uvicorn.Config(app, log_config=None, log_level="error", access_log=False, server_header=False)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        asyncio.run(uvicorn.Server(config).serve(sockets=[listener]))
    return 0


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens there. Raises UsageError where that is impossible."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
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
