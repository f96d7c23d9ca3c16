"""Perplexity and divergence, compared with NumPy."""

import dataclasses
import json
import math
import sys
import threading
from contextlib import nullcontext
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import dsv32_jax as ds
from dsv32_jax import cli
from dsv32_jax.errors import CheckpointError, UsageError
from dsv32_jax.evaluation import Variant, corpus, kl, perplexities, perplexity
from dsv32_jax.generation import score as scoring
from dsv32_jax.system import reporter
from dsv32_jax.system.compilation import count_compilations
from tests import oracle
from tests.cli.conftest import Terminal
from tests.evaluation.conftest import Bytes

TEXTS = ["def f(x):\n    return x + 1\n" * 2, "Grüße, 世界"]
CONTEXT, STRIDE = 16, 10


def by_hand(ids: list[int]) -> list[tuple[list[int], int]]:
    """Return (window, index of the first scored token) for one text."""
    found, scored = [], 1
    for start in range(0, len(ids), STRIDE):
        part = ids[start : start + CONTEXT]
        if scored < len(ids):
            found.append((part, scored - start))
        scored = max(scored, start + len(part))
    return found


def ids_of(text: str) -> list[int]:
    return [0, *Bytes().encode(text)]


def test_perplexity(model):
    """The exponential of the mean loss of `score`, window by window."""
    found = perplexity(model, TEXTS, tokenizer=Bytes(), context=CONTEXT, stride=STRIDE, batch_size=8)
    rows, first = zip(*(part for text in TEXTS for part in by_hand(ids_of(text))), strict=True)
    scores = ds.score(model, rows).logprobs
    logprobs = [logprob for row, start in zip(scores, first, strict=True) for logprob in row[start - 1 :]]
    size = sum(len(text.encode()) for text in TEXTS)
    assert len(logprobs) == found.tokens == found.bytes == size
    assert found.perplexity.mean == pytest.approx(math.exp(-sum(logprobs) / size), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(-sum(logprobs) / size / math.log(2), rel=1e-5)
    assert (found.documents, found.windows, found.context, found.stride) == (2, 6, CONTEXT, STRIDE)
    assert found.read == sum(map(len, rows))
    assert repr(found).startswith(f"Perplexity of {size} tokens\n") and len(repr(found).splitlines()) == 6


def test_one_program_for_all_groups(model, monkeypatch):
    """The last group, with one window of four, shares the program of the others; two batches run at a time, and
    compilation in their threads is counted."""
    together = threading.Barrier(2, timeout=60)
    score = perplexities.score

    def both(model, rows, **options):
        together.wait()
        return score(model, rows, **options)

    rows = [[0, *range(10, 10 + length)] for length in (40, 41, 42, 43)] * 3 + [[0, *range(10, 50)]]
    whole = perplexity(model, rows[:-1], batch_size=4, limit=4)
    monkeypatch.setattr(perplexities, "score", both)
    told = []
    with count_compilations() as compiled:
        found = perplexity(model, rows, batch_size=4, progress=lambda *counts: told.append(counts))
    assert told == [(4, 13), (8, 13), (12, 13), (13, 13)] and compiled.count == 0
    assert found.compile_seconds == 0 < whole.compile_seconds
    assert found.nats.mean == pytest.approx(
        -np.mean([logprob for row in ds.score(model, rows).logprobs for logprob in row]), rel=1e-5
    )


def test_divergence_of_a_model_from_itself(model, monkeypatch):
    """Zero at every token. A terminal shows it after a moment; compilation is logged as that of `generate`."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(corpus, "show_slow", lambda total, unit: reporter.show_slow(total, 0, unit))
    compiling = []
    monkeypatch.setattr(scoring, "log_slow_compilation", lambda *given: compiling.append(given[0]) or nullcontext())
    found = kl(model, model, [ids_of(text) for text in TEXTS], context=CONTEXT, stride=STRIDE)
    assert "/6 windows" in sys.stderr.getvalue() and set(compiling) == {"prefill (batch 4, 16 tokens)"}
    assert found.kl.mean == found.loss.mean == found.percentiles["100"] == 0 and found.same_top.mean == 1


def test_divergence(model):
    """A model with another head, compared with NumPy on the logits of both."""
    noise = np.random.default_rng(1).normal(0, 0.05, model.head_VD.shape)
    other = dataclasses.replace(model, head_VD=model.head_VD + jnp.asarray(noise, jnp.float32))
    found = kl(model, other, TEXTS, tokenizer=Bytes(), context=CONTEXT, stride=STRIDE, batch_size=3)
    rows = []
    for text in TEXTS:
        for window, first in by_hand(ids_of(text)):
            a, b = (oracle.logits(one, window)[first - 1 : -1] for one in (model, other))
            a, b = (x - np.log(np.exp(x).sum(axis=-1, keepdims=True)) for x in (a, b))
            came = np.array(window[first:])[:, None]
            loss = np.take_along_axis(a - b, came, axis=-1)[:, 0]
            rows += zip((np.exp(a) * (a - b)).sum(-1), a.argmax(-1) == b.argmax(-1), loss, came[:, 0], strict=True)
    expected, same, loss, came = map(np.array, zip(*rows, strict=True))
    assert expected.max() > 0.01 and not same.all()
    assert found.kl.mean == pytest.approx(expected.mean(), rel=1e-4)
    assert found.percentiles == pytest.approx(
        {f"{p:g}": np.percentile(expected, p) for p in (50, 90, 99, 99.9, 100)}, rel=1e-4
    )
    assert found.same_top.mean == pytest.approx(same.mean())
    assert found.loss.mean == pytest.approx(loss.mean(), rel=1e-3)
    ratio = found.perplexity_b.mean / found.perplexity_a.mean
    assert math.log(ratio) == pytest.approx(found.loss.mean, rel=1e-3)
    assert repr(found).startswith(f"Divergence of B from A over {found.tokens} tokens\n") and len(repr(found)) < 600
    worst = found.worst[0]
    assert worst.kl == pytest.approx(expected.max(), rel=1e-4)
    document = ids_of(TEXTS[worst.document])
    assert worst.token == Bytes().decode([document[worst.position]])
    assert worst.before == Bytes().decode(document[max(0, worst.position - 16) : worst.position])
    assert [one.kl for one in found.worst] == pytest.approx(sorted(expected)[: -len(found.worst) - 1 : -1], rel=1e-4)


def test_variants(tmp_path):
    """The checkpoint before the colon, dtypes after it."""
    assert Variant.of("a/b:float32,fp8-cache") == Variant(Path("a/b"), jnp.float32, "fp8")
    assert Variant.of("a:bfloat16-cache") == Variant(Path("a"), None, "bfloat16")
    (tmp_path / "odd:fp8-cache").mkdir()
    assert Variant.of(tmp_path / "odd:fp8-cache") == Variant(tmp_path / "odd:fp8-cache")


def test_weights_that_are_not_finite(model):
    """Log-probabilities that are not finite are reported by text and token, not averaged."""
    broken = dataclasses.replace(model, head_VD=model.head_VD.at[7].set(jnp.nan))
    rows = [[0, *range(10, 25)], [0, 8], *[[0, 9]] * 6]
    with pytest.raises(CheckpointError, match="22 tokens are not finite .*text 0 at token 1, text 0 at token 2, "):
        perplexity(broken, rows, batch_size=8)
    with pytest.raises(CheckpointError, match="22 tokens are not finite"):
        kl(model, broken, rows)


def test_an_edited_model(model):
    """Is measured as it is: its perplexity is that of its own scores, and it diverges from the model it was made of."""
    edited = ds.inspect.edit(model, experts_off=[(1, 3)], add={0: np.ones(model.cfg.hidden_size)})
    rows = [ids_of(text)[:CONTEXT] for text in TEXTS]
    logprobs = np.concatenate(ds.score(edited, rows).logprobs)
    found = perplexity(edited, rows, context=CONTEXT)
    assert found.perplexity.mean == pytest.approx(np.exp(-logprobs.mean()), rel=1e-5)
    assert kl(edited, edited, rows, context=CONTEXT).kl.mean == pytest.approx(0, abs=1e-6)
    assert kl(model, edited, rows, context=CONTEXT).kl.mean > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 65}, "context must be an integer from 2 to 64, not 65"),
        ({"context": 1}, "context must be"),
        ({"context": 8.0}, "context must be"),
        ({"context": 8, "stride": 8}, "stride must be .* from 1 to 7"),
        ({"stride": 0}, "stride must be"),
        ({"limit": 0}, "limit must be an integer of at least 1, not 0"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"texts": []}, "there is no text"),
        ({"texts": ""}, r"fewer than two tokens .*: 0 \(counted from 0\)"),
        ({"texts": ["a", "", [0], [0, 1], []]}, r"fewer than two tokens .*: 1, 2, 4 \(counted from 0\)"),
        ({"texts": "a", "tokenizer": None}, "text needs a tokenizer"),
        ({"texts": [[0, 320]]}, "1 token id outside the vocabulary"),
        ({"texts": [[0, 1.5]]}, "integers"),
        ({"texts": [1, 2, b"c"]}, "texts must be text or lists of token ids, not 1, 2, b'c'"),
        ({"texts": Path("a")}, "texts must be a text, or a list"),
        ({"texts": 7}, "texts must be a text, or a list"),
    ],
)
@pytest.mark.parametrize("measure", [perplexity, lambda model, texts, **options: kl(model, model, texts, **options)])
def test_misuse(model, measure, options, message):
    """Invalid arguments are refused before anything runs."""
    options = {"texts": "some text", "tokenizer": Bytes()} | options
    with pytest.raises(UsageError, match=message):
        measure(model, options.pop("texts"), **options)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("x:fp16", "'fp16' cannot follow the colon; write CHECKPOINT"),
        ("x:float32,bfloat16", "gives more than one compute dtype or cache dtype"),
        ("x:fp8-cache,float32-cache", "gives more than one compute dtype or cache dtype"),
        (7, "not int"),
    ],
)
def test_misuse_of_variants(given, message):
    """Unknown words are named."""
    with pytest.raises(UsageError, match=message):
        Variant.of(given)


def test_other_vocabularies(folders, model):
    """Predictions over different tokens are not compared."""
    with pytest.raises(UsageError, match="vocabularies of 320 and 321 tokens; nothing was run"):
        kl(folders / "bf16", folders / "other", [[0, 5]])
    with pytest.raises(UsageError, match="computes in float32; load it again to compute in bfloat16"):
        kl(model, Variant(model, jnp.bfloat16), [[0, 5]])


def test_other_tokenizers(demo, tmp_path):
    """Two checkpoints whose tokenizers assign different tokens to an id."""
    (tmp_path / "other").mkdir()
    for file in demo.iterdir():
        if file.name != "tokenizer.json":
            (tmp_path / "other" / file.name).symlink_to(file)
    raw = json.loads((demo / "tokenizer.json").read_text())
    vocab = raw["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(UsageError, match="differ in 2 of 4096 tokens"):
        kl(demo, tmp_path / "other", ["some text"])


def test_command_line(demo, tmp_path, capsys):
    """dsv32 eval ppl and kl, as text and as JSON."""
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "import os\nimport sys\n" * 9}) + "\n")
    words = [str(tmp_path / "text.jsonl"), "--context", "32", "--stride", "31"]
    assert cli.main(["eval", "ppl", str(demo), *words, "--dtype", "float32", "--cache-dtype", "fp8", "--json"]) == 0
    ppl = json.loads(capsys.readouterr().out)
    direct = perplexity(f"{demo}:float32,fp8-cache", ["import os\nimport sys\n" * 9], context=32, stride=31)
    assert ppl["perplexity"]["mean"] == pytest.approx(direct.perplexity.mean)
    assert ppl["bytes"] == 189 and ppl["tokens_per_second"] > 0
    assert cli.main(["eval", "kl", f"{demo}:float32", f"{demo}:float32,fp8-cache", *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["perplexity_b"]["mean"] == pytest.approx(ppl["perplexity"]["mean"], rel=1e-4)
    assert 0 < found["kl"]["mean"] < 0.1 and found["perplexity_a"]["mean"] != found["perplexity_b"]["mean"]
    assert cli.main(["eval", "kl", f"{demo}:float32", f"{demo}:float32,fp8-cache", *words]) == 0
    told = capsys.readouterr().out
    assert "KL(A || B)" in told and "largest divergence" in told and told.count("' -> '") == len(found["worst"])
    assert cli.main(["eval", "ppl", str(demo), str(tmp_path / "nowhere")]) == 74
    assert cli.main(["eval", "ppl", str(demo), *words[:1], "--context", "4000"]) == 2
    assert cli.main(["eval", "kl", str(demo), str(tmp_path)]) == 3
