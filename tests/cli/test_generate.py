"""dsv32 generate: prompts from everywhere, results for people and programs, and misuse before weights are read."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

import dsv32_jax as ds
from dsv32_jax import chat
from dsv32_jax.chat import template
from dsv32_jax.cli import app, generate_command, open_checkpoint
from dsv32_jax.cli.terminal import Screen
from dsv32_jax.generation.engine_core import EngineCore
from dsv32_jax.generation.options import Options
from tests.cli.conftest import byte_tokenizer

FEW = ("--max-new-tokens", "6", "--capacity", "32", "--dtype", "float32")
"""Options that most tests share, and with them programs."""


@pytest.fixture(scope="module")
def model(checkpoint):
    return ds.load(checkpoint, dtype="float32")


@pytest.fixture(scope="module")
def tokenizer(checkpoint, model):
    return chat.Tokenizer.load(checkpoint, model.cfg)


def wanted(model, tokenizer, ids, **options):
    """What the library makes of the same."""
    made = ds.generate(model, [ids], max_new_tokens=6, capacity=32, tokenizer=tokenizer, **options)
    assert made.text is not None
    return made


def test_every_option_of_the_library_is_there():
    """Each field of Sampling, and of Options all that a command line can say."""
    declared = {field.name for kind in (ds.Sampling, Options) for field in dataclasses.fields(kind)}
    given = vars(app.parser().parse_args(["generate", "folder"]))
    assert declared - set(given) == {"tokenizer", "progress", "constraint"}


def test_g02_text_is_continued_and_chat_is_asked_for(dsv32, checkpoint, model, tokenizer):
    """stdout has the text alone; stderr says what was made of the prompt."""
    ids = [0, *tokenizer.encode("def f(x):")]
    code, out, err = dsv32("generate", checkpoint, "def f(x):", *FEW)
    assert (code, out) == (0, wanted(model, tokenizer, ids).text[0] + "\n")
    assert "prompt: raw text, 10 tokens (--chat sends it as a message)" in err and "generated 6 tokens" in err
    ids = chat.prepare([{"role": "user", "content": "Hi"}], tokenizer).ids
    code, out, err = dsv32("generate", checkpoint, "--chat", *FEW, "Hi", "--quiet")
    assert (code, out, err) == (0, wanted(model, tokenizer, ids).text[0] + "\n", "")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("text", "answer", "reasoning"),
    [
        ("Two</t</think>4", "4\n", "Two</t\n\n"),
        ("Two", "\n", "Two\nthe reasoning is not closed: there is no answer\n"),
        ("Two</thi", "\n", "Two</thi\nthe reasoning is not closed: there is no answer\n"),
    ],
)
def test_reasoning_goes_to_stderr(capsys, stream, text, answer, reasoning):
    """Streamed or not, stdout has the answers alone."""
    asked = SimpleNamespace(thinking=True)
    results = generate_command._Results(Screen(), {1}, None, [(asked, 0)], False, stream)
    for char in text if stream else "":
        results._write_token(0, SimpleNamespace(text=char, token=0))
    results._write_row(0, SimpleNamespace(text=text, tokens=[0]))
    assert capsys.readouterr() == (answer, reasoning)


def test_the_prompt_comes_from_anywhere(dsv32, checkpoint, tmp_path):
    """An argument, stdin with and without -, and a file; with --stream the same text."""
    (tmp_path / "prompt.txt").write_text("Aé\n", encoding="utf-8")
    _, out, _ = dsv32("generate", checkpoint, "Aé\n", *FEW)
    assert dsv32("generate", checkpoint, *FEW, piped="Aé\n")[1] == out
    assert dsv32("generate", checkpoint, "-", *FEW, piped="Aé\n")[1] == out
    assert dsv32("generate", checkpoint, "--file", tmp_path / "prompt.txt", *FEW, "--stream")[1] == out


def test_a_terminal_sees_each_token(dsv32, checkpoint, monkeypatch):
    """Unless the whole text or JSON is asked for; a pipe gets the whole text."""
    asked, follow = [], EngineCore.follow
    spy = lambda self, rows, steps, stop: asked.append(steps) or follow(self, rows, steps, stop)  # noqa: E731
    monkeypatch.setattr(EngineCore, "follow", spy)
    dsv32("generate", checkpoint, "ab", *FEW)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for flags in ((), ("--no-stream",), ("--json",)):
        assert dsv32("generate", checkpoint, "ab", *FEW, *flags)[0] == 0
    assert asked == [None, 1, None, None]


def test_sampling_options_arrive(dsv32, checkpoint, model, tokenizer):
    """And those of the batch: several continuations, a JSON line each, with the likeliest tokens."""
    sampling = ds.Sampling(temperature=0.8, top_k=40, seed=7, logit_bias={70: -100.0, 71: 2.0}, forbidden_ids=[1, 80])
    made = wanted(model, tokenizer, [0, *tokenizer.encode("ab")], sampling=sampling, n=2, top_logprobs=2)
    flags = "--temperature .8 --top-k 40 --seed 7 --logit-bias 70=-100 --logit-bias 71=2 --forbidden-ids 1,80".split()
    code, out, err = dsv32(
        "generate", checkpoint, "ab", *flags, *FEW, "--samples", "2", "--top-logprobs", "2", "--json"
    )
    results = list(map(json.loads, out.splitlines()))
    assert code == 0 and len(results) == 2 and results[0]["tokens"] != results[1]["tokens"]
    for sample, result in enumerate(results):
        assert result["sample"] == sample and result["finish_reason"] == "length" and "message" not in result
        assert (result["tokens"], result["text"]) == (made.tokens[sample], made.text[sample])
        assert result["logprobs"] == made.logprobs[sample]
        assert result["top_logprobs"] == [
            [{"token": i, "text": tokenizer.decode([i]), "logprob": value} for i, value in place]
            for place in made.top_logprobs[sample]
        ]
    assert json.loads(err.splitlines()[-1])["stats"]["new_tokens"] == 12


@pytest.fixture
def advised(checkpoint, tmp_path):
    """The checkpoint with sampling defaults of its own."""
    for entry in checkpoint.iterdir():
        (tmp_path / entry.name).symlink_to(entry)

    def write(**settings):
        (tmp_path / "generation_config.json").write_text(json.dumps(settings))
        return tmp_path

    return write


def test_the_checkpoints_sampling_defaults(dsv32, advised, model, tokenizer):
    """They count where no option is given, in a file of requests too, and are said once."""
    folder = advised(do_sample=True, temperature=0.7, top_p=0.9, top_k=-1, eos_token_id=1)
    ids = [model.cfg.bos_token_id, *tokenizer.encode("ab")]
    drawn = wanted(model, tokenizer, ids, sampling=ds.Sampling(temperature=0.7, top_p=0.9, seed=5))
    code, out, err = dsv32("generate", folder, "ab", "--seed", 5, *FEW)
    assert (code, out) == (0, drawn.text[0] + "\n")
    assert err.count("generation_config.json of the checkpoint: temperature 0.7, top_k 0, top_p 0.9, unless") == 1
    code, out, err = dsv32("generate", folder, "ab", "--temperature", 0, *FEW)
    assert out == wanted(model, tokenizer, ids).text[0] + "\n" and "checkpoint: top_k 0, top_p 0.9, unless" in err
    assert ds.Sampling.from_checkpoint(folder) == ds.Sampling(temperature=0.7, top_p=0.9)
    assert ds.Sampling.from_checkpoint(folder, temperature=1.5) == ds.Sampling(temperature=1.5, top_p=0.9)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {}),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"top_p": 0.95}, {"temperature": 1.0, "top_p": 0.95}),
        ({"temperature": None, "repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
    ],
)
def test_what_generation_config_asks_for(advised, settings, expected):
    assert ds.Sampling.from_checkpoint(advised(**settings)) == ds.Sampling(**expected)


@pytest.mark.parametrize("text", ["<html>", "[]", '{"temperature": "hot"}', '{"top_p": 7}'])
def test_a_generation_config_that_cannot_be_followed(dsv32, advised, text):
    """It is named; an option in place of the wrong value helps."""
    folder = advised()
    (folder / "generation_config.json").write_text(text)
    code, out, err = dsv32("generate", folder, "ab")
    assert (code, out) == (3, "") and "generation_config.json" in err
    if "hot" in text:
        assert dsv32("generate", folder, "ab", "--temperature", 0, "--max-new-tokens", 1)[0] == 0


def test_ids(dsv32, wordless):
    """In and out, without a tokenizer; and streamed as JSON."""
    made = ds.generate(ds.load(wordless, dtype="float32"), [[0, 17, 42]], max_new_tokens=6, capacity=32)
    assert dsv32("generate", wordless, "--ids", "0,17 42", *FEW)[:2] == (0, " ".join(map(str, made.tokens[0])) + "\n")
    assert dsv32("generate", wordless, "--ids", *FEW, "--stream", piped="[0, 17, 42]\n")[1].split() == [
        str(token) for token in made.tokens[0]
    ]
    code, out, _ = dsv32("generate", wordless, "--ids", "0,17,42", *FEW, "--stream", "--json")
    events = list(map(json.loads, out.splitlines()))
    assert code == 0 and [event["token"] for event in events] == made.tokens[0]
    assert [event["finish_reason"] for event in events] == [None] * 5 + ["length"]
    code, _, err = dsv32("generate", wordless, "text")
    assert code == 3 and "no tokenizer.json" in err and "--ids" in err


def test_a_file_of_requests(dsv32, checkpoint, model, tokenizer, tmp_path):
    """Each line as if it were alone, with its own sampling; results say whose they are."""
    messages = [{"role": "user", "content": "Hi"}]
    lines = [
        {"id": "a", "prompt": "ab", "temperature": 0.9, "seed": 3, "logit_bias": {"70": -3}},
        {"id": ["b"], "messages": messages, "thinking": True},
        {"ids": [0, 17, 42]},
        {"prompt": "abc"},
    ]
    file = tmp_path / "requests.jsonl"
    file.write_text("\n\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    code, out, err = dsv32("generate", checkpoint, "--file", file, *FEW, "--batch-size", "1")
    found = {result["line"]: result for result in map(json.loads, out.splitlines())}
    assert code == 0 and sorted(found) == [1, 3, 5, 7] and "4 prompts: 2 x raw text, 1 x messages, thinking" in err
    first = wanted(
        model,
        tokenizer,
        [0, *tokenizer.encode("ab")],
        sampling=ds.Sampling(temperature=0.9, seed=3, logit_bias={70: -3}),
    )
    second = wanted(model, tokenizer, chat.prepare(messages, tokenizer, thinking=True).ids)
    assert found[1]["id"] == "a" and found[1]["tokens"] == first.tokens[0]
    assert found[3]["id"] == ["b"] and found[3]["tokens"] == second.tokens[0]
    assert found[3]["message"]["role"] == "assistant" and found[3]["parse_warnings"]
    assert "id" not in found[5] and found[5]["tokens"] == wanted(model, tokenizer, [0, 17, 42]).tokens[0]


def test_a_file_of_requests_with_options(dsv32, checkpoint, model, tokenizer, tmp_path):
    """Each line has its own length, stops, continuations and likeliest tokens; results keep the order of lines."""
    own = [
        {"max_new_tokens": 2},
        {"n": 2, "temperature": 0.8, "seed": 4},
        {"top_logprobs": 1, "max_new_tokens": 3},
        {"max_new_tokens": 4},
        {"stop_token_ids": list(range(320))},
    ]
    file = tmp_path / "requests.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": "ab", **options}) for options in own), encoding="utf-8")
    code, out, _ = dsv32("generate", checkpoint, "--file", file, *FEW)
    results = list(map(json.loads, out.splitlines()))
    assert code == 0 and [result["line"] for result in results] == [1, 2, 2, 3, 4, 5]
    assert [len(result["tokens"]) for result in results] == [2, 6, 6, 3, 4, 1]
    whole = wanted(model, tokenizer, [0, *tokenizer.encode("ab")]).tokens[0]
    assert results[0]["tokens"] == whole[:2] and results[4]["tokens"] == whole[:4]
    drawn = wanted(model, tokenizer, [0, *tokenizer.encode("ab")], sampling=ds.Sampling(temperature=0.8, seed=4), n=2)
    assert [result["tokens"] for result in results[1:3]] == drawn.tokens and results[2]["sample"] == 1
    assert "top_logprobs" in results[3] and "top_logprobs" not in results[0]


def test_several_texts(dsv32, checkpoint, model, tokenizer):
    """Each below a line that counts them."""
    made = wanted(model, tokenizer, [0, *tokenizer.encode("ab")], sampling=ds.Sampling(temperature=0.8), n=2)
    code, out, _ = dsv32("generate", checkpoint, "ab", *FEW, "--temperature", ".8", "--samples", "2")
    assert (code, out) == (0, f"==> 1 of 2 <==\n{made.text[0]}\n==> 2 of 2 <==\n{made.text[1]}\n")


def test_a_system_text_makes_messages(dsv32, checkpoint, model, tokenizer):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "ab"}]
    made = wanted(model, tokenizer, chat.prepare(messages, tokenizer).ids)
    assert dsv32("generate", checkpoint, "ab", "--system", "s", *FEW)[:2] == (0, made.text[0] + "\n")


BAD_LINES = {
    '{"ids": [0, 99999]}': "outside the vocabulary of 0..319: 99999",
    "not json": "not valid JSON",
    "[1]": "not an object",
    '{"prompt": "a", "ids": [1]}': "one of prompt, messages, ids, not prompt and ids",
    "{}": "not none",
    '{"prompt": 3}': "prompt must be a non-empty string",
    '{"prompt": "a", "thinking": true}': "thinking can only be given with messages",
    '{"prompt": "a", "max_tokens": 3}': "unknown: max_tokens (do you mean max_new_tokens?)",
    '{"prompt": "a", "max_new_tokens": "3"}': "max_new_tokens must be an integer",
    '{"prompt": "a", "stop": [""]}': "at least one character",
    '{"prompt": "a", "n": 0}': "n must be an integer from 1",
    '{"prompt": "a", "temperature": -1}': "temperature must be a number from 0",
    '{"prompt": "a", "temperature": NaN}': "NaN is not a JSON number",
    '{"prompt": "a", "logit_bias": {"x": 1}}': "'x' is not a token id",
    '{"prompt": "a", "logit_bias": {"01": 1}}': "'01' is not a token id",
    '{"prompt": "a", "prompt": "b"}': "duplicate keys: 'prompt'",
    '{"ids": "0,1"}': "must be a list of token ids",
    '{"messages": "hi"}': "must be a list of messages",
    '{"messages": [{"role": "user", "content": "a"}, {"role": "\\u001b[2Jx", "content": ""}]}': "message 1",
    '{"messages": [{"role": "tool", "content": "1"}]}': "made 0 tool calls",
    '{"messages": [{"role": "user", "content": "\\ud800"}]}': "lone surrogate",
    '{"messages": [{"role": "user", "content": "a"}], "thinking": 1}': "thinking must be true or false, not 1",
    '{"messages": [{"role": "user", "content": "a"}], "thinking": null}': "thinking must be true or false, not None",
    '{"messages": [{"role": "user"}]}': "content is missing in 1 message: message 0 (user)",
}


def test_g27_every_bad_line_is_listed(dsv32, checkpoint, tmp_path):
    """Counted, each with its number, escaped, and before weights are read."""
    file = tmp_path / "requests.jsonl"
    file.write_text("\n".join(['{"prompt": "good"}', *BAD_LINES]), encoding="utf-8")
    code, out, err = dsv32("generate", checkpoint, "--file", file)
    assert (
        (code, out) == (2, "")
        and f"{len(BAD_LINES)} invalid requests in" in err
        and "loaded" not in err
        and "\x1b" not in err
    )
    assert "line 13: temperature must be" in err, "options are spelled as the keys of the file"
    for number, why in enumerate(BAD_LINES.values(), 2):
        assert f"line {number}: " in err and why in err, why


MISUSE = {
    "no prompt at all": ((), 2, "stdin is empty"),
    "two prompts": (("a", "--file", "b"), 2, "PROMPT and --file exclude each other"),
    "a file that is not there": (("--file", "nowhere.txt"), 3, "nowhere.txt"),
    "thinking without messages": (("a", "--think"), 2, "--think applies to messages"),
    "text options with ids": (("0", "--ids", "--chat"), 2, "--ids takes and prints token ids"),
    "ids that are words": (("a b", "--ids"), 2, "not a list of token ids"),
    "g10 ids outside the vocabulary": (("0,9999", "--ids"), 2, "outside the vocabulary of 0..319"),
    "g25 stop ids outside the vocabulary": (("a", "--stop-token-ids", "999"), 2, "--stop-token-ids"),
    "g25 bias outside the vocabulary": (("a", "--logit-bias", "320=1"), 2, "--logit-bias"),
    "a bias that is none": (("a", "--logit-bias", "3"), 2, "not ID=VALUE"),
    "a bias given twice": (("a", "--logit-bias", "3=1", "--logit-bias", "3=2"), 2, "names a token twice"),
    "g35 an empty stop string": (("a", "--stop", ""), 2, "at least one character"),
    "stop strings among ids": (("0", "--ids", "--stop", "x"), 2, "give the tokenizer too"),
    "g07 temperature": (("a", "--temperature", "nan"), 2, "--temperature must be a number from 0 to 5"),
    "neither a number nor all": (("a", "--max-new-tokens", "many"), 2, "neither a whole number nor 'all'"),
    "no number": (("a", "--top-k", "many"), 2, "invalid int value"),
    "g01 too long": (("a", "--max-new-tokens", "50", "--capacity", "20"), 2, "use --capacity 52"),
    "g14 negative": (("a", "--max-new-tokens", "-3"), 2, "0 or more"),
    "drafts without the layer": (("a", "--draft", "1"), 2, "does not have"),
    "g29 too many likeliest": (("a", "--top-logprobs", "21"), 2, "from 0 to 20"),
    "an unknown cache": (("a", "--cache-dtype", "int4"), 2, "--cache-dtype must be"),
    "an unknown mesh": (("a", "--mesh", "rows=2"), 2, "invalid mesh"),
    "g20 more devices than there are": (("a", "--mesh", "expert=64"), 5, "needs 64 devices"),
    "an unknown option": (("a", "--nonsense"), 2, "unrecognized arguments"),
    "more texts than one": (("a", "--samples", "2", "--stream"), 2, "add --json, or omit --stream"),
    "system text beside a file": (("--system", "s", "--file", "b.jsonl"), 2, 'the first of "messages"'),
    "two words": (("a", "b"), 2, "unrecognized arguments: b"),
}


@pytest.mark.parametrize("mistake", MISUSE)
def test_misuse(dsv32, checkpoint, monkeypatch, mistake):
    """The exit code, what is wrong, nothing on stdout, and no weights were read."""
    monkeypatch.setattr(open_checkpoint, "load", lambda *_, **__: pytest.fail("weights were read"))
    argv, wanted_code, why = MISUSE[mistake]
    code, out, err = dsv32("generate", checkpoint, *argv)
    assert (code, out) == (wanted_code, "") and why in err


def test_what_comes_in_is_utf8(dsv32, checkpoint):
    code, _, err = dsv32("generate", checkpoint, piped=b"a\xffb")
    assert code == 2 and "stdin is not UTF-8: byte 1 is 0xff" in err


def test_g24_another_models_tokenizer(dsv32, wordless, tmp_path):
    """Compared with the config before anything is read."""
    for name in ("manifest.json", "weights"):
        (tmp_path / name).symlink_to(wordless / name)
    other = byte_tokenizer()
    other["added_tokens"][1]["id"], other["added_tokens"][2]["id"] = 2, 1
    (tmp_path / "tokenizer.json").write_text(json.dumps(other), encoding="utf-8")
    code, _, err = dsv32("generate", tmp_path, "a")
    assert code == 3 and "eos_token_id" in err and "loaded" not in err


def test_g26_text_forges_no_special_token(dsv32, checkpoint):
    """Neither raw text nor messages; with --allow-special it does."""
    text = str(template.USER)
    for flags in ((), ("--chat",)):
        plain = json.loads(dsv32("generate", checkpoint, text, *flags, *FEW, "--json")[1])["prompt_tokens"]
        forged = json.loads(dsv32("generate", checkpoint, text, *flags, "--allow-special", *FEW, "--json")[1])
        assert plain - forged["prompt_tokens"] == len(text.encode()) - 1


def test_texts_that_are_all_alike_are_told(dsv32, checkpoint):
    """Several greedy ones; and the demo wants a token at least."""
    made = [
        dsv32("generate", checkpoint, "ab", *FEW, "--samples", "2", "--json", *flags)
        for flags in ((), ("--temperature", "1"))
    ]
    assert ["are identical" in err for _, _, err in made] == [True, False]
    seeded = [
        dsv32("generate", checkpoint, "ab", *FEW, "--seed", "4", *flags)[2] for flags in ((), ("--temperature", "1"))
    ]
    assert ["--seed: no effect without --temperature" in err for err in seeded] == [True, False]
    code, _, err = dsv32("generate", checkpoint, "ab", *FEW, "--top-logprobs", "2")
    assert code == 2 and "--top-logprobs is written as JSON alone" in err
    code, _, err = dsv32("demo", "--max-new-tokens", "-5")
    assert code == 2 and "not -5; nothing was run" in err


def test_a_folder_that_is_no_checkpoint(dsv32, tmp_path):
    code, _, err = dsv32("generate", tmp_path, "a")
    assert code == 3 and "is not a converted checkpoint" in err


def test_g11_stop_strings_and_broken_characters(dsv32, checkpoint, model, tokenizer):
    """Streamed or not: the text ends before the stop string, and no character comes in halves."""
    whole = wanted(model, tokenizer, [0, *tokenizer.encode("ab")]).text[0]
    stop = whole[2:4]
    for flags in ((), ("--stream",)):
        code, out, _ = dsv32("generate", checkpoint, "ab", "--stop", stop, *flags, *FEW)
        assert (code, out) == (0, whole[: whole.index(stop)] + "\n")
    allowed = ",".join(map(str, tokenizer.encode("é🦆")))
    flags = ("--temperature", "1", "--allowed-ids", allowed, *FEW)
    made = json.loads(dsv32("generate", checkpoint, "ab", *flags, "--json")[1])
    events = dsv32("generate", checkpoint, "ab", *flags, "--json", "--stream")[1].splitlines()
    assert "".join(json.loads(event)["text"] for event in events) == made["text"] == tokenizer.decode(made["tokens"])


def test_no_tokens(dsv32, checkpoint):
    assert dsv32("generate", checkpoint, "a", "--max-new-tokens", "0")[:2] == (0, "\n")


def test_ctrl_c_gives_what_was_made(checkpoint, dsv32, monkeypatch):
    """Exit code 130; the partial result is there, and flagged."""
    steps = []

    def interrupt(self, *given):
        steps.append(given)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return decode(self, *given)

    from dsv32_jax.generation.batch import Batch

    decode = Batch.decode
    monkeypatch.setattr(Batch, "decode", interrupt)
    code, out, err = dsv32("generate", checkpoint, "ab", *FEW, "--json", "--stream")
    assert code == 130 and len(out.splitlines()) == 3 and "interrupted" in err
    steps.clear()
    code, out, err = dsv32("generate", checkpoint, "ab", *FEW, "--stream")
    assert code == 130 and out.endswith("\n")


def test_weights_that_are_no_numbers(dsv32, checkpoint, monkeypatch):
    """It is the checkpoint's fault, not a bug: exit code 3."""

    def broken(*_, **__):
        raise FloatingPointError("the logits of 1 rows are not numbers")

    from dsv32_jax.cli import generate_command

    monkeypatch.setattr(generate_command._Results, "write", broken)
    code, _, err = dsv32("generate", checkpoint, "ab", *FEW)
    assert code == 3 and "not numbers" in err


def test_a_reader_that_goes_away(checkpoint):
    """`| head -1`: no traceback, exit code 0."""
    command = [sys.executable, "-m", "dsv32_jax", "generate", str(checkpoint), "ab", "--max-new-tokens", "0"]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert done.returncode == 0 and "Traceback" not in done.stderr


@pytest.mark.parametrize("command, code, said", [("inspect", 0, "total"), ("generate", 2, "stdin is empty")])
def test_without_stdin(command, code, said, checkpoint):
    """Where stdin is closed, a command that needs none works, and one that does says that nothing came in."""
    line = ["sh", "-c", 'exec "$@" <&-', "sh", sys.executable, "-m", "dsv32_jax", command, str(checkpoint)]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == code and said in done.stdout + done.stderr and "Traceback" not in done.stderr
