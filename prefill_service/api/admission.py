"""From a validated request to what the engine gets: the version is resolved and the seed drawn here, once."""

import asyncio
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from prad.artefact import AdapterRecord, GenerationDefaults
from prad.lm import Tokenizer
from prefill_service.api.budget import fit
from prefill_service.api.defaults import Effective, effective
from prefill_service.api.prompts import PromptEncoder
from prefill_service.api.protocols import ApiLimits, Catalogue, ModelInfo, Readiness
from prefill_service.api.schemas import ChatRequest, CompletionRequest, GenerationRequest
from prefill_service.api.targets import Target, find_target
from prefill_service.errors import InvalidRequestError, NotReadyError
from prefill_service.generation import PromptRequest

TOKENS_PER_EVENT = 16
"""How many tokens decode tells at once where nobody sees them one by one."""


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request that the engine can start: one `PromptRequest` per prompt, `choices` sequences each.

    The choice that clients know as `index` is prompt index * choices + choice.
    """

    id: str
    created: int
    target: Target
    effective: Effective
    prompts: tuple[PromptRequest, ...]
    choices: int

    @property
    def max_tokens(self) -> int:
        """The longest output that any prompt leaves room for."""
        return max(prompt.sampling.max_tokens for prompt in self.prompts)

    def report(self) -> dict[str, object]:
        """The response's `prad` object: which adapter answered, and how it was sampled."""
        version = self.target.version
        return {
            "task": version.task if version else None,
            "version": version.version if version else None,
            "digest": version.digest if version else None,
            "seed": self.effective.seed,
            "sampling": self.effective.report(self.max_tokens),
        }


class Admission:
    """Turns requests into admitted ones, or raises what the client did wrong."""

    def __init__(
        self,
        catalogue: Catalogue,
        readiness: Readiness,
        tokenizer: Tokenizer,
        model: ModelInfo,
        limits: ApiLimits,
    ) -> None:
        self._catalogue = catalogue
        self._readiness = readiness
        self._encoder = PromptEncoder(tokenizer, model.vocab_size, limits.thread_chars)
        self._max_context = model.max_context
        self._stop_ids = model.stop_ids | {tokenizer.eos_id}
        self._limits = limits

    def target(self, request: GenerationRequest) -> Target:
        """Raises NotReadyError, UnknownModelError, InvalidRequestError."""
        if reasons := self._readiness.reasons():
            raise NotReadyError(f"not ready: {'; '.join(reasons)}")
        return find_target(request, self._catalogue)

    async def completion(self, request: CompletionRequest, target: Target) -> Admitted:
        if len(request.prompt) > self._limits.max_prompts:
            raise InvalidRequestError(
                f"'prompt' holds {len(request.prompt)} prompts: expected up to {self._limits.max_prompts}",
                param="prompt",
            )
        each = request.beams or request.choices
        if (total := len(request.prompt) * each) > self._limits.max_choices:
            kind = "choices" if request.beams is None else "beams"
            raise InvalidRequestError(
                f"{len(request.prompt)} prompts with {each} {kind} each are {total} {kind}: expected up to "
                f"{self._limits.max_choices} in one request",
                param="n" if request.best_of is None else "best_of",
            )
        record, raw = _record(target), bool(request.raw_prompt)
        prompts = []
        for prompt in request.prompt:
            prompts.append(await self._encoder.completion(record, prompt, raw=raw))
            await asyncio.sleep(0)  # a long list must not keep the event loop from other requests
        return self._admitted("cmpl", request, target, prompts, self._limits.completion_tokens)

    async def chat(self, request: ChatRequest, target: Target) -> Admitted:
        ids = await self._encoder.chat(_record(target), request.messages, raw=bool(request.raw_prompt))
        return self._admitted("chatcmpl", request, target, [ids], self._limits.chat_tokens)

    def _admitted(
        self,
        prefix: str,
        request: GenerationRequest,
        target: Target,
        prompts: Sequence[tuple[int, ...]],
        default_tokens: int,
    ) -> Admitted:
        record = _record(target)
        values = effective(request, record.generation if record else GenerationDefaults(), default_tokens)
        name = f"{prefix}-{uuid.uuid4().hex}"
        fitted = [
            fit(
                ids,
                context=self._max_context,
                virtual=record.virtual_tokens if record else 0,
                requested=request.output_limit,
                default=values.max_tokens,
                min_tokens=values.min_tokens,
                truncate=request.truncate_prompt_tokens,
            )
            for ids in prompts
        ]
        requests = tuple(
            PromptRequest(
                request_id=f"{name}-{index}",
                version=target.version,
                prompt_ids=ids,
                sampling=values.params(max_tokens, self._stop_ids),
                prompt_index=index,
                choices=request.choices,
                beams=values.beams,
                tokens_per_event=1 if request.stream or values.stop else TOKENS_PER_EVENT,
            )
            for index, (ids, max_tokens) in enumerate(fitted)
        )
        return Admitted(name, int(time.time()), target, values, requests, request.choices)


def _record(target: Target) -> AdapterRecord | None:
    return target.version.artefact.record if target.version else None
