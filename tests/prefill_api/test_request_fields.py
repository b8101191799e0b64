"""What a client may send: neutral values are taken, everything else is refused by name."""

from typing import Any, TypeVar

import pytest
from pydantic import ValidationError

from prad.artefact import GenerationDefaults
from prefill_service.api.admission import fit, resolve
from prefill_service.api.intake import StrictModel
from prefill_service.api.problems import invalid_request
from prefill_service.api.requests import ChatRequest, CompletionRequest
from prefill_service.errors import InvalidRequestError, PromptTooLongError

USER = [{"role": "user", "content": "hi"}]
BEAMS = {"use_beam_search": True, "best_of": 2}
FORMAT = {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}

Model = TypeVar("Model", bound=StrictModel)


def validate(model: type[Model], data: object) -> Model:
    """As FastAPI does, and the failure handler after it."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise invalid_request(error.errors()) from error


@pytest.mark.parametrize(
    "fields",
    [
        {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "echo": False, "suffix": None},
        {"best_of": 1},
        {"best_of": 3, "n": 3},
        {"user": "me", "metadata": {"a": "b"}, "store": False},
        {"temperature": None, "n": None, "stop": None, "stream": None, "max_tokens": None},
        {"response_format": {"type": "text"}, "guided_json": None, "structured_outputs": None},
        {"repetition_penalty": 1, "bad_words": [], "stop_token_ids": [], "allowed_token_ids": None},
        {"top_k": -1},
        {"cache_salt": None},
        {"cache_salt": "tenant-7"},
        {"use_beam_search": False, "length_penalty": 1, "early_stopping": False},
        {**BEAMS, "length_penalty": -0.5, "early_stopping": "never"},
        {"use_beam_search": True, "n": 2, "best_of": 3, "temperature": 0, "top_p": 1, "top_k": -1},
    ],
)
def test_neutral_values_of_missing_features_are_taken(fields: dict[str, Any]) -> None:
    validate(CompletionRequest, {"prompt": "x", **fields})


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"frequency_penalty": 2.5}, "frequency_penalty", "less than or equal to 2, got 2.5"),
        ({"frequency_penalty": False}, "frequency_penalty", "valid number, got false"),
        ({"presence_penalty": -3}, "presence_penalty", "greater than or equal to -2"),
        ({"repetition_penalty": 0}, "repetition_penalty", "greater than 0, got 0"),
        ({"bad_words": ["x", ""]}, "bad_words", "texts of 1 to 256 characters"),
        ({"bad_words": "x"}, "bad_words", "a list of up to 256 texts"),
        ({"allowed_token_ids": []}, "allowed_token_ids", "a list of token ids, got []"),
        ({"allowed_token_ids": [1, -1]}, "allowed_token_ids", "token ids, got -1"),
        ({"allowed_token_ids": [1, None]}, "allowed_token_ids", "token ids, got null"),
        ({"stop_token_ids": [None]}, "stop_token_ids", "token ids, got null"),
        ({"stop_token_ids": [True]}, "stop_token_ids", "token ids, got true"),
        ({"stop_token_ids": list(range(300))}, "stop_token_ids", "up to 256 token ids, got 300"),
        (
            {"best_of": 3, "n": 2, "stream": True},
            "best_of",
            "'best_of' beyond 'n' chooses among whole answers",
        ),
        ({**BEAMS, "n": 3}, "best_of", "'best_of' must be at least 'n', 3: got 2"),
        ({"use_beam_search": True}, "use_beam_search", "needs 'best_of' or 'n' of at least 2"),
        ({**BEAMS, "temperature": 0.5}, "temperature", "takes no 'temperature': leave it out, got 0.5"),
        ({**BEAMS, "top_k": 5}, "top_k", "takes no 'top_k'"),
        ({**BEAMS, "min_tokens": 1}, "min_tokens", "takes no 'min_tokens'"),
        ({**BEAMS, "logprobs": 0}, "logprobs", "'use_beam_search' reports no 'logprobs'"),
        ({"length_penalty": 2}, "length_penalty", "supported with 'use_beam_search' only"),
        ({"early_stopping": True}, "early_stopping", "supported with 'use_beam_search' only"),
        ({**BEAMS, "length_penalty": 11}, "length_penalty", "less than or equal to 10, got 11"),
        ({**BEAMS, "length_penalty": "1"}, "length_penalty", 'valid number, got "1"'),
        ({**BEAMS, "early_stopping": 1}, "early_stopping", 'expected true, false or "never", got 1'),
        ({**BEAMS, "early_stopping": "soon"}, "early_stopping", "never"),
        ({"suffix": "end"}, "suffix", "'suffix' is not supported yet"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "a number from -100 to 100 for token 5, got 101"),
        ({"logit_bias": {"5": "1"}}, "logit_bias", 'got "1"'),
        ({"logit_bias": {"-5": 1}}, "logit_bias", 'token ids as names, got "-5"'),
        ({"logit_bias": {str(i): 1 for i in range(2000)}}, "logit_bias", "up to 1024 token ids"),
        ({"store": True}, "store", "'store' is not supported yet"),
        ({"foo": 1}, "foo", "unknown field 'foo'"),
        ({"n": "5"}, "n", 'got "5"'),
        ({"n": True}, "n", "got true"),
        ({"n": 17}, "n", "less than or equal to 16, got 17"),
        ({"max_tokens": -1}, "max_tokens", "greater than or equal to 0, got -1"),
        (
            {"max_tokens": 0},
            "max_tokens",
            "'max_tokens' 0 asks for no output: expected at least 1, or one of",
        ),
        ({"max_tokens": 5.0}, "max_tokens", "valid integer, got 5.0"),
        ({"temperature": "1"}, "temperature", 'valid number, got "1"'),
        ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
        ({"temperature": float("inf")}, "temperature", "got Infinity"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"top_k": -2}, "top_k", "0 or -1"),
        ({"top_k": True}, "top_k", "got true"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"cache_salt": ""}, "cache_salt", "at least 1 character"),
        ({"cache_salt": 5}, "cache_salt", "valid string, got 5"),
        ({"cache_salt": "x" * 257}, "cache_salt", "at most 256 characters"),
        ({"stop": ""}, "stop", "non-empty"),
        ({"stop": ["a"] * 17}, "stop", "up to 16"),
        ({"logprobs": True}, "logprobs", "valid integer"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "at least 1"),
        ({"stream_options": {"include_usage": True}}, None, "needs 'stream'"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unknown field"),
        ({f"f{i}": 1 for i in range(200)}, None, "the body: expected up to 100 fields, got 201"),
        ({"x" * 5000: 1}, "x" * 5000, f"unknown field '{'x' * 200}…'"),
        ({"logit_bias": 10**5000}, "logit_bias", "up to 1024 token ids"),
        ({"response_format": {"type": "xml"}}, "response_format", 'got {"type": "xml"}'),
        ({"response_format": {"type": "json_schema"}}, "response_format", "expected one of"),
        (FORMAT, "response_format.json_schema.schema", "expected a JSON schema, an object, got null"),
        ({"guided_json": "{"}, "guided_json", "expected a text of JSON"),
        ({"guided_json": {"x-guidance": {}}}, "guided_json", "leave it out"),
        ({"guided_regex": ""}, "guided_regex", "a non-empty text"),
        ({"guided_choice": ["a", 1]}, "guided_choice", "non-empty texts"),
        ({"guided_grammar": "x" * 70_000}, "guided_grammar", "expected up to 65536 bytes, got 70000"),
        ({"structured_outputs": {}}, "structured_outputs", "an object with one of json, regex"),
        ({"structured_outputs": {"json": {}, "regex": "x"}}, "structured_outputs", "with one of"),
        ({"structured_outputs": {"choice": "a"}}, "structured_outputs.choice", "a list of up to 1024"),
        ({"structured_outputs": {"json_object": 1}}, "structured_outputs.json_object", "true"),
        ({"n": [[[0] * 10**6]]}, "n", f"got [[[{', '.join('0' * 19)}"),
        ({"prompt": []}, "prompt", "expected a text"),
        ({"prompt": ["a", 1]}, "prompt", "all texts"),
        ({"prompt": [[1, "a"]]}, "prompt", "whole numbers"),
        ({"prompt": [True]}, "prompt", "all texts"),
    ],
)
def test_refusals_name_the_field(fields: dict[str, Any], param: str | None, message: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        validate(CompletionRequest, {"prompt": "x", **fields})
    assert refused.value.param == param
    assert message in refused.value.message


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"tools": [{"type": "function"}]}, "tools.0.function", "is required"),
        ({"functions": [{}]}, "functions", "not supported yet"),
        ({"top_logprobs": 2}, None, "needs 'logprobs'"),
        ({"logprobs": 2}, "logprobs", "valid boolean"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, None, "disagree"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages.0.role", "'system'"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content", "expected a text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages.0.content",
            "only text",
        ),
        ({"messages": [{**USER[0], "name": "bob"}]}, "messages.0.name", "'name' is not supported yet"),
        ({"prompt": "x"}, "prompt", "unknown field"),
    ],
)
def test_chat_refusals_name_the_field(fields: dict[str, Any], param: str | None, message: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        validate(ChatRequest, {"messages": USER, **fields})
    assert refused.value.param == param
    assert message in refused.value.message


def test_several_problems_come_together() -> None:
    with pytest.raises(InvalidRequestError) as refused:
        validate(CompletionRequest, {"n": 0, "foo": 1})
    assert refused.value.message.count(";") == 2


def test_a_list_of_faults_is_one_fault() -> None:
    """Millions of them would be millions of errors."""
    for messages in ([0] * 50_000, USER * 50_000):
        with pytest.raises(ValidationError) as refused:
            ChatRequest.model_validate({"messages": messages})
        assert refused.value.error_count() == 1
    with pytest.raises(InvalidRequestError, match="at most 4096 items"):
        validate(ChatRequest, {"messages": USER * 50_000})


def test_text_parts_are_joined_and_answers_can_be_sent_back() -> None:
    kept = {"type": "text", "text": "b", "cache_control": {"type": "ephemeral"}}
    parts = [{"type": "text", "text": "a"}, kept]
    answer = {"role": "assistant", "content": "c", "tool_calls": [], "refusal": None}
    request = validate(ChatRequest, {"messages": [{"role": "user", "content": parts}, answer]})
    assert [m.content for m in request.messages] == ["ab", "c"]
    for silent in ({"role": "assistant", "content": None}, {"role": "assistant"}):
        request = validate(ChatRequest, {"messages": [USER[0], silent, USER[0]]})
        assert [m.content for m in request.messages] == ["hi", "", "hi"]


def test_values_resolve_request_then_artefact_then_api() -> None:
    artefact = GenerationDefaults(temperature=0.5, top_k=7, max_tokens=9, stop=("x",))
    silent, stop = resolve(validate(CompletionRequest, {"prompt": "p"}), artefact, 16)
    assert (silent.temperature, silent.top_k, silent.top_p, silent.min_p) == (0.5, 7, 1.0, 0.0)
    assert (silent.max_tokens, stop) == (9, ("x",))
    assert 0 <= silent.seed < 2**63
    spoken = {"prompt": "p", "temperature": 0, "top_k": 0, "max_tokens": 3, "stop": [], "seed": -5}
    loud, stop = resolve(validate(CompletionRequest, spoken), artefact, 16)
    assert (loud.temperature, loud.top_k, loud.max_tokens, stop, loud.seed) == (0.0, 0, 3, (), -5)
    plain, stop = resolve(validate(CompletionRequest, {"prompt": "p"}), GenerationDefaults(), 16)
    assert (plain.temperature, plain.max_tokens, stop) == (1.0, 16, ())


def fitted(length: int, **options: Any) -> tuple[int, int]:
    values = {"context": 10, "requested": None, "default": 4, "min_tokens": 0, "truncate": None, **options}
    ids, max_tokens = fit(tuple(range(length)), **values)
    assert ids == tuple(range(length))[length - len(ids) :]  # the last ones stay
    return len(ids), max_tokens


def test_prompt_and_output_share_the_context() -> None:
    assert fitted(3) == (3, 4)
    assert fitted(8) == (8, 2)  # a default is clipped
    assert fitted(8, requested=2) == (8, 2)
    assert fitted(9) == (9, 1)
    assert fitted(20, truncate=5) == (5, 4)
    assert fitted(3, truncate=5) == (3, 4)
    assert fitted(20, truncate=-1, requested=3) == (7, 3)
    assert fitted(20, truncate=-1) == (6, 4)
    assert fitted(20, truncate=-1, default=100) == (5, 5)


@pytest.mark.parametrize(
    ("length", "options", "numbers"),
    [
        (8, {"requested": 3}, ("10", "11", "8", "3")),
        (10, {}, ("10", "11", "at least 1")),
        (20, {"truncate": 8, "requested": 3}, ("11", "8")),
        (5, {"truncate": -1, "requested": 10}, ("15", "5", "10")),
    ],
)
def test_what_does_not_fit_is_refused_with_numbers(
    length: int, options: dict[str, Any], numbers: tuple[str, ...]
) -> None:
    with pytest.raises(PromptTooLongError) as refused:
        fitted(length, **options)
    assert all(number in refused.value.message for number in numbers)


def test_min_tokens_must_be_reachable() -> None:
    with pytest.raises(InvalidRequestError, match="min_tokens"):
        fitted(3, requested=2, min_tokens=3)
