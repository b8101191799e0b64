"""`prad train`: a task's examples become an adapter folder, through transformers' Trainer."""

import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from prad import __version__
from prad.adapters import Adapter, find_method, new_adapter, reparametrised, save_parameters
from prad.artefact import PROMPT_FIELD, AdapterRecord, BaseModelRef, GenerationDefaults, write_record
from prad.lm import LanguageModel, Tokenizer
from prad.training.data import DataError, collate, read_examples, tokenise
from prad.training.objective import PromptTuning

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class TrainSettings:
    """What a training run depends on; all of it goes into the artefact's training record.

    `batch` counts examples per step; `eval_every` counts steps.
    """

    data: Path
    out: Path
    method: str = "prad-pa"
    config: dict[str, Any] = field(default_factory=dict)
    template: str | None = None
    epochs: float = 1.0
    max_steps: int = -1
    batch: int = 16
    learning_rate: float = 1e-3
    warmup_ratio: float = 0.06
    max_grad_norm: float = 1.0
    seed: int = 0
    eval_every: int = 100
    eval_examples: int = 200
    max_prompt: int = 512
    max_completion: int = 256
    max_tokens: int = 64
    """The artefact's generation default, with temperature 0."""
    licence: str = ""
    description: str = ""
    resume: bool = False


def train(
    model: LanguageModel, tokenizer: Tokenizer, base_name: str, settings: TrainSettings
) -> AdapterRecord:
    """Trains on `data`/train.jsonl, keeps the checkpoint with the least loss on `data`/validation.jsonl,
    and writes the artefact to `out`. With `resume` it goes on from the last checkpoint below `out`.

    Raises DataError, AdapterError or MissingSiteError.
    """
    method = find_method(settings.method)
    config = method.configure(settings.config)
    fresh = new_adapter(method, config, model, settings.seed)
    module = PromptTuning(model, fresh, reparametrised(fresh, model, settings.seed)).to(model.device)
    record = _record(model, base_name, settings, fresh)
    limits = {"max_prompt": settings.max_prompt, "max_completion": settings.max_completion}
    training = tokenise(read_examples(settings.data / "train.jsonl"), tokenizer, record, **limits)
    validation = read_examples(settings.data / "validation.jsonl", settings.eval_examples)
    trainer = Trainer(
        model=module,
        args=_arguments(settings, model.device),
        train_dataset=training,
        eval_dataset=tokenise(validation, tokenizer, record, **limits),
        data_collator=collate,
    )
    started = time.monotonic()
    result = trainer.train(resume_from_checkpoint=_last_checkpoint(settings))
    seconds = time.monotonic() - started

    save_parameters(module.adapter.parameters, settings.out, model.dtype)
    steps = trainer.state.global_step
    outcome = {
        "examples": len(training),
        "parameters": sum(p.numel() for p in module.adapter.parameters.values()),
        "steps": steps,
        "seconds": round(seconds),
        "tokens_per_second": round(_tokens(training) * steps * settings.batch / len(training) / seconds),
        "train_loss": round(result.training_loss, 4),
        "validation_loss": round(trainer.state.best_metric, 4),
        "prad": __version__,
        "torch": torch.__version__,
    }
    record = record.model_copy(update={"training": record.training | outcome})
    write_record(settings.out, record)
    shutil.rmtree(settings.out / CHECKPOINTS)
    return record


def _last_checkpoint(settings: TrainSettings) -> str | None:
    """Raises DataError if checkpoints of an earlier run would be mixed with those of this one."""
    folder = settings.out / CHECKPOINTS
    for unfinished in folder.glob("checkpoint-*"):  # Trainer writes the state last
        if not (unfinished / "trainer_state.json").is_file():
            shutil.rmtree(unfinished)
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if last is not None and not settings.resume:
        raise DataError(f"{folder} holds checkpoints of an earlier run; go on with --resume, or remove it")
    return last


def _tokens(examples: list[Any]) -> int:
    return sum(len(e.prompt) + len(e.completion) for e in examples)


def _record(model: LanguageModel, base_name: str, settings: TrainSettings, fresh: Adapter) -> AdapterRecord:
    fields: dict[str, Any] = {} if settings.template is None else {"template": settings.template}
    if settings.template is not None and settings.template.count(PROMPT_FIELD) != 1:
        raise DataError(f"a template holds {PROMPT_FIELD} exactly once, got {settings.template!r}")
    return AdapterRecord(
        method=settings.method,
        config=fresh.config.model_dump(mode="json"),
        base=BaseModelRef(
            name=base_name,
            architecture=model.fingerprint.architecture,
            weights=model.fingerprint.weights,
        ),
        virtual_tokens=fresh.virtual_tokens,
        generation=GenerationDefaults(temperature=0.0, max_tokens=settings.max_tokens),
        licence=settings.licence,
        description=settings.description,
        training={
            "data": settings.data.name,
            "epochs": settings.epochs,
            "max_steps": settings.max_steps,
            "eval_every": settings.eval_every,
            "batch": settings.batch,
            "learning_rate": settings.learning_rate,
            "warmup_ratio": settings.warmup_ratio,
            "max_grad_norm": settings.max_grad_norm,
            "seed": settings.seed,
            "max_prompt": settings.max_prompt,
            "max_completion": settings.max_completion,
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        **fields,
    )


def _arguments(settings: TrainSettings, device: torch.device) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(settings.out / CHECKPOINTS),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.batch,
        per_device_eval_batch_size=settings.batch,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_ratio,
        max_grad_norm=settings.max_grad_norm,
        lr_scheduler_type="linear",
        weight_decay=0.0,
        seed=settings.seed,
        eval_strategy="steps",
        eval_steps=settings.eval_every,
        save_strategy="steps",
        save_steps=settings.eval_every,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=False,
        logging_steps=min(settings.eval_every, 20),
        prediction_loss_only=True,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=[],
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type != "cpu",
    )
