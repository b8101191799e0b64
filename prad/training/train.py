"""`prad train`: a task's examples become an adapter folder.

Under `accelerate launch` or `torchrun` every process runs this; the main one alone writes.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from rich.console import Console
from transformers import EarlyStoppingCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from prad import __version__
from prad.adapters import (
    AdapterError,
    UnknownMethodError,
    find_method,
    first_embeddings,
    new_adapter,
    reparametrised,
    require_free_names,
    save_parameters,
)
from prad.artefact import (
    FULL,
    RECORD,
    AdapterRecord,
    BaseModelRef,
    GenerationDefaults,
    write_record,
)
from prad.lm import LanguageModel, Tokenizer
from prad.training.data import DataError, TokenisedExample, collate, read_examples, tokenise
from prad.training.objective import AdapterTuning, CompletionLoss, FullTuning
from prad.training.progress import ProgressLine, save_curve
from prad.training.settings import TrainSettings
from prad.training.trainer import CompletionTrainer

CHECKPOINTS = "checkpoints"
_OF_A_RUN: Any = {
    "base": {"weights"},
    **dict.fromkeys(
        ("method", "config", "positions", "template", "task_tokens", "end_token", "training"), True
    ),
}
"""What of a record must be the same to go on from a checkpoint."""


def train(
    model: LanguageModel, tokenizer: Tokenizer, base_name: str, settings: TrainSettings
) -> AdapterRecord:
    """Trains on `data`/train.jsonl, keeps the checkpoint with the least loss on `data`/validation.jsonl,
    and writes the artefact to `out`. With `resume` it goes on from the last checkpoint below `out`.

    The method "full" trains all weights of `model` itself, which is float32 then, and writes a model folder.
    Raises DataError, AdapterError or MissingSiteError.
    """
    record = _record(model, base_name, settings)
    require_free_names(record, tokenizer)
    _require_own_folder(settings.out)
    module = _module(model, tokenizer, record, settings)
    training = _tokenised("train.jsonl", settings.examples, model, tokenizer, record, settings)
    validation = _tokenised("validation.jsonl", settings.eval_examples, model, tokenizer, record, settings)
    arguments = _arguments(settings, model.device)
    with arguments.main_process_first(local=False):
        checkpoint = _last_checkpoint(settings, record)
    line = ProgressLine()
    trainer = CompletionTrainer(
        model=module,
        args=arguments,
        train_dataset=training,
        eval_dataset=validation,
        data_collator=collate,
        callbacks=[line, *_early_stop(settings)],
    )
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        line.close()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    outcome = {
        "examples": len(training),
        "processes": arguments.world_size,
        "parameters": sum(p.numel() for p in module.trained().values()),
        "steps": trainer.state.global_step,
        "tokens_per_second": round(line.tokens_per_second),
        "train_loss": round(losses[-1], 4),
        "validation_loss": round(trainer.state.best_metric, 4),
        "prad": __version__,
        "torch": torch.__version__,
    }
    record = record.model_copy(update={"training": record.training | outcome})
    if trainer.is_world_process_zero():
        _save(module, model, tokenizer, settings)
        write_record(settings.out, record)
        save_curve(trainer.state.log_history, settings.out)
        shutil.rmtree(settings.out / CHECKPOINTS)
    trainer.accelerator.wait_for_everyone()
    return record


def is_main_process() -> bool:
    """Whether this is the only one, or the first of those that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def _tokenised(
    file: str,
    most: int | None,
    model: LanguageModel,
    tokenizer: Tokenizer,
    record: AdapterRecord,
    settings: TrainSettings,
) -> list[TokenisedExample]:
    """The first `most` examples of one of the data files; says how many had to be cut."""
    path = settings.data / file
    examples = read_examples(path, most)
    if record.end_token and not any(record.end_token in e.completion for e in examples):
        raise DataError(f"{path}: no completion ends with the end token {record.end_token!r}")
    tokenised = tokenise(
        examples,
        tokenizer,
        record,
        context=model.max_context,
        max_prompt=settings.max_prompt,
        max_completion=settings.max_completion,
    )
    if is_main_process() and (cut := sum(example.cut for example in tokenised)):
        Console(stderr=True).print(
            f"{path}: {cut} of {len(tokenised)} examples are longer than --max-prompt, --max-completion or "
            f"the model's context of {model.max_context}: their prompts lost their front, answers their end"
        )
    return tokenised


def _require_own_folder(out: Path) -> None:
    """Raises DataError if the artefact cannot go there, or one is there already."""
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise DataError(f"{out} cannot be made: {there} is no folder that can be written to")
    if (out / RECORD).exists():
        raise DataError(f"{out} holds an adapter already: remove it, or choose another folder")


def _module(
    model: LanguageModel, tokenizer: Tokenizer, record: AdapterRecord, settings: TrainSettings
) -> CompletionLoss:
    if record.method == FULL:
        return FullTuning(model, getattr(torch, settings.dtype))
    method = find_method(record.method)
    words = list(settings.task_tokens.values())
    first = first_embeddings(words, tokenizer, model) if words else None
    adapter = new_adapter(method, method.configure(record.config), model, settings.seed, first)
    derived = reparametrised(adapter, model, settings.seed)
    return AdapterTuning(model, adapter, record.positions, derived).to(model.device)


def _save(
    module: CompletionLoss, model: LanguageModel, tokenizer: Tokenizer, settings: TrainSettings
) -> None:
    if isinstance(module, AdapterTuning):
        save_parameters(module.adapter.parameters, settings.out, model.dtype)
        return
    whole: Any = model.module
    whole.to(getattr(torch, settings.dtype)).save_pretrained(settings.out)
    tokenizer.save(settings.out)


def _last_checkpoint(settings: TrainSettings, record: AdapterRecord) -> str | None:
    """Raises DataError if checkpoints of an earlier run would be mixed with those of this one."""
    folder = settings.out / CHECKPOINTS
    kept, own = folder / "run.json", record.model_dump_json(include=_OF_A_RUN)
    for checkpoint in folder.glob("checkpoint-*"):
        if not _is_complete(checkpoint):
            shutil.rmtree(checkpoint, ignore_errors=True)
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if last is not None and not settings.resume:
        raise DataError(f"{folder} holds checkpoints of an earlier run; go on with --resume, or remove it")
    if last is not None and kept.read_text(encoding="utf-8") != own:
        raise DataError(f"{folder} holds checkpoints of a run with other settings; remove it, or repeat them")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if last is None:
            kept.write_text(own, encoding="utf-8")
    except OSError as error:
        raise DataError(f"{settings.out} cannot be made: {error}") from error
    return last


def _is_complete(checkpoint: Path) -> bool:
    """Trainer writes its state last: a run that was killed before has left none, or a part of it."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _record(model: LanguageModel, base_name: str, settings: TrainSettings) -> AdapterRecord:
    fields: dict[str, Any] = {} if settings.template is None else {"template": settings.template}
    full = settings.method == FULL
    if full and settings.config:
        raise AdapterError(f"full fine-tuning has no settings, got {', '.join(settings.config)}")
    config, virtual = {}, 0
    if not full:
        try:
            method = find_method(settings.method)
        except UnknownMethodError as error:
            raise UnknownMethodError(f"{error}, and {FULL}") from error
        if settings.positions == "all" and method.needs_whole_prompt:
            raise AdapterError(f"{method.name} is made from the prompt: it has no form for all positions")
        if settings.positions == "all" and method.only_in_front:
            raise AdapterError(
                f"{method.name} puts tokens in front of the prompt and acts nowhere else: it has no form for "
                "all positions"
            )
        configured = method.configure(settings.config)
        config, virtual = configured.model_dump(mode="json"), method.virtual_tokens(configured)
    dtype = settings.dtype if full else str(model.dtype).removeprefix("torch.")
    base = BaseModelRef(
        name=base_name, architecture=model.fingerprint.architecture, weights=model.fingerprint.weights
    )
    try:
        return AdapterRecord(
            method=settings.method,
            config=config,
            base=base,
            task_tokens=tuple(settings.task_tokens),
            end_token=settings.end_token,
            virtual_tokens=virtual,
            positions="all" if full else settings.positions,
            generation=GenerationDefaults(temperature=0.0, max_tokens=settings.max_tokens),
            licence=settings.licence,
            description=settings.description,
            training=settings.recorded() | {"dtype": dtype},
            **fields,
        )
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise DataError("; ".join(p.replace("Value error, ", "") for p in problems)) from error


def _early_stop(settings: TrainSettings) -> list[EarlyStoppingCallback]:
    return [] if settings.patience is None else [EarlyStoppingCallback(settings.patience)]


def _arguments(settings: TrainSettings, device: torch.device) -> TrainingArguments:
    on_cpu = device.type == "cpu"
    return TrainingArguments(
        output_dir=str(settings.out / CHECKPOINTS),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=settings.batch,
        per_device_eval_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_ratio,
        max_grad_norm=settings.max_grad_norm,
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
        restore_callback_states_from_checkpoint=settings.patience is not None,
        # a part of the steps between checkpoints: then a resumed run logs the same means
        logging_steps=max(steps for steps in range(1, 21) if settings.eval_every % steps == 0),
        include_num_input_tokens_seen=True,
        remove_unused_columns=False,
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        use_cpu=on_cpu,
        ddp_find_unused_parameters=False,
        # named, it makes a process look for others
        ddp_backend="gloo" if on_cpu and torch.distributed.is_torchelastic_launched() else None,
        dataloader_pin_memory=not on_cpu,
    )
