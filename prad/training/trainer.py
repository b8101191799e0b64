"""transformers' Trainer, but for how it sums up losses, how it begins, and when it gives up."""

import math
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from prad.training.data import DataError
from prad.training.objective import CompletionLoss


class DivergedError(DataError):
    """The loss is not finite any more; there is no adapter."""


class CompletionTrainer(Trainer):  # type: ignore[misc]
    """Of a `CompletionLoss`.

    The validation loss is the mean over all completion tokens, whatever the batches. The learning rate rises
    in equal steps to its peak, the first of them above 0, and falls to 0 behind the last step.
    """

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        module: CompletionLoss = self.model
        examples, tokens, loss = 0, 0, 0.0
        for batch in dataloader:
            with torch.no_grad():
                of_examples = module.sums(**self._prepare_inputs(batch))
            sums, counts = self.gather_function(of_examples)  # leaves out what fills up the last batch
            examples += len(sums)
            tokens += int(counts.sum())
            loss += float(sums.sum())
        return EvalLoopOutput(None, None, {f"{metric_key_prefix}_loss": loss / tokens}, examples)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Raises DivergedError, in every process, for a loss that is not finite."""
        super().log(logs, start_time)
        best = self.state.best_model_checkpoint
        for name, key in (("training", "loss"), ("validation", "eval_loss")):
            if not math.isfinite(loss := logs.get(key, 0.0)):
                raise DivergedError(
                    f"the {name} loss is {loss} at step {self.state.global_step}: try a lower learning rate"
                    + (f" (the best checkpoint before is {best})" if best else "")
                )

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LambdaLR:
        warmup = self.args.get_warmup_steps(num_training_steps)
        rate = partial(_part_of_peak, warmup=warmup, steps=num_training_steps)
        self.lr_scheduler = LambdaLR(self.optimizer if optimizer is None else optimizer, rate)
        return self.lr_scheduler


def _part_of_peak(step: int, *, warmup: int, steps: int) -> float:
    rising, falling = (step + 1) / (warmup + 1), (steps - step) / max(1, steps - warmup)
    return rising if step < warmup else max(0.0, falling)
