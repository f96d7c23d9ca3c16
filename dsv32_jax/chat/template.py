"""The fixed text of the DeepSeek-V3.2 message format, character for character; blank lines are part of it."""

from collections.abc import Sequence

from ..generation import detokenizer


class Mark(str):
    """Text that the format itself writes. Special tokens count only in a Mark: in any other string they are text."""

    __slots__ = ()


class Sampled(str):
    """Text that the model sampled, with its tokens `ids`: other tokens can spell the same text."""

    ids: Sequence[int]

    def __new__(cls, text: str, ids: Sequence[int]) -> "Sampled":
        """Return the text with its tokens."""
        made = super().__new__(cls, text)
        made.ids = ids
        return made


BOS = Mark("<｜begin▁of▁sentence｜>")
EOS = Mark("<｜end▁of▁sentence｜>")
USER = Mark("<｜User｜>")
ASSISTANT = Mark("<｜Assistant｜>")
THINK = Mark(detokenizer.THINK)
THINK_END = Mark(detokenizer.THINK_END)
DSML = Mark("｜DSML｜")

SPECIAL = (BOS, EOS, USER, ASSISTANT, THINK, THINK_END)
"""Each is one token in the vocabulary. DSML may or may not be one."""

SCREENED = (BOS, EOS, THINK, THINK_END, DSML)
"""Markers that neither the content nor the reasoning of a parsed message may contain."""

LEAD = Mark("\n\n")
LINE = Mark("\n")

TOOLS = Mark("""## Tools

You have access to a set of tools you can use to answer the user's question.
You can invoke functions by writing a "<｜DSML｜function_calls>" block like the following as part of your reply to the user:
<｜DSML｜function_calls>
<｜DSML｜invoke name="$FUNCTION_NAME">
<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>
...
</｜DSML｜invoke>
<｜DSML｜invoke name="$FUNCTION_NAME2">
...
</｜DSML｜invoke>
</｜DSML｜function_calls>

String and scalar parameters should be specified as is without any escaping or quotes, while lists and objects should use JSON format. The "string" attribute should be set to "true" for string type parameters and "false" for other types (numbers, booleans, arrays, objects).

If the thinking_mode is enabled, then after function results you should strongly consider outputting a thinking block. Here is an example:

<｜DSML｜function_calls>
...
</｜DSML｜function_calls>

<function_results>
...
</function_results>

<think>...thinking about results</think>

Here are the functions available in JSONSchema format:
<functions>
""")  # noqa: E501
TOOLS_END = Mark("\n</functions>\n")

RESPONSE_FORMAT = Mark("## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n")
DEVELOPER = Mark("\n\n# The user's message is: ")

CALLS = Mark("<｜DSML｜function_calls>\n")
CALLS_END = Mark("\n</｜DSML｜function_calls>")
INVOKE = Mark('<｜DSML｜invoke name="')
INVOKE_NAMED = Mark('">\n')
INVOKE_END = Mark("\n</｜DSML｜invoke>")
PARAMETER = Mark('<｜DSML｜parameter name="')
PARAMETER_STRING = Mark('" string="true">')
PARAMETER_JSON = Mark('" string="false">')
PARAMETER_END = Mark("</｜DSML｜parameter>")

RESULTS = Mark("\n\n<function_results>")
RESULT = Mark("\n<result>")
RESULT_END = Mark("</result>")
RESULTS_END = Mark("\n</function_results>\n\n")

READ_CALLS = "\n\n<｜DSML｜function_calls"
READ_CALLS_END = "</｜DSML｜function_calls>"
READ_INVOKE = "<｜DSML｜invoke"
READ_INVOKE_END = "</｜DSML｜invoke"
READ_PARAMETER = "<｜DSML｜parameter"
READ_PARAMETER_END = "/｜DSML｜parameter"
"""Where a parser stops; what closes a tag is read after it."""
