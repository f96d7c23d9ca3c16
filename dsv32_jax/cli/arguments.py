"""The arguments that say how to generate: one for each field of `Sampling` and each entry of `options.Options`."""

import argparse
import re
from typing import Any, NamedTuple

from ..errors import UsageError


class Argument(NamedTuple):
    """An argument as argparse takes it; `kind` reads its text. Without it on the command line the library decides."""

    kind: Any
    metavar: str
    help: str
    often: bool = False

    def add(self, parser: Any, name: str) -> None:
        action = "append" if self.often else "store"
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=self.kind, metavar=self.metavar, action=action, help=self.help)


def token_ids(text: str) -> list[int]:
    """Whole numbers with spaces or commas between them, in brackets or not."""
    words = [word for word in re.split(r"[\s,]+", text.strip().removeprefix("[").removesuffix("]")) if word]
    if not words or not all(re.fullmatch("[0-9]{1,10}", word) for word in words):
        raise argparse.ArgumentTypeError(f"{text[:60]!r} is not a list of token ids such as 0,17,42")
    return [int(word) for word in words]


def token_bias(text: str) -> tuple[int, float]:
    """One id and what is added to its logit, ID=VALUE."""
    name, _, value = text.partition("=")
    try:
        return int(name), float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:60]!r} is not ID=VALUE such as 42=-1.5") from None


def count_or_all(text: str) -> int | str:
    """A whole number, or "all"."""
    return text if text == "all" else int(text)


SAMPLING = {
    "temperature": Argument(float, "X", "0 is greedy, at most 5 (0); DeepSeek recommends 1 with --top-p 0.95"),
    "top_k": Argument(int, "K", "draw among the K likeliest tokens; 0: among all (0)"),
    "top_p": Argument(float, "P", "draw among the fewest tokens whose probability reaches P (1)"),
    "min_p": Argument(float, "P", "drop what is less likely than P times the likeliest (0)"),
    "repetition_penalty": Argument(float, "X", "above 1: less of what occurred, in the prompt too (1)"),
    "presence_penalty": Argument(float, "X", "taken from the logit of every token that was made (0)"),
    "frequency_penalty": Argument(float, "X", "taken once each time the token was made (0)"),
    "logit_bias": Argument(token_bias, "ID=X", "add X to the logit of a token; may be given again", True),
    "allowed_ids": Argument(token_ids, "IDS", "only these tokens may be chosen"),
    "forbidden_ids": Argument(token_ids, "IDS", "these tokens may not be chosen"),
    "seed": Argument(int, "N", "equal prompts with equal seeds give equal tokens (0)"),
}
"""The fields of `Sampling`."""

TURN = {
    "max_new_tokens": Argument(count_or_all, "N", "at most N tokens (64, in a chat 4096); all: what the context holds"),
    "min_new_tokens": Argument(int, "N", "no end token before N tokens (0)"),
    "stop": Argument(str, "TEXT", "end before this text; may be given again", True),
    "stop_token_ids": Argument(token_ids, "IDS", "end with any of these tokens"),
}
BATCH = {
    "n": Argument(int, "N", "continuations of each prompt, with seeds from --seed on (1)"),
    "top_logprobs": Argument(int, "N", "report the N likeliest tokens at each place, with --json (0)"),
    "batch_size": Argument(int, "N", "rows at once (as many as the free memory holds)"),
}
CACHE = {
    "capacity": Argument(int, "N", "tokens that a row's cache holds, prompt included"),
    "cache_dtype": Argument(str, "TYPE", "bfloat16, float32 or fp8 (the compute dtype)"),
    "draft": Argument(int, "K", "draft K tokens a step with the drafting layer; the result is the same (0)"),
}
"""The entries of `options.Options` that a command line can give."""


def add(parser: argparse.ArgumentParser, title: str, table: dict[str, Argument]) -> None:
    """Add the arguments of `table` under a title."""
    group = parser.add_argument_group(title)
    for name, argument in table.items():
        argument.add(group, name)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add what says which model, where, and in which precision."""
    parser.add_argument("checkpoint", metavar="CKPT", help="a converted checkpoint (dsv32 convert SRC CKPT)")
    group = parser.add_argument_group("model")
    group.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="compute dtype (bfloat16)")
    group.add_argument("--mesh", metavar="AXES", help="spread it over devices, for example expert=8,model=2")
    group.add_argument("--verify", choices=("quick", "full"), help="first compare files, or all bytes, with digests")
    group.add_argument("--quiet", action="store_true", help="nothing on stderr but errors")


def given(arguments: argparse.Namespace, *tables: dict[str, Argument]) -> dict[str, Any]:
    """What was given of the arguments of `tables`, as the library takes it."""
    found = {name: getattr(arguments, name, None) for table in tables for name in table}
    found = {name: value for name, value in found.items() if value is not None}
    if "logit_bias" in found:
        found["logit_bias"] = _bias(found["logit_bias"])
    if found.get("max_new_tokens") == "all":
        found["max_new_tokens"] = None
    return found


def _bias(pairs: list[tuple[int, float]]) -> dict[int, float]:
    if len(found := dict(pairs)) < len(pairs):
        raise UsageError("--logit-bias names a token twice; give each once")
    return found
