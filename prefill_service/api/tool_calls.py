"""From an answer's text to calls of tools, while it comes.

text ─ CallParser ▶ content, and calls: name first, then arguments as they are written ─ ToolShape ▶ deltas

What looks like a call and is none stays content: another name than those of the tools, no JSON, a text that
ends before the name. Arguments are passed on as the model wrote them, valid or not, as OpenAI does.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from prefill_service.api.messages import Json
from prefill_service.api.tool_formats import TAGS, ToolFormat
from prefill_service.api.tool_tags import FUNCTION, TaggedCall

_ARGUMENTS = ("arguments", "parameters")
_CALL_ID = "[CALL_ID]"
"""Behind a name, in some of Mistral's: what is left out, as calls get ids here."""
_LONGEST_NAME = 512
"""Of a call, with what stands between it and its arguments."""


@dataclass(slots=True)
class CallNews:
    """Of one call: `name` and `id` with the first of them, and how its arguments go on."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""

    def as_delta(self) -> Json:
        if self.name is None:
            return {"index": self.index, "function": {"arguments": self.arguments}}
        return {"index": self.index, **self.as_whole()}

    def as_whole(self) -> Json:
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(slots=True)
class Said:
    """What a piece of text comes to."""

    content: str = ""
    calls: list[CallNews] = field(default_factory=list)

    def add(self, news: CallNews) -> None:
        """One entry for each call."""
        if self.calls and self.calls[-1].index == news.index:
            self.calls[-1].arguments += news.arguments
        else:
            self.calls.append(news)


class CallObject:
    """One JSON object that may be a call, by character. `fresh`: of its arguments, not taken yet. `name`: of
    what is called, where the object is nothing but the arguments."""

    def __init__(self, name: str | None = None) -> None:
        self.name = name
        self.over = False
        self.fresh = ""
        self.written: list[str] = []
        self._bare = self._has_arguments = name is not None
        self._item: list[str] = []  # the key or the value that comes, of the object itself
        self._key: str | None = None
        self._depth = 0
        self._quoted = self._escaped = False

    def take(self, char: str) -> None:
        self.written.append(char)
        started, outside = self._depth > 0, self._depth == 1 and not self._quoted
        if self._quoted:
            self._quoted = self._escaped or char != '"'
            self._escaped = char == "\\" and not self._escaped
        elif char == '"':
            self._quoted = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
        if self._bare:
            self.fresh += char
            self.over = self._depth == 0
        elif self._depth == 0:
            self._end_item()
            self.over = True
        elif outside and char == ":" and self._key is None:
            self._key, self._item = _text(self._item), []
        elif outside and char == ",":
            self._end_item()
        elif started:
            self._item_goes_on(char)

    def rest(self) -> str:
        """What of its arguments is not told yet, at its end: a call without any has an empty object."""
        return self.fresh if self._has_arguments else self.fresh + "{}"

    def _item_goes_on(self, char: str) -> None:
        if self._key in _ARGUMENTS and (self._has_arguments or (not self._item and char == "{")):
            if self._depth > 1 or char in "}]":  # spaces behind it are the outer object's
                self._has_arguments = True
                self.fresh += char
        elif self._item or not char.isspace():
            self._item.append(char)

    def _end_item(self) -> None:
        if self._key == "name":
            self.name = _text(self._item)
        elif self._key in _ARGUMENTS and not self._has_arguments:
            value = "".join(self._item).strip()
            if value not in ("", "null"):
                inside = _text(self._item)  # some write the object as a text of JSON
                self.fresh, self._has_arguments = value if inside is None else inside, True
        self._key, self._item = None, []


def _text(item: list[str]) -> str | None:
    try:
        value = json.loads("".join(item))
    except ValueError:
        return None
    return value if isinstance(value, str) else None


class CallParser:
    """Of one answer. `names`: of the tools that may be called; `schemas` of their arguments, where texts have
    to be told from JSON; `only_first`: what follows the first call is neither a call nor content."""

    def __init__(
        self,
        form: ToolFormat,
        names: Collection[str],
        *,
        schemas: Mapping[str, Json] = MappingProxyType({}),
        only_first: bool = False,
    ) -> None:
        self._form = form
        self._names = names
        self._schemas = schemas
        self._only_first = only_first
        self._said = Said()
        self._content: list[str] = []
        """Of what is said, in pieces: a text that grows by each of them is copied each time."""
        self._held: list[str] = []
        """Characters that may turn out to begin a call, or to be nothing but space beside one."""
        self._begun = ""
        """Of an opening, behind them."""
        self._called = ""
        """Behind an opening: a name and what comes before its arguments, if calls are written so."""
        self._inside = not form.opening
        """Between an opening and its closing."""
        self._object: CallObject | TaggedCall | None = None
        self._is_open = False
        """Whether the object's call has been told of."""
        self.calls = 0

    def feed(self, text: str) -> Said:
        for char in text:
            self._read(char)
        said, self._said = self._said, Said()
        said.content, self._content = "".join(self._content), []
        return said

    def _read(self, char: str) -> None:
        if self._only_first and self.calls and not self._is_open:
            return
        if self._object is not None:
            self._take(self._object, char)
        elif self._inside:
            self._beside(char)
        else:
            self._outside(char)

    def close(self) -> str:
        """The rest of the content, once nothing more comes."""
        if self._object is not None and not self._is_open:
            self._held += self._object.written
        rest = "".join(self._held) + self._begun
        self._held, self._begun = [], ""
        return rest if not self.calls or not self._is_format(rest.strip()) else ""

    def _is_format(self, rest: str) -> bool:
        """Whether that, behind a call, is no content: nothing, or a closing that did not come whole."""
        return not rest or (self._inside and self._form.closing.startswith(rest))

    def _outside(self, char: str) -> None:
        """Content, until an opening is complete; the space before that is the format's."""
        opening, text = self._form.opening, self._begun + char
        if not opening:
            self._content.append(char)
            return
        at = next((at for at in range(len(text)) if opening.startswith(text[at:])), len(text))
        passed, self._begun = text[:at], text[at:]
        if settled := passed.rstrip():
            self._content += (*self._held, settled)
            self._held = []
        self._held += passed[len(settled) :]
        if self._begun == opening:
            self._held += opening
            self._begun, self._inside = "", True

    def _beside(self, char: str) -> None:
        """Between an opening and a call, between calls, between a call and its closing."""
        form = self._form
        if form.middle:
            self._name_goes_on(char)
            return
        begun = self._mark()
        mark, alone = begun + char, not begun
        if form is TAGS and mark == "<f":  # and no closing
            self._held.pop()
            self._object = TaggedCall(self._schemas)
            for each in mark:
                self._take(self._object, each)
            return
        if char == "{" and alone and form is not TAGS:
            self._object = CallObject()
            self._take(self._object, char)
            return
        self._held.append(char)
        if mark == form.closing:
            if self.calls:
                self._held = []
            self._give_up()
        elif mark == form.skipped or (alone and (char.isspace() or char in form.between)):
            pass
        elif not any(text.startswith(mark) for text in (form.closing, form.skipped)):
            self._give_up()

    def _name_goes_on(self, char: str) -> None:
        """Of a call whose arguments stand behind its name."""
        self._called += char
        name, mark, behind = self._called.partition(self._form.middle)
        name = name.partition(_CALL_ID)[0].strip()
        if char == "{" and mark and name in self._names and behind[:-1].strip() == "":
            self._object = CallObject(name)
            self._take(self._object, char)
            return
        self._held.append(char)
        if behind.strip() or len(self._called) > _LONGEST_NAME:
            self._give_up()

    def _mark(self) -> str:
        """The beginning of a closing, or of what may be skipped, that is held at the end."""
        marks = [text for text in (self._form.closing, self._form.skipped) if text]
        starts = [text[:size] for text in marks for size in range(1, len(text))]
        end = "".join(self._held[-max(map(len, marks), default=1) :])
        return max((start for start in starts if end.endswith(start)), key=len, default="")

    def _take(self, call: CallObject | TaggedCall, char: str) -> None:
        call.take(char)
        if call.name in self._names and not self._is_open:
            self._is_open, self._held = True, []
            self._said.add(CallNews(self.calls, self._form.new_id(), call.name))
            self.calls += 1
        if self._is_open and (news := call.rest() if call.over else call.fresh):
            self._said.add(CallNews(self.calls - 1, arguments=news))
            call.fresh = ""
        if call.over:
            self._object = None
            if not self._is_open:
                self._held += call.written
            if not self._is_open or self._form.middle:
                self._give_up()
            was_open, self._is_open = self._is_open, False
            if was_open and isinstance(call, TaggedCall):
                self._read_back(call.back)

    def _read_back(self, text: str) -> None:
        """Behind a call without its end: what closes calls, or anything."""
        self._inside = not text or text.strip().startswith((self._form.closing, FUNCTION))
        for char in text:
            self._read(char)

    def _give_up(self) -> None:
        """What is held is no call, nor what stands between calls."""
        self._content += self._held
        self._held, self._inside, self._called = [], False, ""
