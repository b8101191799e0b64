"""`prad eval`: how well an adapter does, beside the plain model."""

import json
from pathlib import Path
from typing import Annotated

import typer

from prad.cli.model import DEFAULT_CACHE, CacheOption, DeviceOption, DTypeOption, ModelOption, load_model


def eval_command(
    adapter: Annotated[
        Path, typer.Option(help="Adapter folder.", exists=True, file_okay=False, resolve_path=True)
    ],
    data: Annotated[
        Path, typer.Option(help='File of {"prompt", "completion"} lines.', exists=True, dir_okay=False)
    ],
    limit: Annotated[int | None, typer.Option(help="Only the first so many examples.", min=1)] = None,
    plain: Annotated[bool, typer.Option(help="Score the plain model on the same prompts as well.")] = True,
    show: Annotated[int, typer.Option(help="Print so many answers.", min=0)] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print scores as JSON.")] = False,
    model: ModelOption = "smollm2-135m",
    cache_dir: CacheOption = DEFAULT_CACHE,
    dtype: DTypeOption = "bfloat16",
    device: DeviceOption = "cpu",
) -> None:
    """Score an adapter on a file of examples.

    Example:  prad eval --adapter examples/adapters/sentiment --data test.jsonl
    """
    from prad.adapters import load_adapter
    from prad.artefact import read_artefact
    from prad.lm import resolve_model
    from prad.training.evaluate import evaluate

    artefact = read_artefact(adapter)
    language_model, tokenizer = load_model(model, cache_dir, dtype, device)
    loaded = load_adapter(artefact, language_model)
    stop_ids = language_model.stop_ids(resolve_model(model, cache_dir)) | {tokenizer.eos_id}
    scores: dict[str, dict[str, float]] = {}
    for name, chosen in (("adapter", loaded), ("plain model", None)):
        if chosen is None and not plain:
            continue
        result = evaluate(
            language_model, tokenizer, artefact.record, chosen, data, stop_ids=stop_ids, limit=limit
        )
        scores[name] = result.scores | {"examples": result.examples}
        if not as_json:
            shown = "  ".join(f"{metric} {value:g}" for metric, value in result.scores.items())
            typer.echo(f"{name}: {shown}  ({result.examples} examples)")
            for answer in result.answers[:show]:
                typer.echo(f"    {answer!r}")
    if as_json:
        typer.echo(json.dumps(scores))
