"""`prad train`: examples in, adapter folder out."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from prad.cli.model import DEFAULT_CACHE, CacheOption, DeviceOption, DTypeOption, ModelOption, load_model


def train_command(
    task: Annotated[str, typer.Option(help="Name of the task, for the messages.")],
    data: Annotated[
        Path,
        typer.Option(
            help='Folder with train.jsonl and validation.jsonl, lines of {"prompt", "completion"}.',
            exists=True,
            file_okay=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Where the adapter folder goes.")],
    method: Annotated[str, typer.Option(help="prad-pa, -sa, -lora, -dora, -ia3 or -bitfit.")] = "prad-pa",
    r: Annotated[
        int | None, typer.Option(help="Bottleneck width or rank; the method's default if left out.", min=1)
    ] = None,
    config: Annotated[
        str,
        typer.Option(
            help='The method\'s other settings as JSON: \'{"targets": ["q", "k", "v", "o"], "alpha": 32}\'.',
        ),
    ] = "{}",
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 1.0,
    max_steps: Annotated[int, typer.Option(help="Stop after this many steps (-1: by epochs).")] = -1,
    batch: Annotated[int, typer.Option(help="Examples per step.", min=1)] = 16,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    eval_every: Annotated[int, typer.Option(help="Steps between evaluations and checkpoints.", min=1)] = 100,
    template: Annotated[
        str | None, typer.Option(help="Prompt template with {prompt} once; default as in the paper.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Generation default that serving will use.", min=1)] = 64,
    licence: Annotated[str, typer.Option(help="Licence of the data, recorded in the artefact.")] = "",
    description: Annotated[str, typer.Option(help="One line about the task, recorded in the artefact.")] = "",
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint under --out.")] = False,
    model: ModelOption = "smollm2-135m",
    cache_dir: CacheOption = DEFAULT_CACHE,
    dtype: DTypeOption = "bfloat16",
    device: DeviceOption = "cpu",
) -> None:
    """Train an adapter for one task; the frozen model stays as it is.

    Example:  prad train --task sentiment --data data/sentiment --out adapters/sentiment --epochs 2
    """
    from prad.lm import served_name
    from prad.training.train import TrainSettings, train

    fields = _fields(config)
    language_model, tokenizer = load_model(model, cache_dir, dtype, device)
    record = train(
        language_model,
        tokenizer,
        served_name(model),
        TrainSettings(
            data=data,
            out=out,
            method=method,
            config=fields | ({} if r is None else {"r": r}),
            template=template,
            epochs=epochs,
            max_steps=max_steps,
            batch=batch,
            learning_rate=lr,
            seed=seed,
            eval_every=eval_every,
            max_tokens=max_tokens,
            licence=licence,
            description=description,
            resume=resume,
        ),
    )
    outcome = record.training
    typer.echo(
        f"{out}: {outcome['steps']} steps in {outcome['seconds']} s, "
        f"{outcome['tokens_per_second']} tokens/s, validation loss {outcome['validation_loss']}\n"
        f"next:  prad eval --adapter {out} --data {data / 'test.jsonl'}\n"
        f"       prad adapter push {out} --task {task}"
    )


def _fields(config: str) -> dict[str, Any]:
    try:
        fields = json.loads(config)
    except json.JSONDecodeError as error:
        raise typer.BadParameter(f"--config is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise typer.BadParameter(f"--config expects a JSON object, got {config}")
    return fields
