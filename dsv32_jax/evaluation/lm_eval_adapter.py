"""lm-evaluation-harness on a converted checkpoint (extra [eval]), in this process:

from lm_eval import simple_evaluate
simple_evaluate(LmEval("converted"), tasks=["arc_easy"], num_fewshot=0)

Importing this file also registers the name "dsv32": `model="dsv32", model_args={"checkpoint": "converted"}`.
"""

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..chat import encode, template
from ..errors import UsageError, listing, require_integer
from ..generation.generate import generate
from ..generation.options import Sampling
from ..generation.score import score
from ..model.model import Model
from .variant import Variant
from .windows import windows

INSTALLED = importlib.util.find_spec("lm_eval") is not None
TemplateLM: Any = importlib.import_module("lm_eval.api.model").TemplateLM if INSTALLED else object

LOG = logging.getLogger("dsv32_jax")

BATCH = 16
"""Requests that are answered at once by default."""

NEW_TOKENS = 256
"""Generated at most where a task does not say."""

UNDERSTOOD = ("until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k", "min_p")


class LmEval(TemplateLM):
    """A model as the harness asks for it.

    A context begins with the beginning-of-sentence token. A request longer than `max_length` (the model's longest
    context) loses the beginning of its context, as the harness wants it; how many did is logged, and `truncated` counts
    them. A continuation that does not fit is an error. In prompts special tokens are plain text, unless they come from
    `apply_chat_template`, which begins with the beginning-of-sentence token.
    """

    def __init__(
        self,
        checkpoint: Variant | Model | str | Path,
        *,
        tokenizer: Any = None,
        max_length: int | None = None,
        batch_size: int | str | None = None,
        thinking: bool = False,
        **unused: Any,
    ):
        """`checkpoint` and its spelling are those of `Variant.of`; a model in memory needs a tokenizer. `batch_size`
        may be text, as the harness passes it on; `unused` must be empty or None, as `device` is there."""
        if not INSTALLED:
            raise UsageError("lm-evaluation-harness is not installed: pip install 'dsv32-jax[eval]'")
        super().__init__()
        if meant := {key: value for key, value in unused.items() if value is not None}:
            raise UsageError(f"unknown arguments ({len(meant)}): {listing(sorted(meant))}")
        self._variant = Variant.of(checkpoint)
        found = tokenizer or self._variant.tokenizer()
        if found is None:
            raise UsageError("the harness asks in text: the checkpoint needs a tokenizer.json, a model a tokenizer")
        self._tokenizer: Any = found
        self.model = self._variant.load()
        cfg = self.model.cfg
        self.max_length = cfg.max_position_embeddings if max_length is None else max_length
        require_integer("max_length", self.max_length, 2, cfg.max_position_embeddings)
        given = str(BATCH if batch_size is None else batch_size)
        self.batch_size: Any = int(given) if given.isdecimal() else given
        require_integer("batch_size", self.batch_size, 1, 1 << 20)
        self.thinking = thinking
        self.truncated = 0

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.model.cfg.eos_token_id[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        return self.model.cfg.bos_token_id

    @property
    def max_gen_toks(self) -> int:
        """Tokens generated at most where a task does not say."""
        return min(NEW_TOKENS, self.max_length - 1)

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in the harness's caches."""
        return f"dsv32-{self.model.origin.digest or id(self.model)}"

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The harness records it; the message format is a function, not a template."""
        return "DeepSeek-V3.2, thinking" if self.thinking else "DeepSeek-V3.2"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt of messages, in the model's own format; of an unfinished answer, the answer stays open."""
        if add_generation_prompt:
            return encode(chat_history, thinking=self.thinking)
        *earlier, begun = chat_history
        return encode(earlier, thinking=self.thinking) + begun["content"]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **display: Any) -> list[int]:
        """Token ids, the beginning-of-sentence token first unless `add_special_tokens` is False or it is there."""
        if string.startswith(template.BOS):
            return self._tokenizer.encode(string, allow_special=True)
        ids = self._tokenizer.encode(string)
        return ids if add_special_tokens is False else [self.prefix_token_id, *ids]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **display: Any
    ) -> list[tuple[float, bool]]:
        """For each (text, context, continuation) the log-probability of the continuation, and whether it is greedy."""
        wanted = [len(continuation) for _, _, continuation in requests]
        rows = [[*(context or [self.prefix_token_id]), *continuation] for _, context, continuation in requests]
        answers = self._scored(self._fitting(rows, self.max_length, max(wanted) + 1), wanted)
        for (text, _, _), answer in zip(requests, answers, strict=True):
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """For each text its whole log-probability, window by window, each token with what context fits."""
        documents = [
            [self.prefix_token_id, *self.tok_encode(request.args[0], add_special_tokens=False)] for request in requests
        ]
        parts = windows(documents, self.max_length, self.max_length - 1)
        totals = [0.0] * len(documents)
        answers = self._scored([part.tokens for part in parts], [len(part.tokens) - part.first for part in parts])
        for part, (logprob, _) in zip(parts, answers, strict=True):
            totals[part.document] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """For each (context, options) what the model goes on with, up to the first of the strings `until`."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(i)
        answers = [""] * len(requests)
        for group in groups.values():
            options = self._options(requests[group[0]].args[1])
            room = self.max_length - options["max_new_tokens"]
            prompts = self._fitting([self.tok_encode(requests[i].args[0]) for i in group], room, 1)
            made = generate(
                self.model,
                prompts,
                tokenizer=self._tokenizer,
                cache_dtype=self._variant.cache_dtype,
                batch_size=min(self.batch_size, len(prompts)),
                **options,
            )
            for i, text in zip(group, made.text or [], strict=True):
                answers[i] = text
                self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return answers

    def _options(self, asked: dict[str, Any]) -> dict[str, Any]:
        """What `generate` calls the options of a task. Raises UsageError on unknown ones."""
        if unknown := sorted(set(asked) - set(UNDERSTOOD)):
            raise UsageError(f"a task asks to generate with {listing(unknown)}; known are {listing(UNDERSTOOD)}")
        until = asked.get("until") or []
        drawn = asked.get("do_sample", asked.get("temperature", 0) > 0)
        knobs = {name: asked[name] for name in ("top_p", "top_k", "min_p") if name in asked}
        sampling = Sampling(temperature=float(asked.get("temperature", 1.0)), **knobs) if drawn else Sampling()
        return {
            "stop": [until] if isinstance(until, str) else list(until),
            "max_new_tokens": int(asked.get("max_gen_toks", self.max_gen_toks)),
            "sampling": sampling,
        }

    def _fitting(self, rows: list[list[int]], room: int, least: int) -> list[list[int]]:
        """The last `room` tokens of each row; of some, `least` must be there."""
        if room < least:
            raise UsageError(
                f"a request needs {least} tokens and {room} are left for it: max_length is {self.max_length}, "
                "what is to be generated included"
            )
        if cut := sum(len(row) > room for row in rows):
            self.truncated += cut
            LOG.warning("%d of %d requests lost the beginning of their context: %d tokens fit", cut, len(rows), room)
        return [row[-room:] for row in rows]

    def _scored(self, rows: list[list[int]], wanted: list[int]) -> list[tuple[float, bool]]:
        """The log-probability of the last `wanted` tokens of each row, and whether each was the likeliest."""
        found = score(
            self.model,
            rows,
            top_logprobs=1,
            cache_dtype=self._variant.cache_dtype,
            batch_size=min(self.batch_size, len(rows)),
        )
        answers = []
        for row, count, logprobs, top in zip(rows, wanted, found.logprobs, found.top_logprobs, strict=True):
            first = len(logprobs) - count
            greedy = all(
                likeliest[0][0] == token for likeliest, token in zip(top[first:], row[first + 1 :], strict=True)
            )
            answers.append((float(sum(logprobs[first:])), greedy))
        return answers


if INSTALLED:
    importlib.import_module("lm_eval.api.registry").register_model("dsv32")(LmEval)
