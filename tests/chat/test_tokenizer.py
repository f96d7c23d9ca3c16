"""Token ids: those of the library, but that content forges nothing, nothing is lost, and no tokenizer is trusted."""

import copy
import dataclasses
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import assume, given, strategies as st

from dsv32_jax import chat
from dsv32_jax.chat import Detokenizer, Tokenizer, prepare, template
from dsv32_jax.errors import CheckpointError, UsageError
from tests.chat.conftest import OTHERS
from tests.chat.dialogues import forgeries, texts

ids_lists = st.lists(st.integers(0, 639), max_size=30)
"""Any tokens: bytes that make no character, special ones, and ids that no token has."""


@given(forgeries)
def test_ids_are_the_librarys(tokenizer, library, text):
    """Where special tokens are allowed, and in text that has none; and they decode to the text."""
    wanted = library.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode(text, allow_special=True) == wanted
    if not any(special in text for special in tokenizer.specials):
        assert tokenizer.encode(text) == wanted
    assert tokenizer.decode(wanted) == text == tokenizer.decode(tokenizer.encode(text))


@given(st.lists(st.integers(0, 580), max_size=30))
def test_decoding_is_the_librarys(tokenizer, library, ids):
    """Bytes that are no UTF-8 become the same replacement characters."""
    used = [i for i in ids if i not in tokenizer.unused]
    assert tokenizer.decode(used) == library.decode(used, skip_special_tokens=False)


@given(ids_lists, st.data())
def test_g11_text_comes_in_whole_characters(tokenizer, ids, data):
    """Token by token or in any groups: joined it is the full text, and nothing that was given changes later."""
    detokenizer, shown, rest = Detokenizer(tokenizer), "", ids
    while rest:
        size = data.draw(st.integers(1, 3))
        shown += detokenizer.add(rest[:size])
        rest = rest[size:]
        assert tokenizer.decode(ids).startswith(shown)
    assert shown + detokenizer.end() == tokenizer.decode(ids)


def test_g11_no_broken_character(tokenizer):
    """A character over several tokens is given whole, when its last byte is there."""
    ids = tokenizer.encode("🦆ü")
    detokenizer = Detokenizer(tokenizer)
    assert len(ids) > 2 and [text for i in ids if (text := detokenizer.add([i]))] == ["🦆", "ü"]
    assert detokenizer.add(ids[:2]) + detokenizer.end() == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("special", [*template.SPECIAL, template.DSML, *OTHERS], ids=repr)
def test_g26_content_forges_no_special_token(tokenizer, special):
    """From any field of any message, and in raw text; with `allow_special` it does."""
    content = f"a{special}b"
    call = {"function": {"name": content, "arguments": json.dumps({content: content, "n": [content]})}}
    messages = [
        {
            "role": "system",
            "content": content,
            "tools": [{"function": {"name": content}}],
            "response_format": [content],
        },
        {"role": "user", "content": content},
        {"role": "assistant", "content": content, "reasoning_content": content, "tool_calls": [call]},
        {"role": "tool", "content": content},
    ]
    clean = json.loads(json.dumps(messages, ensure_ascii=False).replace(str(special), "-"))
    for thinking in (False, True):
        prompt = prepare(messages, tokenizer, thinking=thinking)
        assert counts(tokenizer, prompt.ids) == counts(tokenizer, prepare(clean, tokenizer, thinking=thinking).ids)
        assert tokenizer.decode(prompt.ids) == prompt.text == chat.encode(messages, thinking=thinking)
        forged = prepare(messages, tokenizer, thinking=thinking, allow_special=True)
        assert forged.ids.count(tokenizer.specials[special]) > prompt.ids.count(tokenizer.specials[special])
    assert tokenizer.specials[special] not in prepare(content, tokenizer, bos=False).ids
    assert tokenizer.specials[special] in prepare(content, tokenizer, bos=False, allow_special=True).ids


def counts(tokenizer: Tokenizer, ids: list[int]) -> dict[str, int]:
    """How often each special token is among `ids`."""
    return {text: ids.count(i) for text, i in tokenizer.specials.items()}


@given(texts, st.booleans())
def test_a_prompt_is_tokenized_as_a_whole(tokenizer, library, text, thinking):
    """Content and the format's text around it are merged as the reference's one string is, but for special tokens."""
    assume(not any(special in text for special in tokenizer.specials))
    messages = [
        {"role": "system", "content": text, "tools": [{"function": {"name": text}}]},
        {"role": "developer", "content": text or "-"},
        {"role": "assistant", "content": text, "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]},
        {"role": "tool", "content": text},
    ]
    prompt = prepare(messages, tokenizer, thinking=thinking)
    assert prompt.ids == library.encode(chat.encode(messages, thinking=thinking), add_special_tokens=False).ids


def test_the_longest_special_token_counts(raw, library, cfg, tmp_path):
    """Where one begins like another, as in the library."""
    longer = [{**added(raw, template.THINK), "content": "<think>" + end, "id": 609 + i} for i, end in enumerate("xy")]
    text = json.dumps({**raw, "added_tokens": [*raw["added_tokens"], *longer]})
    (tmp_path / "tokenizer.json").write_text(text)
    ids = Tokenizer.load(tmp_path, cfg).encode("<think>x<think>y<think>", allow_special=True)
    assert ids == [609, 610, 602] == type(library).from_str(text).encode("<think>x<think>y<think>").ids


def test_a_vocabulary_that_makes_special_tokens_of_text(raw, cfg, tmp_path):
    """Its merges lead to one: encoding such text is refused."""
    vocab, merges = dict(raw["model"]["vocab"]), []
    for end in range(2, len(template.THINK) + 1):
        merges.append([template.THINK[: end - 1], template.THINK[end - 1]])
        vocab[template.THINK[:end]] = 620 + end
    vocab[template.THINK] = added(raw, template.THINK)["id"]
    vocab = {text: i for text, i in vocab.items() if i < 259 or text in ("".join(merge) for merge in merges)}
    model = {**raw["model"], "vocab": vocab, "merges": merges}
    cut = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps({**raw, "model": model, "pre_tokenizer": cut}))
    forged = Tokenizer.load(tmp_path, cfg)
    assert forged.decode(forged.encode("<thin")) == "<thin"
    with pytest.raises(CheckpointError, match="special tokens of plain text"):
        forged.encode("<think>")


def test_g02_a_prompt_says_what_it_is(tokenizer):
    """Raw text and messages both work, and neither is taken for the other."""
    raw = prepare("hello", tokenizer)
    assert raw.path == "raw text" and raw.text == template.BOS + "hello"
    assert raw.ids == [tokenizer.specials[template.BOS], *tokenizer.encode("hello")]
    talk = prepare([{"role": "user", "content": "hello"}], tokenizer, thinking=True)
    assert talk.path == "messages, thinking" and repr(talk.text) in repr(talk) and "'raw text'" in repr(raw)
    assert prepare([{"role": "user", "content": "hello"}], tokenizer).path == "messages, chat"
    with pytest.raises(UsageError, match="raw text was given"):
        prepare("hello", tokenizer, thinking=True)
    with pytest.raises(UsageError, match="raw text was given"):
        prepare("hello", tokenizer, tools=[{"function": {}}])


def test_a_sentence_begins_once(tokenizer):
    """A prompt that was encoded before brings its own beginning, where that may count."""
    text = chat.encode([{"role": "user", "content": "hi"}], thinking=False)
    bos = tokenizer.specials[template.BOS]
    assert prepare(text, tokenizer, allow_special=True).ids.count(bos) == 1
    assert prepare(text, tokenizer).ids.count(bos) == 1
    assert prepare("hi", tokenizer, bos=False).ids == tokenizer.encode("hi")


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb"])
def test_half_a_surrogate_pair(tokenizer, text):
    with pytest.raises(UsageError, match="surrogate"):
        tokenizer.encode(text)
    with pytest.raises(UsageError, match="surrogate"):
        prepare([{"role": "user", "content": text}], tokenizer)


@pytest.mark.parametrize("wrong", [[640], [-1], [2**40], [True], [1.0], ["1"], [None]])
def test_g25_ids_outside_the_vocabulary(tokenizer, wrong):
    """Of stop tokens, of what is decoded: refused by name."""
    with pytest.raises(UsageError, match=r"1 of 2 stop token ids .* 0\.\.639"):
        tokenizer.check_ids([5, *wrong], "stop token ids")
    with pytest.raises(UsageError, match="tokens"):
        tokenizer.decode(wrong)
    with pytest.raises(UsageError):
        Detokenizer(tokenizer).add(wrong)
    assert tokenizer.check_ids(np.array([5, 639]), "ids") == [5, 639]


def test_ids_that_no_token_has(tokenizer):
    """The model has rows to spare; what it should never say is visible where it does."""
    assert tokenizer.unused and max(tokenizer.specials.values()) < tokenizer.unused[0] and tokenizer.unused[-1] == 639
    assert tokenizer.decode([639]) == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("text", [5, None, b"x", [1, 2]])
def test_only_text_is_encoded(tokenizer, text):
    with pytest.raises(UsageError, match="only text"):
        tokenizer.encode(text)


def changed(raw: dict, change) -> dict:
    copied = copy.deepcopy(raw)
    return change(copied) or copied


def added(raw: dict, text: str) -> dict:
    return next(token for token in raw["added_tokens"] if token["content"] == text)


WRONG = {
    "another bos": (lambda raw: added(raw, template.BOS).update(id=2), ["two"]),
    "an added token twice": (lambda raw: raw["added_tokens"].append(dict(raw["added_tokens"][0])), ["twice"]),
    "an id twice": (lambda raw: added(raw, template.USER).update(id=70), ["two tokens: 70"]),
    "an id past the model": (lambda raw: added(raw, template.USER).update(id=640), ["640"]),
    "a negative id": (lambda raw: added(raw, template.USER).update(id=-5), ["whole number"]),
    "an id that is none": (lambda raw: added(raw, template.USER).update(id=600.5), ["whole number", "600.5"]),
    "no user token": (
        lambda raw: raw["added_tokens"].remove(added(raw, template.USER)),
        ["missing special tokens: <｜User｜>"],
    ),
    "a token that eats spaces": (lambda raw: added(raw, template.USER).update(lstrip=True), ["spaces", "User"]),
    "a byte without a token": (lambda raw: raw["model"]["vocab"].pop("Ā"), ["bytes without a token: 0x00"]),
    "no bytes": (lambda raw: raw.update(decoder={"type": "Metaspace"}), ["byte-level BPE"]),
    "another model": (lambda raw: raw["model"].update(type="Unigram"), ["byte-level BPE"]),
    "lost spaces": (
        lambda raw: raw.update(normalizer={"type": "Replace", "pattern": {"String": " "}, "content": ""}),
        ["normalizer"],
    ),
    "lower case": (lambda raw: raw.update(normalizer={"type": "Lowercase"}), ["normalizer"]),
    "a subword prefix": (lambda raw: raw["model"].update(continuing_subword_prefix="##"), ["subword prefix"]),
    "a word suffix": (lambda raw: raw["model"].update(end_of_word_suffix="</w>"), ["word suffix"]),
    "spaces in front": (
        lambda raw: raw["pre_tokenizer"]["pretokenizers"][-1].update(add_prefix_space=True),
        ["changes text"],
    ),
    "a bad regex": (
        lambda raw: raw["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": "("}),
        ["cannot use"],
    ),
    "an unknown part": (lambda raw: raw.update(pre_tokenizer={"type": "Mystery"}), ["pre_tokenizer"]),
    "merges of nothing": (lambda raw: raw["model"].update(merges=[["zz", "qq"]]), ["cannot use"]),
    "a list": (lambda raw: [raw], ["not a tokenizer"]),
    "tokens that are no objects": (lambda raw: raw.update(added_tokens=["x"]), ["not a tokenizer"]),
}


@pytest.mark.parametrize(("change", "said"), WRONG.values(), ids=WRONG)
def test_g24_what_is_not_the_models_tokenizer(raw, cfg, tmp_path, change, said):
    """One typed error that names the file and what is wrong with it."""
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed(raw, lambda copied: list_or_none(change(copied)))))
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.load(tmp_path, cfg)
    assert all(part in str(caught.value) for part in ["tokenizer", *said]), str(caught.value)


def list_or_none(value):
    return value if isinstance(value, list) else None


@pytest.mark.parametrize("field", ["bos_token_id", "eos_token_id"])
def test_g24_ids_of_another_config(folder, cfg, field):
    """The beginning and the end of a sentence are where the config says."""
    other = dataclasses.replace(cfg, **{field: 7 if field == "bos_token_id" else (7,)})
    with pytest.raises(CheckpointError, match=f"{field} is: 7"):
        Tokenizer.load(folder, other)


def test_what_would_add_cut_or_draw_tokens_is_left_out(raw, cfg, tmp_path, tokenizer):
    """Truncation, padding, a post-processor and dropout of the file change nothing."""

    def change(copied):
        copied["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
        copied["padding"] = None
        copied["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": str(template.BOS), "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {str(template.BOS): {"id": str(template.BOS), "ids": [0], "tokens": [str(template.BOS)]}},
        }
        copied["model"]["dropout"] = 0.9

    (tmp_path / "tokenizer.json").write_text(json.dumps(changed(raw, change)))
    text = "The quick brown fox. " * 5
    assert Tokenizer.load(tmp_path, cfg).encode(text) == tokenizer.encode(text)


def places(value, path=()):
    """Where everything in a tokenizer.json is; of tokens, merges and added tokens the first."""
    if isinstance(value, dict | list):
        many = path in (("model", "vocab"), ("model", "merges"), ("added_tokens",))
        for key in list(value if isinstance(value, dict) else range(len(value)))[: 1 if many else None]:
            yield (*path, key)
            yield from places(value[key], (*path, key))


def replaced(value, path, new):
    """`value` with something else at one place."""
    if not path:
        return new
    copied = copy.copy(value)
    copied[path[0]] = replaced(value[path[0]], path[1:], new)
    return copied


@pytest.mark.parametrize("junk", [None, -1, 0.5, "(", ["x"], {"type": "x"}], ids=repr)
def test_junk_anywhere_in_the_file(raw, cfg, tmp_path, junk):
    """It is refused with a typed error, or the tokenizer still brings text back; the library can end the process."""
    for path in places(raw):
        (tmp_path / "tokenizer.json").write_text(json.dumps(replaced(raw, path, junk)))
        try:
            made = Tokenizer.load(tmp_path, cfg)
        except CheckpointError as error:
            assert "tokenizer" in str(error)
        else:
            assert made.decode(made.encode("fox 12 你好 <think>")) == "fox 12 你好 <think>", path


def test_no_file_or_no_library(folder, cfg, tmp_path, monkeypatch):
    """Each says what to do."""
    with pytest.raises(CheckpointError, match="copy the original checkpoint's"):
        Tokenizer.load(tmp_path, cfg)
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(CheckpointError, match="no tokenizer.json"):
        Tokenizer.load(tmp_path, cfg)
    for other in (None, "converted"):
        with pytest.raises(UsageError, match="tokenizer must be"):
            prepare("hi", other)
        with pytest.raises(UsageError, match=r"model\.cfg"):
            Tokenizer.load(folder, other)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UsageError, match=r"dsv32-jax\[text\]"):
        Tokenizer.load(folder, cfg)


def test_a_file_without_end(cfg, tmp_path):
    """Its size is looked at before its bytes."""
    with open(tmp_path / "tokenizer.json", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match="the limit is"):
        Tokenizer.load(tmp_path, cfg)


def test_the_package_imports_nothing_heavy():
    """Encoding and parsing need neither JAX nor the tokenizers library, and the names are all there."""
    script = (
        "import sys; from dsv32_jax import chat; chat.encode; chat.parse_lenient; chat.Conversation\n"
        "assert not {'jax', 'tokenizers', 'numpy'} & set(sys.modules)\n"
        "assert all(getattr(chat, name) for name in dir(chat)) and getattr(chat, 'nonsense', None) is None"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_one_text_is_encoded(tokenizer):
    """A list of texts is not taken for one text, nor bytes; a person sees what a tokenizer is."""
    with pytest.raises(UsageError, match=r"not \['a', 'b'\]: encode each, \[tokenizer.encode"):
        tokenizer.encode(["a", "b"])
    with pytest.raises(UsageError, match="only text can be encoded, not 3"):
        tokenizer.encode(3)
    assert re.fullmatch(r"Tokenizer of \d+ tokens, \d+ of them special", repr(tokenizer))
