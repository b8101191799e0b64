"""A `.gguf` file becomes an ordinary bf16 model folder, once; afterwards every process maps that folder."""

import hashlib
import shutil
from pathlib import Path

from filelock import FileLock
from gguf import GGUFReader
from tokenizers import pre_tokenizers

from prad.lm.errors import ModelNotFoundError

_FORMAT = 1  # raise it when the conversion changes, so that old folders are not used again


def convert_gguf(path: Path, cache_dir: Path) -> Path:
    """The folder under `cache_dir` that holds `path` as safetensors; converts when it is not there yet.

    Processes that start together wait for one conversion. The folder appears whole or not at all. Raises
    ModelNotFoundError if the file is not what its ending says.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    folder = cache_dir.expanduser() / "models" / f"{path.stem}-{digest[:12]}-v{_FORMAT}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            partial = folder.with_name(folder.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            try:
                _convert(path, partial)
            except ValueError as error:  # also transformers' word for an architecture it cannot convert
                raise ModelNotFoundError(f"{path} cannot be converted: {error}") from error
            partial.rename(folder)
    return folder


def _convert(path: Path, folder: Path) -> None:
    """Not by from_pretrained(gguf_file=...), for which transformers wants accelerate; serving does not."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    where = {"gguf_file": path.name}
    config = AutoConfig.from_pretrained(path.parent, **where)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    read = load_gguf_checkpoint(
        str(path), return_tensors=True, model_to_load=model, torch_dtype=torch.bfloat16
    )["tensors"]
    outcome = model.load_state_dict(read, strict=False)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    filled = {id(parameters[name]) for name in read if name in parameters}
    missing = [n for n in outcome.missing_keys if n not in parameters or id(parameters[n]) not in filled]
    if missing or outcome.unexpected_keys:
        raise ValueError(f"tensors {missing} are missing, {outcome.unexpected_keys} are not the model's")
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, **where)
    if _pre_tokenizer(path) == "smollm":
        # transformers reads the merges but not this field: SmolLM splits numbers into digits first, which
        # decides how spaces in front of a digit are grouped
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), byte_level]
        )
    tokenizer.save_pretrained(folder)


def _pre_tokenizer(path: Path) -> str | None:
    field = GGUFReader(path).get_field("tokenizer.ggml.pre")
    return None if field is None else str(field.contents())
