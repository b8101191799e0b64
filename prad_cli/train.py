"""`prad train`: examples in, adapter folder out."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer

from prad.core.models import DEFAULT_MODEL, served_name
from prad_cli.extras import require_extra
from prad_cli.model import (
    DEFAULT_CACHE,
    CacheOption,
    DeviceOption,
    DTypeOption,
    ModelOption,
    load_model,
    model_flag,
)


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise typer.BadParameter(f"expected a number above 0, got {text}")
    return number


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
    method: Annotated[
        str,
        typer.Option(
            help="prad-pa, prad-sa, prad-lora, prad-dora, prad-mam, prad-bitfit, prad-ia3, prad-prefix, "
            "prad-prompt, prad-para, para, or full: every weight of the model, as a baseline."
        ),
    ] = "prad-pa",
    positions: Annotated[
        Literal["prompt", "all"],
        typer.Option(help="What the adapter acts on. all: the usual LoRA or PA, a baseline, never served."),
    ] = "prompt",
    preset: Annotated[
        str | None,
        typer.Option(
            help="Named settings: quick, paper-sst2, -mnli, -e2e, -webnlg, -mt, -mt-ffn, -xsum or -xsum-ffn. "
            "Flags win."
        ),
    ] = None,
    r: Annotated[
        int | None, typer.Option(help="Bottleneck width or rank; the method's default if left out.", min=1)
    ] = None,
    config: Annotated[
        str,
        typer.Option(
            help='The method\'s other settings as JSON: \'{"targets": ["q", "k", "v", "o"], "alpha": 32}\'. '
            "Each method's are in docs/training.md.",
        ),
    ] = "{}",
    examples: Annotated[
        int | None, typer.Option(help="Only the first so many training examples.", min=1)
    ] = None,
    epochs: Annotated[
        float | None,
        typer.Option(help="Passes over the data.  \\[default: 1]", parser=_positive, metavar="<float>"),
    ] = None,
    max_steps: Annotated[
        int | None, typer.Option(help="Stop after this many steps.  \\[default: by epochs]", min=1)
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="Examples per forward pass and process.  \\[default: 16]", min=1)
    ] = None,
    accumulate: Annotated[int, typer.Option(help="Forward passes per step.", min=1)] = 1,
    lr: Annotated[
        float | None,
        typer.Option(help="Peak learning rate.  \\[default: 0.001]", parser=_positive, metavar="<float>"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.", min=0, max=2**32 - 1)] = 0,
    eval_every: Annotated[
        int | None,
        typer.Option(help="Steps between evaluations and checkpoints.  \\[default: 100]", min=1),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(help="Stop after so many evaluations without a smaller validation loss.", min=1),
    ] = None,
    max_prompt: Annotated[
        int | None,
        typer.Option(help="Tokens; longer prompts lose their front.  \\[default: what fits]", min=1),
    ] = None,
    max_completion: Annotated[
        int | None, typer.Option(help="Tokens; longer answers lose their end.  \\[default: all]", min=1)
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="Prompt template with {prompt} once; default as in the paper.")
    ] = None,
    task_tokens: Annotated[
        list[str] | None,
        typer.Option(
            help="A token of the template whose embedding is trained too, and the words it begins as: "
            "'<|topic|>=subject of the text'. Without words it begins as the vocabulary's mean. Repeatable."
        ),
    ] = None,
    end_token: Annotated[
        str | None,
        typer.Option(help="What ends the answers in the data; the model's EOS is trained in its place."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Generation default that serving will use.", min=1)] = 64,
    licence: Annotated[str, typer.Option(help="Licence of the data, recorded in the artefact.")] = "",
    description: Annotated[str, typer.Option(help="One line about the task, recorded in the artefact.")] = "",
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint under --out.")] = False,
    model: ModelOption = DEFAULT_MODEL,
    cache_dir: CacheOption = DEFAULT_CACHE,
    dtype: DTypeOption = "bfloat16",
    device: DeviceOption = "cpu",
) -> None:
    """Train an adapter for one task; the frozen model stays as it is.

    Example:  prad train --task sentiment --data data/sentiment --out adapters/sentiment --epochs 2

    Several GPUs: accelerate launch --multi_gpu -m prad_cli train --device cuda ...
    """
    require_extra("train", "accelerate")
    over_preset = {
        "epochs": epochs,
        "max_steps": max_steps,
        "batch": batch,
        "learning_rate": lr,
        "eval_every": eval_every,
        "patience": patience,
        "max_prompt": max_prompt,
        "max_completion": max_completion,
    }
    fields = {
        "data": data,
        "out": out,
        "method": method,
        "positions": positions,
        "examples": examples,
        "accumulate": accumulate,
        "template": template,
        "task_tokens": _named(task_tokens or []),
        "end_token": end_token,
        "seed": seed,
        "max_tokens": max_tokens,
        "dtype": dtype,
        "licence": licence,
        "description": description,
        "resume": resume,
        **_merged(preset, method, over_preset, _fields(config, r)),
    }
    _train(fields, task, model, cache_dir, device)


def _merged(
    preset: str | None, method: str, given: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, Any]:
    """A preset's fields of TrainSettings with those that were given over them."""
    from prad.training.presets import preset_fields, with_own

    fields = {} if preset is None else preset_fields(preset, method)
    fields |= {name: value for name, value in given.items() if value is not None}
    if given["epochs"] is not None and given["max_steps"] is None:
        fields["max_steps"] = None  # not a preset's, which would win
    fields["config"] = with_own(fields.get("config", {}), config)
    return fields


def _train(fields: Mapping[str, Any], task: str, model: str, cache_dir: Path, device: str) -> None:
    from prad.artefact import FULL
    from prad.training.settings import TrainSettings
    from prad.training.train import is_main_process, train

    settings = TrainSettings(**fields)
    if settings.method == FULL and settings.dtype not in ("bfloat16", "float32"):
        raise typer.BadParameter(
            f"expected bfloat16 or float32, got '{settings.dtype}'", param_hint="--dtype"
        )
    loaded_as = "float32" if settings.method == FULL else settings.dtype  # what is trained is in float32
    language_model, tokenizer = load_model(model, cache_dir, loaded_as, _own(device))
    record = train(language_model, tokenizer, served_name(model), settings)
    if is_main_process():
        _say(record.training, record.positions == "all", task, settings.data, settings.out, model)


def _say(outcome: dict[str, Any], baseline: bool, task: str, data: Path, out: Path, model: str) -> None:
    typer.echo(
        f"{out}: {outcome['steps']} steps, {outcome['tokens_per_second']} tokens/s, "
        f"validation loss {outcome['validation_loss']}\n"
        f"next:  prad eval --adapter {out} --data {data / 'test.jsonl'}{model_flag(model)}"
    )
    if baseline:
        typer.echo("This is a baseline: it acts on generated tokens too, so it can be evaluated, not served.")
    else:
        typer.echo(f"       prad adapter push {out} --task {task}")


def _own(device: str) -> str:
    """This process's GPU where several were started together."""
    rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{rank}" if device == "cuda" and rank is not None else device


def _named(task_tokens: list[str]) -> dict[str, str | None]:
    """The words that each begins as, by name."""
    named: dict[str, str | None] = {}
    for given in task_tokens:
        name, separator, words = given.partition("=")
        if name in named:
            raise typer.BadParameter(f"{name} is named twice", param_hint="--task-tokens")
        named[name] = words if separator else None
    return named


def _fields(config: str, r: int | None) -> dict[str, Any]:
    """Of --config and --r together."""
    try:
        fields = json.loads(config)
    except json.JSONDecodeError as error:
        raise typer.BadParameter(f"--config is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise typer.BadParameter(f"--config expects a JSON object, got {config}")
    if r is not None and "r" in fields:
        raise typer.BadParameter("r is given twice, by --r and by --config")
    return cast(dict[str, Any], fields) | ({} if r is None else {"r": r})
