"""What the quality study compares: methods are its rows, tasks its columns."""

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Row:
    """A method as it is compared. `method` None: the plain model. `against`: its all-position counterpart.
    `config`: what of its settings is not the default. `seeds`: so many of a column's; None: all."""

    name: str
    method: str | None
    positions: Literal["prompt", "all"] = "prompt"
    learning_rate: float = 1e-3
    against: str | None = None
    config: tuple[tuple[str, Any], ...] = ()
    first_task_only: bool = False
    seeds: int | None = None


@dataclass(frozen=True, slots=True)
class Column:
    """A task: how much of it is trained and tested, the same for all rows, and the score that counts."""

    task: str
    metric: str
    train: int
    epochs: float
    test: int
    max_tokens: int
    seeds: tuple[int, ...] = (0,)


ROWS = (
    Row("PrAd-PA", "prad-pa", against="PA"),
    Row("PrAd-LoRA", "prad-lora", against="LoRA"),
    Row("PA", "prad-pa", "all"),
    Row("LoRA", "prad-lora", "all"),
    Row("prefix tuning", "prad-prefix"),
    Row("plain model", None, seeds=1),
    # the rest of the family: whether it learns at all. Few numbers move in larger steps; none is tuned
    Row(
        "PrAd-LoRA-FFN",
        "prad-lora",
        config=(("targets", ["gate", "up", "down"]),),
        first_task_only=True,
        seeds=1,
    ),
    Row("PrAd-SA", "prad-sa", against="SA", first_task_only=True),
    Row("SA", "prad-sa", "all", first_task_only=True),
    Row("PrAd-DoRA", "prad-dora", first_task_only=True, seeds=1),
    Row("PrAd-MaM", "prad-mam", first_task_only=True, seeds=1),
    Row("PrAd-BitFit", "prad-bitfit", learning_rate=1e-2, first_task_only=True, seeds=1),
    Row("PrAd-IA3", "prad-ia3", learning_rate=1e-2, first_task_only=True, seeds=1),
    Row("prompt tuning", "prad-prompt", learning_rate=1e-2, first_task_only=True, seeds=1),
    Row("PrAd-PARA", "prad-para", first_task_only=True, seeds=1),
    Row("PARA", "para", first_task_only=True, seeds=1),
)
# so many that a cell takes some minutes on two cores
COLUMNS = (
    Column("sentiment_movie", "accuracy", 1280, 2.0, 500, 8, seeds=(0, 1, 2)),
    Column("e2e", "bleu", 960, 1.0, 330, 80),
    Column("mnli", "accuracy", 1280, 1.0, 500, 8),
    Column("mt_multi30k", "bleu", 1280, 1.0, 300, 64),
)
