"""The device side of the engine: one state, which every program is given, donates and returns."""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ..model.cache import Cache, LayerCache
from ..model.model import Model, forward
from ..parallel import sharding
from ..parallel.multihost import fetch
from ..parallel.sharding import map_rows, shard_rows
from . import memory, prefill_decode, speculative
from .constraint import look_ahead, prepare, restrict, take_tokens
from .options import Sampling
from .pages import PAGE
from .prefill_decode import Caches, Generated, State, empty_caches, new_state, place
from .programs import Programs
from .result import TopLogprobs
from .row import Row
from .sampler import SamplerParams, make_params
from .scheduler import Seat

SEGMENT_TOKENS = 256
"""The most tokens a row generates before `decode` returns."""


class Made(NamedTuple):
    """The tokens of a call of `decode` on the host: `Generated`, steps so far, tokens that the MTP head has not read,
    and whether logits were finite."""

    count_B: np.ndarray
    token_Bm: np.ndarray
    logprob_Bm: np.ndarray
    top_id_Bmw: np.ndarray
    top_logprob_Bmw: np.ndarray
    step_B: np.ndarray
    unread_B: np.ndarray
    finite_B: np.ndarray

    def tokens(self, row: Row, top: int) -> Iterator[tuple[int, float, TopLogprobs]]:
        """Yield the tokens of a row with their log-probabilities and the `top` most likely ones."""
        for i in range(self.count_B[row.slot]):
            ids, logprobs = self.top_id_Bmw[row.slot, i, :top], self.top_logprob_Bmw[row.slot, i, :top]
            likely = tuple(zip(ids.tolist(), logprobs.tolist(), strict=True))
            yield int(self.token_Bm[row.slot, i]), float(self.logprob_Bm[row.slot, i]), likely


class Batch:
    """The state of `places` rows, whose tokens are in `pages` pages.

    state  what the next program is given. A program takes it away; who has seen the results puts the new one here. None
           before the first program, and after one that failed or was interrupted
    """

    def __init__(self, model: Model, places: int, pages: int, cache_dtype: np.dtype, draft: int, programs: Programs):
        self.state: State | None = None
        self._params: Any = None  # SamplerParams, once there is a state
        self.cache_dtype, self.draft = cache_dtype, draft
        self._model, self._places, self._pages, self._programs = model, places, pages, programs

    def take(self) -> State:
        """Return the state, an empty one if there is none, and keep none."""
        state, self.state = self.state, None
        if state is None:
            cfg = self._model.cfg
            cache, draft_cache = empty_caches(cfg, self._pages, PAGE, self.cache_dtype, self.draft)
            cache = Cache(cache.layers, jax.device_put(np.zeros(self._places, np.int32)))
            state = new_state(self._model, (cache, draft_cache), self.draft)
            params = make_params([Sampling()] * self._places, cfg.vocab_size, cfg.vocab_size)
            self._params = place(self._model, params)
        return state

    def grow(self, more: int, shards: int) -> None:
        """Have `more` pages in each shard, behind those of before."""
        self._pages += more * shards
        if self.state is not None:
            state = self.take()
            cache, draft_cache = add_pages(self._model.mesh, (state.cache, state.draft_cache), more)
            self.state = place(self._model, dataclasses.replace(state, cache=cache, draft_cache=draft_cache))

    def copy_out(self, pages: Sequence[int], count: int) -> Caches:
        """Return a contiguous cache of one row with the first `count` tokens in these pages."""
        state, at = self.take(), np.array(pages)

        def join(layer: LayerCache) -> LayerCache:
            return jax.tree.map(lambda x: x[at].reshape(1, -1, x.shape[-1])[:, :count], layer)

        caches = Cache(tuple(map(join, state.cache.layers)), jax.device_put(np.full(1, count, np.int32)))
        self.state = state
        return caches, state.draft_cache and join(state.draft_cache)

    def copy_in(self, pages: Sequence[int], caches: Caches) -> None:
        """Write the row of a contiguous cache into these pages."""
        state, at = self.take(), np.array(pages)

        def split(layer: Any, row: Any) -> Any:
            def put(x: jax.Array, new: jax.Array) -> jax.Array:
                missing = len(pages) * PAGE - new.shape[1]
                return x.at[at].set(jnp.pad(new[0], [(0, missing), (0, 0)]).reshape(-1, *x.shape[1:]))

            return jax.tree.map(put, layer, row)

        layers = tuple(map(split, state.cache.layers, caches[0].layers))
        draft_cache = state.draft_cache and split(state.draft_cache, caches[1])
        cache = dataclasses.replace(state.cache, layers=layers)
        self.state = place(self._model, dataclasses.replace(state, cache=cache, draft_cache=draft_cache))

    def seat(self, seats: Sequence[Seat]) -> State:
        """Return the state with rows that were admitted."""
        state, mesh = self.take(), self._model.mesh
        source_B = np.full(self._places, -1, np.int32)
        target_B = source_B.copy()
        for row, copy in seats:
            source_B[row.slot], target_B[row.slot] = copy or (-1, -1)
        if (target_B >= 0).any():
            cache, draft_cache = copy_pages(mesh, (state.cache, state.draft_cache), source_B, target_B)
            state = dataclasses.replace(state, cache=cache, draft_cache=draft_cache)
        state, self._params = seat_rows(mesh, state, self._params, *self._describe([seat.row for seat in seats]))
        return jax.block_until_ready(state)

    def _describe(self, rows: Sequence[Row]) -> tuple[np.ndarray, dict[str, np.ndarray], SamplerParams]:
        """Return places, values of the state and parameters of rows, the last one repeated up to a power of two."""
        vocab_size, size = self._model.cfg.vocab_size, memory.round_up_rows(len(rows))
        rows = [*rows, *[rows[-1]] * (size - len(rows))]
        in_prompt_cV, generated_cV = np.zeros((size, vocab_size), bool), np.zeros((size, vocab_size), np.int32)
        for c, row in enumerate(rows):
            in_prompt_cV[c, row.prompt] = True
            np.add.at(generated_cV[c], np.array(row.tokens, np.int64), 1)
        values = {
            "token_B": np.array([row.known[-1] for row in rows], np.int32),
            "unread_B": np.zeros(size, np.int32),
            "in_prompt_BV": in_prompt_cV,
            "generated_BV": generated_cV,
            "new_B": np.array([len(row.tokens) for row in rows], np.int32),
            "answer_B": np.array([row.answered for row in rows], np.int32),
            "step_B": np.array([row.steps for row in rows], np.int32),
            "finite_B": np.ones(size, bool),
        }
        ids = self._model.origin.tokens or vocab_size
        each = [
            make_params(
                [row.sampling],
                vocab_size,
                ids,
                row.request.end_ids,
                row.request.options.min_new_tokens,
                row.limit,
                row.thoughts_end,
            )
            for row in rows
        ]
        row_c = np.array([row.slot for row in rows], np.int32)
        return row_c, values, jax.tree.map(lambda *parts: np.concatenate(parts), *each)

    def read(self, chunk: Sequence[Row | None], size: int, blocks: int) -> State:
        """Return the state after up to `size` more tokens of these rows; None is padding."""
        tokens_cT, next_cT = (np.zeros((len(chunk), size), np.int32) for _ in range(2))
        count_c, row_c = np.zeros(len(chunk), np.int32), np.full(len(chunk), self._places, np.int32)
        for c, row in enumerate(chunk):
            if row is not None and row.slot is not None:
                count_c[c], row_c[c] = min(size, row.unread), row.slot
                tokens_cT[c, : count_c[c]] = row.known[row.length : row.length + count_c[c]]
                next_cT[c, : count_c[c]] = row.known[row.length + 1 : row.length + 1 + count_c[c]]
        state = self._with_rows([row for row in chunk if row is not None], blocks)
        state = self._programs.prefill(self._model, state, tokens_cT, next_cT, count_c, row_c)
        if constrained := [row for row in chunk if row and row.constraint]:
            prepare(self._model, constrained)  # while the device reads
        return jax.block_until_ready(_without_table(state))

    def decode(self, rows: Sequence[Row], steps: int, fewest: int, blocks: int) -> tuple[State, Made]:
        """Return the state after up to `steps` steps, while more than `fewest` rows go on, and their tokens."""
        top = max(row.request.options.top_logprobs for row in rows)
        width = top and min(memory.round_up_rows(top), self._model.cfg.vocab_size)
        state = self._with_rows(rows, blocks)
        if constrained := [row for row in rows if row.constraint]:
            state, generated = self._step_constrained(constrained, state, width)
        else:
            step = speculative.step if self.draft else prefill_decode.step
            numbers = np.int32(steps), np.int32(fewest), SEGMENT_TOKENS, width
            state, generated = self._programs.decode(step, self._model, self._params, state, *numbers)
        state, generated = jax.block_until_ready((state, generated))
        parts = [getattr(generated, field.name) for field in dataclasses.fields(generated)]
        return _without_table(state), Made(*map(fetch, [*parts, state.step_B, state.unread_B, state.finite_B]))

    def _step_constrained(self, rows: Sequence[Row], state: State, width: int) -> tuple[State, Generated]:
        """Return the state after a step in which these rows sample what their constraints allow, and all new tokens.
        The host finds what that is while the device works: what may come next while the MTP head, or else the model,
        reads the last tokens, and what may come behind drafts while the model reads those."""
        model, programs, drafted = self._model, self._programs, state.token_B[:, None]
        if self.draft:
            state, z_B1D, logit_BV = programs.catch_up(model, state)
            _, (first,) = self._restrict(rows, fetch(drafted))
            each = (first, *[self._params] * (self.draft - 1))
            state, drafted = programs.draft(model, each, state, z_B1D, logit_BV)
        state, logit_BuV = programs.process(model, state, drafted)
        tokens_Bu, each = self._restrict(rows, fetch(drafted))
        return take_tokens(model.mesh, each, state, place(model, tokens_Bu), logit_BuV, width)

    def _restrict(self, rows: Sequence[Row], tokens_Bu: np.ndarray) -> tuple[Any, tuple[SamplerParams, ...]]:
        """Return what `look_ahead` makes of the tokens, and with which parameters a token is sampled behind each."""
        tokens_Bu, allowed_cuV = look_ahead(self._model, rows, tokens_Bu)
        padding = [self._places] * (len(allowed_cuV) - len(rows))
        row_c = np.array([*(row.slot for row in rows), *padding], np.int32)
        each = (restrict(self._model.mesh, self._params, row_c, allowed_cuV[:, u]) for u in range(tokens_Bu.shape[1]))
        return tokens_Bu, tuple(each)

    def _with_rows(self, rows: Sequence[Row], blocks: int) -> State:
        """Return the state in which these rows go on and have their pages. The others have no tokens meanwhile: what is
        computed for them is little."""
        table_Bd, done_B = np.full((self._places, blocks), -1, np.int32), np.ones(self._places, bool)
        length_B = np.zeros(self._places, np.int32)
        for row in rows:
            table_Bd[row.slot, : len(row.pages)] = row.pages
            length_B[row.slot], done_B[row.slot] = row.length, False
        state, (length, table, done) = self.take(), place(self._model, (length_B, table_Bd, done_B))
        cache = dataclasses.replace(state.cache, length_B=length, table_Bd=table)
        return dataclasses.replace(state, cache=cache, done_B=done)


def _without_table(state: State) -> State:
    return dataclasses.replace(state, cache=dataclasses.replace(state.cache, table_Bd=None))


@partial(jax.jit, static_argnames="mesh", donate_argnames=("state", "params"))
def seat_rows(
    mesh: Mesh | None,
    state: State,
    params: SamplerParams,
    row_c: jax.Array,
    values: dict[str, jax.Array],
    new: SamplerParams,
) -> tuple[State, SamplerParams]:
    """Return state and parameters with the given values [c, ...] of these rows; a row beyond the batch is padding."""

    def put(all_rows: jax.Array, some: jax.Array) -> jax.Array:
        return all_rows.at[row_c].set(some, mode="drop")

    state = dataclasses.replace(state, **{name: put(getattr(state, name), value) for name, value in values.items()})
    return shard_rows(mesh, (state, jax.tree.map(put, params, new)))


@partial(jax.jit, static_argnames=("mesh", "more"))
def add_pages(mesh: Mesh | None, caches: Caches, more: int) -> Caches:
    """Return the caches with `more` empty pages in each shard of them."""

    def pad(layer: LayerCache) -> LayerCache:
        return jax.tree.map(lambda x: jnp.pad(x, [(0, more), *[(0, 0)] * (x.ndim - 1)]), layer)

    cache, draft_cache = caches
    with sharding.use_mesh(mesh):
        layers = tuple(map(map_rows(pad), cache.layers))
        return dataclasses.replace(cache, layers=layers), draft_cache and map_rows(pad)(draft_cache)


@partial(jax.jit, static_argnames="mesh", donate_argnames="caches")
def copy_pages(mesh: Mesh | None, caches: Caches, source_B: jax.Array, target_B: jax.Array) -> Caches:
    """Return the caches with page `source_B[b]` copied to `target_B[b]`, both of row b's shard, -1 for none; a copy of
    no page clears the target."""

    def copy(layer: LayerCache, source_B: jax.Array, target_B: jax.Array) -> LayerCache:
        def copy_slots(x: jax.Array) -> jax.Array:
            clear = (source_B < 0).reshape(-1, *[1] * (x.ndim - 1))
            new = jnp.where(clear, jnp.zeros((), x.dtype), x[jnp.maximum(source_B, 0)])
            return x.at[target_B].set(new, mode="drop", wrap_negative_indices=False)

        return jax.tree.map(copy_slots, layer)

    cache, draft_cache = caches
    with sharding.use_mesh(mesh):
        run = map_rows(copy)
        layers = tuple(run(layer, source_B, target_B) for layer in cache.layers)
        draft_cache = draft_cache and run(draft_cache, source_B, target_B)
    return dataclasses.replace(cache, layers=layers), draft_cache


def find_nonfinite(model: Model, tokens: Sequence[int]) -> str:
    """Return the name of the first layer whose output for `tokens` is not finite."""
    out = forward(model, [tokens], seen=True)
    assert out.seen is not None
    streams = [seen.x_BTD for seen in out.seen] + [out.hidden]
    names = ["the embedding", *(f"layer {i}" for i in range(len(out.seen) - 1)), "the last layer or the final norm"]
    return next((name for name, x in zip(names, streams, strict=True) if not jnp.isfinite(x).all()), "the head")
