"""Tensors in a trainer's memory as the files of an adapter, which stay there, too."""

from collections.abc import Mapping
from io import BytesIO
from typing import IO, Any

from prad.artefact import RECORD, WEIGHTS, AdapterRecord


def files_of(record: AdapterRecord, tensors: Mapping[str, Any]) -> list[tuple[str, IO[bytes]]]:
    """(name, contents) of `prad.json` and the weights. `tensors`: all of torch, from any device, or all of
    numpy."""
    return [(RECORD, BytesIO(record.model_dump_json().encode())), (WEIGHTS, BytesIO(_safetensors(tensors)))]


def _safetensors(tensors: Mapping[str, Any]) -> bytes:
    if any(type(tensor).__module__.partition(".")[0] == "torch" for tensor in tensors.values()):
        from safetensors.torch import save  # whoever has such tensors has torch

        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        return bytes(save(plain))
    from safetensors.numpy import save as save_numpy

    return bytes(save_numpy(dict(tensors)))
