"""The digest says which weights these are, however they are spread over files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from prad.core.kv import KVLayout, LayerKV
from prad.lm import LanguageModel, ModelNotFoundError
from prad.lm.fingerprint import Fingerprint, weights_digest

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "b.weight": torch.ones(4), "c.bias": torch.zeros(3)}


def digest(folder: Path, *files: dict[str, torch.Tensor]) -> str:
    folder.mkdir()
    for number, tensors in enumerate(files):
        save_file(tensors, folder / f"model-{number}.safetensors")
    return weights_digest(folder)


def test_shards_do_not_matter(tmp_path: Path) -> None:
    one = digest(tmp_path / "one", WEIGHTS)
    first, *rest = WEIGHTS
    split = digest(tmp_path / "two", {n: WEIGHTS[n] for n in rest}, {first: WEIGHTS[first]})
    assert one == split
    assert len(one) == 64


@pytest.mark.parametrize(
    "changed",
    [
        {"b.weight": torch.tensor([1.0, 1.0, 1.0, 1.0000001])},
        {"b.weight": torch.ones(4, dtype=torch.float16)},
        {"b.weight": torch.ones(2, 2)},
        {"b.weight": torch.ones(4, dtype=torch.int32).view(torch.float32)},
        {"d.weight": torch.ones(4)},
    ],
    ids=["one value", "dtype", "shape", "bytes", "one more tensor"],
)
def test_everything_else_does(changed: dict[str, torch.Tensor], tmp_path: Path) -> None:
    assert digest(tmp_path / "one", WEIGHTS) != digest(tmp_path / "two", WEIGHTS | changed)


def test_a_name_matters(tmp_path: Path) -> None:
    renamed = {("z.weight" if n == "a.weight" else n): t for n, t in WEIGHTS.items()}
    swapped = WEIGHTS | {"a.weight": WEIGHTS["a.weight"].view(3, 2)}
    digests = {digest(tmp_path / str(i), w) for i, w in enumerate((WEIGHTS, renamed, swapped))}
    assert len(digests) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.bool])
def test_every_dtype_can_be_digested(dtype: torch.dtype, tmp_path: Path) -> None:
    assert digest(tmp_path / "one", {"w": torch.ones(3, dtype=dtype), "scalar": torch.tensor(1.0)})


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelNotFoundError, match=r"no \.safetensors file \(pickled weights are never loaded"):
        weights_digest(tmp_path)


def test_every_part_counts() -> None:
    layer = LayerKV(2, 8, 8)
    layout = KVLayout((layer, layer), "float32")
    prints = [
        Fingerprint("llama", "w", "c", layout),
        Fingerprint("gpt2", "w", "c", layout),
        Fingerprint("llama", "v", "c", layout),
        Fingerprint("llama", "w", "d", layout),
        Fingerprint("llama", "w", "c", KVLayout((layer, layer), "bfloat16")),
        Fingerprint("llama", "w", "c", KVLayout((layer,), "float32")),
        Fingerprint("llama", "w", "c", KVLayout((layer, LayerKV(2, 8, 4)), "float32")),
    ]
    assert len({p.digest for p in prints}) == len(prints)
    assert prints[0].digest == Fingerprint("llama", "w", "c", layout).digest


@pytest.mark.parametrize(
    ("setting", "value", "matters"),
    [
        ("rms_norm_eps", 1e-3, True),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 5e5}, True),
        ("hidden_act", "gelu", True),
        ("transformers_version", "5.0.0", False),
        ("dtype", "bfloat16", False),
        ("architectures", ["Other"], False),
    ],
)
def test_settings_count_where_the_forward_depends_on_them(
    setting: str, value: object, matters: bool, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """The same weights under another setting are another model."""
    shutil.copytree(tiny_model("llama"), tmp_path / "copy")
    path = tmp_path / "copy" / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text(encoding="utf-8")) | {setting: value}), encoding="utf-8"
    )
    one, other = (
        LanguageModel.load(folder, dtype=torch.float32).fingerprint
        for folder in (tiny_model("llama"), tmp_path / "copy")
    )
    assert one.weights == other.weights
    assert (one.digest != other.digest) is matters
