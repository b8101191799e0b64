"""A killed run goes on where it was, and two processes train what one trains."""

import os
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

from prad.artefact import WEIGHTS, read_artefact
from prad.lm import LanguageModel, Tokenizer
from prad.training.data import DataError
from prad.training.train import CHECKPOINTS, train
from tests.training.toy import answers_of_unequal_length, settings


def test_a_killed_run_goes_on_and_ends_as_the_uninterrupted_one(
    data: Path,
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed for good (SIGKILL), and resumed: bit for bit what a run without a kill gives."""
    whole, out = tmp_path / "whole", tmp_path / "killed"
    more: dict[str, Any] = {"max_steps": 48, "eval_every": 9, "accumulate": 2, "batch": 8, "patience": 200}
    model, tokenizer = load_tiny("llama"), Tokenizer(tiny_model("llama"))
    expected = train(model, tokenizer, "tiny", settings(data, whole, **more))

    command = [
        sys.executable,
        "-m",
        "prad_cli",
        "train",
        "--task",
        "toy",
        "--data",
        str(data),
        "--out",
        str(out),
    ]
    command += ["--model", str(tiny_model("llama")), "--dtype", "float32", "--r", "8", "--lr", "0.01"]
    command += ["--max-steps", "48", "--eval-every", "9", "--accumulate", "2", "--batch", "8"]
    command += ["--patience", "200", "--template", "{prompt}"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        while len(list(out.glob(f"{CHECKPOINTS}/checkpoint-*/trainer_state.json"))) < 2:
            assert process.poll() is None, (tmp_path / "log").read_text(encoding="utf-8")
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (out / WEIGHTS).exists(), "it was killed in mid-run"
    states = out.glob(f"{CHECKPOINTS}/*/trainer_state.json")
    complete = [int(p.parent.name.split("-")[1]) for p in states if p.read_bytes().endswith(b"\n}\n")]
    for number, state in ((117, "{"), (118, ""), (119, None)):  # killed while writing one
        unfinished = out / CHECKPOINTS / f"checkpoint-{number}"
        unfinished.mkdir()
        (unfinished / "model.safetensors").write_bytes(b"half")
        if state is not None:
            (unfinished / "trainer_state.json").write_text(state, encoding="utf-8")

    resumed: list[str] = []
    original = Trainer.train

    def noted(self: Trainer, resume_from_checkpoint: str | None = None) -> Any:
        resumed.append(Path(str(resume_from_checkpoint)).name)
        return original(self, resume_from_checkpoint=resume_from_checkpoint)

    monkeypatch.setattr(Trainer, "train", noted)
    record = train(model, tokenizer, "tiny", settings(data, out, resume=True, **more))
    assert resumed == [f"checkpoint-{max(complete)}"]
    assert record.training["steps"] == 48
    assert (out / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    for loss in ("train_loss", "validation_loss"):
        assert record.training[loss] == expected.training[loss]
    assert not (out / CHECKPOINTS).exists()
    read_artefact(out)


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
    lines = (uneven / "validation.jsonl").read_text(encoding="utf-8").splitlines()[:13]
    (uneven / "validation.jsonl").write_text("\n".join(lines), encoding="utf-8")
    shutil.copyfile(data / "train.jsonl", uneven / "train.jsonl")
    data = uneven
    model, tokenizer = load_tiny("llama"), Tokenizer(tiny_model("llama"))
    train(model, tokenizer, "tiny", settings(data, tmp_path / "one", batch=16, max_steps=12, eval_every=4))
    command = [sys.executable, "-m", *launcher, "-m", "prad_cli", "train", *rank]
    command += ["--task", "toy", "--data", str(data), "--out", str(tmp_path / "two"), "--batch", "8"]
    command += ["--model", str(tiny_model("llama")), "--dtype", "float32", "--lr", "0.01"]
    command += ["--max-steps", "12", "--eval-every", "4", "--template", "{prompt}"]
    ended = subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        encoding="utf-8",
    )
    assert ended.returncode == 0, ended.stderr
    outcomes = [read_artefact(tmp_path / name).record.training for name in ("one", "two")]
    assert [outcome["processes"] for outcome in outcomes] == [1, 2]
    assert outcomes[1]["validation_loss"] == pytest.approx(outcomes[0]["validation_loss"], abs=3e-3)
    assert "find_unused_parameters" not in ended.stderr
    one, two = (load_file(tmp_path / name / WEIGHTS) for name in ("one", "two"))
    for name, parameter in one.items():
        torch.testing.assert_close(two[name], parameter, rtol=1e-3, atol=1e-4)
