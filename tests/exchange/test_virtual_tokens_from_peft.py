"""The learned tokens of prefix and prompt tuning, between PEFT's one matrix and what we keep."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig
from safetensors.torch import load_file

from prad.exchange import TensorError
from prad.exchange.modules import Modules
from prad.exchange.peft_config import PrefixSource, PromptSource, read_peft_config
from prad.exchange.virtual import EMBEDDINGS, export_prefix, export_prompt, import_prefix, import_prompt
from prad.lm import LanguageModel
from tests.exchange.peft_side import IGNORED, loaded, saved

pytestmark = pytest.mark.filterwarnings(*IGNORED)


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_prefix_is_what_peft_puts_in_the_cache(
    family: str,
    projection: bool,
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path: Path,
) -> None:
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=projection, encoder_hidden_size=8
    )
    saved(tiny_model(family), tmp_path, config)
    source, modules = read_peft_config(tmp_path), Modules(load_tiny(family))
    assert isinstance(source, PrefixSource)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    imported = import_prefix(source, stored, modules)
    assert imported.virtual_tokens == 3
    assert imported.config == {"virtual_tokens": 3, "projection": None}
    cache = loaded(tiny_model(family), tmp_path).get_prompt(batch_size=1)
    for layer, cached in enumerate(cache.layers):  # [1, kv_heads, tokens, dim]
        torch.testing.assert_close(imported.parameters["prefix.key"][layer], cached.keys[0].transpose(0, 1))
        torch.testing.assert_close(
            imported.parameters["prefix.value"][layer], cached.values[0].transpose(0, 1)
        )
    exported = export_prefix(imported.parameters, modules)
    assert torch.equal(exported.tensors[EMBEDDINGS], stored[EMBEDDINGS])
    written = {k: v for k, v in source.model_dump().items() if k in exported.fields}
    del written["prefix_projection"], written["encoder_hidden_size"]
    assert written.items() <= exported.fields.items()


def test_a_soft_prompt_is_the_matrix_itself(
    tiny_model: Callable[[str], Path], load_tiny: Callable[[str], LanguageModel], tmp_path: Path
) -> None:
    saved(tiny_model("llama"), tmp_path, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    source, modules = read_peft_config(tmp_path), Modules(load_tiny("llama"))
    assert isinstance(source, PromptSource)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    imported = import_prompt(source, stored, modules)
    assert imported.config == {"virtual_tokens": 5}
    assert torch.equal(imported.parameters["input.embedding"], stored[EMBEDDINGS][None])
    exported = export_prompt(imported.parameters, modules)
    assert torch.equal(exported.tensors[EMBEDDINGS], stored[EMBEDDINGS])
    assert exported.fields.items() <= source.model_dump().items()


def test_another_width_is_refused(
    tiny_model: Callable[[str], Path], load_tiny: Callable[[str], LanguageModel], tmp_path: Path
) -> None:
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    saved(tiny_model("llama"), tmp_path, config)
    source = read_peft_config(tmp_path)
    assert isinstance(source, PrefixSource)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    with pytest.raises(TensorError, match=r"prompt_embeddings: expected \(3, 384\), found \(3, 128\)"):
        import_prefix(source, stored, Modules(load_tiny("gpt2")))
    with pytest.raises(TensorError, match=r"lm_head: expected prompt_embeddings only"):
        import_prefix(source, stored | {"lm_head": torch.ones(1)}, Modules(load_tiny("llama")))
