"""`prad model`, and the model options that several commands share."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prad.core.models import DEFAULT_MODEL, Choice

if TYPE_CHECKING:
    from prad.lm import LanguageModel, Tokenizer

ModelOption = Annotated[
    str,
    typer.Option(
        "--model", help="Folder, .gguf file, Hugging Face id, or the default model.", envvar="PRAD_MODEL"
    ),
]
CacheOption = Annotated[
    Path, typer.Option("--cache-dir", help="Where converted models are kept.", envvar="PRAD_CACHE_DIR")
]
DTypeOption = Annotated[str, typer.Option("--dtype", help="bfloat16 or float32.")]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu, cuda or cuda:N.")]
DEFAULT_CACHE = Path("~/.cache/prad")


app = typer.Typer(
    no_args_is_help=True,
    help="The frozen model.",
    epilog="Example: prad model path Qwen/Qwen3-0.6B",
)


@app.command("path", epilog="Example: prad model path smollm2-135m")
def path_command(
    name: Annotated[
        str,
        typer.Argument(metavar="[MODEL]", help="Folder, .gguf file, Hugging Face id, or the default model."),
    ] = DEFAULT_MODEL,
    cache_dir: CacheOption = DEFAULT_CACHE,
) -> None:
    """Print the folder that a model is loaded from; converts or fetches it if it is not here yet.

    Other programs read it, too: PEFT, to train a LoRA of the default model.
    """
    from prad.lm import resolve_model

    typer.echo(resolve_model(name, cache_dir))


def load_model(
    name: str, cache_dir: Path, dtype: str, device: str, kernels: Choice = "torch"
) -> "tuple[LanguageModel, Tokenizer]":
    """Resolves and loads; torch and transformers are imported here, not at `--help`."""
    from prad.lm import Tokenizer, load_served

    if dtype not in ("bfloat16", "float32"):
        raise typer.BadParameter(f"expected bfloat16 or float32, got '{dtype}'", param_hint="--dtype")
    model, folder = load_served(name, cache_dir, dtype=dtype, device=device, kernels=kernels)
    return model, Tokenizer(folder)


def model_flag(name: str) -> str:
    """What a command that is told as the next step needs to use the same model."""
    return "" if name == DEFAULT_MODEL else f" --model {name}"
