"""A tiny model that benchmarks can measure: of widths that every precision packs."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from tests.conftest import SIZES, randomised, save_model


@pytest.fixture(scope="session")
def packable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder; in bfloat16."""
    folder = tmp_path_factory.mktemp("packable")
    widths = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    save_model(randomised(LlamaConfig(**SIZES | widths), seed=1).to(torch.bfloat16), folder)
    return folder
