"""What no base can have, or is no number, is refused by files alone: the registry has no torch to try it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from prad.artefact import (
    WEIGHTS,
    AdapterRecord,
    ArtefactError,
    BaseModelRef,
    read_artefact,
    require_sound,
    soundness,
    write_record,
)

LINE = "llama layers=2 hidden=48 heads=6/2 ffn=80 vocab=99"


def checked(folder: Path, tensors: Mapping[str, torch.Tensor], line: str = LINE, **record: Any) -> None:
    base = BaseModelRef(name="tiny", architecture=line, weights="0" * 64)
    folder.mkdir(exist_ok=True)
    write_record(folder, AdapterRecord(**{"method": "prad-pa", "config": {"r": 4}} | record, base=base))
    save_file(dict(tensors), folder / WEIGHTS)
    require_sound(read_artefact(folder))


def whole(**more: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"layers.{layer}.ffn.down": torch.ones(48, 4) for layer in range(2)} | {
        name.replace("_", "."): tensor for name, tensor in more.items()
    }


def test_what_a_base_can_have(tmp_path: Path) -> None:
    checked(tmp_path, whole(input_embedding=torch.ones(7, 33)))
    checked(tmp_path, {"layers.0.down": torch.ones(64, 4)}, line="of another program")
    checked(tmp_path, {f"layers.{n}.v.up": torch.ones(5, 2, 8) for n in range(2)}, virtual_tokens=5)
    checked(tmp_path, whole(), config={})  # a rank that is the method's default


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({}, "holds no tensors"),
        (whole(down=torch.ones(4)), r"tensor down: expected layers.<number>.<name>, or input.<name>"),
        ({"layers.0.ffn.down": torch.ones(48, 4)}, r"tensor layers.1.ffn.down is missing"),
        ({"layers.2.ffn.down": torch.ones(48, 4)}, r"tensor layers.2.ffn.down: the base has 2 layers"),
        (
            whole() | {"layers.1.ffn.down": torch.ones(4, 48)},
            r"layers.1.ffn.down: expected \(48, 4\), as layer 0 has it, the file has \(4, 48\)",
        ),
        (
            {f"layers.{layer}.ffn.down": torch.ones(47, 4) for layer in range(2)},
            r"layers.0.ffn.down \(47, 4\): 47 is no width of the base \[llama layers=2",
        ),
        (
            whole(input_ids=torch.ones(4, dtype=torch.int64)),
            r"expected one of F32, F16, BF16, the file has I64",
        ),
    ],
)
def test_what_no_base_can_have(tmp_path: Path, tensors: dict[str, torch.Tensor], said: str) -> None:
    with pytest.raises(ArtefactError, match=said):
        checked(tmp_path, tensors)


@pytest.mark.parametrize("shape", [(), (0, 48), (48, 0), (1, 0, 8)])
def test_a_tensor_without_numbers(tmp_path: Path, shape: tuple[int, ...]) -> None:
    for names in (["layers.0.down", "layers.1.down"], ["input.embedding"]):
        with pytest.raises(ArtefactError, match=f"{names[0]}: expected one dimension or more, each of at"):
            checked(tmp_path / names[0], {name: torch.ones(shape) for name in names})


@pytest.mark.parametrize(
    ("width", "config"),
    [(47, {"r": 4, "alpha": 47}), (1, {"r": 4, "bias": True}), (1, {"r": 4, "of": [True]})],
)
def test_what_is_no_width_in_a_configuration(tmp_path: Path, width: int, config: dict[str, Any]) -> None:
    with pytest.raises(ArtefactError, match=f"{width} is no width of the base"):
        checked(tmp_path, {f"layers.{n}.down": torch.ones(width, 4) for n in range(2)}, config=config)


@pytest.mark.parametrize("line", ["llama layers=N", "llama layers=2 hidden=48 heads=N/2", "llama heads=2/N"])
def test_a_line_with_a_number_that_is_none(tmp_path: Path, line: str) -> None:
    """Python reads no integer of so many digits."""
    checked(tmp_path, whole(), line=line.replace("N", "9" * 5000))


def test_a_default_rank_is_one_number(tmp_path: Path) -> None:
    tensors = whole() | {f"layers.{n}.ffn.up": torch.ones(5, 48) for n in range(2)}
    with pytest.raises(ArtefactError, match=r"layers.0.ffn.up \(5, 48\): 5 is no width"):
        checked(tmp_path, tensors, config={})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
def test_what_is_no_number(
    tmp_path: Path, dtype: torch.dtype, number: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soundness, "_AT_ONCE", 50)  # so that it lies in a later piece
    tensors = {name: tensor.to(dtype) for name, tensor in whole().items()}
    limits = torch.finfo(dtype)
    for edge, value in enumerate((limits.max, limits.min, limits.tiny, limits.smallest_normal, 0.0, -0.0)):
        tensors["layers.0.ffn.down"][edge, 0] = value
    checked(tmp_path, tensors)
    tensors["layers.1.ffn.down"][40, 1] = tensors["layers.1.ffn.down"][47, 3] = float(number)
    with pytest.raises(ArtefactError, match=r"layers.1.ffn.down: expected finite numbers, .* 2 that are not"):
        checked(tmp_path, tensors)


def test_every_pattern_of_half_precision(tmp_path: Path) -> None:
    """As numpy and torch call it finite."""
    patterns: NDArray[np.uint16] = np.arange(2**16, dtype=np.uint16)
    for dtype in (torch.float16, torch.bfloat16):
        values = torch.from_numpy(patterns.view(np.int16).copy()).view(dtype)
        folder = tmp_path / str(dtype)
        broken = int((~values.isfinite()).sum())
        with pytest.raises(ArtefactError, match=f"{broken} that are not"):
            checked(folder, {"input.all": values})
        checked(folder, {"input.finite": values[values.isfinite()]})
