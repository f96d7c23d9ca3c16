"""Sessions: what was read is not read again, and nothing else changes."""

import dataclasses
import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import dsv32_jax as ds
from dsv32_jax.errors import CheckpointError, StorageError, UsageError
from dsv32_jax.generation import programs, session as session_module, session_file
from dsv32_jax.generation.engine_core import EngineCore
from dsv32_jax.generation.programs import WHOLE
from dsv32_jax.model.model import Origin
from dsv32_jax.system import array_file
from tests import models

FIRST = [0, 31, 31, 200, 64, 65, 66, 67, 68, 69, 70, 71, 72]
SETTINGS = {"fp8, plain": {"cache_dtype": "fp8"}, "drafts": {"draft": 2}}


@pytest.fixture(scope="module")
def model(tiny):
    return models.random_model(dataclasses.replace(tiny, num_hidden_layers=1, eos_token_id=(1,)))


@pytest.fixture(scope="module", params=SETTINGS)
def settings(request):
    return SETTINGS[request.param]


def alone(model, tokens, settings, count=5):
    """What `generate` makes of the whole conversation."""
    return ds.generate(model, [tokens], max_new_tokens=count, capacity=64, **settings).tokens


def test_turns(model, settings):
    """A second turn reads what is new, a changed one what changed, and each gives what the whole would."""
    session = ds.session(model, capacity=64, **settings)
    one = session.generate(FIRST, max_new_tokens=5)
    assert one.tokens == alone(model, FIRST, settings) and one.stats.prompt_tokens == len(FIRST)
    assert session.tokens[: len(FIRST)] == FIRST and len(session.tokens) >= len(FIRST) + 4

    longer = FIRST + one.tokens[0] + [9, 8, 7]
    again = session.fork()
    two = session.generate(longer, max_new_tokens=5)
    assert two.tokens == alone(model, longer, settings) and two.stats.prompt_tokens <= 5
    other = longer[:10] + [111] + longer[11:]
    assert session.generate(other, max_new_tokens=5).tokens == alone(model, other, settings)
    assert session.generate(FIRST, max_new_tokens=5).tokens == one.tokens

    forked = again.generate(longer, max_new_tokens=5)
    assert forked.tokens == two.tokens and forked.stats.prompt_tokens <= two.stats.prompt_tokens


def test_a_later_turn_compiles_no_reading_again(model):
    """A loaded model's arrays are bound to their devices; so is an empty cache, like one that was read into."""
    session = ds.session(jax.device_put(model, jax.devices()[0]), capacity=64)
    session.generate(FIRST[:3], max_new_tokens=1)
    programs = WHOLE.prefill._cache_size()
    session.generate(FIRST, max_new_tokens=1)
    assert WHOLE.prefill._cache_size() == programs


def test_a_cache_that_grows(model, settings):
    """Without a capacity the session has more pages when a turn needs them, and keeps what it holds."""
    session = ds.session(model, **settings)
    made = session.generate(FIRST, max_new_tokens=3)
    longer = FIRST + made.tokens[0] + models.tokens(model.cfg, 1, 200)[0].tolist()
    grown = session.generate(longer, max_new_tokens=5)
    assert (made.stats.capacity, grown.stats.capacity) == (64, 256) and grown.stats.prompt_tokens <= 205
    assert grown.tokens == ds.generate(model, [longer], max_new_tokens=5, **settings).tokens


def test_a_stream_that_is_left(model, settings):
    """What was read and made until then stays; the same stream taken up again goes on as if nothing had happened."""
    session = ds.session(model, capacity=64, **settings)
    stream = session.stream(FIRST, max_new_tokens=5)
    seen = [next(stream).token, next(stream).token]
    stream.close()
    assert len(session.tokens) >= len(FIRST)
    whole = alone(model, FIRST, settings)[0]
    assert seen == whole[:2]
    rest = session.generate(FIRST + seen, max_new_tokens=3)
    assert rest.tokens[0] == whole[2:] and rest.stats.prompt_tokens <= 4


def test_saved_and_loaded(model, settings, tmp_path):
    """The file goes on where the session was."""
    session = ds.session(model, capacity=64, **settings)
    made = session.generate(FIRST, max_new_tokens=5).tokens[0]
    session.save(tmp_path / "session")
    loaded = ds.load_session(model, tmp_path / "session")
    assert (loaded.tokens, loaded.capacity, loaded.draft) == (session.tokens, 64, session.draft)
    longer = FIRST + made + [3]
    got = loaded.generate(longer, max_new_tokens=5)
    assert got.tokens == session.generate(longer, max_new_tokens=5).tokens and got.stats.prompt_tokens <= 4
    assert not (tmp_path / "session.unfinished").exists()


def test_an_empty_session(model, tmp_path):
    """Nothing read, nothing to save but what it is."""
    session = ds.session(model, capacity=64)
    assert session.fork().tokens == []
    session.save(tmp_path / "session")
    assert ds.load_session(model, tmp_path / "session").tokens == []


def test_a_turn_is_not_saved_or_forked_in_its_middle(model, tmp_path):
    """While its stream is open the session holds nothing: a file that was saved before stays as it was."""
    session = ds.session(model, capacity=64)
    session.generate(FIRST, max_new_tokens=3)
    session.save(tmp_path / "session")
    stream = session.stream(FIRST, max_new_tokens=4)
    next(stream)
    for call in (session.fork, lambda: session.save(tmp_path / "session")):
        with pytest.raises(UsageError, match="in the middle of a turn"):
            call()
    stream.close()
    assert len(ds.load_session(model, tmp_path / "session").tokens) > len(FIRST)


def beside(act) -> threading.Thread:
    """`act` in another thread, which gets a second to finish."""
    thread = threading.Thread(target=act)
    thread.start()
    thread.join(1)
    return thread


def test_a_turn_waits_for_a_fork(model, monkeypatch):
    """Its programs take over the arrays that are being enlarged."""
    session, grow, threads, made = ds.session(model, capacity=64), EngineCore.grow, [], []
    first = session.generate(FIRST, max_new_tokens=3).tokens[0]
    longer = FIRST + first + [9]

    def grow_later(core, pages):
        if not threads:
            threads.append(beside(lambda: made.append(session.generate(longer, max_new_tokens=3).tokens)))
        return grow(core, pages)

    monkeypatch.setattr(EngineCore, "grow", grow_later)
    other = session.fork()
    threads[0].join()
    monkeypatch.undo()
    assert made == [alone(model, longer, {}, 3)] and other.tokens == (FIRST + first)[:-1]
    assert other.generate(longer, max_new_tokens=3).tokens == made[0]


def test_a_turn_waits_for_a_save(model, tmp_path, monkeypatch):
    """While a turn runs the session holds nothing: that must not be what is written."""
    session, expand, streams, threads = ds.session(model, capacity=64), session_module.expand_file_path, [], []
    session.generate(FIRST, max_new_tokens=3)
    tokens = list(session.tokens)

    def expand_later(file):
        streams.append(session.stream(FIRST, max_new_tokens=3))
        threads.append(beside(lambda: next(streams[0])))
        return expand(file)

    monkeypatch.setattr(session_module, "expand_file_path", expand_later)
    session.save(tmp_path / "session")
    monkeypatch.undo()
    threads[0].join()
    streams[0].close()
    assert ds.load_session(model, tmp_path / "session").tokens == tokens


def test_an_interrupted_prefill_is_kept(model, monkeypatch):
    """The chunks that were read before Ctrl-C are not read again."""
    monkeypatch.setattr(programs, "chunk_size", lambda rows=1: 4)
    session = ds.session(model, capacity=64)

    def interrupt(read, _):
        if read == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.generate(FIRST, max_new_tokens=5, progress=interrupt)
    assert session.tokens == FIRST[:8]
    made = session.generate(FIRST, max_new_tokens=5)
    assert made.stats.prompt_tokens == len(FIRST) - 8 and made.tokens == alone(model, FIRST, {})


@pytest.mark.parametrize("at", [-20, -3000])
def test_a_flipped_bit_in_a_session(model, tmp_path, at):
    session = ds.session(model, capacity=64)
    session.generate(FIRST, max_new_tokens=3)
    session.save(tmp_path / "session")
    raw = bytearray((tmp_path / "session").read_bytes())
    raw[at] ^= 4
    (tmp_path / "session").write_bytes(raw)
    with pytest.raises(CheckpointError, match="damaged: its bytes"):
        ds.load_session(model, tmp_path / "session")


def test_what_is_not_finite_is_not_kept(model):
    """A turn that fails on it leaves an empty session, not one that spoils the next."""
    spoilt = dataclasses.replace(model, embed_VD=model.embed_VD.at[11].set(jnp.nan))
    session = ds.session(spoilt, capacity=64)
    with pytest.raises(FloatingPointError):
        session.generate([*FIRST, 11], max_new_tokens=2)
    assert session.tokens == []
    assert session.generate(FIRST, max_new_tokens=3).tokens == alone(spoilt, FIRST, {}, 3)


def test_a_session_of_another_model(model, tiny, tmp_path):
    """Refused by the digests of both."""
    session = ds.session(dataclasses.replace(model, origin=Origin("abc")), capacity=64)
    session.save(tmp_path / "session")
    with pytest.raises(UsageError, match="belongs to another model .*abc.*def"):
        ds.load_session(dataclasses.replace(model, origin=Origin("def")), tmp_path / "session")
    with pytest.raises(UsageError, match="belongs to another model"):
        ds.load_session(models.abstract(tiny), tmp_path / "session")


def test_a_session_of_another_compute_dtype(model, tmp_path):
    """Refused with its cache dtype, which is not this model's; any cache dtype that was asked for is kept."""
    session = ds.session(dataclasses.replace(model, dtype=np.dtype("bfloat16")), capacity=64)
    session.save(tmp_path / "session")
    with pytest.raises(UsageError, match='cache_dtype="bfloat16", and this model computes in float32.* dtype="bfloat'):
        ds.load_session(model, tmp_path / "session")
    ds.session(model, capacity=64, cache_dtype="bfloat16").save(tmp_path / "session")
    assert ds.load_session(model, tmp_path / "session").cache_dtype == "bfloat16"


@pytest.mark.parametrize("fault", ["text", "truncated", "other kind", "a smaller array", "tokens", "no facts", "sizes"])
def test_files_that_are_no_sessions(model, tmp_path, fault):
    """Each is refused with the file's name, and nothing of it is used."""
    file = tmp_path / "session"
    session = ds.session(model, capacity=64)
    session.generate(FIRST, max_new_tokens=2)
    session.save(file)
    with safe_open(file, "numpy") as opened:
        about = opened.metadata()
        arrays = {name: opened.get_tensor(name) for name in opened.keys()}
    if fault == "text":
        file.write_text("hello")
    elif fault == "truncated":
        file.write_bytes(file.read_bytes()[:-7])
    elif fault == "other kind":
        save_file(arrays, file, {**about, "kind": "something else"})
    elif fault == "no facts":
        save_file(arrays, file, {"kind": about["kind"]})
    elif fault == "tokens":
        settings = {**json.loads(about["facts"]), "tokens": [5, -1]}
        array_file.write_arrays(file, session_file.KIND, settings, arrays)
    elif fault == "sizes":
        name = min(arrays)
        wrong = {**arrays, name: arrays[name][:-1]}
        array_file.write_arrays(file, session_file.KIND, json.loads(about["facts"]), wrong)
    else:
        name = min(arrays)
        save_file({**arrays, name: arrays[name][:-1].copy()}, file, about)
    with pytest.raises((CheckpointError, UsageError), match="session|token id"):
        ds.load_session(model, file)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"capacity": 0}, "capacity must be an integer from 1"),
        ({"capacity": 1 << 40}, "capacity must be an integer from 1"),
        ({"cache_dtype": "int8"}, "cache_dtype must be bfloat16, float32"),
        ({"cache_dtype": jnp.float16}, "cache_dtype must be bfloat16, float32"),
        ({"draft": -1}, "draft must be an integer"),
    ],
    ids=str,
)
def test_wrong_sessions(model, options, said):
    with pytest.raises(UsageError, match=said):
        ds.session(model, **options)


def test_a_folder_is_no_session(model, tmp_path):
    """Neither to write nor to read, and nothing is left beside it."""
    with pytest.raises(UsageError, match="is a folder"):
        ds.session(model).save(tmp_path)
    with pytest.raises(UsageError, match="is a folder"):
        ds.load_session(model, tmp_path)
    with pytest.raises(CheckpointError, match="there is no .*nowhere"):
        ds.load_session(model, tmp_path / "nowhere")
    with pytest.raises(StorageError, match="cannot be written"):
        ds.session(model).save(tmp_path / "no" / "file")
    assert not list(tmp_path.rglob("*"))


def test_wrong_turns(model):
    """What belongs to the session, several rows, and a turn that does not fit."""
    session = ds.session(model, capacity=16)
    for options, said in (
        ({"draft": 1}, "draft belongs to the session"),
        ({"n": 2}, "one row"),
        ({"capacity": 9}, "cap"),
    ):
        with pytest.raises(UsageError, match=said):
            session.generate(FIRST, max_new_tokens=1, **options)
    with pytest.raises(UsageError, match="max_new_tokens=3 or less"):
        session.generate(FIRST, max_new_tokens=4)
    assert session.tokens == []


def test_scores(model):
    """`score` gives generate's own log-probabilities, and forward's, for rows of any lengths, one at a time or all."""
    made = ds.generate(model, [FIRST, [0, 9]], max_new_tokens=4)
    rows = [FIRST + made.tokens[0], [0, 9] + made.tokens[1], [7]]
    got = ds.score(model, rows, top_logprobs=3)
    for row, scores, logprobs in zip(rows, got.logprobs, made.logprobs, strict=False):
        assert len(scores) == len(row) - 1
        np.testing.assert_allclose(scores[-4:], logprobs, atol=1e-4)
    assert got.logprobs[2] == [] and got.top_logprobs[2] == []
    assert [top[0][0] for top in got.top_logprobs[0][-4:]] == made.tokens[0]
    assert all(len(top) == 3 and top[0][1] >= top[1][1] >= top[2][1] for top in got.top_logprobs[0])
    single = ds.score(model, rows, batch_size=1)
    for row, want in zip(single.logprobs, got.logprobs, strict=True):
        np.testing.assert_allclose(row, want, atol=1e-4)
    with pytest.raises(UsageError, match="top_logprobs"):
        ds.score(model, rows, top_logprobs=21)
