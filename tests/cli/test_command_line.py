"""What the command says: help, mistakes in one line, no traceback for what a person can mend."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from prad import __version__
from prad.lm import LanguageModel
from prad_cli.app import main
from tests import forked
from tests.conftest import random_artefact

ENVIRONMENT = os.environ | {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb", "HF_HUB_OFFLINE": "1"}


def prad(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    return forked.prad(*arguments, environment=ENVIRONMENT)


def one_line(text: str) -> str:
    """The only line of what was said; a traceback would be many."""
    (line,) = [line for line in text.splitlines() if line.strip()]
    return line


def imported_by(*arguments: str) -> tuple[set[str], str]:
    """Modules that a command imports until it ends well, and what it says."""
    started = (
        "import sys, prad_cli.app as c\ntry: c.main()\n"
        "except SystemExit as e: sys.exit(e.code or print(*sys.modules, file=sys.stderr))"
    )
    asked = [sys.executable, "-c", started, *arguments]
    ended = subprocess.run(asked, capture_output=True, encoding="utf-8", env=ENVIRONMENT, check=False)
    assert ended.returncode == 0, ended.stderr
    (modules,) = ended.stderr.splitlines()
    return set(modules.split()), ended.stdout


@pytest.mark.parametrize(
    ("command", "mentioned"),
    [
        ((), ["serve", "prefill", "decode", "registry", "adapter", "keys", "train", "eval"]),
        (("serve",), ["prad serve --adapters examples/adapters", "--port", "--registry-port", "--data-dir"]),
        (("serve",), ["--host", "asked for an API key", "--decode-metrics-port"]),
        (("serve",), ["--weights", "--prefill-weights", "int8", "--threads", "--nice", "PRAD_DECODE_*"]),
        (
            ("train",),
            ["prad train --task sentiment --data", "--eval-every", "--resume", "--seed", "--template"],
        ),
        (
            ("train",),
            ["docs/training.md", "paper-sst2", "-webnlg", "-xsum-ffn", "accelerate launch --multi_gpu"],
        ),
        (("decode",), ["PRAD_DECODE_", "--kv-cache-mib", "--block-size", "--max-sequences", "--port"]),
        (("registry",), ["PRAD_REGISTRY_", "--data-dir", "--port"]),
        (("eval",), ["prad eval --adapter", "--data", "--plain"]),
        (("model",), ["path"]),
        (("adapter",), ["push", "promote", "retire"]),
        (("keys",), ["create", "list", "revoke", "PRAD_TOKEN_FILE", "PRAD_API_KEY"]),
        (("keys", "create"), ["prad keys create alice --task", "--role", "--tokens-per-minute"]),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, tuple) else "",
)
def test_help(command: tuple[str, ...], mentioned: list[str]) -> None:
    ended = prad(*command, "--help")
    assert (ended.returncode, ended.stderr) == (0, "")
    for word in mentioned:
        assert word in ended.stdout


@pytest.mark.parametrize(
    "command",
    ["", "serve", "prefill", "decode", "registry", "train", "eval", "adapter push", "bench decode"],
)
def test_help_waits_for_no_torch(command: str) -> None:
    modules, said = imported_by(*command.split(), "--help")
    assert "torch" not in modules
    assert "Usage: prad" in said


@pytest.mark.parametrize("command", ["version", "serve --help", "prefill --help", "decode --help"])
def test_a_command_waits_for_no_others(command: str) -> None:
    others = {f"prad_cli.{name}" for name in ("adapter", "keys", "bench", "train", "chat", "doctor")}
    modules, _ = imported_by(*command.split())
    assert "prad_cli.app" in modules
    assert not modules & (others | {"adapter_registry.client"})


@pytest.mark.parametrize("command", ["version", "--version"])
def test_version(command: str) -> None:
    assert prad(command).stdout.strip() == __version__


@pytest.mark.parametrize("command", ["serve", "train", "eval", "prefill", "decode", "registry"])
def test_an_unknown_flag_of_a_command_is_named(command: str) -> None:
    ended = prad(command, "--no-such-flag", "3")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "No such option" in ended.stderr
    assert "--no-such-flag" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_wrong_values_are_one_line_each() -> None:
    ended = prad("registry", "--port", "many", "--max-upload-mib", "-1", "--log-level", "warn")
    assert ended.returncode == 2
    port, upload, level = ended.stderr.splitlines()
    assert level.startswith("error: --log-level: ")
    assert "'warning'" in level
    assert port.startswith("error: --port: ")
    assert "'many'" in port
    assert upload.startswith("error: --max-upload-mib: ")


def test_the_folder_of_a_model_is_told(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert prad("model", "path", str(tmp_path / "model")).stdout == f"{tmp_path / 'model'}\n"
    missing = prad("model", "path", "./nothing-here")
    assert missing.returncode == 1
    assert one_line(missing.stderr) == "error: no such file or folder: nothing-here"


def test_a_missing_model_is_one_line(tmp_path: Path) -> None:
    where = ["--port", "0", "--cache-dir", tmp_path]
    ended = prad("decode", *where, "--model", "no-such-org/no-such-model")
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith("error: 'no-such-org/no-such-model' is not a folder")
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    "command", ["decode --port 0", "prefill --port 0", "train --task t --data . --out out"]
)
def test_a_device_that_is_none_is_one_line(command: str, tmp_path: Path) -> None:
    """Said before a model is looked for."""
    where = ["--cache-dir", tmp_path, "--model", "/nowhere"]
    ended = prad(*command.split(), *where, "--device", "gpu")
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == "error: device: expected cpu, cuda or cuda:N, got 'gpu'"
    assert "Traceback" not in ended.stderr


def test_mistakes_of_train_and_eval_are_one_line(
    tiny_model: Callable[[str], Path], load_tiny: Callable[[str], LanguageModel], tmp_path: Path
) -> None:
    model = ["--model", str(tiny_model("llama")), "--dtype", "float32"]
    (tmp_path / "train.jsonl").write_text(
        json.dumps({"prompt": "t1", "completion": "t2"}) + "\n{}\n", encoding="utf-8"
    )
    (tmp_path / "validation.jsonl").write_text("", encoding="utf-8")
    ended = prad("train", "--task", "t", "--data", tmp_path, "--out", tmp_path / "out", *model)
    assert ended.returncode == 1
    assert one_line(ended.stderr).startswith(f"error: {tmp_path / 'train.jsonl'}:2: expected")

    artefact = random_artefact(tmp_path / "adapter", load_tiny("gpt2"), seed=1)
    ended = prad("eval", "--adapter", artefact.folder, "--data", tmp_path / "train.jsonl", *model)
    assert ended.returncode == 1
    assert "trained for architecture [gpt2" in one_line(ended.stderr)
    ended = prad(
        "eval", "--adapter", artefact.folder, "--data", tmp_path / "train.jsonl", "--model", "/nowhere"
    )
    assert (ended.returncode, one_line(ended.stderr)) == (1, "error: no such file or folder: /nowhere")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("config", "said"), [("{", "is not JSON"), ("[3]", "expects a JSON object")])
def test_a_methods_settings_that_are_none_are_named(config: str, said: str, tmp_path: Path) -> None:
    ended = prad("train", "--task", "a", "--data", tmp_path, "--out", tmp_path / "b", "--config", config)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert f"--config {said}" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    "wrong", [("--epochs", "0"), ("--epochs", "x"), ("--lr", "nan"), ("--lr", "-1"), ("--seed", "-1")]
)
def test_training_settings_that_make_no_sense(wrong: tuple[str, str], tmp_path: Path) -> None:
    ended = prad("train", "--task", "t", "--data", tmp_path, "--out", tmp_path / "out", *wrong)
    assert ended.returncode == 2
    assert wrong[0] in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(errno.ENOSPC, "full", "/data/x"),
            "error: /data/x: full; free some room there, or choose another",
        ),
        (
            PermissionError(errno.EACCES, "forbidden", "/x"),
            "error: /x: forbidden; let this user write there, or",
        ),
        (OSError(errno.EDQUOT, "quota"), "error: a file: quota; free some room there, or choose another"),
    ],
)
def test_a_disk_that_takes_nothing_is_one_line(
    error: OSError, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(**_: object) -> None:
        raise error

    monkeypatch.setattr("prad_cli.app.app", command)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert one_line(capsys.readouterr().err).startswith(said)


@pytest.mark.parametrize(
    "error", [BrokenPipeError(errno.EPIPE, "ours"), PermissionError(errno.EACCES, "a port")]
)
def test_a_fault_of_ours_is_told_whole(error: OSError, monkeypatch: pytest.MonkeyPatch) -> None:
    def command(**_: object) -> None:
        raise error

    monkeypatch.setattr("prad_cli.app.app", command)
    with pytest.raises(type(error)):
        main()


def test_a_role_that_nobody_gets_is_not_offered() -> None:
    ended = prad("keys", "create", "ci", "--role", "pusher")
    assert ended.returncode == 2
    said = " ".join(ended.stderr.replace("│", " ").split())
    assert "'complete', 'read', 'push', 'route', 'admin'." in said
