"""The text to evaluate on: documents as token ids, cut into overlapping windows."""

import contextlib
import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax

from ..config import Config
from ..errors import CheckpointError, StorageError, UsageError, listing, pluralize, require_integer
from ..model import validation
from ..model.model import Model
from ..system.files import read_regular
from ..system.reporter import show_slow

Value = TypeVar("Value")

HELDOUT = Path(__file__).parents[1] / "demo_checkpoint" / "heldout.txt"
"""Files of Python's standard library, each below a line with its path; the demo model was not trained on them."""

CONTEXT = 1024
"""Default tokens of a window, if the model's longest context allows."""

BATCH = 4
"""Default windows of a batch. Larger batches are no faster on a CPU."""

LARGEST_FILE = 256 << 20
JSON_LINES = (".jsonl", ".ndjson")

THREADS = 2

Progress = Callable[[int, int], None]
"""Called with the number of windows done and their total."""

Texts = Sequence[str | Sequence[int]]
"""Documents, as text or as token ids."""


class Window(NamedTuple):
    """Tokens that are read together, starting at position `start` of a document.

    Tokens from index `first` on are scored; those before were scored by earlier windows and serve as context. The first
    token of a document has nothing before it and is never scored.
    """

    document: int
    start: int
    tokens: list[int]
    first: int

    @property
    def scored(self) -> list[int]:
        """The tokens that this window scores."""
        return self.tokens[self.first :]

    @property
    def predicting(self) -> slice:
        """The tokens before the scored ones: those whose predictions are scored."""
        return slice(self.first - 1, len(self.tokens) - 1)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents as token ids and the windows over them. `tokenizer` is None if ids were given."""

    documents: list[list[int]]
    windows: list[Window]
    context: int
    stride: int
    tokenizer: Any
    batch_size: int

    @property
    def batches(self) -> list[range]:
        """Indices of the windows that are read together, in the order of the text."""
        count = len(self.windows)
        return [range(start, min(start + self.batch_size, count)) for start in range(0, count, self.batch_size)]

    def rows(self, batch: range) -> list[list[int]]:
        """Return the tokens of a batch, a short last one filled up with rows of one token, for the others' program."""
        rows = [self.windows[i].tokens for i in batch]
        return rows + [rows[0][:1]] * (len(self.batches[0]) - len(rows))


def build_corpus(
    cfg: Config,
    tokenizer: Any,
    texts: Texts | str | None,
    *,
    context: int | None = None,
    stride: int | None = None,
    limit: int | None = None,
    batch_size: int = BATCH,
) -> Corpus:
    """Tokenize `texts` (None: the bundled held-out text) and cut them into windows, keeping the first `limit`.

    Each text gets a beginning-of-sentence token; special tokens in it are plain text. Token ids are used as given.
    Raises UsageError for sizes out of range, for texts with nothing to score, and for text without a tokenizer.
    """
    context = min(CONTEXT, cfg.max_position_embeddings) if context is None else context
    require_integer("context", context, 2, cfg.max_position_embeddings)
    stride = context // 2 if stride is None else stride
    require_integer("stride", stride, 1, context - 1)
    require_integer("batch_size", batch_size, 1, 1 << 20)
    if limit is not None:
        require_integer("limit", limit, 1)
    given = read_heldout() if texts is None else [texts] if isinstance(texts, str) else texts
    if isinstance(given, bytes) or not hasattr(given, "__len__"):
        raise UsageError(f"texts must be a text, or a list of texts or of lists of token ids, not {given!r:.200}")
    documents = [_encode(text, tokenizer, cfg) if isinstance(text, str) else text for text in given]
    if odd := [repr(text) for text in documents if isinstance(text, bytes) or not hasattr(text, "__len__")]:
        raise UsageError(f"texts must be text or lists of token ids, not {listing(odd, 5)}; nothing was run")
    if not documents:
        raise UsageError("there is no text to evaluate on; nothing was run")
    if short := [i for i, ids in enumerate(documents) if len(ids) < 2]:
        raise UsageError(
            f"texts of fewer than two tokens have nothing to score: {listing(short)} (counted from 0); "
            "nothing was run. Leave them out"
        )
    documents = validation.check_prompts(documents, cfg.vocab_size)
    return Corpus(documents, cut_windows(documents, context, stride)[:limit], context, stride, tokenizer, batch_size)


def map_batches(
    function: Callable[[range], list[Value]], model: Model, corpus: Corpus, progress: Progress | None
) -> list[Value]:
    """Call `function` with each batch of windows, each call in a thread, and return its values for all windows. Without
    a `progress` stderr shows how far that is.

    XLA's CPU backend runs much of a program on one core, so on CPUs several batches run at a time; not over a mesh,
    whose devices wait for each other and must all run programs in one order.
    """
    threads = THREADS if jax.default_backend() == "cpu" and model.mesh is None else 1
    values: list[Value] = []
    total = len(corpus.windows)
    own = None if progress is None else contextlib.nullcontext(lambda _: progress(len(values), total))
    with own or show_slow(total, unit="windows") as count, ThreadPoolExecutor(threads) as pool:
        contexts = [copy_context() for _ in corpus.batches]
        for some in pool.map(lambda context, batch: context.run(function, batch), contexts, corpus.batches):
            values += some
            count(len(some))
    return values


def cut_windows(documents: Sequence[Sequence[int]], context: int, stride: int) -> list[Window]:
    """Return windows of `context` tokens (fewer at the end of a document), `stride` < `context` apart.

    After the first window of a document, every scored token has at least context - stride tokens before it.
    """
    windows = []
    for document, tokens in enumerate(documents):
        start, scored = 0, 1
        while scored < len(tokens):
            part = list(tokens[start : start + context])
            windows.append(Window(document, start, part, scored - start))
            scored = start + len(part)
            start += stride
    return windows


def read_heldout() -> list[str]:
    """Return the bundled text, file by file."""
    parts = re.split("^##### .*\n", HELDOUT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [text.removesuffix("\n") for text in parts[1:]]


def read_texts(files: Sequence[str | Path]) -> list[str]:
    """Return the documents in `files`: the "text" of each line of a .jsonl file, any other file as a whole.

    Raises UsageError that lists every problem, StorageError if a file cannot be read.
    """
    problems: list[str] = []
    texts = [text for file in files for text in _read_documents(Path(file), problems)]
    if problems:
        raise UsageError(
            f"{pluralize(len(problems), 'text')} cannot be used; nothing was run: {listing(problems)}. "
            f'Each line of a {JSON_LINES[0]} file must be a JSON object with a string "text", any other file UTF-8 text'
        )
    return texts


def _read_documents(file: Path, problems: list[str]) -> Iterator[str]:
    try:
        text = read_regular(file, LARGEST_FILE).decode("utf-8-sig")
    except CheckpointError as error:
        problems.append(str(error))
        return
    except UnicodeDecodeError as error:
        problems.append(f"{file} is not UTF-8 at byte {error.start}")
        return
    except OSError as error:
        raise StorageError(f"{file} cannot be read: {error.strerror}; nothing was run") from error
    if file.suffix not in JSON_LINES:
        yield text
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if isinstance(entry, dict) and isinstance(entry.get("text"), str):
            yield entry["text"]
        else:
            problems.append(f'{file}:{number} is not a JSON object with a string "text"')


def _encode(text: str, tokenizer: Any, cfg: Config) -> list[int]:
    if tokenizer is None:
        raise UsageError(
            "text needs a tokenizer: pass tokenizer= with a model in memory, put tokenizer.json into the checkpoint's "
            "folder, or pass token ids"
        )
    return [cfg.bos_token_id, *tokenizer.encode(text)]
