"""What a generation gives back."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Stats:
    """Where the time went. Rates count real tokens of all rows; compilation is in neither of them.

    `steps` counts the steps of all rows: with drafts a step makes several tokens, of which `accepted` were drafted.
    Tokens behind a stop string are among these two, not among `new_tokens`.
    """

    rows: int
    compile_seconds: float
    compiles: int
    prefill_seconds: float
    decode_seconds: float
    prompt_tokens: int
    new_tokens: int
    capacity: int
    steps: int
    drafts: int
    accepted: int

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens processed a second."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens made a second, after the first of each row, which the prefill makes."""
        decoded = self.new_tokens - self.rows
        return decoded / self.decode_seconds if self.decode_seconds and decoded > 0 else 0.0

    @property
    def acceptance(self) -> float:
        """The share of drafted tokens that the model kept; 0 without drafts."""
        return self.accepted / (self.steps * self.drafts) if self.steps and self.drafts else 0.0


@dataclasses.dataclass(frozen=True)
class Generation:
    """What was generated: one entry a row, the n continuations of a prompt next to each other.

    `tokens` are the new ones only, the end token included where the model chose one; with a stop string up to the token
    that completes it. `logprobs` are natural logarithms under the model's own distribution, before penalties,
    temperature and truncation; `top_logprobs` the likeliest tokens at each place, as many as were asked for.
    `finish_reason` is "stop" for an end token or stop string, "length" where max_new_tokens was reached, "interrupted"
    where Ctrl-C came first or a stream was left. `text` is None without a tokenizer; it leaves out end token and stop
    string.
    """

    tokens: list[list[int]]
    logprobs: list[list[float]]
    finish_reason: list[str]
    stats: Stats
    text: list[str] | None = None
    top_logprobs: list[list[tuple[tuple[int, float], ...]]] | None = None
