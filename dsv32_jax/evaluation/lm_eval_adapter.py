"""lm-evaluation-harness on a converted checkpoint (extra [eval]):

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
from ..chat.tool_calls import require_turn
from ..errors import UsageError, listing, pluralize, require_integer
from ..generation.generate import generate
from ..generation.options import Sampling
from ..generation.score import score
from ..model.model import Model
from .corpus import cut_windows
from .variant import Variant

INSTALLED = importlib.util.find_spec("lm_eval") is not None
TemplateLM: Any = importlib.import_module("lm_eval.api.model").TemplateLM if INSTALLED else object

LOG = logging.getLogger("dsv32_jax")

BATCH = 16
"""Default requests in a batch."""

NEW_TOKENS = 256
"""Default limit of generated tokens, if a task sets none."""

TASK_OPTIONS = ("until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k", "min_p")


class LmEval(TemplateLM):
    """The harness's interface to a model.

    A context begins with the beginning-of-sentence token. As the harness expects, a request longer than `max_length`
    (default: the model's longest context) loses the beginning of its context; this is logged and counted in
    `truncated`. A continuation that does not fit is an error. Special tokens in prompts are plain text, unless the
    prompt begins with the beginning-of-sentence token, as those of `apply_chat_template` do.
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
        """Load `checkpoint`, spelled as for `Variant.of`; a model in memory needs a tokenizer. `batch_size` may be
        text, as the harness passes it; arguments in `unused`, such as `device`, must be None."""
        if not INSTALLED:
            raise UsageError("lm-evaluation-harness is not installed: pip install 'dsv32-jax[eval]'")
        super().__init__()
        if unknown := [key for key, value in unused.items() if value is not None]:
            raise UsageError(f"unknown arguments ({len(unknown)}): {listing(sorted(unknown))}")
        self._variant = Variant.of(checkpoint)
        self._tokenizer: Any = tokenizer or self._variant.tokenizer()
        if self._tokenizer is None:
            raise UsageError("the harness needs text: put tokenizer.json into the checkpoint or pass tokenizer=")
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
        """The end-of-text token."""
        return self.model.cfg.eos_token_id[0]

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context."""
        return self.model.cfg.bos_token_id

    @property
    def max_gen_toks(self) -> int:
        """The limit of generated tokens, if a task sets none."""
        return min(NEW_TOKENS, self.max_length - 1)

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's name in the harness's caches."""
        origin = self.model.origin
        return "-".join(["dsv32", origin.digest or str(id(self.model)), *filter(None, [origin.edit])])

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return a name for the harness's records; the message format is a function, not a template."""
        return "DeepSeek-V3.2, thinking" if self.thinking else "DeepSeek-V3.2"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the prompt for messages. Without a generation prompt the last message is the beginning of the answer,
        which has no place in thinking mode. Raises UsageError where it is not the model's turn."""
        *earlier, last = [*chat_history, {"content": ""}] if add_generation_prompt else chat_history
        if not add_generation_prompt and self.thinking:
            raise UsageError("an answer cannot be begun for a model that thinks first: use thinking=False")
        text = encode(earlier, thinking=self.thinking)
        require_turn(earlier)
        return text + last["content"]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **display: Any) -> list[int]:
        """Return token ids, beginning with the beginning-of-sentence token unless `add_special_tokens` is False."""
        if string.startswith(template.BOS):
            return self._tokenizer.encode(string, allow_special=True)
        ids = self._tokenizer.encode(string)
        return ids if add_special_tokens is False else [self.prefix_token_id, *ids]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **display: Any
    ) -> list[tuple[float, bool]]:
        """Return the log-probability of each (text, context, continuation), and whether greedy decoding yields it."""
        counts = [len(continuation) for _, _, continuation in requests]
        rows = [[*(context or [self.prefix_token_id]), *continuation] for _, context, continuation in requests]
        answers = self._score(self._truncate(rows, self.max_length, max(counts) + 1), counts)
        for (text, _, _), answer in zip(requests, answers, strict=True):
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each text, window by window, with as much context as fits."""
        documents = [
            [self.prefix_token_id, *self.tok_encode(request.args[0], add_special_tokens=False)] for request in requests
        ]
        windows = cut_windows(documents, self.max_length, self.max_length - 1)
        totals = [0.0] * len(documents)
        answers = self._score([window.tokens for window in windows], [len(window.scored) for window in windows])
        for window, (logprob, _) in zip(windows, answers, strict=True):
            totals[window.document] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the continuation of each (context, options) up to a string of `until`, without its reasoning; nothing
        where the reasoning has no end."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(i)
        answers = [""] * len(requests)
        for group in groups.values():
            options = self._options(requests[group[0]].args[1])
            room = self.max_length - options["max_new_tokens"]
            prompts = self._truncate([self.tok_encode(requests[i].args[0]) for i in group], room, 1)
            texts = generate(
                self.model,
                prompts,
                tokenizer=self._tokenizer,
                cache_dtype=self._variant.cache_dtype,
                batch_size=min(self.batch_size, len(prompts)),
                **options,
            ).text
            for i, prompt, text in zip(group, prompts, texts or [], strict=True):
                if self._tokenizer.bytes_of(prompt[-1:]) == template.THINK.encode():
                    text = text.partition(template.THINK_END)[2]
                answers[i] = text
                self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return answers

    def _options(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Return the options of a task as `generate` names them. Raises UsageError if one is unknown."""
        if unknown := sorted(set(asked) - set(TASK_OPTIONS)):
            raise UsageError(
                f"unknown generation options of a task: {listing(unknown)}; known: {listing(TASK_OPTIONS)}"
            )
        until = asked.get("until") or []
        sample = asked.get("do_sample", asked.get("temperature", 0) > 0)
        knobs = {name: asked[name] for name in ("top_p", "top_k", "min_p") if name in asked}
        sampling = Sampling(temperature=float(asked.get("temperature", 1.0)), **knobs) if sample else Sampling()
        return {
            "stop": [until] if isinstance(until, str) else list(until),
            "max_new_tokens": int(asked.get("max_gen_toks", self.max_gen_toks)),
            "sampling": sampling,
        }

    def _truncate(self, rows: list[list[int]], room: int, least: int) -> list[list[int]]:
        """Return the last `room` tokens of each row. Raises UsageError if a request needs more, `least`."""
        if room < least:
            raise UsageError(
                f"a request needs {pluralize(least, 'token')}, but {room} are left of max_length={self.max_length} "
                "(generated tokens included)"
            )
        if cut := sum(len(row) > room for row in rows):
            self.truncated += cut
            LOG.warning("%d of %d requests lost the beginning of their context; %d tokens fit", cut, len(rows), room)
        return [row[-room:] for row in rows]

    def _score(self, rows: list[list[int]], counts: list[int]) -> list[tuple[float, bool]]:
        """Return the log-probability of the last `counts` tokens of each row, and whether each was the most likely."""
        scores = score(
            self.model,
            rows,
            top_logprobs=1,
            cache_dtype=self._variant.cache_dtype,
            batch_size=min(self.batch_size, len(rows)),
        )
        answers = []
        for row, count, logprobs, top in zip(rows, counts, scores.logprobs, scores.top_logprobs, strict=True):
            first = len(logprobs) - count
            greedy = [pairs[0][0] for pairs in top[first:]] == row[first + 1 :]
            answers.append((float(sum(logprobs[first:])), greedy))
        return answers


if INSTALLED:
    importlib.import_module("lm_eval.api.registry").register_model("dsv32")(LmEval)
