"""A version's probe: it passes if its adapter moves the logits and spoils none, of any method; and it is
computed in a thread of its own, which steps back."""

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from prad.adapters import METHODS, AdapterError, find_method, load_adapter, new_adapter, save_parameters
from prad.artefact import WEIGHTS, AdapterRecord, Artefact, BaseModelRef, read_artefact, write_record
from prad.lm import LanguageModel
from prad.lm.kernels import Kernels, Precision
from prefill_service import probing
from prefill_service.probing import Prober
from tests.conftest import random_artefact

IN_FRONT = {"prad-prefix", "prad-prompt", "prad-mam"}
"""Those whose virtual tokens are some before any training."""


@pytest.fixture(scope="module", params=["torch", "torch, bfloat16", "kernels", "int8"])
def model(request: pytest.FixtureRequest, tiny_model: Callable[[str], Path]) -> LanguageModel:
    dtype = torch.float32 if request.param in ("torch", "kernels") else torch.bfloat16
    loaded = LanguageModel.load(tiny_model("llama"), dtype=dtype)
    if request.param in ("kernels", "int8"):
        precision: Precision = "int8" if request.param == "int8" else "full"
        loaded.accelerate(request.getfixturevalue("kernels"), precision)
    assert loaded.is_fused == ("torch" not in request.param)
    return loaded


def config(method: str) -> dict[str, Any]:
    fields = find_method(method).config_type.model_fields
    return {name: value for name, value in (("r", 8), ("virtual_tokens", 3)) if name in fields}


def fresh(folder: Path, model: LanguageModel, method: str) -> Artefact:
    """As it is before the first step of training."""
    folder.mkdir()
    found = find_method(method)
    settings = found.configure(config(method))
    adapter = new_adapter(found, settings, model, 0)
    save_parameters(adapter.parameters, folder, torch.float32)
    base = BaseModelRef(
        name="tiny", architecture=model.fingerprint.architecture, weights=model.fingerprint.weights
    )
    record = AdapterRecord(
        method=method,
        config=settings.model_dump(mode="json"),
        base=base,
        virtual_tokens=adapter.virtual_tokens,
    )
    write_record(folder, record)
    return read_artefact(folder)


async def probe(model: LanguageModel, artefact: Artefact, *, allow_unmoved: bool = False) -> None:
    prober = Prober(model, lambda found: load_adapter(found, model), lambda: 0, allow_unmoved=allow_unmoved)
    try:
        await prober.probe(artefact)
    finally:
        prober.close()


@pytest.mark.parametrize("method", sorted(METHODS))
async def test_one_that_moves_the_logits_passes_and_one_that_does_not_fails(
    model: LanguageModel, tmp_path: Path, method: str
) -> None:
    await probe(model, random_artefact(tmp_path / "trained", model, 3, method=method, config=config(method)))
    untrained = fresh(tmp_path / "fresh", model, method)
    if method in IN_FRONT:
        await probe(model, untrained)
        return
    with pytest.raises(AdapterError, match=r"changes nothing: .* PRAD_PREFILL_ALLOW_UNMOVED=1"):
        await probe(model, untrained)
    await probe(model, untrained, allow_unmoved=True)


async def test_a_small_step_of_training_moves_them(model: LanguageModel, tmp_path: Path) -> None:
    artefact = random_artefact(tmp_path / "a", model, 3, method="prad-lora")
    weights = load_file(artefact.folder / WEIGHTS)
    small = {name: 1e-4 * weight if "lora_B" in name else weight for name, weight in weights.items()}
    assert any("lora_B" in name for name in weights)
    save_file(small, artefact.folder / WEIGHTS)
    await probe(model, read_artefact(artefact.folder))


async def test_one_that_spoils_the_logits_fails(model: LanguageModel, tmp_path: Path) -> None:
    artefact = random_artefact(tmp_path / "a", model, 3)
    weights = load_file(artefact.folder / WEIGHTS)
    save_file({name: 1e30 * weight for name, weight in weights.items()}, artefact.folder / WEIGHTS)
    for allow_unmoved in (False, True):
        with pytest.raises(AdapterError, match="not finite"):
            await probe(model, read_artefact(artefact.folder), allow_unmoved=allow_unmoved)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Of each pass by kernels: the thread's name, how nice it is, and how many compute."""
    seen: list[tuple[str, int, int]] = []
    run = Kernels.run

    def noted(self: Kernels, *given: Any) -> None:
        nice = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        seen.append((threading.current_thread().name.partition("_")[0], nice, self.threads))
        run(self, *given)

    monkeypatch.setattr(Kernels, "run", noted)
    return seen


@pytest.mark.skipif(sys.platform != "linux", reason="niceness belongs to a process there")
async def test_it_has_one_thread_that_steps_back(
    tiny_model: Callable[[str], Path], kernels: Kernels, tmp_path: Path, threads: list[tuple[str, int, int]]
) -> None:
    model = LanguageModel.load(tiny_model("llama"), dtype=torch.float32)
    model.accelerate(kernels.beside(2))
    before = os.getpriority(os.PRIO_PROCESS, 0)
    await probe(model, random_artefact(tmp_path / "a", model, 3))
    assert set(threads) == {("probe", 10, 1)}
    assert os.getpriority(os.PRIO_PROCESS, 0) == before, "nobody else does"


async def test_it_waits_for_no_prompt_pass(
    tiny_model: Callable[[str], Path], kernels: Kernels, tmp_path: Path
) -> None:
    model = LanguageModel.load(tiny_model("llama"), dtype=torch.float32)
    model.accelerate(kernels)
    with model._one_pass, model._one_fused_pass:
        await probe(model, random_artefact(tmp_path / "a", model, 3))


async def test_it_steps_back_for_nobody_whom_it_could_keep_waiting(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where torch computes."""
    model = LanguageModel.load(tiny_model("llama"), dtype=torch.float32)
    seen: list[tuple[bool, int]] = []
    compute = model.module.forward

    def noted(*given: Any, **named: Any) -> Any:
        nice = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        seen.append((model._one_pass.locked(), nice))
        return compute(*given, **named)

    monkeypatch.setattr(model.module, "forward", noted)
    many = {"virtual_tokens": 60}
    await probe(model, random_artefact(tmp_path / "a", model, 3, method="prad-prompt", config=many))
    assert seen
    assert set(seen) == {(True, os.getpriority(os.PRIO_PROCESS, 0))}


async def test_pushes_in_a_row_take_a_small_part_of_the_time_while_requests_are_under_way(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = LanguageModel.load(tiny_model("llama"), dtype=torch.float32)
    artefact = random_artefact(tmp_path / "a", model, 3)
    rests: list[float] = []
    live = 0

    async def sleep(seconds: float) -> None:
        rests.append(seconds)

    monkeypatch.setattr(probing.asyncio, "sleep", sleep)
    monkeypatch.setattr(probing, "_REST", 1e6)
    prober = Prober(model, lambda found: load_adapter(found, model), lambda: live, allow_unmoved=False)
    try:
        for _ in range(2):
            await prober.probe(artefact)  # nobody asks anything: at once
        assert not rests
        live = 1
        await prober.probe(artefact)
        (rest,) = rests
        assert rest > 1  # a million times as long as it computed
    finally:
        prober.close()
