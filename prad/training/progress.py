"""What a person sees of a run: one line while it trains (elsewhere than on a terminal one now and then), a
curve beside the artefact."""

import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from prad.training.tracking import BETWEEN_LINES_S

CURVE = "training.png"


class ProgressLine(TrainerCallback):  # type: ignore[misc]
    """Steps, losses and tokens per second; and the seconds that steps took, evaluations left out.

    Tokens are prompt and completion tokens that went through the model, of all processes.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._fresh = 0  # tokens seen before this session
        self._tokens = 0
        self._started = 0.0
        self._shown: dict[str, str] = {}
        self._bar: Progress | None = None
        self._console: Console | None = None
        self._said_at = 0.0

    @property
    def tokens_per_second(self) -> float:
        return (self._tokens - self._fresh) / self.seconds if self.seconds else 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._fresh = self._tokens = state.num_input_tokens_seen
        if not state.is_world_process_zero:
            return
        self._console, self._said_at = Console(stderr=True), time.monotonic()
        if self._console.is_terminal:
            columns = (MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=self._console)
            self._bar.add_task("steps", total=state.max_steps, completed=state.global_step)
            self._bar.start()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._started = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        self.seconds += time.monotonic() - self._started
        self._tokens = state.num_input_tokens_seen
        self._show(state)
        control.should_log |= state.global_step >= state.max_steps  # the last steps' loss, too
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        names = {"loss": "loss", "eval_loss": "validation"}
        self._shown |= {names[key]: f"{value:.4f}" for key, value in (logs or {}).items() if key in names}
        self._show(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Also after a failure: the terminal's cursor comes back."""
        if self._bar is not None:
            self._bar.stop()

    def _show(self, state: TrainerState) -> None:
        losses = " ".join(f"{name} {value}" for name, value in self._shown.items())
        text = f"steps  {losses}  {self.tokens_per_second:.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=state.global_step, description=text)
        elif self._console is not None and time.monotonic() - self._said_at >= BETWEEN_LINES_S:
            self._console.print(
                f"{state.global_step} of {state.max_steps} {text}", highlight=False, soft_wrap=True
            )
            self._said_at = time.monotonic()


def save_curve(history: list[dict[str, float]], folder: Path) -> None:
    """Writes `training.png`: the losses of Trainer's log by step; where matplotlib is missing, says so."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        Console(stderr=True).print(
            "no training curve: matplotlib is not installed (pip install -e '.\\[train]')"
        )
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, label in (("loss", "training"), ("eval_loss", "validation")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), marker=".", label=label)
    axes.set(xlabel="step", ylabel="loss per completion token")
    axes.legend()
    figure.savefig(folder / CURVE, dpi=120)
