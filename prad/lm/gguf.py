"""A `.gguf` file becomes an ordinary bf16 model folder, once; afterwards every process maps that folder.

A conversion takes every tensor of the file and fills every parameter of the model, or it fails and names what
does not fit: what transformers leaves out it fills with random numbers, and what it does not know it skips.
"""

import hashlib
import logging
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from safetensors import SafetensorError, safe_open

from prad.lm.blocks import blocks_of, save_blocks
from prad.lm.errors import ModelNotFoundError

if TYPE_CHECKING:
    from gguf import GGUFReader

logger = logging.getLogger(__name__)

_FORMAT = 4  # raise it when the conversion changes, so that old folders are not used again
_ROOM = "free some room there, or choose another --cache-dir"


def convert_gguf(path: Path, cache_dir: Path) -> Path:
    """The folder under `cache_dir` that holds `path` as safetensors; converts when it is not there yet.

    Processes that start together wait for one conversion. The folder appears whole or not at all; one that
    was damaged since is made again. Raises ModelNotFoundError if the file is not what its ending says, not
    whole, or one of several, or if nothing can be kept there.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    name = f"{path.stem}-{digest[:12]}"
    folder = cache_dir.expanduser() / "models" / f"{name}-v{_FORMAT}"
    if _is_there(folder):  # needs no lock, which a read-only cache has none of
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not _is_there(folder):  # by the one before
                _convert_whole(path, folder)
                _remove_earlier(folder, name)
    except OSError as error:
        raise ModelNotFoundError(
            f"no converted model can be kept in {folder.parent}: {error}; {_ROOM}, or mend whose folder it is"
        ) from error
    return folder


def _is_there(folder: Path) -> bool:
    """Whether it was converted, and its files are whole still: a disk that ran full, or lost its power, may
    have cut them off."""
    if not folder.is_dir():
        return False
    try:
        for weights in folder.rglob("*.safetensors"):
            with safe_open(weights, framework="np"):
                pass
    except (OSError, SafetensorError):
        return False
    return True


def _convert_whole(path: Path, folder: Path) -> None:
    if folder.is_dir():
        logger.warning("%s is damaged: it is converted again", folder)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _convert(path, partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except Exception as error:  # the readers have no word of their own for a file that is cut off, or odd
        full = "No space left" in str(error)
        raise ModelNotFoundError(
            f"{path} cannot be converted: {error}{f'; {_ROOM}' if full else ''}"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove_earlier(folder: Path, name: str) -> None:
    """Earlier conversions of the same file. A process that has mapped one keeps it all the same."""
    for number in range(1, _FORMAT):
        earlier = folder.with_name(f"{name}-v{number}")
        shutil.rmtree(earlier, ignore_errors=True)
        for packed in folder.parent.parent.glob(f"packed/{earlier.name}-*"):
            shutil.rmtree(packed, ignore_errors=True)
        with suppress(OSError):  # another user's
            Path(f"{earlier}.lock").unlink(missing_ok=True)


def _convert(path: Path, folder: Path) -> None:
    """Not by from_pretrained(gguf_file=...), for which transformers wants accelerate; serving does not."""
    import torch
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    reader = GGUFReader(path)
    _require_all_in_one(reader)
    where = {"gguf_file": path.name}
    config = AutoConfig.from_pretrained(path.parent, **where)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    processor = _processor(reader, model)
    places = _places(reader, model, processor)
    read = load_gguf_checkpoint(
        str(path), return_tensors=True, model_to_load=model, torch_dtype=torch.bfloat16
    )["tensors"]
    _fill(model, read)
    model.generation_config.eos_token_id = _end_ids(reader, config.eos_token_id)
    model.save_pretrained(folder)
    save_blocks(blocks_of(reader, model, places, processor), folder)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, **where)
    if _field(reader, "tokenizer.ggml.pre") == "smollm":
        # transformers reads the merges but not this field: SmolLM splits numbers into digits first, which
        # decides how spaces in front of a digit are grouped
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), byte_level]
        )
    tokenizer.save_pretrained(folder)


def _require_all_in_one(reader: "GGUFReader") -> None:
    parts = _field(reader, "split.count") or 1
    if parts > 1:
        number = (_field(reader, "split.no") or 0) + 1
        raise ValueError(
            f"it is part {number} of {parts}, expected a whole model; join them with llama.cpp: "
            "llama-gguf-split --merge FIRST_PART WHOLE.gguf"
        )


def _processor(reader: "GGUFReader", model: Any) -> Any:
    """transformers', which knows the architecture's names and orders of rows."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    make = TENSOR_PROCESSORS.get(_field(reader, "general.architecture"), TensorProcessor)
    return make(config=model.config.to_dict())


def _places(reader: "GGUFReader", model: Any, processor: Any) -> dict[str, str]:
    """The model's parameters by the file's names. Raises ValueError for a tensor of the file that the model
    has no place for: it means something."""
    from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

    known: dict[str, str] = get_gguf_hf_weights_map(model, processor)
    if extra := [tensor.name for tensor in reader.tensors if tensor.name not in known]:
        raise ValueError(f"a {type(model).__name__} has no place for its tensors {_listed(extra)}")
    return known


def _fill(model: Any, read: dict[str, Any]) -> None:
    """Loads `read` into the model, all of it and nowhere less. Raises ValueError with what does not fit."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if misshapen := [
        f"{name} {list(found.shape)} (expected {list(parameters[name].shape)})"
        for name, found in read.items()
        if name in parameters and found.shape != parameters[name].shape
    ]:
        raise ValueError(f"tensors of another shape than the model's: {_listed(misshapen)}")
    outcome = model.load_state_dict(read, strict=False)
    filled = {id(parameters[name]) for name in read if name in parameters}  # with those that are tied to them
    missing = [n for n in outcome.missing_keys if n not in parameters or id(parameters[n]) not in filled]
    if missing:
        raise ValueError(f"tensors are missing: {_listed(missing)}")
    if outcome.unexpected_keys:
        raise ValueError(f"tensors are not the model's: {_listed(outcome.unexpected_keys)}")


def _end_ids(reader: "GGUFReader", eos: int | list[int] | None) -> list[int]:
    """Every token that the file calls an end: of the text, of a turn, of a message."""
    named = (_field(reader, f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    given = eos if isinstance(eos, list) else [eos]
    return sorted({int(token) for token in (*given, *named) if token is not None})


def _field(reader: "GGUFReader", name: str) -> Any:
    field = reader.get_field(name)
    return None if field is None else field.contents()


def _listed(names: Iterable[str], most: int = 5) -> str:
    every = list(names)
    return ", ".join(every[:most]) + (f" and {len(every) - most} more" if len(every) > most else "")
