"""The all-position baselines and full fine-tuning: trained and evaluated by their own formula, not served."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from typer.testing import CliRunner

from adapter_registry.errors import AdapterRefusedError
from adapter_registry.staging import check
from prad.adapters import AdapterError, find_method, load_adapter, new_adapter, placeholders
from prad.artefact import AdapterRecord, NotServableError, read_artefact, read_record, read_servable
from prad.core.search import Limits
from prad.lm import LanguageModel, Tokenizer
from prad.training.data import TokenisedExample, collate, read_examples, tokenise
from prad.training.decoding import AdaptedModel
from prad.training.evaluate import decoder, evaluate
from prad.training.objective import AdapterTuning, FullTuning
from prad.training.settings import TrainSettings
from prad.training.train import train
from prad_cli.app import app
from tests.conftest import EOS, random_artefact
from tests.oracle.reference import Reference

EXAMPLES = [
    TokenisedExample((5, 6, 7), (8, 9, 3, 119)),
    TokenisedExample(tuple(range(20, 60)), (1, 2, 3, 4, 5, 119)),
]
METHODS = ["prad-pa", "prad-sa", "prad-lora", "prad-dora", "prad-mam"]


def logits_of_all(
    reference: Reference, prompt: Sequence[int], output: Sequence[int], folder: Path
) -> torch.Tensor:
    """Of a model whose adapter acts on every position: each token's past is all prompt."""
    rows = [reference.logits([*prompt, *output[:i]], output[i : i + 1], folder) for i in range(len(output))]
    return torch.cat(rows)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_loss_is_that_of_an_adapter_on_all_positions(
    method: str,
    family: str,
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path: Path,
) -> None:
    model, reference = load_tiny(family), Reference(tiny_model(family))
    artefact = random_artefact(tmp_path / "a", model, seed=3, method=method, config={}, positions="all")
    labels = torch.tensor([i for e in EXAMPLES for i in e.completion])

    def of(logits: Callable[..., torch.Tensor]) -> float:
        every = [logits(e.prompt, e.completion, artefact.folder) for e in EXAMPLES]
        return float(cross_entropy(torch.cat(every).double(), labels))

    expected = of(lambda *args: logits_of_all(reference, *args))
    prompt_only = of(reference.logits)
    assert abs(expected - prompt_only) > 1e-4 * expected, "the positions make a difference"
    stored = load_file(artefact.weights)
    fresh = new_adapter(find_method(method), find_method(method).configure({}), model, seed=0)
    parameters = {
        name: torch.stack([stored[f"layers.{i}.{name}"] for i in range(model.num_layers)])
        for name in fresh.parameters
    }
    module = AdapterTuning(model, replace(fresh, parameters=parameters), "all")
    virtual = placeholders(fresh.virtual_tokens)
    loss = module(**collate([replace(e, prompt=virtual + e.prompt) for e in EXAMPLES]))["loss"].detach()
    assert float(loss) == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_greedy_answers_are_those_of_an_adapter_on_all_positions(
    method: str,
    family: str,
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path: Path,
) -> None:
    model, reference = load_tiny(family), Reference(tiny_model(family))
    artefact = random_artefact(tmp_path / "a", model, seed=3, method=method, config={}, positions="all")
    adapter = load_adapter(artefact, model, allow_all_positions=True)
    prompts = [list(e.prompt) for e in EXAMPLES]
    decoding = decoder(AdaptedModel(model, adapter, "all"), Limits(12, frozenset({EOS})))
    differs = []
    virtual = placeholders(adapter.virtual_tokens)
    for index, search in decoding.run([[*virtual, *prompt] for prompt in prompts]):
        answer = search.answer
        rows = logits_of_all(reference, prompts[index], [*answer, EOS], artefact.folder)[: len(answer)]
        chosen = rows.gather(1, torch.tensor(answer)[:, None])[:, 0]
        assert bool((rows.max(dim=1).values - chosen < 1e-3).all())
        other = reference.logits(prompts[index], [*answer, EOS], artefact.folder)[: len(answer)]
        differs.append(not torch.allclose(rows[1:], other[1:], atol=1e-2))
    assert any(differs), "prompt-only would say something else"


def test_what_acts_on_all_positions_is_refused_by_name(
    load_tiny: Callable[[str], LanguageModel], tmp_path: Path
) -> None:
    model = load_tiny("llama")
    artefact = random_artefact(tmp_path / "a", model, seed=3, positions="all")
    reason = "prad-pa was trained on all positions.*evaluated but not served"
    with pytest.raises(NotServableError, match=reason):
        load_adapter(artefact, model)
    with pytest.raises(NotServableError, match=reason):
        read_servable(artefact.folder)
    with pytest.raises(AdapterRefusedError, match=reason):
        check(artefact.folder)
    pushed = CliRunner().invoke(app, ["adapter", "push", str(artefact.folder), "--task", "x"])
    assert pushed.exit_code == 1
    assert "evaluated but not served" in pushed.stderr


def data_folder(root: Path) -> Path:
    """Always t5 after a prompt."""
    root.mkdir()
    for name in ("train", "validation", "test"):
        lines = [
            json.dumps({"prompt": f"t{i} t{i + 1}", "completion": "t5", "label": "t5"}) for i in range(24)
        ]
        (root / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def test_full_fine_tuning_is_a_model_folder_and_no_adapter(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, data, out = tiny_model("llama"), data_folder(tmp_path / "data"), tmp_path / "out"
    model, tokenizer = LanguageModel.load(folder, dtype=torch.float32), Tokenizer(folder)
    settings = TrainSettings(
        data, out, method="full", dtype="float32", learning_rate=3e-3, max_steps=40, template="{prompt}"
    )
    record = train(model, tokenizer, "tiny", settings)
    assert (record.method, record.positions, record.config) == ("full", "all", {})
    assert record.training["parameters"] == sum(p.numel() for p in model.module.parameters())
    assert read_record(out) == record
    for read in (read_artefact, read_servable):
        with pytest.raises(NotServableError, match="a fully fine-tuned model is no adapter"):
            read(out)
    fresh = validation_loss(LanguageModel.load(folder, dtype=torch.float32), tokenizer, record, data)
    assert record.training["validation_loss"] < 0.7 * fresh
    trained, again = LanguageModel.load(out, dtype=torch.float32), Tokenizer(out)
    kept = validation_loss(trained, again, record, data)
    assert kept == pytest.approx(record.training["validation_loss"], rel=1e-3)
    assert trained.fingerprint.weights != record.base.weights

    what = ["eval", "--adapter", str(out), "--data", str(data / "test.jsonl"), "--model", str(folder)]
    shown = CliRunner().invoke(app, [*what, "--dtype", "float32", "--show", "1", "--plain"])
    tuned, tuned_answer, plain, plain_answer = shown.stdout.splitlines()
    assert tuned.startswith("fine-tuned model: accuracy")
    assert plain.startswith("plain model: accuracy")
    assert tuned_answer != plain_answer


def validation_loss(model: LanguageModel, tokenizer: Tokenizer, record: AdapterRecord, data: Path) -> float:
    """Of the model itself."""
    examples = read_examples(data / "validation.jsonl")
    batch = collate(tokenise(examples, tokenizer, record, context=512))
    with torch.no_grad():
        return float(FullTuning(model, torch.float32)(**batch)["loss"])


def test_full_fine_tuning_takes_no_settings(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tiny_model("llama")
    model = LanguageModel.load(folder, dtype=torch.float32)
    settings = TrainSettings(data_folder(tmp_path / "d"), tmp_path / "o", method="full", config={"r": 3})
    with pytest.raises(AdapterError, match="full fine-tuning has no settings, got r"):
        train(model, Tokenizer(folder), "tiny", settings)


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("prad-para", "is made from the prompt"),
        ("prad-prefix", "puts tokens in front of the prompt and acts nowhere else"),
        ("prad-prompt", "puts tokens in front of the prompt and acts nowhere else"),
    ],
)
def test_what_has_no_form_for_all_positions_is_refused(
    method: str,
    reason: str,
    load_tiny: Callable[[str], LanguageModel],
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    settings = TrainSettings(
        data_folder(tmp_path / "d"), tmp_path / "o", method=method, positions="all", template="{prompt}"
    )
    with pytest.raises(AdapterError, match=f"{method} {reason}: it has no form for all positions"):
        train(load_tiny("llama"), Tokenizer(tiny_model("llama")), "tiny", settings)


def test_a_baseline_artefact_is_evaluated_as_it_was_trained(
    load_tiny: Callable[[str], LanguageModel], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model, tokenizer = load_tiny("llama"), Tokenizer(tiny_model("llama"))
    data = data_folder(tmp_path / "data")
    settings = TrainSettings(
        data, tmp_path / "out", positions="all", learning_rate=1e-2, max_steps=60, template="{prompt}"
    )
    record = train(model, tokenizer, "tiny", settings)
    assert record.positions == "all"
    adapter = load_adapter(read_artefact(tmp_path / "out"), model, allow_all_positions=True)
    answers = {}
    for positions in ("all", "prompt"):
        result = evaluate(
            model,
            tokenizer,
            record.model_copy(update={"positions": positions}),
            adapter,
            data / "test.jsonl",
            stop_ids=frozenset({tokenizer.eos_id}),
        )
        answers[positions] = result.answers
    assert answers["all"] != answers["prompt"], "the record decides, not the caller"
