"""The scheduler without a device: pages that hold what they should, whatever comes, goes or runs short."""

import dataclasses

import pytest
from hypothesis import given, strategies as st

from dsv32_jax import configs
from dsv32_jax.config import Config
from dsv32_jax.generation.pages import PAGE, Pages, count_common, count_pages
from dsv32_jax.generation.programs import count_operations, fill, most_alone, most_beside, plan_chunk
from dsv32_jax.generation.request import validate
from dsv32_jax.generation.row import Row
from dsv32_jax.generation.scheduler import Scheduler


def make_row(cfg, prompt, limit) -> Row:
    return Row(validate(cfg, [prompt], max_new_tokens=limit, dtype="float32"))


class Device:
    """What pages would hold: every write and every copy is made, and every read is checked."""

    def __init__(self, places, pages, shards=1, draft=0):
        self.scheduler = Scheduler(places, pages, shards, draft)
        self.slots = [[[None] * PAGE for _ in pool.users] for pool in self.scheduler.pools]

    def held(self, row):
        slots = self.slots[self.scheduler.shard_of(row)]
        return [token for page in row.pages for token in slots[page]][: row.length]

    def write(self, row, tokens):
        slots = self.slots[self.scheduler.shard_of(row)]
        for i, token in enumerate(tokens, row.length):
            page = row.pages[i // PAGE]
            assert self.scheduler.pools[self.scheduler.shard_of(row)].users[page] >= 1
            slots[page][i % PAGE] = token
        row.length += len(tokens)

    def step(self, ends=()):
        """Admit, read up to 100 tokens, and generate a token in each row; a row generates what its tokens add up to."""
        scheduler = self.scheduler
        seats = scheduler.admit()
        copies = [(seat.row, *seat.copy) for seat in seats if seat.copy]
        contents = [list(self.slots[scheduler.shard_of(row)][source]) for row, source, _ in copies]
        for (row, _, target), content in zip(copies, contents, strict=True):
            self.slots[scheduler.shard_of(row)][target][:] = content
        for row in scheduler.reading[:1]:
            self.write(row, row.known[row.length : row.length + min(100, row.unread)])
            if not row.unread:
                scheduler.learn(row, row.length)
        assert scheduler.reserve(1)
        for row in scheduler.running:
            self.write(row, [row.known[-1]])
            row.add(sum(row.known) % 7 + 2, 0.0)
        self.check()
        for row in [*scheduler.running, *scheduler.reading, *scheduler.waiting]:
            if row.finish_reason or row in ends:
                row.interrupt()
                scheduler.release(row)

    def check(self):
        """Every row reads its own tokens, nobody writes where others read, and pages are counted."""
        scheduler = self.scheduler
        for shard, pool in enumerate(scheduler.pools):
            rows = [row for row in scheduler.places if row and scheduler.shard_of(row) == shard]
            users = [0] * len(pool.users)
            for page in [page for row in rows for page in row.pages] + [node.page for node in pool._nodes]:
                users[page] += 1
            assert users == pool.users and sorted(pool.free) == [page for page, n in enumerate(users) if not n]
            for row in rows:
                assert self.held(row) == list(row.known[: row.length])
                others = {page for other in rows if other is not row for page in other.pages}
                assert not others & set(row.pages[row.length // PAGE :])


def alone(cfg, prompt, limit):
    known = list(prompt)
    for _ in range(limit):
        known.append(sum(known) % 7 + 2)
    return known[len(prompt) :]


REQUESTS = st.lists(
    st.tuples(st.integers(0, 3), st.integers(1, 250), st.integers(1, 90), st.integers(0, 40), st.booleans()),
    min_size=1,
    max_size=12,
)


@given(REQUESTS, st.integers(1, 4), st.integers(6, 20), st.integers(1, 2))
def test_any_mix_of_rows(tiny, requests, places, pages, shards):
    """Shared beginnings, few pages, rows that are given up: every other row makes what it makes alone, and at the end
    nobody uses a page but the tree."""
    cfg = dataclasses.replace(tiny, eos_token_id=(1,))
    device = Device(places * shards, pages * shards, shards)
    rows, arrivals = [], []
    for family, length, limit, arrival, leaves in requests:
        prompt = [2 + family, *([3] * (length // 2)), *([4 + family] * (length - length // 2))][:length]
        rows.append((make_row(cfg, prompt, limit), prompt, limit, leaves))
        arrivals.append(arrival)
    for step in range(4000):
        for (row, *_), arrival in zip(rows, arrivals, strict=True):
            if arrival == step:
                device.scheduler.submit(row)
        device.step(ends=[row for row, _, _, leaves in rows if leaves and len(row.tokens) > 3])
        if step > 40 and all(row.finish_reason for row, *_ in rows):
            break
    for row, prompt, limit, leaves in rows:
        assert row.tokens == alone(cfg, prompt, limit)[: len(row.tokens)]
        assert leaves or len(row.tokens) == limit
    assert device.scheduler.row_pages == 0
    assert device.scheduler.used_pages == sum(pool.known for pool in device.scheduler.pools)


def test_first_come_first_served(tiny):
    """A row that does not fit holds back those behind it; the youngest makes room for the oldest, and comes back."""
    device = Device(2, 4)
    old, young, last = (make_row(tiny, [2, i, *[3] * 60], 100) for i in (5, 6, 7))
    for row in (old, young, last):
        device.scheduler.submit(row)
    device.step()
    device.step()
    assert [row.slot is not None for row in (old, young, last)] == [True, True, False]
    while young.slot is not None:
        device.step()
    assert old.slot is not None and device.scheduler.waiting == [young, last] and 50 < len(young.tokens) < 100
    for _ in range(400):
        device.step()
    assert [len(row.tokens) for row in (old, young, last)] == [100] * 3


def test_who_begins_alike_waits_for_the_reader(tiny):
    """And another one overtakes it meanwhile."""
    device = Device(4, 40)
    shared = [2, *[3] * 500]
    rows = [make_row(tiny, [*shared, 5], 4), make_row(tiny, [*shared, 6], 4), make_row(tiny, [9, 9], 4)]
    for row in rows:
        device.scheduler.submit(row)
    device.step()
    assert [row.slot is not None for row in rows] == [True, False, True]
    for _ in range(6):
        device.step()
    assert rows[1].slot is not None and rows[1].pages[:7] == rows[0].pages[:7] != rows[1].pages[7:]


def test_the_tree():
    """The longest beginning in whole pages and a part, until the pages are needed: the last used ones stay."""
    pool, tokens = Pages(6), list(range(200))
    pages = pool.take(4)
    pool.insert(tokens, pages)
    pool.release(pages)
    assert pool.find(tokens, 999) == (200, pages[:3], pages[3]) and len(pool.free) == 2
    assert pool.find([*tokens[:130], 7, 7], 999) == (130, pages[:2], pages[2])
    assert pool.find(tokens, 199, ahead=1) == (199, pages[:3], pages[3])
    assert pool.find(tokens[:128], 127) == (127, pages[:1], pages[1])
    assert pool.find([5, *tokens], 999) == (0, [], None)
    pool.use(pages)
    pool.insert([*tokens, *range(500, 550)], pages)
    pool.release(pages)
    assert pool.find([*tokens, *range(500, 550)], 999).count == 250 and pool.known == 4
    assert pool.take(3) is not None and pool.find(tokens, 999) == (192, pages[:3], None)
    assert pool.take(4) is None and pool.known == 0


def test_beginnings_and_chunks():
    """What is common, pages of tokens, and how much is read at once beside rows that generate."""
    assert (count_common([1, 2, 3], [1, 2, 4]), count_common([1], [1, 2]), count_common([], [1])) == (2, 1, 0)
    assert [count_pages(n) for n in (0, 1, 64, 65)] == [0, 1, 1, 2]
    assert plan_chunk(500, most_alone(2)) == (512, 1) and plan_chunk(100, most_alone(8)) == (128, 4)
    assert [plan_chunk(unread, 512)[0] for unread in (1, 21, 22, 300, 400, 9000)] == [16, 16, 32, 256, 512, 512]
    assert plan_chunk(5000, 21) == (16, 1) and plan_chunk(9, 64) == (16, 4) and plan_chunk(5000, 5) == (4, 1)
    assert [fill(count) for count in (1, 2, 3, 5, 6, 9, 12, 13)] == [1, 2, 4, 4, 8, 8, 16, 16]


def test_prompts_do_not_make_rows_wait_long():
    """As many tokens as two steps take, fewer of those that attend to much; at least four."""
    real = Config.from_json(configs.path("deepseek_v32"))
    assert most_beside(real, [0] * 16, 0) == most_beside(real, [9000] * 16, 9000) == 32
    assert 16 < most_beside(real, [0] * 16, 9000) < 24 and most_beside(real, [0], 9000) == 4
    assert count_operations(real, 0) == pytest.approx(580e6, rel=0.01)
    assert count_operations(real, 2048) - count_operations(real, 0) == 2048 * (128 * 1088 + 64 * 128)


@pytest.mark.parametrize("count", [1, 5])
def test_more_pages(count):
    """Pages that are added are free, and those of before keep what they hold."""
    pool = Pages(2)
    pages = pool.take(2)
    pool.insert(list(range(100)), pages)
    pool.grow(2 + count)
    assert len(pool.free) == count and pool.find(list(range(100)), 99).count == 99
    assert len(set(pool.take(count)) | set(pages)) == 2 + count
