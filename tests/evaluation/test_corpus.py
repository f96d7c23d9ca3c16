"""Texts, windows over them, and means with their standard errors."""

import numpy as np
import pytest
from hypothesis import given, strategies as st

from dsv32_jax.errors import StorageError, UsageError
from dsv32_jax.evaluation import corpus
from dsv32_jax.evaluation.corpus import cut_windows
from dsv32_jax.evaluation.perplexities import Estimate, estimate_mean, exponentiate


@given(st.data())
def test_each_token_is_scored_once(data):
    """All tokens but the first of a document; after the first window with at least context - stride before them."""
    context = data.draw(st.integers(2, 12))
    stride = data.draw(st.integers(1, context - 1))
    lengths = data.draw(st.lists(st.integers(0, 40), max_size=4))
    documents = [list(range(100 * d, 100 * d + n)) for d, n in enumerate(lengths)]
    found = cut_windows(documents, context, stride)
    scored = [token for window in found for token in window.scored]
    assert scored == [token for ids in documents for token in ids[1:]]
    for window in found:
        assert window.tokens == documents[window.document][window.start : window.start + len(window.tokens)]
        assert len(window.tokens) <= context
        assert window.first == 1 if window.start == 0 else window.first == context - stride


def test_windows_of_an_example():
    """Seven tokens in windows of four, two apart."""
    found = cut_windows([[0, 1, 2, 3, 4, 5, 6]], 4, 2)
    assert [(window.tokens, window.first) for window in found] == [
        ([0, 1, 2, 3], 1),
        ([2, 3, 4, 5], 2),
        ([4, 5, 6], 2),
    ]


def test_error_of_a_mean():
    """For windows of equal length it is the textbook standard error of their means."""
    values = np.random.default_rng(0).normal(3, 1, (40, 25))
    found = estimate_mean(list(values))
    assert found.mean == pytest.approx(values.mean())
    assert found.standard_error == pytest.approx(values.mean(axis=1).std(ddof=1) / 40**0.5)
    assert exponentiate(found).standard_error == pytest.approx(np.exp(found.mean) * found.standard_error)


def test_error_of_uneven_windows():
    """The standard error agrees with the spread of repeated samples."""
    rng = np.random.default_rng(0)
    drawn = [
        estimate_mean([rng.normal(rng.normal(1, 0.5), 1, size) for size in rng.integers(5, 60, 50)]) for _ in range(300)
    ]
    spread = np.std([one.mean for one in drawn])
    assert np.mean([one.standard_error for one in drawn]) == pytest.approx(spread, rel=0.15)
    assert estimate_mean([np.array([1.0, 3.0])]) == Estimate(2.0, None)


def test_files(tmp_path):
    """A file is one text, each line of a .jsonl file another."""
    (tmp_path / "a.py").write_text("print(1)\n")
    (tmp_path / "b.jsonl").write_text('{"text": "one", "id": 4}\n\n{"text": "t\\u00e4o"}\n')
    assert corpus.read_texts([tmp_path / "b.jsonl", tmp_path / "a.py"]) == ["one", "täo", "print(1)\n"]


def test_the_shipped_text():
    """The bundled text is whole files, without the lines that name them."""
    found = corpus.read_heldout()
    assert len(found) == 9 and sum(map(len, found)) > 100_000
    assert not any(line.startswith("##### ") for text in found for line in text.splitlines())


def test_every_bad_text_is_named(tmp_path):
    """All problems are listed in one error."""
    (tmp_path / "a.jsonl").write_text('{"text": 1}\n[]\n{"text": "fine"}\nnonsense\n' + "[" * 100_000)
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UsageError, match="5 texts") as caught:
        corpus.read_texts([tmp_path / "a.jsonl", tmp_path / "b.txt"])
    for part in ("a.jsonl:1 ", "a.jsonl:2 ", "a.jsonl:4 ", "a.jsonl:5 ", "b.txt is not UTF-8 at byte 3"):
        assert part in str(caught.value)
    with pytest.raises(StorageError, match="nowhere"):
        corpus.read_texts([tmp_path / "nowhere"])


def test_a_huge_file_is_not_read(tmp_path):
    """A huge file is refused by its size."""
    with open(tmp_path / "huge.txt", "wb") as file:
        file.truncate(corpus.LARGEST_FILE + 1)
    with pytest.raises(UsageError, match="huge.txt has"):
        corpus.read_texts([tmp_path / "huge.txt"])
