"""Which rows are computed next, and where their tokens are kept: pure host code, the same in every process."""

import bisect
import heapq
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .pages import PAGE, Pages, Prefix, count_common, count_pages
from .row import Row


class Seat(NamedTuple):
    """A row that was admitted, and the page whose first tokens are to be copied to another one for it."""

    row: Row
    copy: tuple[int, int] | None


class Scheduler:
    """Admits rows first come first served, as places in the batch and pages are free.

    waiting  rows in the order of their submission
    places   the row in each place of the batch, or None. Places are split evenly over `shards`, whose pages are apart
    pools    the pages of each shard
    """

    def __init__(self, places: int, pages: int, shards: int = 1, draft: int = 0):
        self.waiting: list[Row] = []
        self.places: list[Row | None] = [None] * places
        self.pools = [Pages(pages // shards) for _ in range(shards)]
        self._open = [[p for p in range(places) if self.shard(p) == shard] for shard in range(shards)]
        self._draft, self._ahead, self._submitted = draft, min(draft, 1), 0

    @property
    def reading(self) -> list[Row]:
        """Rows whose prompt is not read yet, the first comer first."""
        return sorted((row for row in self.places if row and row.unread), key=lambda row: row.order)

    @property
    def running(self) -> list[Row]:
        """Rows that generate, the first comer first."""
        return sorted((row for row in self.places if row and not row.unread), key=lambda row: row.order)

    @property
    def pages(self) -> int:
        """All pages."""
        return sum(len(pool.users) for pool in self.pools)

    @property
    def used_pages(self) -> int:
        """Pages that rows or the tree use."""
        return sum(len(pool.users) - len(pool.free) for pool in self.pools)

    @property
    def row_pages(self) -> int:
        """Pages that rows use."""
        return sum(len({page for row in self._rows(shard) for page in row.pages}) for shard in range(len(self.pools)))

    def submit(self, row: Row) -> None:
        """Let the row wait for a place."""
        row.order = self._submitted
        self._submitted += 1
        self.waiting.append(row)

    def admit(self) -> list[Seat]:
        """Give waiting rows places and the pages of their tokens so far.

        A row waits if another one is just reading what it begins with; later ones overtake it meanwhile.
        """
        seats: list[Seat] = []
        reading = self.reading if self.waiting else []
        for row in list(self.waiting) if any(self._open) else []:
            found = {shard: self._find(row, shard) for shard, places in enumerate(self._open) if places}
            if not found:
                break
            if any(self._is_about_to_know(row, other, found) for other in reading):
                continue
            shard = max(found, key=lambda shard: (found[shard].count, len(self.pools[shard].free)))
            seat = self._seat(row, shard, found[shard])
            if seat is None:
                break
            seats.append(seat)
            reading += [row] if row.unread else []
        return seats

    def shard(self, place: int) -> int:
        """Return the shard of a place."""
        return place * len(self.pools) // len(self.places)

    def shard_of(self, row: Row) -> int:
        """Return the shard in which the row has its place."""
        assert row.slot is not None
        return self.shard(row.slot)

    def reserve(self, tokens: int) -> bool:
        """Give every running row pages for so many more tokens, or for all that it may have.

        Where pages run out: return False if `tokens` is more than a step needs, else preempt the youngest rows.
        """
        for row in self.running:
            while row.slot is not None and not self._extend(row, tokens):
                if tokens > 1 + self._draft:
                    return False
                self.preempt(max(self._rows(self.shard_of(row)), key=lambda row: row.order))
        return True

    def preempt(self, row: Row) -> None:
        """Take the place of a row, which waits again. Its tokens are kept, their pages until somebody needs them."""
        self.release(row)
        bisect.insort(self.waiting, row, key=lambda row: row.order)

    def grow(self, more: int) -> None:
        """Have `more` pages in each shard."""
        for pool in self.pools:
            pool.grow(len(pool.users) + more)

    def find(self, tokens: Sequence[int]) -> tuple[int, Prefix]:
        """Return what is known of these tokens, and in which shard."""
        found = [(shard, pool.find(tokens, len(tokens))) for shard, pool in enumerate(self.pools)]
        return max(found, key=lambda known: known[1].count)

    def learn(self, row: Row, count: int) -> None:
        """Let the first `count` tokens of the row be found by others."""
        self._pool(row).insert(row.known[:count], row.pages)

    def release(self, row: Row) -> None:
        """Take place and pages of the row, wherever it is. Its tokens can be found until their pages are needed."""
        if row.slot is None:
            if row in self.waiting:
                self.waiting.remove(row)
            return
        self.learn(row, max(0, row.length - row.unsure))
        self._pool(row).release(row.pages)
        self.places[row.slot] = None
        heapq.heappush(self._open[self.shard_of(row)], row.slot)
        row.slot, row.pages, row.length, row.cached = None, [], 0, row.length

    def clear(self) -> None:
        """Forget all tokens in pages: those of rows that have places are read again."""
        for row in [*self.reading, *self.running]:
            row.length = 0
            self.preempt(row)
        for pool in self.pools:
            pool.forget()

    def _find(self, row: Row, shard: int) -> Prefix:
        """Return the row's longest prefix in the shard. Its last token is computed in any case, for its logits. A slot
        of the MTP head's cache depends on the token after it too, and a first draft on the one before the last."""
        return self.pools[shard].find(row.known, self._most(row), self._ahead)

    def _most(self, row: Row) -> int:
        return max(0, len(row.known) - 1 - self._ahead)

    def _is_about_to_know(self, row: Row, other: Row, found: dict[int, Prefix]) -> bool:
        """Return whether `other`, which reads, will soon have read a much longer prefix of the row than is found."""
        known, most = max(prefix.count for prefix in found.values()), self._most(row)
        common = min(count_common(row.known, other.known) - self._ahead, most)
        return common - known >= PAGE or common == most > known

    def _seat(self, row: Row, shard: int, prefix: Prefix) -> Seat | None:
        pool, needed = self.pools[shard], count_pages(len(row.known))
        held = [*prefix.pages, *([] if prefix.rest is None else [prefix.rest])]
        pool.use(held)
        taken = pool.take(needed - len(prefix.pages))
        if taken is None and prefix.rest is not None:
            pool.release([held.pop()])
            prefix = Prefix(len(prefix.pages) * PAGE, prefix.pages, None)
            taken = pool.take(needed - len(prefix.pages))
        if taken is None:
            pool.release(held)
            return None
        if prefix.rest is not None:
            pool.release([prefix.rest])
        place = heapq.heappop(self._open[shard])
        self.waiting.remove(row)
        self.places[place] = row
        row.slot, row.pages, row.length = place, [*prefix.pages, *taken], prefix.count
        return Seat(row, None if prefix.rest is None else (prefix.rest, taken[0]))

    def _extend(self, row: Row, tokens: int) -> bool:
        most = len(row.prompt) + row.limit
        missing = count_pages(min(row.length + tokens, most)) - len(row.pages)
        taken = self._pool(row).take(max(0, missing))
        row.pages += taken or []
        return taken is not None

    def _rows(self, shard: int) -> Iterator[Row]:
        return (row for row in self.places if row and self.shard_of(row) == shard)

    def _pool(self, row: Row) -> Pages:
        return self.pools[self.shard_of(row)]
