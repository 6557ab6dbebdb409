"""Chat templates: a conversation as the text a model was trained on, rendered in a sandbox.

A template is a small jinja2 program that comes with a model, so it is not trusted: it sees plain data only, can reach
no Python object, and is stopped when it works too long or builds too much (`chat_sandbox`).
"""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

from jinja2 import Template, TemplateError, TemplateSyntaxError, UndefinedError
from jinja2.exceptions import SecurityError

from paperworks.data.chat.budget import Budget, Exhausted, spending
from paperworks.data.chat.sandbox import ChatSandbox

LONGEST_TEMPLATE = 1 << 18  # characters; the longest published ones have about 20,000


class ChatTemplateError(ValueError):
    """A template that does not compile, refuses the messages, asks for what they lack, or misbehaves."""


def render(
    template: str,
    messages: Sequence[Mapping[str, object]],
    add_generation_prompt: bool = True,
    *,
    tools: Sequence[object] | None = None,
    documents: Sequence[object] | None = None,
    **variables: object,
) -> str:
    """Write a conversation as text, as transformers' `apply_chat_template` does.

    Args:
        template: the jinja2 source.
        messages: dicts with a "role" and a "content" (or tool calls), first to last.
        add_generation_prompt: end with the beginning of the assistant's turn.
        tools, documents: what templates that know them expect.
        variables: more names for the template, such as `bos_token`.

    Raises:
        ValueError: messages that are not a conversation; says which and why.
        ChatTemplateError: the template failed, was refused, or was stopped.
    """
    given = _plain(variables, "variables")
    assert isinstance(given, dict)
    given |= {
        "messages": _conversation(messages),
        "add_generation_prompt": bool(add_generation_prompt),
        "tools": _plain(tools, "tools"),
        "documents": _plain(documents, "documents"),
    }
    compiled = _compiled(template)
    try:
        with spending(Budget.for_input(given)):
            return "".join(compiled.generate(given))
    except Exhausted as error:
        raise ChatTemplateError(f"the chat template was stopped: {error}") from error
    except SecurityError as error:
        raise ChatTemplateError(f"the chat template reaches for what it may not have: {error}") from error
    except UndefinedError as error:
        raise ChatTemplateError(f"the chat template asks for something the messages do not have: {error}") from error
    except TemplateError as error:
        raise ChatTemplateError(f"the chat template refuses these messages: {error.message}") from error
    except RecursionError as error:
        raise ChatTemplateError("the chat template calls itself too deeply") from error
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, MemoryError) as error:
        raise ChatTemplateError(f"the chat template failed: {type(error).__name__}: {error}") from error


@lru_cache(maxsize=64)
def _compiled(template: str) -> Template:
    if not isinstance(template, str):
        raise TypeError(f"a chat template is a str, got {type(template).__name__}")
    if len(template) > LONGEST_TEMPLATE:
        raise ChatTemplateError(f"the chat template has {len(template):,} characters, at most {LONGEST_TEMPLATE:,} fit")
    try:
        return ChatSandbox().from_string(template)
    except TemplateSyntaxError as error:
        raise ChatTemplateError(f"the chat template has an error in line {error.lineno}: {error.message}") from error
    except (TemplateError, RecursionError, SyntaxError, MemoryError, ValueError) as error:
        raise ChatTemplateError(f"the chat template cannot be compiled: {type(error).__name__}: {error}") from error


def _conversation(messages: Sequence[Mapping[str, object]]) -> list[object]:
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise ValueError(f"messages must be a list of dicts with role and content, got {type(messages).__name__}")
    if not messages:
        raise ValueError("there are no messages: at least one dict with role and content is needed")
    for index, message in enumerate(messages):
        _check(message, index)
    plain = _plain(list(messages), "messages")
    assert isinstance(plain, list)
    return plain


def _check(message: object, index: int) -> None:
    if not isinstance(message, Mapping):
        raise ValueError(f"message {index} must be a dict with role and content, got {type(message).__name__}")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise ValueError(f"message {index} needs a 'role' such as 'user', got {role!r}")
    content = message.get("content")
    if "content" not in message and "tool_calls" not in message:
        raise ValueError(f"message {index} (role {role!r}) has no 'content'; its keys are {sorted(map(str, message))}")
    if not isinstance(content, str | list | tuple | None):
        raise ValueError(f"message {index} (role {role!r}) must have text as content, got {type(content).__name__}")


def _plain(value: object, where: str, depth: int = 0) -> object:
    """Rebuild data from plain types, so that a template never holds an object with methods of its own."""
    if depth > 64:
        raise ValueError(f"{where} is nested more than 64 deep (or contains itself)")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where} holds {value}, which JSON cannot")
        return float.__float__(value)
    if isinstance(value, Mapping):
        wrong = [key for key in value if not isinstance(key, str)]
        if wrong:
            raise ValueError(f"{where} has the key {wrong[0]!r}; keys must be str")
        return {str.__str__(key): _plain(item, f"{where}[{key!r}]", depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(value)]
    raise ValueError(
        f"{where} is a {type(value).__name__}; only str, numbers, bool, None, lists and dicts can be rendered"
    )
