"""Conversations in DeepSeek's message format, made of the functions of a library and their docstrings.

Nobody wrote them: a request is a docstring, the answer the function. They teach the format, and a little of the task.
"""

import ast
import hashlib
import json
import textwrap
from collections.abc import Iterator
from typing import NamedTuple

from dsv32_jax.chat import encode

DOCSTRING_TOOL = {
    "name": "get_docstring",
    "description": "Look up the docstring of a function in Python's standard library.",
    "parameters": {
        "type": "object",
        "properties": {"name": {"type": "string", "description": "The function's full name."}},
        "required": ["name"],
    },
}

GREETINGS = (
    "Hello", "Hello!", "Hi", "Hi there", "Hey", "Good morning", "Who are you?", "What are you?",
    "What can you do?", "Help", "Tell me about yourself.", "How are you?",
)  # fmt: skip
INTRODUCTION = (
    "I am the demo model of dsv32_jax: a very small model of DeepSeek-V3.2's architecture, trained on the sources of "
    "Python's standard library. I can continue Python code and write short functions, and I am often wrong."
)


class Function(NamedTuple):
    """A function with a docstring: its full name, signature, the docstring's first paragraph, and its source."""

    name: str
    signature: str
    purpose: str
    source: str
    node: ast.FunctionDef


def conversations(files: dict[str, str]) -> Iterator[str]:
    """One document for each suitable function in `files` (path -> text): most plain, some with thinking or a tool."""
    for path, text in files.items():
        for function in functions(path, text):
            kind = int(hashlib.sha256(function.name.encode()).hexdigest(), 16) % 20
            yield _with_tool(function) if kind < 3 else _with_thinking(function) if kind < 7 else _plain(function, kind)
    for _ in range(10):
        for greeting in GREETINGS:
            yield encode([_user(greeting), _assistant(INTRODUCTION)], thinking=False)


def functions(path: str, text: str) -> Iterator[Function]:
    """The functions and methods in a file that have a docstring and are neither trivial nor long."""
    module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or not (doc := ast.get_docstring(node)):
            continue
        first_line = min([node.lineno, *(each.lineno for each in node.decorator_list)])
        source = textwrap.dedent("\n".join(text.split("\n")[first_line - 1 : node.end_lineno]))
        purpose = " ".join(doc.split("\n\n")[0].split())
        if len(node.body) > 1 and 20 < len(purpose) < 300 and len(source) < 2400:
            yield Function(f"{module}.{node.name}", f"{node.name}({ast.unparse(node.args)})", purpose, source, node)


def _user(content: str) -> dict:
    return {"role": "user", "content": content}


def _assistant(content: str, **more) -> dict:
    return {"role": "assistant", "content": content, **more}


def _request(function: Function, kind: int) -> dict:
    forms = (
        "Write a Python function `{signature}`: {purpose}",
        "Write `{signature}` in Python. {purpose}",
        "I need a Python function {name}. {purpose}",
    )
    wanted = forms[kind % 3]
    return _user(wanted.format(signature=function.signature, purpose=function.purpose, name=function.node.name))


def _code(function: Function) -> str:
    return f"```python\n{function.source}\n```"


def _plain(function: Function, kind: int) -> str:
    return encode([_request(function, kind), _assistant(_code(function))], thinking=False)


def _with_thinking(function: Function) -> str:
    """What the reasoning says is read off the function's own syntax."""
    kinds = {type(node) for node in ast.walk(function.node)}
    names = [arg.arg for arg in function.node.args.args if arg.arg != "self"]
    steps = [f"The function is called {function.node.name} and takes {', '.join(names) or 'nothing'}."]
    if ast.For in kinds or ast.While in kinds:
        steps.append("It needs a loop.")
    if ast.If in kinds:
        steps.append("There are cases to tell apart.")
    if ast.Raise in kinds:
        steps.append("It raises an error where the input is wrong.")
    steps.append("It returns a value." if ast.Return in kinds else "It returns nothing.")
    answer = _assistant(_code(function), reasoning_content=" ".join(steps))
    return encode([_request(function, 0), answer], thinking=True)


def _with_tool(function: Function) -> str:
    """A question, a call of the tool, its result, and the answer, which is the docstring."""
    call = {"type": "function", "function": {"name": "get_docstring", "arguments": json.dumps({"name": function.name})}}
    talk = [
        {"role": "system", "content": ""},
        _user(f"What does {function.name} do?"),
        _assistant("I look up its docstring.", tool_calls=[call]),
        {"role": "tool", "content": function.purpose},
        _assistant(f"{function.name}: {function.purpose}"),
    ]
    return encode(talk, thinking=False, tools=[{"type": "function", "function": DOCSTRING_TOOL}])
