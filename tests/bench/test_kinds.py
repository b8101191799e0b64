"""Kinds of CPU: where results go, and what others are asked in there."""

import importlib
import platform
from pathlib import Path

import pytest
import torch

from bench import kinds
from bench.adapters import write_peft_lora
from bench.kinds import KINDS, cpu_kind, named_dtypes
from prad.lm import LanguageModel
from prad.lm.kernels import cpus

WORKERS = Path(kinds.__file__).parent / "workers"
NEEDS = {kind.name: kind.needs for kind in cpus.KINDS}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="these kinds are of x86-64")
def test_a_kind_is_that_of_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuple(NEEDS) == KINDS
    for name, needs in NEEDS.items():
        if name != "aarch64":
            monkeypatch.setattr(kinds, "cpu_flags", lambda flags=needs: [*flags, "fpu"])
            assert cpu_kind() == name
            widens = name not in ("amx", "avx512-bf16")
            assert ("float32" in named_dtypes(1)) == ("float32" in named_dtypes(64)) == widens
            assert ("bfloat16" in named_dtypes(64)) != widens
            assert "bfloat16" in named_dtypes(1)
    monkeypatch.setattr(kinds, "cpu_flags", lambda: ["fpu"])
    assert cpu_kind() == "other"


def test_peft_is_asked_in_float32_by_adapters_in_bfloat16(
    packable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = write_peft_lora(tmp_path, LanguageModel.load(packable, dtype=torch.bfloat16), 2, 4)
    monkeypatch.syspath_prepend(str(WORKERS))
    worker = importlib.import_module("transformers_worker")
    model = worker.loaded(str(packable), torch.float32, folders)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with torch.inference_mode():
        logits = model(torch.tensor([[1, 2, 3]] * 2), adapter_names=[*folders]).logits
    assert not torch.equal(*logits)
