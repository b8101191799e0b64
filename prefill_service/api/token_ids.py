"""Ids of tokens in an answer that was asked to name them, where vLLM has them: `return_token_ids`.

A chat's prompt stands once beside its choices, or in a stream's first chunk; a completion's in each choice,
or in the choice's first chunk.
"""

from prefill_service.api.admission import Admitted
from prefill_service.api.messages import Json
from prefill_service.api.requests import Shape


class TokenIds:
    """Of one answer."""

    def __init__(self, admitted: Admitted, shape: Shape) -> None:
        self._prompts = [[*prompt.prompt_ids, *prompt.continuation_ids] for prompt in admitted.prompts]
        self._choices = admitted.choices
        self._of_choices = shape.many_prompts
        self._begun: set[int] = set()

    @property
    def beside_choices(self) -> Json:
        return {} if self._of_choices else {"prompt_token_ids": self._prompts[0]}

    def added(self, choice: Json, index: int, ids: list[int]) -> Json:
        """A choice, or the next chunk of one, with ids of its tokens, and the prompt's before the first."""
        if self._of_choices and index not in self._begun:
            self._begun.add(index)
            choice = {**choice, "prompt_token_ids": self._prompts[index // self._choices]}
        return {**choice, "token_ids": ids}
