"""A model's chat template: what it takes, and the text that it makes of a conversation.

It comes with the model and is a program (Jinja, sandboxed by transformers): who asks gives it data and never
a template of their own.
"""

import inspect
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from jinja2 import Environment, TemplateError, meta

from prad.lm.errors import ChatTemplateError

_MARK = "\N{WHITE MEDIUM STAR}"
_NAME = "prad_probe"
_PROBE: dict[str, object] = {
    "type": "function",
    "function": {"name": _NAME, "description": "", "parameters": {"type": "object", "properties": {}}},
}
_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
"""A tag that transformers adds to Jinja, for training; it marks text and changes none."""
_GIVEN = {"messages", "raise_exception", "strftime_now"}
_FAULTS = (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError)
"""What a template may stumble over: data of another kind than it expects, as far as it does not look."""


class ChatTemplate:
    """Of transformers' tokenizer, which has one."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @cached_property
    def source(self) -> str:
        """Its text; that for tools, of a tokenizer with several."""
        own = self._tokenizer.chat_template
        return str(own.get("tool_use") or own.get("default") or "") if isinstance(own, dict) else str(own)

    @cached_property
    def takes_tools(self) -> bool:
        """Whether a tool that it is given is in what it writes."""
        try:
            return _NAME in self.render([{"role": "user", "content": "?"}], [_PROBE])
        except ChatTemplateError:
            return False

    @cached_property
    def variables(self) -> frozenset[str]:
        """Names of what it reads beside a conversation, tools and special tokens: who asks may set these."""
        own = self._tokenizer.chat_template
        environment, found = Environment(extensions=["jinja2.ext.loopcontrols"]), set[str]()
        for source in own.values() if isinstance(own, dict) else (own,):
            try:
                found |= meta.find_undeclared_variables(environment.parse(_GENERATION.sub("", source)))
            except TemplateError:
                return frozenset()
        given = {*_GIVEN, *environment.globals, *self._tokenizer.special_tokens_map}
        return frozenset(
            found - given - set(inspect.signature(self._tokenizer.apply_chat_template).parameters)
        )

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        tools: Sequence[Mapping[str, object]] = (),
        *,
        add_generation_prompt: bool = True,
        continued: bool = False,
        variables: Mapping[str, object] | None = None,
    ) -> str:
        """The conversation's text. `continued`: it ends where the last message's text does, so that this goes
        on; `variables`: of those that it reads. Raises ChatTemplateError, in the template's own words."""
        turns = [dict(message) for message in messages]
        if continued:
            turns[-1]["content"] = f"{turns[-1]['content']}{_MARK}"
        try:
            text = self._tokenizer.apply_chat_template(
                turns,
                tools=[dict(tool) for tool in tools] or None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt and not continued,
                **(variables or {}),
            )
        except _FAULTS as error:
            raise ChatTemplateError(str(error)) from error
        if continued and _MARK not in text:
            raise ChatTemplateError("it leaves out the text of the last message, which should go on")
        return str(text).rpartition(_MARK)[0] if continued else str(text)

    def behind_answer(self) -> str:
        """What it puts behind an assistant's turn; empty where it makes no plain conversation."""
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}]
        try:
            text = self.render(turns, add_generation_prompt=False)
        except ChatTemplateError:
            return ""
        return text.rpartition(_MARK)[2] if _MARK in text else ""
