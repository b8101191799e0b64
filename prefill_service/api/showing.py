"""What an answer says of what it was given (`prefill_service.api.given`), and the ids of a continuation.

Its functions run for requests that ask for that, and for no others.

    echo              the client's own text before each answer's; what ids, and what was cut, decode to
    echo + logprobs   the tokens of that text before the answer's: refused inside a template, whose tokens are
                      not those of the text that was sent
    ..._logprobs      the tokens as they were computed, in the form that vLLM has
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from prad.artefact import PROMPT_FIELD, AdapterRecord
from prad.core.sampling import ScoredToken, Scoring, Token
from prad.lm import TextStream, Tokenizer
from prefill_service.api.conversation import ChatEncoder, stream_behind
from prefill_service.api.given import Given
from prefill_service.api.intake import PromptInput
from prefill_service.api.requests import CompletionRequest, GenerationRequest, Json
from prefill_service.api.text import ChoiceText, Delta, Template, TokenScore, TokenScorer
from prefill_service.errors import InvalidRequestError
from prefill_service.prompt import PromptRequest

MOST_SCORES = 2**18
"""Log-probabilities of given tokens in one answer: some 20 MB of JSON."""
_AT_ONCE = 1024
"""Tokens of a prompt that are put into words without a thread of their own."""

Scores = Sequence[ScoredToken | None]


class GivenEncoder(ChatEncoder):
    """Tokenises continuations, too."""

    async def continuations(self, given: Sequence[PromptInput]) -> list[tuple[int, ...]]:
        """What follows prompts: in no template, and without the model's own tokens in front. Raises
        InvalidRequestError, OverloadedError."""
        texts = [each for each in given if isinstance(each, str)]
        for text in texts:
            self._require_short(len(text), "continuation")
        encoded = []
        with self._room(sum(map(len, texts))):
            for each in given:
                if isinstance(each, str):
                    encoded.append(await self._encoded(len(each), partial(self._behind, each)))
                else:
                    self._require_known(each, "continuation")
                    encoded.append(each)
        return encoded

    def _behind(self, text: str) -> list[int]:
        return self._tokenizer.encode_continuation(self._tokenizer.as_text(text))


def scoring_of(request: GenerationRequest, prompt_tokens: int) -> Scoring | None:
    """Of one of its prompts."""
    echoed = request.logprobs if isinstance(request, CompletionRequest) and request.echo else None
    all_of_it = [count for count in (request.prompt_logprobs, echoed) if count is not None]
    behind = request.continuation_logprobs if isinstance(request, Given) else None
    if all_of_it:
        return Scoring(0, max(*all_of_it, behind or 0))
    return None if behind is None else Scoring(prompt_tokens, behind)


def require_shown(
    request: GenerationRequest,
    record: AdapterRecord | None,
    template: Template,
    prompts: Sequence[PromptRequest],
) -> None:
    """Raises InvalidRequestError for what cannot be shown."""
    total = 0
    for prompt in prompts:
        if prompt.scoring is not None:
            tokens = len(prompt.prompt_ids) + len(prompt.continuation_ids) - prompt.scoring.first
            total += tokens * (1 + prompt.scoring.alternatives) * prompt.choices
    if total > MOST_SCORES:
        raise InvalidRequestError(
            f"the answer would hold {total} log-probabilities of given tokens: expected up to {MOST_SCORES}; "
            "ask for fewer alternatives, choices or prompts at once",
            param="prompt",
        )
    if not stands_in_template(record, template):
        return
    if isinstance(request, CompletionRequest) and request.echo and request.logprobs is not None:
        raise InvalidRequestError(
            "the prompt stands in this task's template: its tokens are not those of the text that is echoed. "
            "Instead of 'echo' with 'logprobs' use 'prompt_logprobs' or 'continuation_logprobs', or send "
            "the whole prompt with 'raw_prompt': true",
            param="echo",
            code="template_not_echoed",
        )


def stands_in_template(record: AdapterRecord | None, template: Template) -> bool:
    """Whether there is more in the prompt than what was sent; a template may be no more than its prompt."""
    if record is None or template == "none":
        return False
    return record.chat_template or record.template != PROMPT_FIELD


class Shown:
    """What the answer to one request says of what that gives, prompt by prompt."""

    def __init__(
        self, request: GenerationRequest, tokenizer: Tokenizer, scorer: TokenScorer, *, inside: bool
    ) -> None:
        """inside: whether its prompts stand in a template."""
        self._request = request
        self._echoing = request if isinstance(request, CompletionRequest) and request.echo else None
        self._inside = inside
        self._tokenizer = tokenizer
        self._scorer = scorer
        self._told: dict[int, Json] = {}

    def stream_behind(self, prompt: PromptRequest, specials: frozenset[int]) -> TextStream | None:
        """For an answer that is shown behind what was given: its first space is no training's, and belongs to
        the text. None if it stands alone."""
        if not prompt.continuation_ids and self._echoing is None:
            return None
        return stream_behind(self._tokenizer, prompt.prompt_ids + prompt.continuation_ids, specials)

    async def opening(
        self, prompt: PromptRequest, scores: Scores, texts: Mapping[int, ChoiceText]
    ) -> list[Delta]:
        """At the first news of a prompt: what stands before the answers of its choices, whose `texts` begin
        behind it."""
        work = partial(self._words, prompt, scores)
        tokens = len(prompt.prompt_ids) + len(prompt.continuation_ids)
        text, listed = work() if tokens <= _AT_ONCE else await asyncio.to_thread(work)
        if self._echoing is None:
            return []
        for choice in texts.values():
            choice.length = len(text)
        first = prompt.prompt_index * prompt.choices
        return [Delta(first + choice, text, listed) for choice in texts]

    def add_to(self, body: Json, choices: Sequence[Json]) -> None:
        """What a whole answer says beside its choices' texts: a chat's at the top, as vLLM has it."""
        if not isinstance(self._request, CompletionRequest):
            body.update(self._told[0])
            return
        for index, choice in enumerate(choices):
            choice.update(self._told[index // self._request.choices])

    def _words(self, prompt: PromptRequest, scores: Scores) -> tuple[str, tuple[TokenScore, ...]]:
        """The text that is echoed, and its tokens if they were asked for; notes the rest."""
        begins, request, told = len(prompt.prompt_ids), self._request, Json()
        known = (*(None,) * (begins + len(prompt.continuation_ids) - len(scores)), *scores)
        if request.prompt_logprobs is not None:
            told["prompt_logprobs"] = self._entries(known, request.prompt_logprobs)
        if isinstance(request, Given) and request.continuation_logprobs is not None:
            told["continuation_logprobs"] = self._entries(known[begins:], request.continuation_logprobs)
        text, listed, offset = "", tuple[TokenScore, ...](), None
        if self._echoing is not None:
            (text, before), (more, behind) = self._texts(self._echoing, prompt)
            offset = len(text)
            offsets = [min(at, offset) for at in before] + [offset + at for at in behind]
            text += more
            if (count := self._echoing.logprobs) is not None:
                ids = prompt.prompt_ids + prompt.continuation_ids
                listed = tuple(map(partial(self._score, count), ids, known, offsets))
        if prompt.continuation_ids and (request.prompt_logprobs is not None or self._echoing is not None):
            told["continuation"] = {"token": begins, "text_offset": offset}
        self._told[prompt.prompt_index] = told
        return text, listed

    def _texts(
        self, request: CompletionRequest, prompt: PromptRequest
    ) -> tuple[tuple[str, list[int]], tuple[str, list[int]]]:
        """What is echoed of the prompt, and of the continuation; each with where its tokens begin."""
        given = request.prompt[prompt.prompt_index]
        if self._inside:
            own = given if isinstance(given, str) else self._tokenizer.decode(given)
            before = [0] * len(prompt.prompt_ids)
            stream = self._tokenizer.stream()
        else:
            stream = self._tokenizer.stream()
            decoded, before = _decoded(stream, prompt.prompt_ids)
            whole = isinstance(given, str) and request.truncate_prompt_tokens is None
            own = given if whole and isinstance(given, str) else decoded
        behind = _decoded(stream, prompt.continuation_ids)
        if request.continuation is not None:
            more = request.continuation[prompt.prompt_index]
            behind = (more if isinstance(more, str) else behind[0], behind[1])
        return (own, before), behind

    def _score(self, count: int, token: int, score: ScoredToken | None, offset: int) -> TokenScore:
        if score is None:
            return replace(self._scorer.score(Token(token, 0.0), offset), logprob=None)
        return self._scorer.score(replace(score, top=score.top[:count]), offset)

    def _entries(self, scores: Scores, count: int) -> list[Json | None]:
        return [None if score is None else self._entry(score, count) for score in scores]

    def _entry(self, score: ScoredToken, count: int) -> Json:
        """The token first; those that are likelier or nearly as likely behind it, by rank."""
        named = self._scorer.score(score, 0)
        told: Json = {str(score.id): _numbers(named.logprob, score.rank, named.token.text)}
        for rank, ((other, _), (name, logprob)) in enumerate(
            zip(score.top[:count], named.top[:count], strict=True), 1
        ):
            told.setdefault(str(other), _numbers(logprob, rank, name.text))
        return told


def _numbers(logprob: float | None, rank: int, text: str) -> Json:
    return {"logprob": logprob, "rank": rank, "decoded_token": text}


def _decoded(stream: TextStream, ids: Sequence[int]) -> tuple[str, list[int]]:
    """The text of ids, and where in it that of each begins."""
    pieces, offsets, length = list[str](), list[int](), 0
    for token in ids:
        offsets.append(length)
        pieces.append(stream.push(token))
        length += len(pieces[-1])
    return "".join((*pieces, stream.flush())), offsets
