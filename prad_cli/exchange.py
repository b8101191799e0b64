"""`prad adapter import` and `export`, added to the group: LoRA files and the like that PEFT wrote, and ours
for PEFT."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from prad.core.models import DEFAULT_MODEL, served_name
from prad_cli.adapter import app, push
from prad_cli.model import (
    DEFAULT_CACHE,
    CacheOption,
    DTypeOption,
    ModelOption,
    load_model,
    model_flag,
)

_IMPORT_EXAMPLES = (
    "Examples:\n\n[bold]prad adapter import my-lora adapters/mine --model Qwen/Qwen3-0.6B[/bold]\n\n"
    "[bold]prad adapter import my-lora --task support --template 'Q: {prompt} A:'[/bold]"
)
_EXPORT_EXAMPLES = "Example: [bold]prad adapter export adapters/mine for-peft[/bold]"

if TYPE_CHECKING:
    from prad.artefact import AdapterRecord, Artefact


@app.command("import", epilog=_IMPORT_EXAMPLES)
def import_command(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="PEFT's folder: adapter_config.json and its safetensors.")
    ],
    out: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="The artefact to write; must not be there yet.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Push it as a version of this task to a running registry.")
    ] = None,
    wait: Annotated[bool, typer.Option(help="After a push: until a prefill service has verified it.")] = True,
    template: Annotated[
        str | None, typer.Option(help="Prompt template with {prompt} once; the prompt alone if left out.")
    ] = None,
    chat_template: Annotated[
        bool | None,
        typer.Option("--chat-template/--no-chat-template", help="Wrap prompts in the model's chat template."),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Generation default of the task.", min=1)] = None,
    licence: Annotated[str | None, typer.Option(help="Licence, recorded in the artefact.")] = None,
    description: Annotated[str | None, typer.Option(help="One line about the task, recorded too.")] = None,
    positions: Annotated[
        Literal["prompt", "all"],
        typer.Option(help="What it acts on. all: as in PEFT, a baseline for prad eval, never served."),
    ] = "prompt",
    allow_other_base: Annotated[
        bool,
        typer.Option("--allow-other-base", help="Also if the file names another base model than --model."),
    ] = False,
    model: ModelOption = DEFAULT_MODEL,
    cache_dir: CacheOption = DEFAULT_CACHE,
    dtype: DTypeOption = "bfloat16",
    registry: Annotated[
        str, typer.Option("--registry", envvar="PRAD_REGISTRY_URL", help="URL of the adapter registry.")
    ] = "http://127.0.0.1:8001",
) -> None:
    """Make an artefact of an adapter that PEFT wrote: LoRA, DoRA, IA3, prefix tuning or prompt tuning.

    Nothing in SRC is run: a pickled adapter_model.bin is refused. What cannot be served exactly is refused by
    its name.
    """
    if out is None and task is None:
        raise typer.BadParameter("name a DIR to write, or a --task to push to, or both")
    if task is not None and positions == "all":
        raise typer.BadParameter("what acts on all positions is not served: drop --task")
    from prad.exchange import ImportSettings, import_folder

    settings = ImportSettings(
        base_name=served_name(model),
        base_model=model,
        template=template,
        chat_template=chat_template,
        max_tokens=max_tokens,
        licence=licence,
        description=description,
        allow_other_base=allow_other_base,
        positions=positions,
    )
    language_model, _ = load_model(model, cache_dir, dtype, "cpu")
    with tempfile.TemporaryDirectory() as passing:
        folder = Path(passing) / "artefact" if out is None else out
        artefact = import_folder(source, folder, language_model, settings)
        typer.echo(_said(artefact, source, out, model, pushed=task is not None))
        if task is not None:
            push(str(folder), task, wait=wait, registry=registry)


@app.command("export", epilog=_EXPORT_EXAMPLES)
def export_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="An adapter folder of prad train or import.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The PEFT folder to write; not there yet.")],
    base: Annotated[
        str | None, typer.Option(help="What PEFT shall call the base model, e.g. its Hugging Face id.")
    ] = None,
    allow_other_base: Annotated[
        bool,
        typer.Option("--allow-other-base", help="Also if it was trained on other weights than --model's."),
    ] = False,
    model: ModelOption = DEFAULT_MODEL,
    cache_dir: CacheOption = DEFAULT_CACHE,
    dtype: DTypeOption = "bfloat16",
) -> None:
    """Write an adapter as PEFT loads it: prad-lora, -dora, -ia3, -prefix or -prompt, baselines too.

    What PEFT cannot hold (template, generation defaults, the base's digest) lies beside it in prad.json, and
    [bold]prad adapter import[/bold] reads it back.
    """
    from prad.adapters import find_method
    from prad.artefact import read_artefact
    from prad.exchange import export_folder

    artefact = read_artefact(folder)
    language_model, _ = load_model(model, cache_dir, dtype, "cpu")
    export_folder(artefact, out, language_model, base_name=base, allow_other_weights=allow_other_base)
    typer.echo(
        f"{out}: {artefact.record.method} for PEFT\nload it:  PeftModel.from_pretrained(model, '{out}')"
    )
    if not find_method(artefact.record.method).only_in_front and artefact.record.positions == "prompt":
        typer.echo(
            "note: PEFT applies it to generated tokens too, not to the prompt alone. To do as here: run the "
            "prompt with it, then generate from that KV cache under model.disable_adapter()"
        )


def _said(artefact: "Artefact", source: Path, out: Path | None, model: str, *, pushed: bool) -> str:
    from prad.adapters import find_method
    from prad.exchange import was_prompt_only

    record = artefact.record
    said = [f"{source} imported: {record.method} for {record.base.name} (weights {record.base.weights[:12]})"]
    said += _base_note(record)
    if find_method(record.method).only_in_front:
        said.append("note: its virtual tokens stand in front of the prompt here as in PEFT: nothing changes")
    elif record.positions == "all":
        said.append("note: it acts on all positions, as in PEFT: a baseline, to be evaluated and not served")
    elif not was_prompt_only(record):
        said.append(
            "note: it was trained on all positions. Here it acts on the prompt only, later tokens are the "
            "plain model's: its quality may drop, so measure it before you serve it, beside what --positions "
            "all imports: that is what PEFT does"
        )
    if record.generation.max_tokens is None:
        said.append(
            "note: without --max-tokens, a completion that names none gets 16 tokens, as OpenAI's API has it"
        )
    if out is not None:
        said.append(f"next:  prad eval --adapter {out} --data FILE{model_flag(model)}")
        if record.positions == "prompt" and not pushed:
            said.append(f"next:  prad adapter push {out} --task NAME")
    return "\n".join(said)


def _base_note(record: "AdapterRecord") -> list[str]:
    """What a person cannot see: how sure it is that the adapter was made for this model."""
    from prad.exchange import how_base_is_known

    known, named = how_base_is_known(record), record.training["imported"]["base_model"]
    if known == "digest":
        return []
    if known == "name":
        return [
            f"note: the file names {named}, as --model does; PEFT keeps no digest, so that the weights are "
            "the same is the name's word alone"
        ]
    if named is None:
        return ["note: the file names no base model; that its shapes fit is all that is known"]
    return [f"note: the file names {named}: it was made for other weights, or their name is another"]
