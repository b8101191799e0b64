"""Which devices a model may be loaded on, whatever this machine has."""

from pathlib import Path

import pytest
import torch

from prad.lm import DeviceError, LanguageModel
from prad.lm.device import require_device


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """As many as the test says."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: request.param)


@pytest.mark.parametrize(
    "name",
    [
        *("", "gpu", "cpu:0", "CUDA", "mps", "meta", "cuda:", "cuda:-1", "cuda:x"),
        *("cuda:00", "cuda:01", "cuda:\N{ARABIC-INDIC DIGIT ONE}"),
    ],
)
@pytest.mark.parametrize("gpus", [2], indirect=True)
@pytest.mark.usefixtures("gpus")
def test_other_names_are_refused_with_those_that_are_known(name: str) -> None:
    with pytest.raises(DeviceError, match=f"expected cpu, cuda or cuda:N, got '{name}'"):
        require_device(name)


@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
@pytest.mark.parametrize("gpus", [0], indirect=True)
@pytest.mark.usefixtures("gpus")
def test_without_a_gpu_it_says_what_works(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        DeviceError, match=rf"device '{name}': torch .* finds no GPU .*; cpu works everywhere"
    ):
        LanguageModel.load(tmp_path, device=name)
    require_device("cpu")


@pytest.mark.parametrize("gpus", [2], indirect=True)
@pytest.mark.usefixtures("gpus")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    for name in ("cpu", "cuda", "cuda:0", "cuda:1"):
        require_device(name)
    with pytest.raises(DeviceError, match="device 'cuda:2': this machine has cuda:0 to cuda:1"):
        require_device("cuda:2")
