"""Text in, text out: DeepSeek-V3.2's message format, its tokenizer, and conversations.

text    = chat.encode(messages, thinking=True)             # messages -> the prompt, byte for byte the reference's
message = chat.parse(completion, thinking=True)            # the model's text -> an assistant message, strictly
message, forgiven = chat.parse_lenient(completion, thinking=True)

tokenizer = chat.Tokenizer.load("checkpoint", model.cfg)   # needs the extra [text]
prompt    = chat.prepare(messages, tokenizer, thinking=True)
generate(model, [prompt.ids])
"""

from typing import TYPE_CHECKING

from ..system.lazy import names

if TYPE_CHECKING:
    from ..generation.detokenizer import Detokenizer as Detokenizer
    from ..generation.stop_strings import StopStrings as StopStrings
    from .conversation import Conversation as Conversation
    from .encoding import encode as encode
    from .faults import EncodingError as EncodingError
    from .faults import ParsingError as ParsingError
    from .lenient import parse_lenient as parse_lenient
    from .parsing import parse as parse
    from .prompts import Prompt as Prompt
    from .prompts import prepare as prepare
    from .tokenizer import Tokenizer as Tokenizer

_HOME = {
    "Conversation": ".conversation",
    "Detokenizer": "..generation.detokenizer",
    "EncodingError": ".faults",
    "ParsingError": ".faults",
    "Prompt": ".prompts",
    "StopStrings": "..generation.stop_strings",
    "Tokenizer": ".tokenizer",
    "encode": ".encoding",
    "parse": ".parsing",
    "parse_lenient": ".lenient",
    "prepare": ".prompts",
}

__all__ = sorted(_HOME)

__getattr__, __dir__ = names(__name__, _HOME)
