"""What the floor is made of where torch packs no bfloat16, and what a pass says that torch computes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench.flags import Prefill
from bench.floor import ContestGround, Ground, others_way
from bench.limits import Hardware
from bench.prefill import grown
from bench.rounds import interleaved
from prad.lm import LanguageModel
from prad.lm.kernels import Kernels


def loaded(folder: Path, kernels: Kernels | None = None) -> LanguageModel:
    model = LanguageModel.load(folder, dtype=torch.bfloat16)
    if kernels is not None:
        model.accelerate(kernels)
    return model


def test_where_torch_packs_no_bf16_it_is_asked_in_float32(
    packable: Path, kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    model = loaded(packable, kernels)
    ground = Ground(model, [1, 8], bandwidth_mib=1, stored=True)
    took = interleaved(ground.kinds, 1, "floor")
    for row in ground.figures(took)["gemms"]:
        assert {"stored_ms", "packed_float32_ms", "own_ms"} <= set(row)
        assert "packed_ms" not in row
    assert ground.floors_s(took, 8, 10)[0] > 0
    contest = ContestGround(model, 2, 4, 4)
    assert min(contest.floor_s(interleaved(contest.kinds, 1, "floor"))) > 0


def test_others_way_is_of_the_models_dtype(
    packable: Path, load_tiny: Callable[[str], LanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    assert others_way(loaded(packable)) == "packed"
    assert others_way(load_tiny("llama")) == "packed"


def test_gemms_of_a_pass_that_torch_computes_are_not_known(packable: Path, kernels: Kernels) -> None:
    flags = Prefill.model_validate({"rounds": 1, "tokens": 66})
    assert grown(loaded(packable), 66, flags, Hardware(1))["short_gemms_ms"] is None
    assert grown(loaded(packable, kernels), 66, flags, Hardware(1))["short_gemms_ms"] is not None
