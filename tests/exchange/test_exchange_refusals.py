"""What cannot be imported exactly is refused, naming file, field, what was expected and what was found."""

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PromptEncoderConfig
from safetensors.torch import load_file, save_file

from prad.adapters import ParameterMismatchError
from prad.artefact import read_artefact
from prad.exchange import (
    ExchangeError,
    FieldError,
    TensorError,
    export_folder,
    how_base_is_known,
    import_folder,
)
from prad.exchange.bases import BaseName
from prad.lm import LanguageModel
from tests.conftest import random_artefact
from tests.exchange.peft_side import IGNORED, saved, settings

pytestmark = pytest.mark.filterwarnings(*IGNORED)
Importing = Callable[..., None]


@pytest.fixture
def source(tiny_model: Callable[[str], Path], tmp_path: Path) -> Path:
    """A LoRA of PEFT that can be imported."""
    saved(tiny_model("llama"), tmp_path / "peft", LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    return tmp_path / "peft"


@pytest.fixture
def importing(
    source: Path, load_tiny: Callable[[str], LanguageModel], tiny_model: Callable[[str], Path]
) -> Importing:
    """Imports `source` and sees that nothing is left where it fails."""

    def run(family: str = "llama", **options: Any) -> None:
        out = source.parent / "out"
        try:
            import_folder(source, out, load_tiny(family), settings(tiny_model("llama"), **options))
        finally:
            assert {path.name for path in source.parent.iterdir()} <= {"peft", "out"}
        assert out.is_dir()

    return run


def change(source: Path, **fields: Any) -> None:
    path = source / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | fields), encoding="utf-8")


def change_tensors(source: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = source / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("peft_type", "VERA", "'LORA', 'IA3', 'PREFIX_TUNING', 'PROMPT_TUNING', found 'VERA'"),
        ("task_type", "SEQ_CLS", "expected 'CAUSAL_LM'"),
        ("bias", "lora_only", "expected 'none', found 'lora_only' (biases of the base model"),
        ("lora_bias", True, "found True (a bias of lora_B"),
        ("modules_to_save", ["lm_head"], "found ['lm_head'] (whole modules"),
        ("init_lora_weights", "pissa", "found 'pissa' (the base model's weights were changed"),
        ("layer_replication", [[0, 2]], "other layers"),
        ("use_qalora", True, "not known here"),
        ("field_of_tomorrow", 3, "expected nothing, found 3 (not known here"),
        ("init_lora_weights", "olora", "expected True, False, 'gaussian', 'eva'"),
        ("lora_alpha", float("inf"), "found inf"),
        ("lora_alpha", 0, "expected a number other than 0, found 0 (nothing would be changed"),
        ("r", 0, "found 0"),
        ("r", None, "found None"),
        ("target_modules", None, "found None"),
        ("target_modules", "(q_proj", "expected a regular expression, found '(q_proj'"),
        ("target_modules", ["query"], "names of modules that this model has, found ['query']"),
        (
            "target_modules",
            ["q_proj", "v_proj", "embed_tokens"],
            "found 'model.embed_tokens' (it has no adapter site",
        ),
        ("rank_pattern", {"q_proj": "many"}, "found 'many'"),
        ("rank_pattern", {"(": 3}, "expected a regular expression"),
        (
            "base_model_name_or_path",
            "org/another",
            "'llama', the model it is imported for, found 'org/another'",
        ),
    ],
)
def test_a_field_that_cannot_be_honoured_is_named(
    field: str, value: object, said: str, source: Path, importing: Importing
) -> None:
    change(source, **{field: value})
    with pytest.raises(FieldError, match=rf"^adapter_config\.json: {field}: .*{re.escape(said)}"):
        importing()


def test_a_required_field_that_is_missing_is_named(source: Path, importing: Importing) -> None:
    path = source / "adapter_config.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    del fields["lora_alpha"]
    path.write_text(json.dumps(fields), encoding="utf-8")
    with pytest.raises(FieldError, match="lora_alpha: expected a value, found None"):
        importing()


def test_layers_of_a_pattern_are_refused_as_in_peft(source: Path, importing: Importing) -> None:
    change(source, target_modules=".*q_proj", layers_to_transform=[1])
    with pytest.raises(ExchangeError, match=r"json: layers_to_transform needs a list of target_modules"):
        importing()


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"r": 3}'])
def test_a_configuration_that_is_none_is_named(text: str, source: Path, importing: Importing) -> None:
    (source / "adapter_config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ExchangeError, match=r"^adapter_config\.json: "):
        importing()


def test_fields_that_matter_in_training_only_are_passed_over(source: Path, importing: Importing) -> None:
    change(source, lora_dropout=0.3, init_lora_weights="gaussian", loftq_config={}, layers_pattern=[])
    importing()


def test_a_byte_order_mark_in_front_is_no_fault(source: Path, importing: Importing) -> None:
    path = source / "adapter_config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    importing()
    record = source.parent / "out" / "prad.json"
    record.write_bytes(b"\xef\xbb\xbf" + record.read_bytes())
    assert read_artefact(source.parent / "out").record.method == "prad-lora"


def test_another_base_can_be_allowed(source: Path, importing: Importing) -> None:
    change(source, base_model_name_or_path="org/another")
    importing(allow_other_base=True)


HERE = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize(
    ("named", "model", "agree"),
    [
        (HERE, "smollm2-135m", True),
        ("smollm2-135m", HERE, True),
        ("HuggingFaceTB/SmolLM2-135M", "smollm2-135m", False),
        ("/home/me/models/SmolLM2-135M-Instruct/", "smollm2-135m", True),
        ("org/SmolLM2-135M-Instruct", "smollm2-135m", False),
        ("qwen/qwen3-0.6b", "Qwen/Qwen3-0.6B", True),
        ("other/Qwen3-0.6B", "Qwen/Qwen3-0.6B", False),
        ("/hub/models--Qwen--Qwen3-0.6B/snapshots/1f3a", "Qwen/Qwen3-0.6B", True),
        ("/hub/models--other--Qwen3-0.6B/snapshots/1f3a", "Qwen/Qwen3-0.6B", False),
        ("models--gpt2/snapshots/607a", "gpt2", True),
        ("Qwen/Qwen3-0.6B", "/hub/models--Qwen--Qwen3-0.6B/snapshots/1f3a", True),
        (r"C:\Users\me\Qwen3-0.6B", "Qwen/Qwen3-0.6B", True),
        (r"C:\hub\models--Qwen--Qwen3-0.6B\snapshots\1f3a", "Qwen/Qwen3-0.6B", True),
        ("C:/models/Qwen3-1.7B", "Qwen/Qwen3-0.6B", False),
        ("./Qwen3-0.6B.gguf", "Qwen/Qwen3-0.6B", True),
    ],
)
def test_names_of_a_base_model_are_read_as_people_write_them(named: str, model: str, agree: bool) -> None:
    assert BaseName.read(named).agrees(BaseName.of_model(model)) is agree


def test_a_folder_that_looks_like_an_id_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert BaseName.of_model("models/llama") == BaseName(None, "llama")
    assert BaseName.of_model("meta/llama") == BaseName("meta", "llama")


def test_another_base_of_the_same_name_is_refused(source: Path, importing: Importing) -> None:
    change(source, base_model_name_or_path="other/llama")
    with pytest.raises(
        FieldError, match=r"expected 'org/llama', .* found 'other/llama' .*--allow-other-base"
    ):
        importing(base_model="org/llama")


@pytest.mark.parametrize(
    ("named", "known"), [("/there/llama", "name"), (None, "nothing"), ("org/other", "nothing")]
)
def test_how_the_base_is_known_is_recorded(
    named: str | None, known: str, source: Path, importing: Importing
) -> None:
    change(source, base_model_name_or_path=named)
    importing(allow_other_base=True)
    assert how_base_is_known(read_artefact(source.parent / "out").record) == known


def test_a_base_that_is_a_folder_here_is_known_by_its_weights(
    source: Path, importing: Importing, tiny_model: Callable[[str], Path], tmp_path_factory: Any
) -> None:
    """As it is where PEFT trained on the folder that `prad model path` prints."""
    other = tmp_path_factory.mktemp("elsewhere") / "of-any-name"
    shutil.copytree(tiny_model("llama"), other)
    change(source, base_model_name_or_path=str(other))
    importing(base_model="org/llama")
    assert how_base_is_known(read_artefact(source.parent / "out").record) == "digest"


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda t: t.pop(f"{Q0}.lora_B.weight"), r"q_proj\.lora_B\.weight: expected \(48, 4\), found none"),
        (
            lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(5, 48)}),
            r"q_proj\.lora_A\.weight: expected \(4, 48\), found \(5, 48\)",
        ),
        (
            lambda t: [t.pop(f"{Q0}.lora_{x}.weight") for x in "AB"],
            r"layers\.0\.self_attn\.q_proj: expected tensors, as target_modules names it, found none",
        ),
        (
            lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(2)}),
            r"lm_head\.weight: expected a name like base_model\.model\.<module>\.lora_A\.weight",
        ),
        (
            lambda t: t.update({"../../etc/passwd": torch.ones(2)}),
            r"\.\./\.\./etc/passwd: expected a name like",
        ),
        (
            lambda t: t.update({"base_model.model.../../x.lora_A.weight": torch.ones(2)}),
            r"\.\./\.\./x\.lora_A\.weight: expected modules of this model",
        ),
        (
            lambda t: t.update({f"{Q0}.lora_magnitude_vector": torch.ones(48)}),
            "lora_magnitude_vector: expected a name like",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    edit: Callable[[dict[str, torch.Tensor]], None], said: str, source: Path, importing: Importing
) -> None:
    change_tensors(source, edit)
    with pytest.raises(TensorError, match=rf"^adapter_model\.safetensors: .*{said}"):
        importing()


def test_tensors_that_peft_would_leave_out_are_refused(source: Path, importing: Importing) -> None:
    change(source, target_modules=["v_proj"])
    with pytest.raises(ExchangeError, match=r"holds tensors of model\.layers\.0\.self_attn\.q_proj, "):
        importing()


def test_weights_that_change_nothing_are_refused(source: Path, importing: Importing) -> None:
    change_tensors(source, lambda t: [t[n].zero_() for n in t if "lora_B" in n])
    with pytest.raises(ExchangeError, match=r"every lora_B\.weight is zero \(untrained\)"):
        importing()


def test_numbers_that_are_none_are_refused(source: Path, importing: Importing) -> None:
    change_tensors(source, lambda t: t[f"{Q0}.lora_A.weight"].fill_(float("nan")))
    with pytest.raises(ParameterMismatchError, match="expected finite numbers"):
        importing()


def test_another_architecture_is_refused(
    source: Path, importing: Importing, load_tiny: Callable[[str], LanguageModel], tmp_path: Path
) -> None:
    with pytest.raises(TensorError, match=r"for another architecture than \[gpt2 layers=4 "):
        importing("gpt2")
    lora = random_artefact(
        tmp_path / "elsewhere" / "lora", load_tiny("gpt2"), 1, method="prad-lora", config={}
    )
    export_folder(lora, tmp_path / "elsewhere" / "out", load_tiny("gpt2"))
    with pytest.raises(ExchangeError, match=r"prad\.json: base\.architecture: expected .*\[llama .*\[gpt2 "):
        import_folder(
            tmp_path / "elsewhere" / "out", tmp_path / "x", load_tiny("llama"), settings(Path("tiny"))
        )


def test_other_weights_of_an_exported_adapter_are_refused_unless_allowed(
    load_tiny: Callable[[str], LanguageModel], tmp_path: Path
) -> None:
    model = load_tiny("llama")
    lora = random_artefact(tmp_path / "lora", model, 1, method="prad-lora", config={})
    export_folder(lora, tmp_path / "peft", model)
    path = tmp_path / "peft" / "prad.json"
    path.write_text(
        path.read_text(encoding="utf-8").replace(model.fingerprint.weights, "0" * 64), encoding="utf-8"
    )
    with pytest.raises(
        ExchangeError, match=r"prad\.json: base\.weights: expected .*found 000000000000 \(tiny\)"
    ):
        import_folder(tmp_path / "peft", tmp_path / "a", model, settings(Path("tiny")))
    allowed = settings(Path("tiny"), allow_other_base=True)
    again = import_folder(tmp_path / "peft", tmp_path / "a", model, allowed)
    assert how_base_is_known(again.record) == "nothing"
    assert again.record.base.weights == model.fingerprint.weights


class _Runs:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (exec, ("raise AssertionError('the pickle was run')",))


def test_a_pickle_is_refused_and_not_run(source: Path, importing: Importing) -> None:
    (source / "adapter_model.safetensors").unlink()
    (source / "adapter_model.bin").write_bytes(pickle.dumps(_Runs()))
    with pytest.raises(
        ExchangeError, match=r"adapter_model\.bin, expected adapter_model\.safetensors: a pickle"
    ):
        importing()


def test_a_pickle_by_the_right_name_is_no_safetensors(source: Path, importing: Importing) -> None:
    (source / "adapter_model.safetensors").write_bytes(pickle.dumps(_Runs()))
    with pytest.raises(ExchangeError, match=r"adapter_model\.safetensors is not a whole safetensors file"):
        importing()


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_weights_that_are_cut_off_are_said_so(kept: float, source: Path, importing: Importing) -> None:
    path = source / "adapter_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(ExchangeError, match=rf"^{path} is not a whole safetensors file .*was it cut off"):
        importing()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float64, torch.int8])
def test_numbers_of_another_type_are_named(dtype: torch.dtype, source: Path, importing: Importing) -> None:
    name = f"{Q0}.lora_A.weight"
    change_tensors(source, lambda t: t.update({name: t[name].to(dtype)}))
    expected = r"expected torch\.float32 or torch\.float16 or torch\.bfloat16"
    with pytest.raises(TensorError, match=rf"q_proj\.lora_A\.weight: {expected}, found {dtype}"):
        importing()


def test_a_folder_that_cannot_be_written_is_named(
    source: Path, load_tiny: Callable[[str], LanguageModel], tiny_model: Callable[[str], Path]
) -> None:
    model, out = load_tiny("llama"), source / "adapter_config.json" / "out"
    with pytest.raises(ExchangeError, match=f"^{out} cannot be written: .*adapter_config"):
        import_folder(source, out, model, settings(tiny_model("llama")))
    artefact = import_folder(source, source / "ours", model, settings(tiny_model("llama")))
    with pytest.raises(ExchangeError, match=f"^{out} cannot be written: .*adapter_config"):
        export_folder(artefact, out, model)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(name: str, source: Path, importing: Importing) -> None:
    (source / name).unlink()
    with pytest.raises(ExchangeError, match=f"holds no {re.escape(name)}"):
        importing()


def test_nothing_is_overwritten(source: Path, importing: Importing) -> None:
    importing()
    with pytest.raises(ExchangeError, match="is there already"):
        importing()


def test_a_wrong_template_is_named(importing: Importing) -> None:
    with pytest.raises(ExchangeError, match=r"template holds \{prompt\} exactly once"):
        importing(template="no place for it")


def test_an_input_that_is_no_site_is_refused(
    tiny_model: Callable[[str], Path], load_tiny: Callable[[str], LanguageModel], tmp_path: Path
) -> None:
    config = IA3Config(target_modules=["up_proj"], feedforward_modules=["up_proj"])
    saved(tiny_model("llama"), tmp_path / "peft", config)
    with pytest.raises(FieldError, match=r"feedforward_modules: expected only mlp\.down_proj .*up_proj"):
        import_folder(tmp_path / "peft", tmp_path / "out", load_tiny("llama"), settings(tiny_model("llama")))


def test_a_prompt_encoder_is_refused_by_name(
    tiny_model: Callable[[str], Path], load_tiny: Callable[[str], LanguageModel], tmp_path: Path
) -> None:
    config = PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8)
    saved(tiny_model("llama"), tmp_path / "peft", config)
    with pytest.raises(FieldError, match=r"peft_type: .*found 'P_TUNING'"):
        import_folder(tmp_path / "peft", tmp_path / "out", load_tiny("llama"), settings(tiny_model("llama")))
