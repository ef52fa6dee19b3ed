"""What a tokenizer's chat template writes around texts, found by having it write marks in their place."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from headprof.errors import ModelError, UsageError
from headprof.models.checkpoint import one_line

_MARK, _SYSTEM_MARK = "HEADPROF-CONTENT", "HEADPROF-SYSTEM"
# Templates that print today's date or open a thinking block would make the prompt differ from day to day, or part the
# question from its answer; templates that know neither ignore both.
_TEMPLATE_OPTIONS: dict[str, Any] = {"date_string": "01 Jan 2025", "enable_thinking": False}

_MOST_NAMED = 8
"""Roles of a conversation that a message names."""


def parts_with_system(tokenizer: Any, templated: bool) -> tuple[str, str, str]:
    """What the chat template writes before a system message, between that and the user's text, and after it.

    Raises:
        UsageError: it has no place for a system message, or there is no template.
    """
    mend = "leave --system away and begin the document or the prompt with its text"
    if not templated:
        raise UsageError(f"Without a chat template there is no place for a system message: {mend}.")
    messages = [{"role": "system", "content": _SYSTEM_MARK}, {"role": "user", "content": _MARK}]
    try:
        rendered = _rendered(tokenizer, messages)
    except Exception:  # a template is a program: this is how some refuse the role
        rendered = ""
    first, found, rest = rendered.partition(_SYSTEM_MARK)
    between, also_found, after = rest.partition(_MARK)
    if not (found and also_found) or _MARK in first + after or _SYSTEM_MARK in between + after:
        raise UsageError(
            f"The model's chat template has no system role: {mend}, or pass --chat-template with one that has it."
        )
    return first, between, after


def _rendered(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **_TEMPLATE_OPTIONS)


def template_parts(tokenizer: Any) -> tuple[str, str]:
    """What the chat template writes before and after the user's text, generation prompt included.

    Raises:
        ModelError: the chat template fails, or does not repeat the user's text.
    """
    messages = [{"role": "user", "content": _MARK}]
    try:
        rendered = _rendered(tokenizer, messages)
    except Exception as error:  # a template is a program that comes with the model, and may fail in any way
        raise ModelError(
            f"The tokenizer's chat template cannot be used ({one_line(error).replace(_MARK, '...')}): pass "
            f"--chat-template none to ask without it, {_other_templates(tokenizer)}."
        ) from error
    if rendered.count(_MARK) != 1:
        raise ModelError(
            "The tokenizer's chat template does not repeat the user's text exactly once: pass --chat-template none to "
            "ask without it, or a file with another template."
        )
    before, after = rendered.split(_MARK)
    return before, after


def turn_parts(tokenizer: Any, roles: Sequence[str]) -> list[str]:
    """What the chat template writes before, between and after texts of these roles, one part more than there are texts.

    Raises:
        UsageError: it takes no such conversation.
        ModelError: it does not repeat the texts exactly once.
    """
    marks = [f"{_MARK}-{number}-" for number in range(len(roles))]
    try:
        rendered = _rendered(
            tokenizer, [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
        )
    except Exception as error:  # as in `parts_with_system`
        raise UsageError(
            f"The model's chat template takes no conversation of the roles {_listed(roles)} "
            f"({one_line(error).replace(_MARK, '...')}): give others, or pass --chat-template with one that does."
        ) from error
    any_mark = re.compile(rf"{_MARK}-\d+-")
    if any_mark.findall(rendered) != marks:
        raise ModelError(
            f"The tokenizer's chat template does not repeat the texts of the roles {_listed(roles)} exactly "
            "once: pass a file with another template with --chat-template."
        )
    return any_mark.split(rendered)


def _listed(roles: Sequence[str]) -> str:
    return ", ".join(roles[:_MOST_NAMED]) + ", ..." * (len(roles) > _MOST_NAMED)


def between_turns(tokenizer: Any) -> str:
    """What the chat template writes between the model's reply and the user's next text.

    Raises:
        ModelError: the chat template fails at a second turn, or does not repeat the texts of several.
    """
    reply, more = f"{_MARK}-REPLY", f"{_MARK}-MORE"
    turns = (("user", _MARK), ("assistant", reply), ("user", more))
    messages = [{"role": role, "content": text} for role, text in turns]
    try:
        rendered = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **_TEMPLATE_OPTIONS
        )
    except Exception as error:  # as in `template_parts`
        raise ModelError(
            f"The tokenizer's chat template cannot be used for a second turn ({one_line(error).replace(_MARK, '...')}):"
            f" pass --chat-template none to ask without it, {_other_templates(tokenizer)}."
        ) from error
    if rendered.count(reply) != 1 or rendered.count(more) != 1 or rendered.index(more) < rendered.index(reply):
        raise ModelError(
            "The tokenizer's chat template does not repeat the texts of several turns exactly once: pass "
            "--chat-template none to ask without it, or a file with another template."
        )
    return rendered.partition(reply)[2].partition(more)[0]


def _other_templates(tokenizer: Any) -> str:
    named = tokenizer.chat_template
    if not isinstance(named, dict):
        return "or a file with another template"
    return f"one of its names ({', '.join(sorted(named))}), or a file with another template"
