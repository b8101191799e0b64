"""What a chat template is found to take, and the text that it makes."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer as Fast
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from prad.lm import DEFAULT_MODEL, ChatTemplateError, Tokenizer, resolve_model
from tests.cache import CACHE

PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
OPEN = "{% if add_generation_prompt %}<assistant>{% endif %}"
TOOLS = "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}"
USER = {"role": "user", "content": "hi"}


def templated(folder: Path, template: str | dict[str, str]) -> Tokenizer:
    words = Fast(models.WordLevel({"?": 0, "<|end|>": 1}, unk_token="?"))
    fast = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|end|>", chat_template=template)
    fast.save_pretrained(folder)
    return Tokenizer(folder)


@pytest.mark.parametrize(
    ("template", "takes"),
    [
        (PLAIN, False),
        ("{# tools are for others #}" + PLAIN, False),
        (TOOLS + PLAIN, True),
        ({"default": PLAIN, "tool_use": TOOLS + PLAIN}, True),
        ("{{ raise_exception('never') }}", False),
    ],
)
def test_who_writes_tools_takes_them(tmp_path: Path, template: str, takes: bool) -> None:
    found = templated(tmp_path, template).chat_template
    assert found.takes_tools is takes
    assert not takes or "t | tojson" in found.source


def test_the_default_models_template_takes_no_tools() -> None:
    template = Tokenizer(resolve_model(DEFAULT_MODEL, CACHE)).chat_template
    assert (template.takes_tools, template.variables) == (False, frozenset())


def test_variables_are_those_that_nobody_else_gives(tmp_path: Path) -> None:
    template = (
        "{% set own = 1 %}{% generation %}{{ bos_token }}{{ own }}{% endgeneration %}{{ strftime_now('%Y') }}"
        "{% for m in messages %}{% if m.role == 'x' %}{% break %}{% endif %}{{ padding }}{% endfor %}"
        "{{ tools }}{{ documents }}{{ range(2) }}{{ enable_thinking }}{{ eos_token }}{{ date_string }}"
    )
    assert templated(tmp_path, template).chat_template.variables == {
        "bos_token",
        "date_string",
        "enable_thinking",
    }


def test_a_turn_is_opened_continued_or_neither(tmp_path: Path) -> None:
    template = templated(tmp_path, PLAIN + OPEN).chat_template
    answer = {"role": "assistant", "content": "So\N{WHITE MEDIUM STAR} be "}
    assert template.render([USER]) == "<user>hi\n<assistant>"
    assert template.render([USER], add_generation_prompt=False) == "<user>hi\n"
    assert template.render([USER, answer], continued=True) == f"<user>hi\n<assistant>{answer['content']}"
    assert answer["content"] == "So\N{WHITE MEDIUM STAR} be ", "what is given stays as it is"


@pytest.mark.parametrize("template", ["{{ raise_exception('told so') }}", "{{ 'a' - 1 }}", "{{ none.x.y }}"])
def test_whatever_a_template_stumbles_over_is_one_error(tmp_path: Path, template: str) -> None:
    with pytest.raises(ChatTemplateError):
        templated(tmp_path, template).chat_template.render([USER])


def test_a_message_that_is_left_out_cannot_go_on(tmp_path: Path) -> None:
    template = templated(tmp_path, "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    with pytest.raises(ChatTemplateError, match="leaves out"):
        template.chat_template.render([USER, {"role": "assistant", "content": "x"}], continued=True)


def test_special_tokens_are_left_out_or_shown(tmp_path: Path) -> None:
    tokenizer = Tokenizer(resolve_model(DEFAULT_MODEL, CACHE))
    start, end = (tokenizer.encode_continuation(name)[0] for name in ("<|im_start|>", "<|im_end|>"))
    word = tokenizer.encode_continuation("word")
    ids = [start, *word, end]
    assert tokenizer.decode(ids) == "word"
    assert tokenizer.decode(ids, frozenset({end})) == "word<|im_end|>"
    assert tokenizer.decode(ids, tokenizer.special_ids) == "<|im_start|>word<|im_end|>"
    stream = tokenizer.stream(frozenset({end}))
    assert "".join([stream.push(token) for token in ids] + [stream.flush()]) == "word<|im_end|>"
    assert tokenizer.names([start, end]) == ["<|im_start|>", "<|im_end|>"]


def test_data_is_text_as_far_as_it_is_texts() -> None:
    tokenizer = Tokenizer(resolve_model(DEFAULT_MODEL, CACHE))
    marked = tokenizer.as_data({"<|im_end|>": [1, None, True, {"x": "a<|im_end|>"}]})
    assert "<|im_end|>" not in str(marked)
    assert isinstance(marked, dict)
    ((name, _),) = marked.items()
    ids = tokenizer.encode_continuation(name)
    assert tokenizer.decode(ids) == "<|im_end|>"
    assert not tokenizer.special_ids & set(ids)
    assert tokenizer.as_data({"x": [1.5, False]}) == {"x": [1.5, False]}


@pytest.mark.parametrize("written", ["tool | tojson", "tool | tojson(ensure_ascii=True)", "tools | string"])
def test_texts_in_data_stay_texts_however_a_template_writes_data(tmp_path: Path, written: str) -> None:
    """Escaped marks are marks: what they hide reaches no prompt."""
    folder = resolve_model(DEFAULT_MODEL, CACHE)
    source = "{% for tool in tools %}{{ " + written + " }}{% endfor %}<|im_end|>"
    fast = PreTrainedTokenizerFast.from_pretrained(folder)
    fast.chat_template = source
    fast.save_pretrained(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    tool = {"name": "f<|im_end|>ü\n"}
    (end,) = tokenizer.encode_continuation("<|im_end|>")
    ids = tokenizer.encode_chat([USER], [{name: tokenizer.as_data(text) for name, text in tool.items()}])
    assert (ids.count(end), ids[-1]) == (1, end)
    told = tokenizer.decode(ids)
    assert "f<|im_end|>" in told
    assert told.isascii() == ("ensure_ascii" in written)
    assert len(told) < 40, "no mark is left"
