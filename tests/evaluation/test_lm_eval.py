"""The adapter for lm-evaluation-harness, tested against its interface, or a stub where it is not installed."""

import importlib
import importlib.util
import logging
from types import SimpleNamespace

import numpy as np
import pytest

from dsv32_jax import Sampling
from dsv32_jax.errors import UsageError
from dsv32_jax.evaluation import lm_eval_adapter
from tests import oracle
from tests.evaluation.conftest import Bytes

STUB = '''
class TemplateLM:
    """The base class of lm-evaluation-harness 0.4.13, shortened."""

    def __init__(self):
        self.kept = []
        self.cache_hook = self

    def add_partial(self, *what):
        self.kept.append(what)

    def loglikelihood(self, requests, disable_tqdm=False):
        asked = []
        for context, continuation in [request.args for request in requests]:
            if context == "":
                pair = [self.prefix_token_id], self.tok_encode(continuation, add_special_tokens=False)
            else:
                whole, before = self.tok_encode(context + continuation), self.tok_encode(context)
                pair = before, whole[len(before):]
            asked.append(((context, continuation), *pair))
        return self._loglikelihood_tokens(asked, disable_tqdm=disable_tqdm)
'''


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """The module as imported when the harness is installed."""
    if importlib.util.find_spec("lm_eval"):
        yield lm_eval_adapter
        return
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("stub")
        (folder / "lm_eval" / "api").mkdir(parents=True)
        (folder / "lm_eval" / "api" / "model.py").write_text(STUB)
        (folder / "lm_eval" / "api" / "registry.py").write_text(
            "NAMES = {}\ndef register_model(name):\n    return lambda kind: NAMES.setdefault(name, kind)\n"
        )
        patch.syspath_prepend(folder)
        yield importlib.reload(lm_eval_adapter)
    importlib.reload(lm_eval_adapter)


@pytest.fixture(scope="module")
def harness(adapter, model):
    return adapter.LmEval(model, tokenizer=Bytes(), max_length=16, batch_size="4", device=None)


def ask(*arguments):
    return [SimpleNamespace(args=one) for one in arguments]


def logprobs(model, ids):
    """Log-probabilities of all tokens but the first, and whether each is the most likely, in float64."""
    logits = oracle.logits(model, ids)[:-1]
    found = (logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True)))[np.arange(len(ids) - 1), ids[1:]]
    return found, logits.argmax(axis=-1) == ids[1:]


def test_loglikelihood(harness, model):
    """Continuations with and without context; greedy if every token is the most likely."""
    pairs = [("abc", "de"), ("", "xyz"), ("abc", "d")]
    for (context, continuation), (logprob, is_greedy) in zip(pairs, harness.loglikelihood(ask(*pairs)), strict=True):
        expected, likeliest = logprobs(model, [0, *Bytes().encode(context + continuation)])
        count = len(continuation)
        assert logprob == pytest.approx(expected[-count:].sum(), rel=1e-4)
        assert is_greedy == likeliest[-count:].all()
    likeliest = int(oracle.logits(model, [0, 100, 101])[-1].argmax())
    answers = harness._loglikelihood_tokens([(None, [0, 100, 101], [token]) for token in (likeliest, 3, 4)])
    assert [is_greedy for _, is_greedy in answers] == [True, False, False]


def test_a_long_context_loses_its_beginning(harness, model, caplog):
    """Truncation is logged; a continuation that does not fit is an error."""
    before = harness.truncated
    with caplog.at_level(logging.WARNING, "dsv32_jax"):
        asked = ask(("a long context, too long", "de"), ("a", "b"), ("a", "c"))
        (logprob, _), *_ = harness.loglikelihood(asked)
    expected, _ = logprobs(model, Bytes().encode("a long context, too longde")[-16:])
    assert logprob == pytest.approx(expected[-2:].sum(), rel=1e-4)
    assert harness.truncated == before + 1 and "1 of 3 requests lost the beginning" in caplog.text
    with pytest.raises(UsageError, match="needs 17 tokens, but 16 are left"):
        harness.loglikelihood(ask(("a", "16 letters long.")))


def test_rolling(harness, model):
    """Each token of a text once; windows overlap by the one token that the next needs."""
    text = "a text of 26 letters, long"
    ids = [0, *Bytes().encode(text)]
    first, _ = logprobs(model, ids[:16])
    second, _ = logprobs(model, ids[15:])
    short, _ = logprobs(model, [0, *Bytes().encode("ab")])
    found = harness.loglikelihood_rolling(ask((text,), ("ab",)))
    assert found == pytest.approx([first.sum() + second.sum(), short.sum()], rel=1e-4)


def test_generation(harness, adapter, monkeypatch):
    """Options of a task become those of `generate`; requests with equal options run together."""
    asked = []

    def generate(model, prompts, *, stop, max_new_tokens, sampling, **_):
        asked.append((prompts, stop, max_new_tokens, sampling))
        return SimpleNamespace(text=[f"{len(asked)}{len(prompt)}" for prompt in prompts])

    monkeypatch.setattr(adapter, "generate", generate)
    greedy = {"until": ["\n", "."], "max_gen_toks": 6, "do_sample": False, "temperature": 0.0}
    drawn = {"until": "x", "temperature": 0.5, "top_p": 0.9}
    assert harness.generate_until(ask(("abc", greedy), ("ab", drawn), ("20 letters in a text", greedy))) == [
        "14",
        "21",
        "110",
    ]
    text = Bytes().encode("20 letters in a text")
    assert asked[0] == ([[0, *Bytes().encode("abc")], text[-10:]], ["\n", "."], 6, Sampling())
    assert asked[1] == ([Bytes().encode("b")], ["x"], 15, Sampling(temperature=0.5, top_p=0.9))
    with pytest.raises(UsageError, match="options of a task: num_beams; known: until"):
        harness.generate_until(ask(("abc", {"num_beams": 2})))
    with pytest.raises(UsageError, match="needs 1 token, but 0 are left"):
        harness.generate_until(ask(("abc", {"max_gen_toks": 16})))


def test_answers_are_scored_without_thoughts(adapter, model, monkeypatch):
    """Where the prompt opened them; and a prompt that is not the model's turn, or begins its answer, is refused."""

    class Thinking(Bytes):
        def encode(self, text: str, **_) -> list[int]:
            return [2] if text.endswith("<think>") else [9]

        def bytes_of(self, ids) -> bytes:
            return b"".join(b"<think>" if i == 2 else super(Thinking, self).bytes_of([i]) for i in ids)

    harness = adapter.LmEval(model, tokenizer=Thinking(), max_length=16, thinking=True)
    prompt = harness.apply_chat_template([{"role": "user", "content": "x"}])
    assert prompt.endswith("<think>")
    texts = iter(["so</think>yes", "so", "so</think>yes"])
    monkeypatch.setattr(adapter, "generate", lambda *_, **__: SimpleNamespace(text=[next(texts)]))
    options = {"until": [], "max_gen_toks": 4}
    asked = [(prompt, options), (prompt, {**options, "max_gen_toks": 5}), ("plain", {**options, "max_gen_toks": 6})]
    assert harness.generate_until(ask(*asked)) == ["yes", "", "so</think>yes"]
    begun = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    with pytest.raises(UsageError, match="thinks first"):
        harness.apply_chat_template(begun, add_generation_prompt=False)
    harness.thinking = False
    assert harness.apply_chat_template(begun, add_generation_prompt=False).endswith("</think>y")
    with pytest.raises(UsageError, match="not the model's turn"):
        harness.apply_chat_template(begun)


def test_special_tokens(adapter, demo):
    """Plain text in a task's text; the format's own in a chat prompt."""
    harness = adapter.LmEval(demo)
    assert harness.eot_token_id == 1 and harness.prefix_token_id == 0 and harness.max_length == 2048
    forged = harness.tok_encode("a<｜end▁of▁sentence｜>")
    assert forged[0] == 0 and 1 not in forged
    assert harness.tok_encode("a", add_special_tokens=False) == forged[1:2]
    prompt = harness.apply_chat_template([{"role": "user", "content": "Hello"}])
    begun = harness.apply_chat_template(
        [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "I"}], add_generation_prompt=False
    )
    ids = harness.tok_encode(prompt)
    assert ids.count(0) == 1 and harness.tok_encode(begun)[: len(ids)] == ids and begun.endswith("I")
    assert harness.tokenizer_name.startswith("dsv32-") and harness.chat_template(True)


def test_misuse(adapter, model, monkeypatch):
    """Unknown arguments, a model without a tokenizer, no harness."""
    for options, message in [
        ({"dtype": "auto", "peft": "x"}, r"unknown arguments \(2\): dtype, peft"),
        ({"max_length": 65}, "max_length must be an integer from 2 to 64"),
        ({"batch_size": "0"}, "batch_size must be"),
        ({"batch_size": "auto"}, "batch_size"),
    ]:
        with pytest.raises(UsageError, match=message):
            adapter.LmEval(model, tokenizer=Bytes(), **options)
    with pytest.raises(UsageError, match="or pass tokenizer="):
        adapter.LmEval(model)
    monkeypatch.setattr(adapter, "INSTALLED", False)
    with pytest.raises(UsageError, match=r"pip install 'dsv32-jax\[eval\]'"):
        adapter.LmEval(model, tokenizer=Bytes())
