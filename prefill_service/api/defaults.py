"""The values that take effect, each from the first that names it: request, artefact, the API's own."""

import secrets
from dataclasses import dataclass
from typing import TypeVar

from prad.artefact import GenerationDefaults
from prad.core.sampling import SamplingParams
from prefill_service.api.schemas import GenerationRequest

GREEDY_BELOW = 1e-5
"""Logits divided by less than this may overflow float32; the draw is greedy there anyway."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Effective:
    """How this request is sampled. `max_tokens` is a wish until the prompt's length is known: `budget`."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    max_tokens: int
    stop: tuple[str, ...]
    seed: int
    min_tokens: int
    ignore_eos: bool
    alternatives: int | None
    beams: int | None
    """How many hypotheses a beam search keeps; None: tokens are drawn one by one."""

    def params(self, max_tokens: int, stop_ids: frozenset[int]) -> SamplingParams:
        """What the engine gets for a prompt that leaves room for `max_tokens`."""
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            seed=self.seed,
            min_tokens=self.min_tokens,
            stop_ids=frozenset() if self.ignore_eos else stop_ids,
            logprobs=self.alternatives,
        )

    def report(self, max_tokens: int) -> dict[str, object]:
        """As the response's `prad` object shows it."""
        return {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "max_tokens": max_tokens,
            "stop": list(self.stop),
        } | ({} if self.beams is None else {"beams": self.beams})


def effective(request: GenerationRequest, artefact: GenerationDefaults, max_tokens: int) -> Effective:
    """`artefact`: the adapter's defaults (empty for the plain model); `max_tokens`: the API's default."""
    if request.beams is not None:  # the task's defaults are for drawing
        drawing = {"temperature": 0.0, "top_p": None, "top_k": None, "min_p": None}
        artefact = artefact.model_copy(update=drawing)
    temperature = _first(request.temperature, artefact.temperature, 1.0)
    return Effective(
        temperature=0.0 if temperature < GREEDY_BELOW else temperature,
        top_p=_first(request.top_p, artefact.top_p, 1.0),
        top_k=_first(request.top_k, artefact.top_k, 0),
        min_p=_first(request.min_p, artefact.min_p, 0.0),
        max_tokens=_first(request.output_limit, artefact.max_tokens, max_tokens),
        stop=_first(request.stop, None, artefact.stop),
        seed=secrets.randbits(53) if request.seed is None else request.seed,
        min_tokens=request.min_tokens or 0,
        ignore_eos=bool(request.ignore_eos),
        alternatives=request.alternatives,
        beams=request.beams,
    )


def _first(request: T | None, artefact: T | None, api: T) -> T:
    if request is not None:
        return request
    return api if artefact is None else artefact
