"""The command lines of most commands. Nothing here needs JAX, so `--help` answers at once."""

import argparse
import dataclasses
import importlib
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from ..errors import UsageError, spell_option
from ..generation.options import Options, Sampling, explain, specs
from ..system.interrupts import acknowledge_interrupt
from . import multihost_launch

LENGTH, BATCH, CACHE = (
    [name for name, spec in specs(Options).items() if spec.group == group] for group in ("length", "batch", "cache")
)
"""Names of Options by their group."""

OWN = [*LENGTH, "n", "top_logprobs"]
"""Those that each prompt has for itself."""

SHARED = [name for name in [*BATCH, *CACHE] if name not in OWN]
"""Those of all prompts together."""

CHAT_DEFAULTS = {"max_new_tokens": 4096, "capacity": 16384}
"""Defaults of a chat where they differ from those of the library. A cache of fixed size compiles its programs once."""

GENERATE = """The continuation goes to stdout, everything else to stderr. Without PROMPT or --file, or with -, the
prompt is read from stdin. Text is used verbatim, including a trailing newline."""

GENERATE_EPILOG = """A .jsonl file holds one request per line: an object with "prompt" (text), "messages" (as in
OpenAI's API) or "ids"; "thinking" and "tools" with messages; "id", which the result repeats; and options of sampling,
length and batch under their names in Python, which are those above with _ for -: "temperature", "max_new_tokens" (-n),
"stop"; but "n" is --samples. Results are JSON lines in the order of requests; "line" tells which request each belongs
to. The first Ctrl-C prints what was generated so far and ends with exit code 130."""

CHECKPOINT_DEFAULTS = "What a checkpoint's generation_config.json asks for comes before these defaults."

CHAT = "Talk to the model; /help lists commands. Of piped input every line is a turn."

SERVE = """Answer HTTP requests as OpenAI (/v1/chat/completions, /v1/completions, /v1/models) and Anthropic
(/v1/messages) define them; also /tokenize, /detokenize, /health and /metrics. Clients are refused until the model is
loaded and what first requests need is compiled. Ctrl-C or SIGTERM lets running answers end."""

DOCTOR = "Show what is installed, devices, memory and disk, and whether a checkpoint would load."


def add_commands(commands: Any) -> None:
    """Add the parsers to the subparsers `commands`; each sets `run`, which takes the parsed arguments."""
    _add_demo(commands)
    _add_generate(commands)
    _add_chat(commands)
    _add_serve(commands)
    _add_doctor(commands)
    _add_fit(commands)


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser("demo", help="convert, load and run a small trained model: a minute, no download")
    length = "maximum new tokens (default: 80)"
    demo.add_argument("-n", "--max-new-tokens", type=int, default=80, metavar="N", help=length)
    demo.add_argument("--keep", type=Path, metavar="DIR", help="leave the converted model in DIR, for other commands")
    demo.add_argument("--json", action="store_true", help="print one JSON object, and the steps to stderr")
    demo.set_defaults(run=_run_module("demo"))


def _add_generate(commands: Any) -> None:
    generate = commands.add_parser(
        "generate",
        help="continue a prompt, or a file of them",
        description=GENERATE,
        epilog=GENERATE_EPILOG,
    )
    _add_model(generate)
    add = generate.add_argument
    add("prompt", metavar="PROMPT", nargs="?", help="text to continue; - for stdin")
    add("--file", type=Path, metavar="FILE", help="a text file holds one prompt; a .jsonl file one request per line")
    add("--chat", action="store_true", help="send the text as a user's message instead of continuing it")
    add("--system", metavar="TEXT", help="send this system text before the message")
    add("--think", action="store_true", help="with messages: think before the answer; the reasoning goes to stderr")
    add("--allow-special", action="store_true", help="let the text of special tokens in prompts become such tokens")
    add("--ids", action="store_true", help="token ids in and out; needs no tokenizer")
    stream = "write each token as soon as it is generated (default: on a terminal)"
    add("--stream", action=argparse.BooleanOptionalAction, help=stream)
    add("--json", action="store_true", help="write a JSON object for each result (with --stream: for each token)")
    layerwise = "compile one program for each kind of layer, or the whole model (default: for deep models on a CPU)"
    add("--layerwise", action=argparse.BooleanOptionalAction, help=layerwise)
    _add_options(generate, "sampling", Sampling, specs(Sampling))
    _add_options(generate, "length, batch and cache", Options, [*LENGTH, *BATCH, *CACHE])
    multihost_launch.add_arguments(generate)
    run = _run_module("generate_command")
    generate.set_defaults(run=lambda arguments: multihost_launch.run(arguments, run))
    generate.trailing_positional = "prompt"


def _add_chat(commands: Any) -> None:
    chat = commands.add_parser("chat", help="talk to the model", description=CHAT)
    _add_model(chat)
    add = chat.add_argument
    add("--system", metavar="TEXT", help="system text")
    add("--tools", type=Path, metavar="FILE", help="JSON list of tools, as in OpenAI's API; you type the results")
    think = "think first, and show or hide it (default: off; --think alone: on)"
    add("--think", choices=("on", "off", "hide"), nargs="?", const="on", help=think)
    add("--load", type=Path, metavar="FILE", help="continue a conversation that /save wrote")
    add("--no-history", action="store_true", help="do not save what you type for next time")
    _add_options(chat, "sampling", Sampling, specs(Sampling))
    _add_options(chat, "length and cache", Options, [*LENGTH, *CACHE], CHAT_DEFAULTS)
    chat.set_defaults(run=_run_module("chat_command"))


def _add_serve(commands: Any) -> None:
    serve = commands.add_parser("serve", help="answer HTTP requests", description=SERVE)
    _add_model(serve)
    add = serve.add_argument_group("server").add_argument
    add("--host", default="127.0.0.1", metavar="HOST", help="address to listen on (default: 127.0.0.1)")
    add("--port", type=int, default=8000, metavar="N", help="port to listen on; 0: a free one (default: 8000)")
    add("--name", metavar="NAME", help="what clients call the model (default: the name of the folder)")
    add("--api-key-file", type=Path, metavar="FILE", help="a file of keys, one a line: clients must send one of them")
    add("--rows", type=int, default=16, metavar="N", help="rows at once (default: 16)")
    add("--context", type=int, metavar="N", help="tokens of a row, prompt included (default: the longest context)")
    add("--pages", type=int, metavar="N", help="pages of 64 tokens for all rows (default: as many as fit in memory)")
    add("--waiting", type=int, default=256, metavar="N", help="rows that may wait; others are refused (default: 256)")
    add("--timeout", type=float, default=3600, metavar="SECONDS", help="the longest answer (default: 3600)")
    _add_options(serve, "cache", Options, ["cache_dtype", "draft"])
    serve.set_defaults(run=_run_module("serve_command"))


def _add_doctor(commands: Any) -> None:
    doctor = commands.add_parser("doctor", help="show what is installed and would run", description=DOCTOR)
    doctor.add_argument("checkpoint", metavar="CHECKPOINT", nargs="?", type=Path, help="a checkpoint to examine")
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    doctor.set_defaults(run=_run_module("doctor"))


def _add_fit(commands: Any) -> None:
    fit = commands.add_parser(
        "fit",
        help="whether weights, cache and activations fit in memory",
        description="Predict a model's memory on each device without loading it. Exit code 5 if it does not fit.",
    )
    add = fit.add_argument
    add("path", metavar="CHECKPOINT", help="a converted checkpoint, or a config.json")
    add("--context", type=int, metavar="N", help="tokens in a row, prompt included (default: 4096, or the maximum)")
    add("--batch", type=int, default=1, metavar="B", help="rows at once (default: 1)")
    add("--mesh", metavar="AXES", help="for example expert=8,model=2 (default: one device)")
    add("--cache-dtype", metavar="DTYPE", help="KV cache storage, also fp8 (default: --dtype)")
    add("--dtype", default="bfloat16", metavar="DTYPE", help="compute dtype, or float32 (default: bfloat16)")
    add("--draft", type=int, default=0, metavar="K", help="tokens drafted at each step (default: 0)")
    add("--format", choices=("nvfp4", "fp8", "bf16"), help="weight format of a config.json (default: nvfp4)")
    add("--experts", default="device", metavar="WHERE", help="device, host, or host:N (the first N layers)")
    add("--device-memory", metavar="SIZE", help="for example 141GB (default: what is free here)")
    add("--host-memory", metavar="SIZE", help="for example 256GiB (default: what is free here)")
    add("--device-speed", metavar="SIZE", help="bytes a second that a device copies, for example 2.2TB")
    add("--host-speed", metavar="SIZE", help="bytes a second that the host reads (default: measured, with --experts)")
    add(
        "--disk-speed",
        metavar="SIZE",
        help="bytes a second that weights are read at, for example 2GB (default: measured)",
    )
    add("--json", action="store_true", help="print one JSON object")
    fit.set_defaults(run=_run_module("fit_command"))


def _run_module(module: str) -> Callable[[argparse.Namespace], int]:
    """Return `run` of a module of this folder, imported when it is called."""
    return acknowledge_interrupt()(lambda arguments: importlib.import_module(f".{module}", __package__).run(arguments))


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a converted checkpoint (dsv32 convert SRC DST)")
    add = parser.add_argument_group("model").add_argument
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="compute dtype (default: bfloat16)")
    add("--mesh", metavar="AXES", help="spread the model over devices, for example expert=8,model=2")
    experts = "where routed experts lie: device, host, or host:N (of the first N layers)"
    add("--experts", default="device", metavar="WHERE", help=experts)
    add("--verify", choices=("quick", "full"), help="first check the files, or all bytes, against their checksums")
    add("--quiet", action="store_true", help="write only errors to stderr")


def _add_options(parser: Any, title: str, declaration: type, names: Any, defaults: Mapping[str, int] = {}) -> None:
    """Add an argument for each of the fields `names` of Sampling or Options. `defaults`: those shown in the help."""
    group = parser.add_argument_group(title, CHECKPOINT_DEFAULTS if declaration is Sampling else None)
    for field in dataclasses.fields(declaration):
        spec = field.metadata["spec"]
        if field.name in names:
            repeats = spec.kind in ("strings", "token_biases")
            group.add_argument(
                *(["-n"] if field.name == "max_new_tokens" else []),
                spell_option(field.name),
                dest=field.name,
                type=_parse_count_or(spec.none) if spec.none else READERS[spec.kind],
                metavar=spec.metavar,
                action="append" if repeats else "store",
                help=explain(field, spec.none, defaults.get(field.name)) + "; may be repeated" * repeats,
            )


def collect_sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the sampling parameters that were given, as `Sampling` takes them."""
    given = collect_options(arguments, specs(Sampling))
    if "logit_bias" in given:
        pairs, given["logit_bias"] = given["logit_bias"], dict(given["logit_bias"])
        if len(given["logit_bias"]) < len(pairs):
            raise UsageError("--logit-bias names a token twice")
    return given


def collect_options(arguments: argparse.Namespace, names: Collection[str]) -> dict[str, Any]:
    """Return the options among `names` that were given, as the library takes them."""
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    return {name: None if value is UNSET else value for name, value in given.items()}


UNSET = object()
"""Marks an option that the command line sets to None, as `all` does."""


def _parse_count_or(none: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            return UNSET if text == none else int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text[:60]!r} is neither a whole number nor {none!r}") from None

    return parse


def parse_token_ids(text: str) -> list[int]:
    """Parse whole numbers separated by spaces or commas, in brackets or not."""
    words = [word for word in re.split(r"[\s,]+", text.strip().removeprefix("[").removesuffix("]")) if word]
    if not words or not all(re.fullmatch("[0-9]{1,10}", word) for word in words):
        raise argparse.ArgumentTypeError(f"{text[:60]!r} is not a list of token ids such as 0,17,42")
    return [int(word) for word in words]


def _parse_token_bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:60]!r} is not ID=VALUE such as 42=-1.5") from None


READERS: dict[str, Callable[[str], Any]] = {
    **{"count": int, "number": float, "seed": int, "strings": str, "dtype": str},
    **{"token_ids": parse_token_ids, "token_biases": _parse_token_bias},
}
"""How each kind of option is read from text."""
