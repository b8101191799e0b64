"""The split without processes: a real prompt pass, what prefill tells decode as it travels, and decode's
engine, stepped by hand. Decode knows nothing else: another one is a service that was started anew."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch

from decode_service.engine import PagedEngine
from decode_service.runner import ModelRunner
from decode_service.scheduler import Scheduler
from kvtransfer.frames import Encoding, Incoming, Rows
from kvtransfer.messages import Open, decode, encode
from prad.adapters import Adapter
from prad.core.kv import BlockPool
from prad.core.sampling import Drafter, Token, TokenEvent
from prad.lm import Grammars, LanguageModel, SiteVectors
from prad.lm.kv import Pools
from prefill_service.decode_link import alike, open_message, text_ids
from prefill_service.pass_loop import deliver_first
from prefill_service.passes import raw, run_prompt_pass
from prefill_service.prompt import Prompt, PromptRequest

BLOCKS = 260
Asked = tuple[PromptRequest, Adapter | None]
Answers = dict[str, list[list[Token]]]
"""By the request's id: each choice's tokens."""


class Split:
    def __init__(self, model: LanguageModel, grammars: Grammars | None = None) -> None:
        self.ends: dict[tuple[str, int], str] = {}
        self._model = model
        self._events: list[TokenEvent] = []
        self._engine = PagedEngine(
            ModelRunner(model, Pools(model.layout, BLOCKS, 16, "cpu", model.kernels), grammars),
            Scheduler(BlockPool(BLOCKS, 16), 64),
            lambda told: self._events.extend(event for each in told.values() for event in each),
            lambda *_: None,
            drafter=Drafter(4, model.vocab_size),
        )

    def answers(self, asked: Sequence[Asked], steps: int | None = None) -> Answers:
        """All prompts in one pass, all sequences in one batch. steps: decode dies after so many."""
        prompts = [Prompt(request, adapter) for request, adapter in asked]
        layers: list[tuple[torch.Tensor, torch.Tensor]] = []
        states: dict[Prompt, SiteVectors] = {}
        first = run_prompt_pass(
            self._model,
            Pools(self._model.layout, 0, 16, "cpu", self._model.kernels),
            [prompt.as_chunk() for prompt in prompts],
            lambda _, key, value: layers.append((key.clone(), value.clone())),
            states.__setitem__,
        )
        answers: Answers = {}
        starts = accumulate((prompt.tokens for prompt in prompts[:-1]), initial=0)
        for prompt, start in zip(prompts, starts, strict=True):
            tokens = first[prompt]
            assert tokens is not None
            answers[prompt.request.request_id] = [[token] for token in tokens]
            sampling, index = prompt.request.sampling, prompt.request.output_offset + 1
            for choice, token in enumerate(tokens):
                if (reason := sampling.finish_reason(token.id, index)) is not None:
                    self.ends[prompt.request.request_id, choice] = reason
            if deliver_first(prompt, tokens, 0):
                self._hand_over(prompt, layers, start, tokens, states.get(prompt, {}))
        while self._engine.status().sequences and steps != 0:
            before = len(self._events)
            self._engine.step()
            if steps is not None and len(self._events) > before:
                steps -= 1
        for event in self._events:
            answers[event.request_id][event.choice] += event.tokens
            assert event.error is None, event.error
            if event.finish_reason is not None:
                self.ends[event.request_id, event.choice] = event.finish_reason
        return answers

    def _hand_over(
        self,
        prompt: Prompt,
        layers: Sequence[tuple[torch.Tensor, torch.Tensor]],
        start: int,
        tokens: Sequence[Token],
        state: SiteVectors,
    ) -> None:
        request = decode(Open, encode(open_message(prompt, self._model.spec, 60.0)))
        reservation = self._engine.admit("client", request)
        own = slice(start, start + prompt.tokens)
        planes = tuple((raw(key[own]), raw(value[own])) for key, value in layers)
        frame = Incoming(0, (), Encoding.RAW, self._model.layout.bytes_per_token, planes)
        self._engine.write(frame, [reservation.placed(0, Rows(0, 0, prompt.tokens))])
        for site, vectors in state.items():
            self._engine.put_state(reservation, str(site), bytes(raw(vectors)))
        self._engine.commit(reservation, tokens, text_ids(prompt), alike(prompt))


def replayed(request: PromptRequest, output: Sequence[int]) -> PromptRequest:
    """The same, behind so much of its output."""
    return replace(request, continuation_ids=tuple(output), output_offset=len(output))


def ids(tokens: Sequence[Token]) -> list[int]:
    return [token.id for token in tokens]
