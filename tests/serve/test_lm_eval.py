"""lm-evaluation-harness's `local-completions` with the demo model; where it is not installed, the requests it sends."""

import importlib.util
from types import SimpleNamespace

import httpx2
import pytest

import dsv32_jax as ds

IS_INSTALLED = importlib.util.find_spec("lm_eval") is not None  # other tests put a stand-in for it there
PAIRS = [("def area(r):", "\n    return"), ("x =", " é"), ("", "import os")]
OPTIONS = {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False}


def split(encode, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """The tokens of the context, or the first of all, and with them those of the continuation."""
    before = encode(context)
    return (
        (before, before + encode(context + continuation)[len(before) :])
        if context
        else ([0], [0, *encode(continuation)])
    )


class Requests:
    """What version 0.4.13 sends and how it reads the answers, shortened."""

    def __init__(self, base_url: str, model: str, **_):
        self.http, self.url, self.model = httpx2.Client(timeout=120), base_url, model
        self.base = base_url.removesuffix("/v1/completions")
        self.eos = self.http.get(f"{self.base}/tokenizer_info").json()["eos_token"]

    def tok_encode(self, text: str) -> list[int]:
        body = {"prompt": text, "add_special_tokens": False}
        return self.http.post(f"{self.base}/tokenize", json=body).json()["tokens"]

    def post(self, **body):
        answer = self.http.post(self.url, json={"model": self.model, "seed": 1234, "temperature": 0, **body}).json()
        return sorted(answer["choices"], key=lambda choice: choice["index"])

    def loglikelihood(self, requests):
        for context, continuation in (request.args for request in requests):
            before, ids = split(self.tok_encode, context, continuation)
            (choice,) = self.post(prompt=[ids], max_tokens=1, logprobs=1, echo=True)
            logprobs = choice["logprobs"]["token_logprobs"][len(before) : -1]
            likeliest = [max(top.values()) for top in choice["logprobs"]["top_logprobs"][len(before) : -1]]
            yield sum(logprobs), logprobs == likeliest

    def generate_until(self, requests):
        for context, options in (request.args for request in requests):
            stop, limit = [*options["until"], self.eos], options["max_gen_toks"]
            yield self.post(prompt=[self.tok_encode(context)], max_tokens=limit, stop=stop)[0]["text"]


@pytest.fixture(scope="module")
def harness(served):
    options = {"base_url": f"{served.url}/v1/completions", "model": "demo", "custom_prefix_token_id": 0}
    if IS_INSTALLED:
        module = importlib.import_module("lm_eval.models.openai_completions")
        yield module.LocalCompletionsAPI(**options)
    else:
        requests = Requests(**options)
        yield requests
        requests.http.close()


def ask(kind: str, *arguments):
    """Requests as tasks make them."""
    if IS_INSTALLED:
        make = importlib.import_module("lm_eval.api.instance").Instance
        return [make(request_type=kind, doc={}, arguments=one, idx=i) for i, one in enumerate(arguments)]
    return [SimpleNamespace(args=one) for one in arguments]


def test_loglikelihood(harness, model, tokenizer):
    """Those of `score`, and whether each token was the most likely; an empty context is the first token of all."""
    found = list(harness.loglikelihood(ask("loglikelihood", *PAIRS)))
    for (context, continuation), (logprob, is_greedy) in zip(PAIRS, found, strict=True):
        before, ids = split(tokenizer.encode, context, continuation)
        scores = ds.score(model, [ids], top_logprobs=1)
        assert logprob == pytest.approx(sum(scores.logprobs[0][len(before) - 1 :]), abs=1e-4)
        tops = [top[0][0] for top in scores.top_logprobs[0][len(before) - 1 :]]
        assert is_greedy == (tops == ids[len(before) :])


def test_generation(harness, model, tokenizer):
    """That of `generate`."""
    ids = tokenizer.encode(PAIRS[0][0])
    gen = ds.generate(model, [ids], tokenizer=tokenizer, stop=OPTIONS["until"], max_new_tokens=8)
    assert list(harness.generate_until(ask("generate_until", (PAIRS[0][0], dict(OPTIONS))))) == gen.text
