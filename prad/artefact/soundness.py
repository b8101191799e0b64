"""What an adapter's tensors say about themselves, without the model and without torch: that they are numbers,
in every layer of the base alike, of widths that the base or the record has. What a method makes of them is
for a prefill service to try.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prad.artefact.files import WEIGHTS, Artefact, ArtefactError, TensorInfo
from prad.artefact.schema import AdapterRecord

_NAME = re.compile(r"layers\.(0|[1-9]\d{0,4})\.(.+)")
_INPUT = "input."
_EXPONENTS = {"F32": ("<u4", 0x7F800000), "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80)}
"""By dtype: as what a number's bits are read, and those that are all set where it is not finite."""
_AT_ONCE = 1 << 22  # numbers
_NO_WIDTHS = {"alpha", "scale"}  # of a configuration: what numbers are multiplied by


def require_sound(artefact: Artefact) -> None:
    """Raises ArtefactError with the first tensor that no base like the record's can have, or that has no
    finite numbers. Reads the weights once."""
    if not artefact.tensors:
        raise ArtefactError(f"{WEIGHTS} holds no tensors")
    by_layer: dict[str, dict[int, TensorInfo]] = defaultdict(dict)
    for name, info in artefact.tensors.items():
        if info.dtype not in _EXPONENTS:
            raise _wrong(name, f"expected one of {', '.join(_EXPONENTS)}", info.dtype)
        if not info.shape or 0 in info.shape:
            raise _wrong(name, "expected one dimension or more, each of at least 1", info.shape)
        if found := _NAME.fullmatch(name):
            by_layer[found[2]][int(found[1])] = info
        elif not name.startswith(_INPUT):
            raise ArtefactError(f"tensor {name}: expected layers.<number>.<name>, or input.<name>")
    record, architecture = artefact.record, artefact.record.base.architecture
    base = _base(architecture)
    for name, layers in by_layer.items():
        _require_alike(name, layers, base.get("layers"), architecture)
    if widths := _widths(base, record):
        shapes = {name: layers[0].shape for name, layers in by_layer.items()}
        _require_known(shapes, widths, architecture, spare="r" not in record.config)
    for name, broken in _not_finite(artefact.weights):
        raise _wrong(name, "expected finite numbers", f"{broken} that are not")


def _wrong(tensor: str, expected: str, found: object) -> ArtefactError:
    return ArtefactError(f"tensor {tensor}: {expected}, the file has {found}")


def _base(architecture: str) -> dict[str, int]:
    """The sizes in a base's line, as `prad.lm` writes it; those of heads as heads and kv_heads."""
    sizes = {name: int(size) for name, size in re.findall(r"\b([a-z_]+)=(\d{1,9})\b", architecture)}
    if found := re.search(r"\bheads=(\d{1,9})/(\d{1,9})\b", architecture):
        sizes |= {"heads": int(found[1]), "kv_heads": int(found[2])}
    return sizes


def _require_alike(name: str, layers: dict[int, TensorInfo], count: int | None, architecture: str) -> None:
    """In each layer of the base, and of one shape: they become one tensor."""
    last = max(layers)
    count = last + 1 if count is None else count
    if last >= count:
        raise ArtefactError(f"tensor layers.{last}.{name}: the base has {count} layers [{architecture}]")
    for layer in range(count):
        if layer not in layers:
            raise ArtefactError(f"tensor layers.{layer}.{name} is missing: each layer has its own")
        if layers[layer].shape != layers[0].shape:
            expected = f"expected {layers[0].shape}, as layer 0 has it"
            raise _wrong(f"layers.{layer}.{name}", expected, layers[layer].shape)


def _widths(base: dict[str, int], record: AdapterRecord) -> set[int]:
    """Whatever a dimension can be: a width of the base, or a number of the record. None where the line of
    the base does not tell."""
    if not {"hidden", "heads", "kv_heads", "ffn"} <= base.keys() or not base["heads"]:
        return set()
    head = base.get("head_dim", base["hidden"] // base["heads"])
    widths = {base[name] for name in ("hidden", "ffn", "heads", "kv_heads")} | {head}
    widths |= {head * base["heads"], head * base["kv_heads"]}
    return widths | {record.virtual_tokens} | set(_numbers(record.config))


def _numbers(value: Any) -> Iterator[int]:
    """Whole numbers anywhere in a configuration that can be a width: ranks, and the like."""
    if isinstance(value, dict | list):
        named = value.items() if isinstance(value, dict) else enumerate(value)
        for name, each in named:
            if name not in _NO_WIDTHS:
                yield from _numbers(each)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield int(value)


def _require_known(
    shapes: dict[str, tuple[int, ...]], widths: set[int], architecture: str, *, spare: bool
) -> None:
    """spare: the rank is a default of the method, which nobody knows here: one size may be unknown."""
    unknown = sorted({size for shape in shapes.values() for size in shape} - widths)
    for name, shape in shapes.items():
        for size in set(unknown[spare:]).intersection(shape):
            raise ArtefactError(
                f"tensor layers.0.{name} {shape}: {size} is no width of the base [{architecture}], and "
                "no number of the configuration"
            )


def _not_finite(weights: Path) -> Iterator[tuple[str, int]]:
    """Each tensor with numbers that are infinite or none, and how many."""
    import numpy as np  # at the first push, not when a registry starts

    with weights.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        for name, told in header.items():
            if name == "__metadata__":
                continue
            kind, exponent = _EXPONENTS[told["dtype"]]
            count, broken = math.prod(told["shape"]), 0
            file.seek(8 + length + told["data_offsets"][0])
            for begin in range(0, count, _AT_ONCE):
                size = min(_AT_ONCE, count - begin) * int(kind[-1])
                bits = np.frombuffer(file.read(size), kind)
                broken += int(np.count_nonzero((bits & exponent) == exponent))
            if broken:
                yield name, broken
