"""One step of the engine: rows are admitted, a chunk of prompts is read, rows that generate take some decode steps."""

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax

from ..errors import pluralize
from ..kernels import host_experts
from ..model.model import Model
from ..parallel import multihost
from ..system.compilation import count_compilations, log_slow_compilation
from . import memory
from .batch import SEGMENT_TOKENS, Batch, Made, find_nonfinite
from .pages import PAGE, count_pages
from .prefill_decode import Caches
from .programs import fill, most_alone, most_beside, plan_chunk
from .row import Row
from .scheduler import Scheduler, Seat

SEGMENT_SECONDS = 0.5
"""The time between two looks at whether Ctrl-C was pressed."""

COUNTERS = ("compiles", "loads", "generated", "prefix_hits", "preemptions", "answered")
SECONDS = ("prefill_seconds", "decode_seconds", "compile_seconds", "first_token_seconds")


class Loop:
    """A batch of rows on the device, and the scheduler that fills it.

    scheduler  which rows have places in the batch, which wait, and the pages they have
    totals     counters of what was done so far
    segment_seconds  `decode` returns to the host about this often

    Prompts are read in chunks between decode steps: small ones, so that rows which generate do not wait for long, or,
    `for_throughput`, large ones, which are faster.
    """

    def __init__(self, model: Model, scheduler: Scheduler, batch: Batch, for_throughput: bool):
        self.model, self.scheduler, self.batch, self.draft = model, scheduler, batch, batch.draft
        self._for_throughput = for_throughput
        self.totals: dict[str, Any] = {**dict.fromkeys(COUNTERS, 0), **dict.fromkeys(SECONDS, 0.0)}
        self.segment_seconds, self._segment, self._blocks = SEGMENT_SECONDS, 1, 1

    def submit(self, row: Row) -> None:
        """Let the row wait. The table is as long as the longest row needs since there was none."""
        empty = not any(self.scheduler.places) and not self.scheduler.waiting
        blocks = memory.round_up_rows(count_pages(len(row.prompt) + row.limit))
        self._blocks = blocks if empty else max(self._blocks, blocks)
        self.scheduler.submit(row)

    def advance(self, steps: int | None) -> None:
        """Take a step. Raises CapacityError if the device runs out of memory."""
        with self.protect():
            self._seat(self.scheduler.admit())
            self._read()
            self._decode(steps)

    @contextlib.contextmanager
    def protect(self) -> Iterator[None]:
        """If a program fails or is interrupted in the `with`, let the rows wait again, and read anew what they had."""
        try:
            yield
        except BaseException:
            if self.batch.state is None:
                self.scheduler.clear()
            raise

    def copy_out(self, tokens: Sequence[int]) -> Caches | None:
        """Return a contiguous cache of one row with what is known of these tokens, None if nothing is."""
        shard, prefix = self.scheduler.find(tokens)
        pages = [*prefix.pages, *([] if prefix.rest is None else [prefix.rest])]
        first = shard * len(self.scheduler.pools[0].users)
        return self.batch.copy_out([first + page for page in pages], prefix.count) if pages else None

    def copy_in(self, tokens: Sequence[int], caches: Caches) -> None:
        """Let these tokens be found, which are in a contiguous cache of one row."""
        pool = self.scheduler.pools[0]
        pages = pool.take(count_pages(len(tokens)))
        assert pages is not None
        self.batch.copy_in(pages, caches)
        pool.insert(tokens, pages)
        pool.release(pages)

    def _seat(self, seats: Sequence[Seat]) -> None:
        """Write what the device has to know of rows that were admitted."""
        if not seats:
            return
        with self._measure("prefill"):
            self.batch.state = self.batch.seat(seats)
        for row, _ in seats:
            self.totals["prefix_hits"] += row.length
            row.read += not row.unread

    def _read(self) -> None:
        """Read the next chunk of prompts."""
        scheduler, shards = self.scheduler, len(self.scheduler.pools)
        if not (reading := scheduler.reading):
            return
        tokens = self._most_tokens(reading)
        size, most = plan_chunk(reading[0].unread, tokens)
        groups = [[row for row in reading if scheduler.shard_of(row) == shard] for shard in range(shards)]
        fitting = [[row for row in rows if plan_chunk(row.unread, tokens)[0] >= size][:most] for rows in groups]
        rows = min(most, fill(max(map(len, fitting))))
        chunk: list[Row | None] = []
        for group in fitting:
            chunk += [*group[:rows], *[None] * (rows - len(group))]
        with self._measure("prefill"):
            state = self.batch.read(chunk, size, self._blocks)
            for row in filter(None, chunk):
                count = min(size, row.unread)
                row.length, row.read, row.unsure = row.length + count, row.read + count, 0
                if not row.unread:
                    row.read += 1
                    scheduler.learn(row, row.length)
            self.batch.state = state
        self._release_ended(filter(None, chunk))
        for row in {id(row.request): row for row in chunk if row is not None}.values():
            row.report()

    def _most_tokens(self, reading: Sequence[Row]) -> int:
        """Return how many tokens are read at once: few enough that rows which generate do not wait long."""
        running = {row.slot: row.length for row in self.scheduler.running}
        whole = most_alone(len(reading))
        if not running or self._for_throughput:
            return whole
        lengths = [running.get(place, 0) for place in range(len(self.scheduler.places))] * (1 + self.draft)
        return min(whole, most_beside(self.model.cfg, lengths, reading[0].length))

    def _decode(self, steps: int | None) -> None:
        """Take `steps` steps, or as many as fit in `segment_seconds`; one while prompts are read, or a row has a
        constraint."""
        scheduler, each = self.scheduler, 1 + self.draft
        is_short = bool(scheduler.reading) or any(row.constraint for row in scheduler.running)
        count = 1 if is_short else min(steps or self._segment, SEGMENT_TOKENS // each)
        waiting = len(scheduler.waiting)
        while not scheduler.reserve(count * each):
            count //= 2
        self.totals["preemptions"] += len(scheduler.waiting) - waiting
        if not (running := scheduler.running):
            return
        begun, fewest = time.perf_counter(), len(running) - 1 if scheduler.waiting else 0
        with self._measure("decode"):
            state, made = self.batch.decode(running, count, fewest, self._blocks)
            taken = max(int(made.step_B[row.slot]) - row.steps for row in running)
            if self._collect(running, made):
                self.batch.state = state
        if steps is None and not is_short:
            slow = multihost.agree_on_any(self.model.mesh, time.perf_counter() - begun > self.segment_seconds)
            if slow:
                self._segment = max(1, self._segment // 2)
            elif taken == count:
                self._segment = min(self._segment * 2, SEGMENT_TOKENS // each)

    def _collect(self, running: Sequence[Row], made: Made) -> bool:
        """Hand out the tokens that a program generated. Returns False where logits were not finite: nothing in the
        cache is trusted then, because what is masked is multiplied with zero, and a NaN stays one."""
        if bad := [row for row in running if not made.finite_B[row.slot]]:
            self._blame(bad, made)
        for row in running:
            count, row.steps = int(made.count_B[row.slot]), int(made.step_B[row.slot])
            row.length, row.made = row.length + count, row.made + count
            row.unsure = int(made.unread_B[row.slot]) - 1 if self.draft else 0
            row.news.append(row)
            for token in made.tokens(row, row.request.options.top_logprobs):
                if row.finish_reason:
                    break
                if not row.tokens:
                    self.totals["answered"] += 1
                    self.totals["first_token_seconds"] += time.perf_counter() - row.submitted
                row.pending.append(row.add(*token))
                self.totals["generated"] += 1
        if bad:
            self.scheduler.clear()
        self._release_ended(running)
        return not bad

    def _release_ended(self, rows: Iterable[Row]) -> None:
        for row in rows:
            if row.finish_reason:
                self.scheduler.release(row)

    def _blame(self, bad: Sequence[Row], made: Made) -> None:
        """End rows with logits that are not finite with an error that names the first of each request."""
        cause = host_experts.take_error() or "Check the checkpoint's weights"
        for row in bad:
            others = sum(row.request is other.request for other in bad)
            tokens = row.tokens + [token for token, *_ in made.tokens(row, 0)][:-1]
            origin = find_nonfinite(self.model, row.prompt + tokens)
            error = FloatingPointError(
                f"the logits of {pluralize(others, 'row')} are not finite: row {row.index}, new token {len(tokens)}; "
                f"the first output that is not finite is that of {origin}. {cause}"
            )
            row.interrupt(error)

    @contextlib.contextmanager
    def _measure(self, part: str) -> Iterator[None]:
        """Add the seconds of the `with` to `part`, except those of compilation, which have an account of their own."""
        begun, rows = time.perf_counter(), len(self.scheduler.places)
        program = f"{part} (batch {rows}, {self._blocks * PAGE} tokens)"
        with count_compilations() as compiled, log_slow_compilation(program, compiled):
            try:
                yield
            except jax.errors.JaxRuntimeError as error:
                page = memory.compute_page_bytes(self.model.cfg, self.batch.cache_dtype, self.draft)
                raise memory.explain_exhaustion(
                    self.model, page * len(self.scheduler.pools) * len(self.scheduler.pools[0].users), error
                ) from error
        self.totals["compiles"] += compiled.count
        self.totals["loads"] += compiled.loads
        self.totals["compile_seconds"] += compiled.seconds
        self.totals[f"{part}_seconds"] += max(0.0, time.perf_counter() - begun - compiled.seconds)
