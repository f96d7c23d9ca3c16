"""The text of the demo model: Python's standard library, split by file, and conversations made of its functions.

    python tests/demo_training/corpus.py WORK [LIBRARY]

LIBRARY is the lib/python3.11 of a CPython 3.11 (default: that of this interpreter). Writes to WORK: tokenizer.json,
train.npy and heldout.npy (uint16 token ids, each document from its bos to its eos), heldout.txt (what is shipped).
"""

import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from conversations import conversations
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCABULARY = 4096
BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
ADDED = (
    "｜DSML｜", "<think>", "</think>",
    "<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>",
    "<｜User｜>", "<｜Assistant｜>", "<|EOT|>",
    "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>",
    "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>",
    "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>", "<｜tool▁sep｜>",
)  # fmt: skip
"""DeepSeek's added tokens in their order; the text has the first three and the two speakers only."""

PIECES = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
"""DeepSeek's pre-tokenizer: a text is cut by each of these in order."""

HELD_OUT_OF = 61
"""One library file in so many is held out."""

GENERATED = ("encodings", "site-packages", "__pycache__", "pydoc_data")
TESTS = ("test", "tests", "idle_test")


def main(work: Path, library: Path) -> None:
    files = dict(sources(library))
    heldout = [path for path in files if is_held_out(path)]
    training = {path: text for path, text in files.items() if path not in heldout}
    talks = list(conversations({path: text for path, text in training.items() if not is_test(path)}))
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(list(training.values()))
    tokenizer.save(str(work / "tokenizer.json"), pretty=False)
    (work / "heldout.txt").write_text("".join(f"##### {path}\n{files[path]}\n" for path in heldout), encoding="utf-8")
    save(work / "train.npy", tokenizer, [*(BOS + text + EOS for text in training.values()), *talks])
    save(work / "heldout.npy", tokenizer, [BOS + files[path] + EOS for path in heldout])
    print(f"{len(training)} files, {len(talks)} conversations; held out: {', '.join(heldout)}")


def sources(library: Path) -> Iterator[tuple[str, str]]:
    """Path and text of the Python files in UTF-8 that people wrote."""
    for file in sorted(library.rglob("*.py")):
        path = file.relative_to(library)
        if set(path.parts) & set(GENERATED) or file.stat().st_size < 200:
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if sum(letter.isdigit() or letter > "~" for letter in text) < len(text) / 5:
            yield path.as_posix(), text


def is_test(path: str) -> bool:
    return bool(set(path.split("/")) & set(TESTS))


def is_held_out(path: str) -> bool:
    """Of a library file, by a hash of its path: the split does not depend on what else is there."""
    return not is_test(path) and int(hashlib.sha256(path.encode()).hexdigest(), 16) % HELD_OUT_OF == 0


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE with DeepSeek's pre-tokenizer and special tokens: bos 0, eos 1, pad 2, added ones at the end."""
    tokenizer = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(piece), "isolated") for piece in PIECES]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(ADDED),
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False, special="｜>" in text) for text in ADDED])
    assert tokenizer.get_vocab_size() == VOCABULARY
    return tokenizer


def save(file: Path, tokenizer: Tokenizer, documents: list[str]) -> None:
    encoded = tokenizer.encode_batch_fast(documents, add_special_tokens=False)
    np.save(file, np.concatenate([np.array(each.ids, np.uint16) for each in encoded]))
    print(f"{file.name}: {sum(map(len, documents)):,} characters, {sum(len(each.ids) for each in encoded):,} tokens")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(*sys.argv[2:] or [sysconfig.get_paths()["stdlib"]]))
