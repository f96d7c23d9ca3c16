"""`dsv32 demo`: from a Hugging Face folder to text, with the small trained model that is shipped."""

import argparse
import contextlib
import functools
import json
import math
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import UsageError
from ..kernels import read_choice
from ..system.progress import format_size
from ..system.wrapping import wrap_lines

CHECKPOINT = Path(__file__).parents[1] / "demo_checkpoint"

PROMPT = '''def read_lines(path):
    """Return the lines of a text file without their line breaks."""
'''
NEXT = "next: dsv32 demo --keep converted, which leaves the model in converted/ for dsv32 chat and ds.load"
PASSAGE = ("class BaseProcess(object):", "    def terminate(")
"""The held-out paragraph: from the first mark to the second."""


def run(arguments: argparse.Namespace) -> int:
    """Convert, load, generate, and measure the perplexity of a held-out paragraph; print each step and its time, or
    all of them as JSON."""
    from .. import convert

    seconds: dict[str, float] = {}
    stream = sys.stderr if arguments.json else sys.stdout

    def show(text: str) -> None:
        print(wrap_lines(text, stream=stream), file=stream, flush=True)

    time_step = functools.partial(_time_step, show, seconds)
    read_choice()
    if arguments.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens must be 1 or more, not {arguments.max_new_tokens}; nothing was run")
    with tempfile.TemporaryDirectory(prefix="dsv32-demo-") as scratch:
        target = arguments.keep or Path(scratch, "converted")
        with time_step("converted a Hugging Face checkpoint") as report:
            manifest = convert.convert(CHECKPOINT, target)
            size = sum(file.stat().st_size for file in CHECKPOINT.glob("*.safetensors"))
            report(f"{format_size(size)} of FP8 and BF16, {len(manifest.leaves)} weights, lossless")
        with time_step("imported JAX and loaded the model") as report:
            from .. import chat
            from ..checkpoint.load import load
            from ..generation.generate import generate
            from ..generation.options import Sampling
            from ..generation.score import score
            from ..system.compilation import is_cache_enabled

            model = load(target)
            tokenizer = chat.Tokenizer.load(target, model.cfg)
            report(f"{model.cfg.num_hidden_layers} layers + MTP, computing in {model.dtype}")
        with time_step("generated text") as report:
            gen = generate(
                model,
                [chat.prepare(PROMPT, tokenizer).ids],
                max_new_tokens=arguments.max_new_tokens,
                sampling=Sampling(temperature=0.7, top_p=0.95, seed=5),
                tokenizer=tokenizer,
                stop=["\ndef", "\nclass", "\n```"],
            )
            done = "loading" if gen.stats.loads == gen.stats.compiles else "compiling"
            cached = ", cached for the next run" if done == "compiling" and is_cache_enabled() else ""
            report(f"{gen.stats.compile_seconds:.1f} s of it {done} {gen.stats.compiles} programs{cached}")
        (text,) = gen.text or [""]
        show(PROMPT + text)
        with time_step("read a held-out paragraph") as report:
            heldout = (CHECKPOINT / "heldout.txt").read_text(encoding="utf-8")
            ids = chat.prepare(heldout[heldout.index(PASSAGE[0]) : heldout.index(PASSAGE[1])], tokenizer).ids
            (logprobs,) = score(model, [ids]).logprobs
            perplexity = math.exp(-sum(logprobs) / len(logprobs))
            report(f"perplexity {perplexity:.1f} over {len(logprobs)} tokens, vocabulary {model.cfg.vocab_size}")
    show("13 million parameters, trained for nine minutes: the text is often wrong, the path is the real model's.")
    show(f"next: dsv32 chat {shlex.quote(str(arguments.keep))}" if arguments.keep else NEXT)
    if arguments.json:
        print(json.dumps({"prompt": PROMPT, "text": text, "perplexity": perplexity, "seconds": seconds}))
    return 0


@contextlib.contextmanager
def _time_step(show: Callable[[str], None], seconds: dict[str, float], name: str) -> Iterator[Callable[[str], None]]:
    """Yield a function that shows a step and its result, with the seconds since its start, which join `seconds`."""
    start = time.perf_counter()

    def report(result: str) -> None:
        seconds[name] = round(time.perf_counter() - start, 3)
        show(f"{seconds[name]:6.1f} s  {name}: {result}")

    yield report
