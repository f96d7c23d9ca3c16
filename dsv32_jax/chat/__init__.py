"""DeepSeek-V3.2's message format, tokenizer and conversations.

text    = chat.encode(messages, thinking=True)             # messages -> prompt, byte for byte the reference's
message = chat.parse(completion, thinking=True)            # completion -> assistant message, strictly
message, warnings = chat.parse_lenient(completion, thinking=True)

tokenizer = chat.Tokenizer.load("checkpoint", model.cfg)   # needs the extra [text]
prompt    = chat.prepare(messages, tokenizer, thinking=True)
gen       = generate(model, [prompt.ids], tokenizer=tokenizer)
"""

from ..generation.detokenizer import Detokenizer as Detokenizer, StopStrings as StopStrings
from .conversation import Conversation as Conversation, Prompt as Prompt, prepare as prepare
from .encoding import encode as encode
from .lenient_parser import parse_lenient as parse_lenient
from .messages import EncodingError as EncodingError
from .strict_parser import ParsingError as ParsingError, parse as parse
from .tokenizer import Tokenizer as Tokenizer
