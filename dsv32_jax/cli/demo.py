"""`dsv32 demo`: the whole way from a Hugging Face folder to text, with the small trained model that is shipped."""

import math
import tempfile
import time
from pathlib import Path

from ..errors import UsageError
from ..kernels import variable

CHECKPOINT = Path(__file__).parents[1] / "demo_checkpoint"

PROMPT = '''def read_lines(path):
    """Return the lines of a text file without their line breaks."""
'''
PASSAGE = ("class BaseProcess(object):", "    def terminate(")
"""The held-out paragraph: from the first mark to the second."""


def run(new_tokens: int) -> None:
    """Convert, load, generate, and measure the perplexity of a held-out paragraph; print what happened and how long."""
    from .. import convert

    variable.asked()
    if new_tokens < 1:
        raise UsageError(f"the demo generates 1 token or more, not {new_tokens}; nothing was run")
    with tempfile.TemporaryDirectory(prefix="dsv32-demo-") as scratch:
        target = Path(scratch, "converted")
        with _timed("converted a Hugging Face checkpoint") as done:
            manifest = convert.convert(CHECKPOINT, target)
            size = sum(file.stat().st_size for file in CHECKPOINT.glob("*.safetensors"))
            done(f"{size / 1e6:.1f} MB of FP8 and BF16, {len(manifest.leaves)} leaves, every byte kept")
        with _timed("imported JAX and loaded the model") as done:
            from .. import chat
            from ..checkpoint.load import load
            from ..generation.generate import generate
            from ..generation.options import Sampling
            from ..generation.score import score
            from ..system.compilation import is_cache_enabled

            model = load(target)
            tokenizer = chat.Tokenizer.load(target, model.cfg)
            done(f"{model.cfg.num_hidden_layers} layers + MTP, computing in {model.dtype}")
        with _timed("generated text") as done:
            ids = chat.prepare(PROMPT, tokenizer).ids
            sampling = Sampling(temperature=0.7, top_p=0.95, seed=5)
            made = generate(
                model,
                [ids],
                max_new_tokens=new_tokens,
                sampling=sampling,
                tokenizer=tokenizer,
                stop=["\ndef", "\nclass", "\n```"],
            )
            stats = made.stats
            programs = f"{stats.compiles} programs{', cached for the next run' if is_cache_enabled() else ''}"
            done(f"{stats.compile_seconds:.1f} s of it compiling {programs}")
        print(PROMPT + (made.text or [""])[0])
        with _timed("read a paragraph that it was not trained on") as done:
            text = (CHECKPOINT / "heldout.txt").read_text(encoding="utf-8")
            ids = chat.prepare(text[text.index(PASSAGE[0]) : text.index(PASSAGE[1])], tokenizer).ids
            (logprobs,) = score(model, [ids]).logprobs
            perplexity = math.exp(-sum(logprobs) / len(logprobs))
            done(f"perplexity {perplexity:.1f} over {len(logprobs)} tokens of a vocabulary of {model.cfg.vocab_size}")
    print(
        "13 million parameters, trained for nine minutes: the text is often wrong; the path is that of the real model."
    )


class _timed:
    """Prints one line for what ran inside the `with`: its seconds, what it was, and what `done` was told."""

    def __init__(self, what: str):
        self.what, self.note = what, ""

    def __enter__(self):
        self.start = time.perf_counter()
        return lambda note: setattr(self, "note", note)

    def __exit__(self, kind, *_):
        if kind is None:
            print(f"{time.perf_counter() - self.start:6.1f} s  {self.what}: {self.note}", flush=True)
