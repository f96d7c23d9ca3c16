"""`dsv32 demo`: from a Hugging Face folder to text, with the small trained model that is shipped."""

import argparse
import json
import math
import shlex
import sys
import tempfile
import time
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
    """Convert, load, generate, and measure perplexity on a held-out paragraph; print steps and times, or JSON."""
    from .. import convert

    seconds: dict[str, float] = {}
    begun = time.perf_counter()
    stream = sys.stderr if arguments.json else sys.stdout

    def show(text: str) -> None:
        print(wrap_lines(text, stream=stream), file=stream, flush=True)

    def report(step: str, result: str) -> None:
        nonlocal begun
        seconds[step] = round(time.perf_counter() - begun, 3)
        show(f"{seconds[step]:6.1f} s  {step}: {result}")
        begun = time.perf_counter()

    read_choice()
    if arguments.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens must be 1 or more, not {arguments.max_new_tokens}; nothing was run")
    with tempfile.TemporaryDirectory(prefix="dsv32-demo-") as scratch:
        target = arguments.keep or Path(scratch, "converted")
        manifest = convert.convert(CHECKPOINT, target)
        size = sum(file.stat().st_size for file in CHECKPOINT.glob("*.safetensors"))
        weights = f"{len(manifest.leaves)} weights, lossless"
        report("converted a Hugging Face checkpoint", f"{format_size(size)} of FP8 and BF16, {weights}")
        from .. import chat
        from ..checkpoint.load import load
        from ..generation.generate import generate
        from ..generation.options import Sampling
        from ..generation.score import score
        from ..system.compilation import is_cache_enabled

        model = load(target)
        tokenizer = chat.Tokenizer.load(target, model.cfg)
        layers = model.cfg.num_hidden_layers
        report("imported JAX and loaded the model", f"{layers} layers + MTP, computing in {model.dtype}")
        options = {"max_new_tokens": arguments.max_new_tokens, "stop": ["\ndef", "\nclass", "\n```"]}
        sampling, prompt = Sampling(temperature=0.7, top_p=0.95, seed=5), chat.prepare(PROMPT, tokenizer).ids
        gen = generate(model, [prompt], sampling=sampling, tokenizer=tokenizer, **options)
        how = "loading" if gen.stats.loads == gen.stats.compiles else "compiling"
        cached = ", cached for the next run" if how == "compiling" and is_cache_enabled() else ""
        report("generated text", f"{gen.stats.compile_seconds:.1f} s of it {how} {gen.stats.compiles} programs{cached}")
        (text,) = gen.text or [""]
        show(PROMPT + text)
        heldout = (CHECKPOINT / "heldout.txt").read_text(encoding="utf-8")
        ids = chat.prepare(heldout[heldout.index(PASSAGE[0]) : heldout.index(PASSAGE[1])], tokenizer).ids
        (logprobs,) = score(model, [ids]).logprobs
        perplexity = math.exp(-sum(logprobs) / len(logprobs))
        done = f"perplexity {perplexity:.1f} over {len(logprobs)} tokens, vocabulary {model.cfg.vocab_size}"
        report("read a held-out paragraph", done)
    show("13 million parameters, trained for nine minutes: the text is often wrong, the path is the real model's.")
    show(f"next: dsv32 chat {shlex.quote(str(arguments.keep))}" if arguments.keep else NEXT)
    if arguments.json:
        print(json.dumps({"prompt": PROMPT, "text": text, "perplexity": perplexity, "seconds": seconds}))
    return 0
