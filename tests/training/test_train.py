"""`train` on a toy task: it learns, the frozen weights stay, the same seed gives the same adapter, and a
killed run goes on where it was."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer
from typer.testing import CliRunner

from prad.adapters import METHODS, Adapter, AdapterError, find_method, load_adapter, new_adapter
from prad.artefact import FULL, WEIGHTS, AdapterRecord, BaseModelRef, read_artefact
from prad.cli.app import app
from prad.lm import LanguageModel, Tokenizer
from prad.training.data import DataError, collate, read_examples, tokenise
from prad.training.evaluate import evaluate
from prad.training.objective import AdapterTuning
from prad.training.presets import PRESETS, UnknownPresetError, preset_fields, with_own
from prad.training.progress import CURVE
from prad.training.settings import TrainSettings
from prad.training.train import CHECKPOINTS, train
from prad.training.trainer import CompletionTrainer

YES, NO = "t50", "t60"
DOCUMENT = Path(__file__).parents[2] / "docs" / "training.md"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whether a prompt of three words ends in t1 or t2."""
    folder = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    for name, count in (("train", 256), ("validation", 32), ("test", 64)):
        lines = []
        for first, second, last in torch.randint(0, 1000, (count, 3), generator=generator).tolist():
            words = f"t{3 + first % 30} t{3 + second % 30} t{1 + last % 2}"
            answer = YES if last % 2 else NO
            lines.append(json.dumps({"prompt": words, "completion": answer, "label": answer}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def settings(data: Path, out: Path, **more: Any) -> TrainSettings:
    defaults: dict[str, Any] = {
        "config": {"r": 8},
        "batch": 16,
        "learning_rate": 1e-2,
        "eval_every": 20,
        "template": "{prompt}",
    }
    return TrainSettings(data=data, out=out, **defaults | more)


def frozen_digest(model: LanguageModel) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.module.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def validation_loss(model: LanguageModel, tokenizer: Tokenizer, data: Path, adapter: Adapter | None) -> float:
    """`adapter` None: a fresh prad-pa, which is the plain model."""
    method = find_method("prad-pa")
    chosen = adapter or new_adapter(method, method.config_type(), model, seed=0)
    base = BaseModelRef(name="", architecture="", weights="")
    record = AdapterRecord(
        method="prad-pa", config={}, base=base, template="{prompt}", virtual_tokens=chosen.virtual_tokens
    )
    examples = read_examples(data / "validation.jsonl")
    batch = collate(tokenise(examples, tokenizer, record, context=512))
    with torch.no_grad():
        return float(AdapterTuning(model, chosen)(**batch)["loss"])


def test_it_learns_and_the_frozen_weights_stay(
    data: Path, tiny_model: Callable[[str], Path], load_tiny: Callable[[str], LanguageModel], tmp_path: Path
) -> None:
    model, tokenizer = load_tiny("llama"), Tokenizer(tiny_model("llama"))
    before = frozen_digest(model)
    fresh = validation_loss(model, tokenizer, data, adapter=None)
    record = train(
        model, tokenizer, "tiny", settings(data, tmp_path, max_steps=100, max_tokens=1, licence="MIT")
    )
    assert frozen_digest(model) == before
    assert not any(p.requires_grad for p in model.module.parameters())

    artefact = read_artefact(tmp_path)
    assert artefact.record == record
    assert (record.licence, record.training["steps"], record.training["examples"]) == ("MIT", 100, 256)
    assert record.base.weights == model.fingerprint.weights
    assert {p.name for p in tmp_path.iterdir()} == {"prad.json", WEIGHTS, CURVE}
    scores = {}
    for name, adapter in (("adapter", load_adapter(artefact, model)), ("plain", None)):
        result = evaluate(
            model, tokenizer, record, adapter, data / "test.jsonl", stop_ids=frozenset({tokenizer.eos_id})
        )
        assert len(result.answers) == result.examples == 64
        scores[name] = result.scores["accuracy"]
    assert scores["adapter"] > 95
    assert scores["plain"] < 60
    learnt = validation_loss(model, tokenizer, data, load_adapter(artefact, model))
    assert learnt == pytest.approx(record.training["validation_loss"], rel=1e-3, abs=1e-4)
    assert learnt < 0.7 * fresh, "what is left is the end of the answer, which the plain model decides"


def test_seeds(
    data: Path, tiny_model: Callable[[str], Path], load_tiny: Callable[[str], LanguageModel], tmp_path: Path
) -> None:
    model, tokenizer = load_tiny("gpt2"), Tokenizer(tiny_model("gpt2"))

    def weights(out: str, seed: int) -> str:
        train(model, tokenizer, "tiny", settings(data, tmp_path / out, max_steps=6, eval_every=3, seed=seed))
        return hashlib.sha256((tmp_path / out / WEIGHTS).read_bytes()).hexdigest()

    assert weights("one", 1) == weights("again", 1)
    assert weights("one more", 2) != weights("two", 1)


@pytest.mark.parametrize(("steps", "eval_every"), [(1, 1000), (3, 1000), (6, 4)])
def test_a_run_shorter_than_the_first_evaluation_is_saved(
    steps: int,
    eval_every: int,
    data: Path,
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path: Path,
) -> None:
    """One step or three, evaluated at the end; or six, the last two of them after the last evaluation."""
    model, tokenizer = load_tiny("llama"), Tokenizer(tiny_model("llama"))
    record = train(model, tokenizer, "tiny", settings(data, tmp_path, max_steps=steps, eval_every=eval_every))
    assert record.training["steps"] == steps
    method = find_method("prad-pa")
    fresh = new_adapter(method, method.config_type.model_validate({"r": 8}), model, 0)
    trained = load_adapter(read_artefact(tmp_path), model)
    assert not torch.equal(trained.parameters["ffn.up"], fresh.parameters["ffn.up"])


def test_the_checkpoint_with_the_least_validation_loss_is_kept(
    data: Path,
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, tokenizer = load_tiny("llama"), Tokenizer(tiny_model("llama"))
    losses: list[float] = []
    states: list[torch.Tensor] = []
    original = Trainer.evaluate

    def noted(self: Trainer, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = original(self, *args, **kwargs)
        metrics["eval_loss"] = [3.0, 1.0, 2.0, 4.0][len(losses)]  # the second is the best
        losses.append(metrics["eval_loss"])
        states.append(self.model.ffn_up.detach().clone())
        return metrics

    monkeypatch.setattr(Trainer, "evaluate", noted)
    record = train(model, tokenizer, "tiny", settings(data, tmp_path, max_steps=8, eval_every=2))
    kept = load_file(tmp_path / WEIGHTS)["layers.0.ffn.up"]
    assert len(states) == 4
    assert torch.equal(kept, states[1][0])
    assert record.training["validation_loss"] == 1.0


def test_a_killed_run_goes_on_and_ends_as_the_uninterrupted_one(
    data: Path,
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed for good (SIGKILL), and resumed: bit for bit what a run without a kill gives."""
    whole, out = tmp_path / "whole", tmp_path / "killed"
    more: dict[str, Any] = {"max_steps": 100, "eval_every": 9, "accumulate": 2, "batch": 8, "patience": 200}
    model, tokenizer = load_tiny("llama"), Tokenizer(tiny_model("llama"))
    expected = train(model, tokenizer, "tiny", settings(data, whole, **more))

    command = [sys.executable, "-m", "prad", "train", "--task", "toy", "--data", str(data), "--out", str(out)]
    command += ["--model", str(tiny_model("llama")), "--dtype", "float32", "--r", "8", "--lr", "0.01"]
    command += ["--max-steps", "100", "--eval-every", "9", "--accumulate", "2", "--batch", "8"]
    command += ["--patience", "200", "--template", "{prompt}"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        while len(list(out.glob(f"{CHECKPOINTS}/checkpoint-*/trainer_state.json"))) < 2:
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (out / WEIGHTS).exists(), "it was killed in mid-run"
    complete = [int(p.parent.name.split("-")[1]) for p in out.glob(f"{CHECKPOINTS}/*/trainer_state.json")]
    (out / CHECKPOINTS / "checkpoint-119").mkdir()  # killed while writing one
    (out / CHECKPOINTS / "checkpoint-119" / "model.safetensors").write_bytes(b"half")

    resumed: list[str] = []
    original = Trainer.train

    def noted(self: Trainer, resume_from_checkpoint: str | None = None) -> Any:
        resumed.append(Path(str(resume_from_checkpoint)).name)
        return original(self, resume_from_checkpoint=resume_from_checkpoint)

    monkeypatch.setattr(Trainer, "train", noted)
    record = train(model, tokenizer, "tiny", settings(data, out, resume=True, **more))
    assert resumed == [f"checkpoint-{max(complete)}"]
    assert record.training["steps"] == 100
    assert (out / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    for loss in ("train_loss", "validation_loss"):
        assert record.training[loss] == expected.training[loss]
    assert not (out / CHECKPOINTS).exists()
    read_artefact(out)


def test_accumulated_batches_make_the_step_of_one_large_batch(
    data: Path, tiny_model: Callable[[str], Path], load_tiny: Callable[[str], LanguageModel], tmp_path: Path
) -> None:
    """Labels are counted over the whole step: examples of unequal length weigh what they weigh together."""
    model, tokenizer = load_tiny("llama"), Tokenizer(tiny_model("llama"))
    uneven = answers_of_unequal_length(tmp_path / "data")
    weights = []
    for batch, accumulate in ((12, 1), (3, 4)):
        out = tmp_path / f"{batch}"
        train(
            model, tokenizer, "tiny", settings(uneven, out, batch=batch, accumulate=accumulate, max_steps=8)
        )
        weights.append(load_file(out / WEIGHTS))
    for name, whole in weights[0].items():
        torch.testing.assert_close(weights[1][name], whole, rtol=1e-3, atol=1e-4)


def answers_of_unequal_length(folder: Path) -> Path:
    folder.mkdir()
    lines = [
        json.dumps({"prompt": f"t{i} t{i + 1}", "completion": " ".join(["t5"] * (1 + i % 7))})
        for i in range(48)
    ]
    for name in ("train", "validation"):
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize("batch", [1, 5, 48])
def test_the_validation_loss_is_that_of_all_tokens_whatever_the_batches(
    batch: int, tiny_model: Callable[[str], Path], load_tiny: Callable[[str], LanguageModel], tmp_path: Path
) -> None:
    model, tokenizer = load_tiny("llama"), Tokenizer(tiny_model("llama"))
    uneven = answers_of_unequal_length(tmp_path / "data")
    out = tmp_path / "out"
    record = train(model, tokenizer, "tiny", settings(uneven, out, batch=batch, max_steps=2))
    expected = validation_loss(model, tokenizer, uneven, load_adapter(read_artefact(out), model))
    assert record.training["validation_loss"] == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_the_learning_rate_rises_and_falls_by_equal_steps(
    data: Path,
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every step has some: none is without effect."""
    model, tokenizer = load_tiny("llama"), Tokenizer(tiny_model("llama"))
    rates: list[float] = []
    original = CompletionTrainer.training_step

    def noted(self: CompletionTrainer, *args: Any, **kwargs: Any) -> Any:
        rates.append(self.lr_scheduler.get_last_lr()[0])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(CompletionTrainer, "training_step", noted)
    train(
        model,
        tokenizer,
        "tiny",
        settings(data, tmp_path, max_steps=8, learning_rate=1.0, warmup_ratio=0.4, eval_every=100),
    )
    assert rates == pytest.approx([1 / 5, 2 / 5, 3 / 5, 4 / 5, 1, 3 / 4, 1 / 2, 1 / 4])


def test_training_stops_when_the_validation_loss_no_longer_falls(
    data: Path,
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, tokenizer = load_tiny("llama"), Tokenizer(tiny_model("llama"))
    losses = iter([3.0, 2.0, 2.5, 1.0, 1.1, 1.2, 1.3, 0.1])
    original = CompletionTrainer.evaluation_loop

    def noted(self: CompletionTrainer, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        output.metrics["eval_loss"] = next(losses)
        return output

    monkeypatch.setattr(CompletionTrainer, "evaluation_loop", noted)
    record = train(model, tokenizer, "tiny", settings(data, tmp_path, max_steps=40, eval_every=2, patience=3))
    assert record.training["steps"] == 14, "three evaluations after the best, which is the fourth"
    assert record.training["validation_loss"] == 1.0


def test_only_so_many_examples(
    data: Path, tiny_model: Callable[[str], Path], load_tiny: Callable[[str], LanguageModel], tmp_path: Path
) -> None:
    model, tokenizer = load_tiny("llama"), Tokenizer(tiny_model("llama"))
    record = train(model, tokenizer, "tiny", settings(data, tmp_path, examples=40, batch=16))
    assert (record.training["examples"], record.training["steps"]) == (40, 3)
    assert record.training["tokens_per_second"] > 0


def test_every_preset_is_one_of_its_methods(tmp_path: Path) -> None:
    for name, preset in PRESETS.items():
        for method in preset.methods or METHODS:
            fields = preset_fields(name, method)
            if method == FULL:
                assert not fields["config"]
            else:
                find_method(method).configure(fields.get("config", {}))
            TrainSettings(tmp_path, tmp_path, method=method, **fields)
    lora = find_method("prad-lora").configure(preset_fields("paper-e2e", "prad-lora")["config"])
    assert (lora.r, lora.factor) == (56, 4.0)
    config = preset_fields("paper-e2e", "prad-lora")["config"]
    assert with_own(config, {"r": 8}) == {"r": 8, "alpha": 32.0}
    assert with_own(config, {"alpha": 1.0}) == {"r": 56, "alpha": 1.0}
    assert preset_fields("paper-mt", "prad-lora")["max_steps"] == 120_000, "a method's own wins"
    assert preset_fields("paper-mt", "prad-pa")["max_steps"] == 60_000
    with pytest.raises(UnknownPresetError, match="unknown preset 'x'; known: quick, paper-sst2"):
        preset_fields("x", "prad-pa")
    with pytest.raises(
        UnknownPresetError, match=r"'paper-mnli' is for prad-pa, prad-sa, .* not for prad-ia3"
    ):
        preset_fields("paper-mnli", "prad-ia3")


def test_epochs_win_over_a_presets_steps(
    data: Path, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = ["train", "--task", "toy", "--data", str(data), "--out", str(out), "--preset", "paper-e2e"]
    command += ["--model", str(tiny_model("llama")), "--dtype", "float32", "--examples", "40"]
    ended = CliRunner().invoke(app, [*command, "--epochs", "1"])
    assert ended.exit_code == 0, ended.output
    assert read_artefact(out).record.training["steps"] == 2, "not 60,000"


def test_the_documentation_has_every_methods_settings() -> None:
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| `(\{.*\})` \| .+ \|$", DOCUMENT.read_text(), re.MULTILINE)
    documented = [(method, json.loads(config)) for method, config in rows]
    assert dict(documented) == {name: m.config_type().model_dump(mode="json") for name, m in METHODS.items()}
    assert len(documented) == len(METHODS)


@pytest.mark.long
@pytest.mark.parametrize(
    ("launcher", "rank"),
    [
        # it takes --r for one of its own
        (["torch.distributed.run", "--nproc-per-node", "2"], ["--config", '{"r": 8}']),
        (
            # --multi_gpu on a CPU, too: with --cpu it starts one process, whatever --num_processes is
            ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port=0"],
            ["--r", "8"],
        ),
    ],
    ids=["torchrun", "accelerate"],
)
def test_two_processes_train_what_one_trains(
    launcher: list[str],
    rank: list[str],
    data: Path,
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path: Path,
) -> None:
    """The same command under a launcher, on the CPU: each process takes half of every step's batch. What
    fills up the last batch of validation examples counts for nothing."""
    uneven = answers_of_unequal_length(tmp_path / "data")
    lines = (uneven / "validation.jsonl").read_text().splitlines()[:13]
    (uneven / "validation.jsonl").write_text("\n".join(lines))
    shutil.copyfile(data / "train.jsonl", uneven / "train.jsonl")
    data = uneven
    model, tokenizer = load_tiny("llama"), Tokenizer(tiny_model("llama"))
    train(model, tokenizer, "tiny", settings(data, tmp_path / "one", batch=16, max_steps=12, eval_every=4))
    command = [sys.executable, "-m", *launcher, "-m", "prad", "train", *rank]
    command += ["--task", "toy", "--data", str(data), "--out", str(tmp_path / "two"), "--batch", "8"]
    command += ["--model", str(tiny_model("llama")), "--dtype", "float32", "--lr", "0.01"]
    command += ["--max-steps", "12", "--eval-every", "4", "--template", "{prompt}"]
    ended = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200
    )
    assert ended.returncode == 0, ended.stderr
    outcomes = [read_artefact(tmp_path / name).record.training for name in ("one", "two")]
    assert [outcome["processes"] for outcome in outcomes] == [1, 2]
    assert outcomes[1]["validation_loss"] == pytest.approx(outcomes[0]["validation_loss"], abs=3e-3)
    assert "find_unused_parameters" not in ended.stderr
    one, two = (load_file(tmp_path / name / WEIGHTS) for name in ("one", "two"))
    for name, parameter in one.items():
        torch.testing.assert_close(two[name], parameter, rtol=1e-3, atol=1e-4)


def test_a_resumed_run_ends_as_the_uninterrupted_one(
    data: Path,
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, tokenizer = load_tiny("llama"), Tokenizer(tiny_model("llama"))
    train(model, tokenizer, "tiny", settings(data, tmp_path / "whole", max_steps=24, eval_every=6))

    original = Trainer.evaluate

    def interrupted(self: Trainer, *args: Any, **kwargs: Any) -> dict[str, float]:
        if self.state.global_step == 18:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    out = tmp_path / "twice"
    monkeypatch.setattr(Trainer, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(model, tokenizer, "tiny", settings(data, out, max_steps=24, eval_every=6))
    with pytest.raises(DataError, match=f"{out / CHECKPOINTS} holds checkpoints .* --resume"):
        train(model, tokenizer, "tiny", settings(data, out, max_steps=24, eval_every=6))
    monkeypatch.setattr(Trainer, "evaluate", original)
    train(model, tokenizer, "tiny", settings(data, out, max_steps=24, eval_every=6, resume=True))
    assert (out / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_trains_and_loads(
    method: str,
    data: Path,
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path: Path,
) -> None:
    model, tokenizer = load_tiny("gpt2"), Tokenizer(tiny_model("gpt2"))
    record = train(model, tokenizer, "tiny", settings(data, tmp_path, method=method, config={}, max_steps=20))
    artefact = read_artefact(tmp_path)
    assert artefact.record == record
    assert load_adapter(artefact, model).method.name == method
    found = find_method(method)
    fresh = validation_loss(model, tokenizer, data, new_adapter(found, found.configure({}), model, seed=0))
    assert record.training["validation_loss"] < fresh, "it has learnt something"


def test_nothing_is_written_over_and_no_broken_adapter_is_kept(
    data: Path, tiny_model: Callable[[str], Path], load_tiny: Callable[[str], LanguageModel], tmp_path: Path
) -> None:
    model, tokenizer = load_tiny("llama"), Tokenizer(tiny_model("llama"))
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file is no folder that can be written to"):
        train(model, tokenizer, "tiny", settings(data, tmp_path / "file" / "out", max_steps=1))
    with pytest.raises(DataError, match="/proc/none/out cannot be made"):
        train(model, tokenizer, "tiny", settings(data, Path("/proc/none/out"), max_steps=1))
    bad = settings(data, tmp_path / "bad", max_steps=40, learning_rate=1e38)
    with pytest.raises(DataError, match=r"the training loss is nan at step 20: try a lower learning rate$"):
        train(model, tokenizer, "tiny", bad)
    assert not (tmp_path / "bad" / WEIGHTS).exists()
    train(model, tokenizer, "tiny", settings(data, tmp_path / "bad", max_steps=1))
    later = settings(data, tmp_path / "later", max_steps=40, eval_every=2, learning_rate=1e38)
    with pytest.raises(DataError, match=r"nan at step 4: .*the best checkpoint before is .*checkpoint-2\)"):
        train(model, tokenizer, "tiny", later)
    train(model, tokenizer, "tiny", settings(data, tmp_path / "kept", max_steps=1))
    before = (tmp_path / "kept" / WEIGHTS).read_bytes()
    with pytest.raises(DataError, match="holds an adapter already"):
        train(model, tokenizer, "tiny", settings(data, tmp_path / "kept", max_steps=1))
    assert (tmp_path / "kept" / WEIGHTS).read_bytes() == before


def test_what_is_cut_is_said_and_an_end_token_that_is_nowhere_is_refused(
    data: Path,
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, tokenizer = load_tiny("llama"), Tokenizer(tiny_model("llama"))
    train(model, tokenizer, "tiny", settings(data, tmp_path / "whole", max_steps=1, examples=20))
    assert "longer" not in capsys.readouterr().err
    train(model, tokenizer, "tiny", settings(data, tmp_path / "cut", max_steps=1, examples=20, max_prompt=1))
    assert "train.jsonl: 20 of 20 examples are longer" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(DataError, match=r"train\.jsonl: no completion ends with the end token '<end>'"):
        train(model, tokenizer, "tiny", settings(data, tmp_path / "end", max_steps=1, end_token="<end>"))
    with pytest.raises(ValueError, match=r"warmup_ratio: .*, got 1\.5"):
        settings(data, tmp_path / "x", warmup_ratio=1.5)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_settings_that_are_not_finite_are_refused(method: str) -> None:
    for name, field in find_method(method).config_type.model_fields.items():
        if field.annotation is float:
            for value in (float("nan"), float("inf")):
                with pytest.raises(AdapterError, match=f"{name}: Input should be a finite number"):
                    find_method(method).configure({name: value})
