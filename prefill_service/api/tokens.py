"""Text to ids and back, for whoever asks, as vLLM has it: POST /tokenize and /detokenize.

A prompt or a conversation gets the ids that a request with it would have computed, template included; nothing
is computed, and nothing too long is refused.
"""

from collections.abc import Awaitable, Callable
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, FailFast, Field, RootModel
from starlette.requests import Request
from starlette.responses import Response

from prad.artefact import AdapterRecord
from prad.lm import Tokenizer
from prefill_service.api.admission import Admission, ModelInfo, Target
from prefill_service.api.described import REFUSALS, body_schema
from prefill_service.api.intake import ApiLimits, Neutral, StrictModel, checked, read_body, read_json
from prefill_service.api.messages import Addressed, Conversation, Json
from prefill_service.api.outcomes import JsonResponse
from prefill_service.api.text import Template, chat_template, completion_template
from prefill_service.errors import InvalidRequestError


class Named(StrictModel):
    """What says whose tokens are meant."""

    model: str | None = None
    """The plain model's id, or a task, as in a request; the plain model if absent."""
    task: str | None = None
    """The task, where `model` names the plain model or is left out."""
    user: str | None = None
    """Where requests for a task are divided between versions: whose. Absent: as in a request."""


class Tokenized(Named):
    raw_prompt: bool | None = None
    """Leave out the task's template. Absent: no."""
    return_token_strs: bool | None = None
    """Name each token as the vocabulary has it, too. Absent: no."""


class TokenizePrompt(Tokenized):
    prompt: str
    """A text, as /v1/completions takes it."""
    add_special_tokens: bool | None = None
    """Put the tokenizer's special tokens in front. Absent: as the model and the task were trained."""


class TokenizeChat(Tokenized, Conversation):
    unsupported: ClassVar[Neutral] = {"chat_template": (), "mm_processor_kwargs": ()}


class TokenizeBody(RootModel[TokenizePrompt | TokenizeChat]):
    """A text, or a conversation."""


class Detokenize(Named):
    tokens: Annotated[list[int], FailFast(), Field(max_length=2**20)]
    """Ids of the vocabulary, up to 1048576."""


class TokenizeAnswer(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)

    count: int
    """How many tokens there are."""
    max_model_len: int
    """How many fit, with an output: the model's context without the adapter's virtual tokens."""
    tokens: list[int]
    """Their ids; task tokens of an adapter are -1 for the first, -2 for the second."""
    token_strs: list[str] | None
    """As the vocabulary has them, if `return_token_strs` was sent."""
    prad: Json
    """Whose they are, and what is around the prompt, as in an answer."""


class DetokenizeAnswer(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)

    prompt: str
    """The text."""


Meant = Callable[[Request, Addressed], Awaitable[Target]]
"""Which version a request names, once its files are here."""


def token_routes(
    admission: Admission, tokenizer: Tokenizer, model: ModelInfo, limits: ApiLimits, meant: Meant
) -> APIRouter:
    router = APIRouter(tags=["tokens"], responses=REFUSALS)

    @router.post(
        "/tokenize",
        response_model=None,
        responses={200: {"model": TokenizeAnswer}},
        openapi_extra=body_schema(TokenizeBody),
    )
    async def tokenize(request: Request) -> Response:
        """The token ids of a prompt or a conversation, in the template that a request has it in."""
        wanted = await read_tokenize(request, limits)
        target = await meant(request, wanted)
        return JsonResponse(await tokenized(wanted, target, admission, tokenizer, model))

    @router.post(
        "/detokenize",
        response_model=None,
        responses={200: {"model": DetokenizeAnswer}},
        openapi_extra=body_schema(Detokenize),
    )
    async def detokenize(request: Request) -> Response:
        """The text of token ids, special tokens included."""
        wanted = await read_body(request, Detokenize, limits)
        await meant(request, wanted)
        return JsonResponse({"prompt": await admission.encoder.text_of(wanted.tokens)})

    return router


async def read_tokenize(request: Request, limits: ApiLimits) -> TokenizePrompt | TokenizeChat:
    """Raises what `read_body` raises."""
    data: Any = await read_json(request, limits)
    sent = data if isinstance(data, dict) else {}
    if sent.get("messages") is None:
        return checked(request, data, TokenizePrompt, limits)
    if sent.get("prompt") is not None:
        raise InvalidRequestError("'prompt' and 'messages' both came: send one of them", param="prompt")
    return checked(request, data, TokenizeChat, limits)


async def tokenized(
    wanted: TokenizePrompt | TokenizeChat,
    target: Target,
    admission: Admission,
    tokenizer: Tokenizer,
    model: ModelInfo,
) -> Json:
    """The answer of /tokenize. Raises InvalidRequestError, OverloadedError."""
    record, raw = target.record, bool(wanted.raw_prompt)
    template: Template
    if isinstance(wanted, TokenizeChat):
        template = chat_template(record, raw=raw)
        chat = await admission.encoder.chat(record, wanted, template, cut=True)
        ids = chat.prompt + chat.continuation
    else:
        template = completion_template(record, wanted.prompt, raw=raw, add=False)
        specials = wanted.add_special_tokens
        (ids,) = await admission.encoder.completion(
            record, [wanted.prompt], template, cut=True, specials=specials
        )
    names = _names(ids, tokenizer, record) if wanted.return_token_strs else None
    virtual = 0 if record is None else record.virtual_tokens
    return {
        "count": len(ids),
        "max_model_len": model.max_context - virtual,
        "tokens": ids,
        "token_strs": names,
        "prad": {**target.named(), "template": template},
    }


def _names(ids: tuple[int, ...], tokenizer: Tokenizer, record: AdapterRecord | None) -> list[str]:
    """An adapter's own tokens by the names that its template has for them."""
    of_task = () if record is None else record.task_tokens
    names = tokenizer.names([max(token, 0) for token in ids])
    return [of_task[-1 - token] if token < 0 else name for token, name in zip(ids, names, strict=True)]
