"""How a command ends: its exit code, and an error as a message for people and as JSON for programs."""

import json
import os
import sys
from collections.abc import Callable

from ..errors import (
    COMMAND_LINE,
    FULL,
    CapacityError,
    CheckpointError,
    DsvError,
    StorageError,
    explain_exhaustion,
    refusal,
)
from .reporter import escape_unencodable
from .wrapping import wrap_lines


def run_command(run: Callable[[], int], as_json: bool) -> int:
    """Call `run` and return its exit code, or that of its error, which goes to stderr, and to stdout `as_json`.

    Messages spell options as the command line does. A reader that stops reading is no error.
    """
    spelling = COMMAND_LINE.set(True)
    facts = {}
    try:
        return run()
    except DsvError as error:
        message, code, facts = str(error), error.exit_code, error.facts
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except FileNotFoundError as error:
        message, code = refusal(error), CheckpointError.exit_code
    except OSError as error:
        message, code = refusal(error), (CapacityError if error.errno in FULL else StorageError).exit_code
    except (MemoryError, RuntimeError) as error:
        exhausted = explain_exhaustion(error)
        message, code = str(exhausted), exhausted.exit_code
    finally:
        COMMAND_LINE.reset(spelling)
    print(wrap_lines(escape_unencodable(f"error: {message}"), stream=sys.stderr), file=sys.stderr, flush=True)
    if as_json:
        print(json.dumps({**facts, "error": message, "code": code}), flush=True)
    return code
