"""From a validated request to what the engine gets: version, values and seed are decided here, once.

A value is the first that is named: by the request, by the task's artefact, by the API.
"""

import secrets
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from starlette.requests import Request

from prad.artefact import AdapterRecord, GenerationDefaults, GenerationValues
from prad.core.rules import Rules
from prad.core.sampling import SamplingParams
from prad.lm import Grammars, Tokenizer
from prefill_service.api.compiling import CompileQueue
from prefill_service.api.intake import ApiLimits
from prefill_service.api.messages import Addressed
from prefill_service.api.outcomes import while_connected
from prefill_service.api.requests import (
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    addressed,
    split_name,
)
from prefill_service.api.rules import RULE_FIELDS, rules_of
from prefill_service.api.showing import GivenEncoder, require_shown, scoring_of
from prefill_service.api.text import Template, chat_template, completion_template
from prefill_service.catalogue import Client, TaskCatalogue
from prefill_service.errors import (
    InvalidRequestError,
    NotHereYetError,
    NotReadyError,
    PromptTooLongError,
    UnknownModelError,
)
from prefill_service.prompt import Engine, PromptRequest, TaskVersion

T = TypeVar("T")

TOKENS_PER_EVENT = 16
"""How many tokens decode tells at once where nobody sees them one by one."""

GREEDY_BELOW = 1e-5
"""Logits divided by less than this may overflow float32; the draw is greedy there anyway."""

FIT = -1
"""truncate_prompt_tokens that keeps as much of the prompt as fits."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Facts of the frozen model. `fingerprint` is shown short as `system_fingerprint`.

    max_context: positions that prompt, virtual tokens and output share; vocab_size: ids that the model
    embeds; stop_ids: what the model's generation config names (the tokenizer's EOS always counts as well).
    """

    fingerprint: str
    max_context: int
    vocab_size: int
    stop_ids: frozenset[int]

    @property
    def short_fingerprint(self) -> str:
        return f"fp_{self.fingerprint[:12]}"


@dataclass(frozen=True, slots=True)
class Target:
    """`version` None is the plain model. `name`: as the client wrote it, and as the response repeats it;
    `routing`: the revision of the task's routing that it was resolved by; `shadow`: the version under which
    it also runs, unseen; `key`: the name of the API key that was shown."""

    name: str
    version: TaskVersion | None
    routing: int | None = None
    shadow: TaskVersion | None = None
    key: str | None = None

    @property
    def record(self) -> AdapterRecord | None:
        return self.version.artefact.record if self.version else None

    def named(self) -> dict[str, object]:
        """For an answer."""
        version = self.version
        return {
            "task": version.task if version else None,
            "version": version.version if version else None,
            "digest": version.digest if version else None,
            "routing": self.routing,
        }


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request that the engine can start: one `PromptRequest` per prompt, `choices` sequences each.

    The choice that clients know as `index` is prompt index * choices + choice. `keep_stop`: what ends an
    output stays in it; `shown`: special tokens that are text of it; `goes_on`: it stands behind a text that
    the client gave; `tells_ids`: the answer names the tokens.
    """

    id: str
    created: int
    target: Target
    template: Template
    stop: tuple[str, ...]
    prompts: tuple[PromptRequest, ...]
    keep_stop: bool = False
    shown: frozenset[int] = frozenset()
    goes_on: bool = False
    tells_ids: bool = False

    @property
    def choices(self) -> int:
        return self.prompts[0].choices

    @property
    def sampling(self) -> SamplingParams:
        """Of the prompt that leaves room for the longest output; the others differ in that alone."""
        return max((prompt.sampling for prompt in self.prompts), key=lambda sampling: sampling.max_tokens)

    @property
    def most_tokens(self) -> int:
        """That it may take, of prompts and of outputs as long as they may get."""
        return sum(
            len(prompt.prompt_ids)
            + len(prompt.continuation_ids)
            + prompt.sampling.max_tokens * prompt.sequences
            for prompt in self.prompts
        )

    def report(self) -> dict[str, object]:
        """The response's `prad` object: which adapter answered, in which template, and how it was sampled."""
        sampling, beams = self.sampling, self.prompts[0].beams
        values = {name: getattr(sampling, name) for name in GenerationValues.model_fields}
        values |= {"stop": list(self.stop)} | ({} if beams is None else beams.report())
        return {
            **self.target.named(),
            "template": self.template,
            "seed": sampling.seed,
            "sampling": values,
        }


def resolve(
    request: GenerationRequest, artefact: GenerationDefaults, max_tokens: int
) -> tuple[SamplingParams, tuple[str, ...]]:
    """How this request is sampled, and its stop texts. `artefact`: the adapter's defaults (empty for the
    plain model); `max_tokens`: the API's, a wish until the prompt's length is known: `fit`."""
    if request.beams is not None:  # the task's defaults are for drawing
        artefact = GenerationDefaults(temperature=0.0, max_tokens=artefact.max_tokens, stop=artefact.stop)
    defaults = artefact.model_dump(include=set(GenerationValues.model_fields), exclude_none=True)
    api = {"max_tokens": max_tokens, "temperature": 1.0, "seed": secrets.randbits(53)}
    params = SamplingParams(**(api | defaults | request.sampling))
    if params.temperature < GREEDY_BELOW:
        params = replace(params, temperature=0.0)
    return params, artefact.stop if request.stop is None else request.stop


class Admission:
    """Turns requests into admitted ones, or raises what the client did wrong."""

    def __init__(
        self,
        engine: Engine,
        catalogue: TaskCatalogue,
        tokenizer: Tokenizer,
        model: ModelInfo,
        limits: ApiLimits,
    ) -> None:
        self._engine = engine
        self._catalogue = catalogue
        self.encoder = GivenEncoder(tokenizer, model.vocab_size, model.max_context, limits)
        self._tokenizer = tokenizer
        self._max_context = model.max_context
        self._stop_ids = model.stop_ids | tokenizer.end_ids
        grammars = CompileQueue(Grammars(lambda: tokenizer, model.vocab_size))
        self._rules_of = partial(
            rules_of, tokenizer=tokenizer, grammars=grammars, vocab_size=model.vocab_size
        )
        self._limits = limits

    @property
    def troubles(self) -> list[str]:
        """Why no request can be served now; empty once they can."""
        return [t for t in (self._engine.trouble, self._catalogue.trouble) if t is not None]

    def target(self, request: Addressed, key: str, client: Client | None = None) -> Target:
        """The one place where task becomes version; `key`: sticky, where the task's requests are divided.
        `client`: who shows a key, which must be for the task.
        Raises NotReadyError, NotHereYetError, TaskNotAllowedError, UnknownModelError, InvalidRequestError."""
        if troubles := self.troubles:
            raise NotReadyError(f"not ready: {'; '.join(troubles)}")
        base_name = self._catalogue.base_name
        name, param = addressed(request, base_name)
        task, which = (base_name, None) if name is None else split_name(name, param)
        shown = None if client is None else client.name
        if client is not None:
            client.require(task)
        if name is None:
            return Target(base_name, None, key=shown)
        version, routing = find_version(self._catalogue, task, which, param, key, client)
        shadow = self._catalogue.shadow(task, version) if which is None else None
        return Target(name, version, routing, shadow, shown)

    async def completion(self, request: CompletionRequest, target: Target) -> Admitted:
        if len(request.prompt) > self._limits.max_prompts:
            raise InvalidRequestError(
                f"'prompt' holds {len(request.prompt)} prompts: expected up to {self._limits.max_prompts}",
                param="prompt",
            )
        each = request.drawn if request.beams is None else request.beams.width
        if (total := len(request.prompt) * each) > self._limits.max_choices:
            kind = "choices" if request.beams is None else "beams"
            raise InvalidRequestError(
                f"{len(request.prompt)} prompts with {each} {kind} each are {total} {kind}: expected up to "
                f"{self._limits.max_choices} in one request",
                param="n" if request.best_of is None else "best_of",
            )
        template = completion_template(
            target.record, request.prompt[0], raw=request.raw, add=bool(request.add_template)
        )
        cut = request.truncate_prompt_tokens is not None
        prompts = await self.encoder.completion(
            target.record, request.prompt, template, cut=cut, specials=request.add_special_tokens
        )
        given = request.continuation
        behind = [()] * len(prompts) if given is None else await self.encoder.continuations(given)
        rules = await self._rules(request, target)
        return self._admitted("cmpl", request, target, template, prompts, behind, rules)

    async def chat(self, request: ChatRequest, target: Target) -> Admitted:
        template = chat_template(target.record, raw=request.raw)
        cut = request.truncate_prompt_tokens is not None
        ids = await self.encoder.chat(target.record, request, template, cut=cut)
        rules = await self._rules(self.encoder.held_to_calls(request, request.constraint), target)
        behind = [ids.continuation]
        admitted = self._admitted("chatcmpl", request, target, template, [ids.prompt], behind, rules)
        shown = admitted.shown | self.encoder.shown_in_calls(request)
        return replace(admitted, shown=shown, goes_on=request.goes_on)

    async def _rules(self, request: GenerationRequest, target: Target) -> Rules | None:
        """None without touching any for most requests: who names no field of theirs."""
        if request.model_fields_set.isdisjoint(RULE_FIELDS):
            return None
        beams, spaced = request.beams is not None, target.version is not None and not request.goes_on
        asked = partial(self._rules_of, request, beams=beams, spaced=spaced, key=target.key)
        return await asked(ignore_eos=bool(request.ignore_eos))

    def _admitted(
        self,
        prefix: str,
        request: GenerationRequest,
        target: Target,
        template: Template,
        prompts: Sequence[tuple[int, ...]],
        behind: Sequence[tuple[int, ...]],
        rules: Rules | None,
    ) -> Admitted:
        record = target.record
        chat = isinstance(request, ChatRequest)
        default_tokens = self._limits.chat_tokens if chat else self._limits.completion_tokens
        params, stop = resolve(request, record.generation if record else GenerationDefaults(), default_tokens)
        stop_ids = frozenset() if request.ignore_eos else self._stop_ids
        params = replace(params, stop_ids=stop_ids.union(request.stop_token_ids or ()), rules=rules)
        name = f"{prefix}-{uuid.uuid4().hex}"
        fitted = [
            fit(
                ids,
                context=self._max_context,
                virtual=record.virtual_tokens if record else 0,
                behind=len(more),
                requested=request.output_limit,
                default=params.max_tokens,
                min_tokens=params.min_tokens,
                truncate=request.truncate_prompt_tokens,
            )
            for ids, more in zip(prompts, behind, strict=True)
        ]
        told_each = (request.stream or stop) and request.beams is None
        requests = tuple(
            PromptRequest(
                request_id=f"{name}-{index}",
                version=target.version,
                prompt_ids=ids,
                sampling=replace(params, max_tokens=max_tokens),
                prompt_index=index,
                choices=request.drawn,
                beams=request.beams,
                continuation_ids=more,
                scoring=scoring_of(request, len(ids)) if request.shows_given else None,
                tokens_per_event=1 if told_each else TOKENS_PER_EVENT,
                cache_salt=request.cache_salt,
                key=target.key,
                answer=name,
                prompts=len(fitted),
            )
            for index, ((ids, max_tokens), more) in enumerate(zip(fitted, behind, strict=True))
        )
        if request.shows_given:
            require_shown(request, record, template, requests)
        return Admitted(
            name,
            int(time.time()),
            target,
            template,
            stop,
            requests,
            keep_stop=bool(request.include_stop_str_in_output),
            shown=self._tokenizer.special_ids if request.skip_special_tokens is False else frozenset(),
            tells_ids=bool(request.return_token_ids),
        )


def fit(
    ids: tuple[int, ...],
    *,
    context: int,
    virtual: int = 0,
    behind: int = 0,
    requested: int | None,
    default: int,
    min_tokens: int,
    truncate: int | None,
) -> tuple[tuple[int, ...], int]:
    """The prompt as it will be computed, and how many tokens may follow it.

    `context`: positions for both, the adapter's `virtual` tokens and a continuation's, `behind` it;
    `requested`: max_tokens if the request names it (kept to the letter), else `default` is clipped to what
    fits. `truncate`: keep only that many of the prompt's last tokens.
    Raises PromptTooLongError with the numbers, InvalidRequestError for an empty prompt or min_tokens that
    cannot be reached.
    """
    capacity = context - virtual - behind
    if truncate is not None:
        kept = _room(capacity, requested, default) if truncate == FIT else truncate
        ids = ids[-kept:] if kept > 0 else ids
    if not ids:
        raise InvalidRequestError("the prompt is empty: expected at least one token", param="prompt")
    room, least = capacity - len(ids), 1 if requested is None else requested
    if room < least:
        if room > 0:
            advice, param = f"max_tokens is at most {room} with this prompt", "max_tokens"
        else:
            advice, param = "shorten the prompt or send 'truncate_prompt_tokens'", "prompt"
        taken = [f"the adapter's {virtual} virtual ones"] if virtual else []
        taken += [f"{behind} of the continuation"] if behind else []
        beside = f" beside {' and '.join(taken)}" if taken else ""
        raise PromptTooLongError(
            f"the context holds {capacity} tokens{beside}, but {len(ids) + least} were asked for: "
            f"{len(ids)} in the prompt and {'at least 1' if requested is None else least} for the output; "
            f"{advice}",
            param=param,
        )
    max_tokens = min(default, room) if requested is None else requested
    if min_tokens > max_tokens:
        raise InvalidRequestError(
            f"'min_tokens' is {min_tokens}, but the output is limited to {max_tokens} tokens",
            param="min_tokens",
        )
    return ids, max_tokens


def _room(capacity: int, requested: int | None, default: int) -> int:
    """How much prompt fits beside the output; a default output length takes at most half the context."""
    return capacity - (min(default, capacity // 2) if requested is None else requested)


async def when_here(request: Request, find: Callable[[], T]) -> T:
    """What `find` finds, once the version that it means is here: as long as the client stays connected. The
    body must have been read."""
    while True:
        try:
            return find()
        except NotHereYetError as error:
            async with while_connected(request.receive):
                await error.here()


def find_version(
    catalogue: TaskCatalogue,
    task: str,
    name: int | str | None,
    param: str,
    key: str | None = None,
    asks: Client | None = None,
) -> tuple[TaskVersion, int]:
    """As `TaskCatalogue.resolve`, which it raises as; UnknownModelError names the field."""
    try:
        return catalogue.resolve(task, name, key, asks)
    except UnknownModelError as error:
        raise UnknownModelError(error.message, param=error.param or param, code=error.code) from error
