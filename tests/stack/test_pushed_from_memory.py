"""A trainer's tensors are a version that answers as soon as the push that waits is answered."""

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from adapter_registry.client import RegistryClient
from adapter_registry.errors import AdapterRefusedError
from prad.artefact import Artefact
from prad.lm import LanguageModel
from tests.conftest import RunningStack, StackMaker, random_artefact


def answered_by(running: RunningStack, model: str) -> str:
    answer = running.api.post("/v1/completions", json={"model": model, "prompt": "t1 t2", "max_tokens": 1})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["prad"]["digest"])


def test_each_push_answers_at_once(
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path: Path,
    running_stack: StackMaker,
) -> None:
    model = load_tiny("llama")
    trained: list[Artefact] = [random_artefact(tmp_path / str(seed), model, seed) for seed in range(4)]
    with (
        running_stack(tiny_model("llama"), None, tmp_path) as running,
        RegistryClient(running.registry) as registry,
    ):
        for number, artefact in enumerate(trained, 1):
            tensors = load_file(artefact.weights)
            pushed = registry.push_tensors("steps", artefact.record, tensors, ready_within=30)
            assert (pushed.name, pushed.pending, pushed.reason) == (f"steps@{number}", (), "")
            assert pushed.state == ("routable" if number == 1 else "verified")
            assert answered_by(running, pushed.name) == pushed.digest
        assert answered_by(running, "steps") == registry.version("steps", 1).digest
        broken = {name: tensor.new_full(tensor.shape, float("nan")) for name, tensor in tensors.items()}
        with pytest.raises(AdapterRefusedError, match="expected finite numbers"):
            registry.push_tensors("steps", artefact.record, broken)
        tensors = {name: 1e38 * tensor for name, tensor in tensors.items()}  # which only a pass shows
        bad = registry.push_tensors("steps", artefact.record, tensors, ready_within=30)
        assert (bad.state, bad.pending) == ("failed", ())
        assert bad.reason
