"""Virtual tokens: rows of a prompt pass in front of the prompt's own, whose states are learned.

They are tokens like others to positions, chunks, cached blocks and the hand-off. `Group.set_virtual` sets
their states at the sites of a method; where it sets none, the model computes them.
"""

from typing import Annotated

import torch
from pydantic import Field

from prad.adapters.method import FrozenModel, MethodConfig

_COMMON = 5000  # ids to begin from: the low ones are a vocabulary's frequent tokens (Lester et al. 2021)


class VirtualConfig(MethodConfig):
    virtual_tokens: Annotated[int, Field(ge=1)] = 20


def first_ids(config: VirtualConfig, model: FrozenModel, generator: torch.Generator) -> tuple[int, ...]:
    """Tokens of the vocabulary that virtual ones begin as: a start that the model knows how to read."""
    drawn = torch.randint(min(_COMMON, model.vocab_size), (config.virtual_tokens,), generator=generator)
    return tuple(drawn.tolist())
