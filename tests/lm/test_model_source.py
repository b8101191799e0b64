"""Which models load, which are refused, and that a refusal names the model and the reason."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import SIZES, packed_logits, save_random, some_ids

from prad.lm import LanguageModel, ModelNotFoundError, UnsupportedModelError, resolve_model, served_name

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "state space": ("MambaConfig", {"state_size": 8}, "MambaForCausalLM has no attention"),
    "attention with a mask of its own": ("BloomConfig", {"n_head": 4}, "BloomForCausalLM"),
    "attention that cannot be replaced": ("FalconConfig", {}, "FalconForCausalLM"),
    "soft cap": ("Gemma2Config", {"head_dim": 16}, "Gemma2Attention wants softcap"),
    "sinks": (
        "GptOssConfig",
        {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1},
        "GptOssAttention wants .*s_aux",
    ),
    "chunks": (
        "Llama4TextConfig",
        {"head_dim": 16, "attention_chunk_size": 8, "num_local_experts": 2},
        "Llama4ForCausalLM has layers of chunked_attention",
    ),
    "convolutions": (
        "Lfm2Config",
        {"layer_types": ["conv", "full_attention", "conv", "conv"]},
        "Lfm2ForCausalLM has layers of conv",
    ),
    "tokens that see later ones": (
        "Gemma3TextConfig",
        {"head_dim": 16, "use_bidirectional_attention": True},
        "Gemma3Attention lets tokens attend to later ones",
    ),
    "layers of two sizes": (
        "Gemma4TextConfig",
        {"num_key_value_heads": 2, "vocab_size_per_layer_input": 8, "hidden_size_per_layer_input": 8},
        "Gemma4ForCausalLM has layers that differ in head_dim; only layers of one size",
    ),
    "images": ("Gemma3Config", {}, "Gemma3ForConditionalGeneration is a language model inside"),
    "translation": ("T5Config", {"d_model": 48}, "a 't5' model is not a causal language model"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_by_name(kind: str, tmp_path: Path) -> None:
    name, special, message = REFUSED[kind]
    config = getattr(transformers, name)(**({} if kind == "images" else SIZES | special))
    if kind in ("images", "translation"):  # their configuration is enough
        config.save_pretrained(tmp_path)
    else:
        save_random(config, tmp_path)
    with pytest.raises(UnsupportedModelError, match=message):
        LanguageModel.load(tmp_path, dtype=torch.float32)


@pytest.mark.parametrize(("rope_type", "expected"), [("longrope", 32), ("llama3", 256)])
def test_the_context_ends_where_positions_would_depend_on_the_neighbours(
    rope_type: str, expected: int, tmp_path: Path
) -> None:
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, "original_max_position_embeddings": 32}
    more = {
        "longrope": {"short_factor": [1.0] * 6, "long_factor": [2.0] * 6},
        "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    }[rope_type]
    config = transformers.LlamaConfig(**SIZES, rope_parameters=rope | more)
    model = LanguageModel.load(save_random(config, tmp_path), dtype=torch.float32)
    assert model.max_context == expected
    mine = some_ids(20, 0)
    neighbours = ([some_ids(2, 1)], [some_ids(model.max_context, 1)])
    short, long = (packed_logits(model, [mine, *others])[0] for others in neighbours)
    torch.testing.assert_close(short, long, rtol=0, atol=1e-4)


def test_a_folder_with_pickled_weights_only_is_refused(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes((tiny_model("llama") / "config.json").read_bytes())
    torch.save({"weight": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelNotFoundError, match="pickled weights are never loaded"):
        LanguageModel.load(tmp_path)


@pytest.mark.parametrize("config", [None, "not json", "{}", '{"model_type": "no-such-model"}'])
def test_a_folder_without_a_model_is_refused(config: str | None, tmp_path: Path) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config, encoding="utf-8")
    with pytest.raises(ModelNotFoundError, match=f"{tmp_path} holds no model that can be read"):
        LanguageModel.load(tmp_path)


def test_weights_that_are_cut_off_are_refused(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_model("llama") / "config.json").read_bytes())
    whole = (tiny_model("llama") / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelNotFoundError, match=r"model\.safetensors"):
        LanguageModel.load(tmp_path)


def test_missing_weights_are_refused(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """A layer that is not in the files would be random numbers."""
    from safetensors.torch import load_file, save_file

    (tmp_path / "config.json").write_bytes((tiny_model("llama") / "config.json").read_bytes())
    weights = load_file(tiny_model("llama") / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelNotFoundError, match=r"model\.layers\.2\.mlp\.up_proj\.weight"):
        LanguageModel.load(tmp_path)


def test_a_name_that_is_nothing_is_said_clearly(tmp_path: Path) -> None:
    """In a process of its own: the hub's client reads HF_HUB_OFFLINE when it is imported."""
    names = ["no-such-org/no-such-model", "no such model"]
    program = (
        "import sys; from pathlib import Path; from prad.lm import ModelNotFoundError, resolve_model\n"
        "for name in sys.argv[1:]:\n"
        "    try: resolve_model(name, Path('unused'))\n"
        "    except ModelNotFoundError as error: print(repr(str(error)))"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, *names],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        encoding="utf-8",
    )
    assert ended.returncode == 0, ended.stderr
    for name, said in zip(names, ended.stdout.splitlines(), strict=True):
        assert f"'{name}' is not a folder, not a .gguf file, not 'smollm2-135m'" in said


@pytest.mark.parametrize("name", ["/no-such-folder", "./no/such/folder", "no/such/folder", "~/no-such"])
def test_a_path_that_leads_nowhere_is_not_taken_for_an_id(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ModelNotFoundError, match=f"^no such file or folder: {Path(name).expanduser()}$"):
        resolve_model(name, tmp_path)


def test_a_home_folder_of_nobody_is_no_path(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"^no such file or folder: ~no-such-user/model"):
        resolve_model("~no-such-user/model", tmp_path)


def test_a_file_of_another_kind_is_said_clearly(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(
        ModelNotFoundError, match=r"expected a folder or a \.gguf file, .*safetensors is another"
    ):
        resolve_model(str(tmp_path / "model.safetensors"), tmp_path)


def test_a_missing_gguf_file_is_said_clearly(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=f"there is no file {tmp_path / 'none.gguf'}"):
        resolve_model(str(tmp_path / "none.gguf"), tmp_path)


def test_a_gguf_file_that_is_none_is_said_clearly(tmp_path: Path) -> None:
    (tmp_path / "junk.gguf").write_bytes(b"junk" * 100)
    with pytest.raises(ModelNotFoundError, match=r"junk\.gguf"):
        resolve_model(str(tmp_path / "junk.gguf"), tmp_path / "cache")


def test_served_names() -> None:
    assert served_name("smollm2-135m") == "smollm2-135m"
    assert served_name("/models/some/Llama-7B.gguf") == "Llama-7B"
    assert served_name("meta/Llama-7B/") == "Llama-7B"


def test_stop_ids_come_from_the_generation_config(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    model = LanguageModel.load(tiny_model("llama"), dtype=torch.float32)
    assert model.stop_ids(tiny_model("llama")) == {119}
    assert model.stop_ids(tmp_path) == {119}, "without a generation config the model's own is asked"
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}), encoding="utf-8")
    assert model.stop_ids(tmp_path) == {7, 9}
    (tmp_path / "generation_config.json").write_text(
        '{"temperature": 0.6, "do_sample": true}', encoding="utf-8"
    )
    assert model.stop_ids(tmp_path) == {119}, "nor is one that names none the last word"


def test_the_files_are_mapped_not_copied(tiny_model: Callable[[str], Path], load_tiny: Any) -> None:
    """Loading takes the files' own memory: a weight lies inside a mapping of the file."""
    model = load_tiny("llama")
    address = next(p for n, p in model.module.named_parameters() if "mlp" in n).data_ptr()
    mapped = [
        line.split()[0].split("-")
        for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
        if str(tiny_model("llama")) in line
    ]
    assert any(int(start, 16) <= address < int(end, 16) for start, end in mapped)
