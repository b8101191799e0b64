"""A trainer's tensors become a version in one request, without files."""

import numpy as np
import pytest
import torch
from safetensors.numpy import load
from safetensors.torch import load as load_torch

from adapter_registry.errors import AdapterRefusedError
from prad.artefact import WEIGHTS, AdapterRecord, BaseModelRef

BASE = BaseModelRef(name="tiny", architecture="llama-test", weights="0" * 64)
RECORD = AdapterRecord(method="pa", config={"rank": 4}, base=BASE)


def stored(registry, pushed) -> bytes:
    return (registry.data / "artefacts" / pushed.digest / WEIGHTS).read_bytes()


def test_tensors_of_numpy(registry):
    down = np.arange(8, dtype=np.float32).reshape(2, 4)
    pushed = registry.client.push_tensors("support", RECORD, {"layers.0.down": down})
    assert (pushed.name, pushed.created, pushed.record) == ("support@1", True, RECORD)
    assert np.array_equal(load(stored(registry, pushed))["layers.0.down"], down)
    assert not registry.client.push_tensors("support", RECORD, {"layers.0.down": down}).created
    assert registry.client.push_tensors("support", RECORD, {"layers.0.down": down + 1}).version == 2


def test_tensors_of_torch_as_a_trainer_has_them(registry):
    whole = torch.randn(4, 6, requires_grad=True)
    tensors = {"layers.0.down": whole.T, "layers.1.down": torch.ones(6, 4, dtype=torch.bfloat16)}
    pushed = registry.client.push_tensors("support", RECORD, tensors)
    found = load_torch(stored(registry, pushed))
    assert torch.equal(found["layers.0.down"], whole.detach().T)
    assert found["layers.1.down"].dtype is torch.bfloat16


def test_what_is_no_adapter_is_refused_as_ever(registry):
    with pytest.raises(AdapterRefusedError, match="PEFT's layout"):
        registry.client.push_tensors("support", RECORD, {"base_model.x": np.ones(1, np.float32)})
    assert registry.client.state().revision == 0
