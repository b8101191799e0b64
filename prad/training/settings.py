"""What a training run depends on."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prad.training.objective import Positions


@dataclass(frozen=True)
class TrainSettings:
    """All of it but paths goes into the artefact's training record.

    `batch` counts examples per forward pass and process, `accumulate` passes per step, `eval_every` steps,
    `patience` evaluations without a smaller loss after which training stops.
    """

    data: Path
    out: Path
    method: str = "prad-pa"
    config: dict[str, Any] = field(default_factory=dict)
    positions: Positions = "prompt"
    template: str | None = None
    task_tokens: dict[str, str | None] = field(default_factory=dict)
    """Their names, and the words whose mean each begins as; None: the whole vocabulary's."""
    end_token: str | None = None
    examples: int | None = None
    """Only the first so many training examples."""
    epochs: float = 1.0
    max_steps: int | None = None
    """Wins over `epochs`."""
    batch: int = 16
    accumulate: int = 1
    learning_rate: float = 1e-3
    warmup_ratio: float = 0.06
    max_grad_norm: float = 1.0
    seed: int = 0
    eval_every: int = 100
    eval_examples: int = 200
    patience: int | None = None
    max_prompt: int | None = None
    """Tokens: longer prompts keep their last; None: what fits into the model's context."""
    max_completion: int | None = None
    """Tokens: longer ones lose their end."""
    max_tokens: int = 64
    """The artefact's generation default, with temperature 0."""
    dtype: str = "bfloat16"
    """What full fine-tuning computes in; an adapter computes in its frozen model's."""
    licence: str = ""
    description: str = ""
    resume: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(
                f"warmup_ratio: expected a part of the steps, 0 to below 1, got {self.warmup_ratio}"
            )

    def recorded(self) -> dict[str, Any]:
        """For the training record: what the result depends on, in plain values."""
        names = (
            "examples",
            "epochs",
            "max_steps",
            "eval_every",
            "patience",
            "batch",
            "accumulate",
            "learning_rate",
            "warmup_ratio",
            "max_grad_norm",
            "seed",
            "max_prompt",
            "max_completion",
            "task_tokens",
        )
        return {"data": self.data.name} | {name: getattr(self, name) for name in names}
