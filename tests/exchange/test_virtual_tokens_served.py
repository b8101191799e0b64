"""Learned tokens from PEFT that do not fit: more than the context holds, or of another width than the
embeddings; those as wide as projected embeddings do."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PromptTuningConfig

from prad.adapters import AdapterError
from prad.exchange import TensorError, import_folder
from prad.lm import LanguageModel
from tests.conftest import CONFIGS, randomised
from tests.exchange.peft_side import IGNORED, import_and_back, saved, settings

pytestmark = pytest.mark.filterwarnings(*IGNORED)


def test_too_many_tokens_for_the_context_are_refused(
    tiny_model: Callable[[str], Path], load_tiny: Callable[[str], LanguageModel], tmp_path: Path
) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=511)
    folder = tiny_model("llama")
    saved(folder, tmp_path / "peft", config)
    with pytest.raises(AdapterError, match="511 virtual tokens"):
        import_folder(tmp_path / "peft", tmp_path / "ours", load_tiny("llama"), settings(folder))


@pytest.fixture
def narrow(tmp_path: Path) -> Path:
    """As OPT-350m: embeddings of 32 are projected to the layers' 48."""
    config = CONFIGS["opt"]()
    config.word_embed_proj_dim = 32
    randomised(config, seed=1).save_pretrained(tmp_path / "narrow")
    return tmp_path / "narrow"


def test_tokens_are_as_wide_as_embeddings_that_are_projected(narrow: Path, tmp_path: Path) -> None:
    model = LanguageModel.load(narrow, dtype=torch.float32)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, token_dim=32)
    import_and_back(config, narrow, model, tmp_path)


def test_tokens_as_wide_as_the_layers_are_refused_there(
    narrow: Path, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """PEFT makes them so unless it is told; its own forward fails on them."""
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    saved(tiny_model("opt"), tmp_path / "peft", config)
    model, told = (
        LanguageModel.load(narrow, dtype=torch.float32),
        settings(Path("opt"), allow_other_base=True),
    )
    said = (
        r"expected \(5, 32\), found \(5, 48\) \(PROMPT_TUNING: as wide as model\.decoder\.embed_tokens, for"
    )
    with pytest.raises(TensorError, match=said):
        import_folder(tmp_path / "peft", tmp_path / "ours", model, told)
