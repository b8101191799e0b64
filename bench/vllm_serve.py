"""vLLM's own benchmark of servers, `vllm bench serve`, asks ours and vLLM's: random prompts, all at once,
streamed, greedy, end token ignored.

Ours: the plain model, one task, and as many tasks (PrAd-LoRA) as requests, which it knows as LoRA modules.
vLLM's server: of the same folder, in bf16 (in float32 on a CPU that does not multiply it: `vllm_dtype`), on
all cores, paused while ours is asked; with --vllm-lora another one, with as many LoRAs (r on q and v). All
are alive at once and asked in turn, for new prompts at each turn, by a program that --vllm-python runs: it
says what is written here, and computes on the same cores. Our decode service makes no drafts, for the
reason that `peers` gives.
"""

import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.adapters import write_peft_lora
from bench.flags import VllmServe
from bench.kinds import named_dtypes
from bench.model import load, model_folder
from bench.peer import WORKERS, PeerError, PeerProgram, last_lines, others_environment, require_interpreter
from bench.rounds import interleaved, ratio
from bench.serving import served
from local_stack.stack import answers, free_ports
from prad.lm import LanguageModel

_COMMAND = str(WORKERS / "vllm_command.py")
_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}
_SERVER = {
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",  # it leaves one to its scheduler by itself
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; its default takes half of the machine
}
_START_S = 1200.0  # the first start compiles
_PATIENCE_S = 60.0  # what takes longer is asked once, and once to warm up: `rounds_s` shows it
_SPARE = 64  # tokens: a prompt may be more of them than it was made of
_THEIRS = "vLLM, no adapters"
_RATE = "output_throughput"

Report = Mapping[str, Any]
"""What the program says about one run, by its own names."""


@dataclass(frozen=True, slots=True)
class _Server:
    """One to be asked. `names`: of the models, in turn; without any the first one that it lists."""

    url: str
    names: Sequence[str] = ()
    program: PeerProgram | None = None
    """Paused while others are asked."""


def run(arguments: VllmServe) -> dict[str, Any]:
    require_interpreter(arguments.vllm_python)
    model = load(arguments)
    with tempfile.TemporaryDirectory() as name, ExitStack() as started:
        asking = _Asking(arguments, Path(name))
        versions = asking.versions()
        servers = _servers(arguments, model, Path(name), started)
        reports: dict[str, list[Report]] = {each: [] for each in servers}

        def variant(name: str) -> Callable[[], float]:
            def measure() -> float:
                reports[name].append(asking.report(servers[name]))
                return float(reports[name][-1]["duration"])

            return measure

        variants = {each: variant(each) for each in servers}
        interleaved(variants, arguments.rounds, "rounds", patience_s=_PATIENCE_S)
    return {
        "model": arguments.model,
        "vllm_dtype": _dtype(arguments),
        "peers": {"vLLM": versions},
        "rows": rows({each: found[1:] for each, found in reports.items()}),  # the first one warms up
    }


def _servers(
    arguments: VllmServe, model: LanguageModel, root: Path, started: ExitStack
) -> dict[str, _Server]:
    """All of them, ready; vLLM's, which compile as they start, before ours, and paused."""
    number = arguments.requests
    loras: dict[str, Mapping[str, str]] = {_THEIRS: {}}
    if arguments.vllm_lora:
        loras[f"vLLM, {number} LoRAs"] = write_peft_lora(root / "lora", model, number, arguments.r)
    theirs = {}
    for name, adapters in loras.items():
        server = started.enter_context(_Vllm(arguments, root / f"vllm-{len(adapters)}.log", adapters))
        with Console(stderr=True).status(f"starting {name}"):
            theirs[name] = server.wait_ready()
    no_drafts = ("--speculate", "0")
    ours = started.enter_context(served(arguments, model, {"prad-lora": number}, decode=no_drafts))
    tasks = ours.tasks["prad-lora"]
    return {
        "PrAd server, no adapters": _Server(ours.url),
        "PrAd server, one task, PrAd-LoRA": _Server(ours.url, tasks[:1]),
        f"PrAd server, {number} tasks, PrAd-LoRA": _Server(ours.url, tasks),
        **theirs,
    }


def _dtype(told: VllmServe) -> str:
    return list(named_dtypes(told.requests))[-1]


class _Vllm(PeerProgram):
    """`vllm serve` of the model's folder. `loras`: adapters' names and folders."""

    def __init__(self, told: VllmServe, log: Path, loras: Mapping[str, str]) -> None:
        (port,) = free_ports(1)
        self._url = f"http://127.0.0.1:{port}"
        self._names = tuple(loras)
        command = [str(told.vllm_python), _COMMAND, "serve", str(model_folder(told))]
        command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", _dtype(told)]
        command += ["--max-model-len", str(max(256, told.prompt + told.output + _SPARE))]
        command += ["--max-num-seqs", str(told.requests), "--max-num-batched-tokens", "4096"]
        command += ["--no-enable-prefix-caching", "--disable-log-stats", "--disable-uvicorn-access-log"]
        if loras:
            command += ["--enable-lora", "--max-loras", str(len(loras)), "--max-lora-rank", str(told.r)]
            command += ["--lora-modules", *(f"{name}={folder}" for name, folder in loras.items())]
        super().__init__("vllm serve", command, log, environment=_ENVIRONMENT | _SERVER)

    def wait_ready(self) -> _Server:
        """Raises PeerError if it ends, or is not ready for very long."""
        deadline = time.monotonic() + _START_S
        while not answers(f"{self._url}/health"):
            if self.process.poll() is not None:
                raise self.ended()
            if time.monotonic() > deadline:
                raise PeerError(f"vllm serve was not ready within {_START_S:g} s")
            time.sleep(0.5)
        self.pause()
        return _Server(self._url, self._names, self)


class _Asking:
    """`vllm bench serve`, a process each time; `folder` holds what it says."""

    def __init__(self, told: VllmServe, folder: Path) -> None:
        self._told = told
        self._tokenizer = str(model_folder(told))
        self._folder = folder
        self._seeds = count()  # new prompts each time: no prefix cache knows them

    def versions(self) -> dict[str, str]:
        found: dict[str, str] = json.loads(self._run("--versions"))
        return found

    def report(self, server: _Server) -> Report:
        """Raises PeerError unless every request was answered, at the asked length."""
        told = self._told
        flags = ["--backend", "openai", "--endpoint", "/v1/completions", "--base-url", server.url]
        flags += ["--tokenizer", self._tokenizer, "--dataset-name", "random", "--ignore-eos"]
        flags += ["--random-input-len", str(told.prompt), "--random-output-len", str(told.output)]
        flags += ["--num-prompts", str(told.requests), "--seed", str(next(self._seeds))]
        flags += ["--temperature", "0", "--disable-tqdm", "--save-result", "--result-dir", str(self._folder)]
        if len(server.names) == 1:
            flags += ["--model", server.names[0]]
        elif server.names:
            flags += ["--lora-assignment", "round-robin", "--lora-modules", *server.names]
        file = self._folder / "report.json"
        file.unlink(missing_ok=True)
        with nullcontext() if server.program is None else server.program.awake():
            said = self._run("bench", "serve", "--result-filename", file.name, *flags)
        report: Report = json.loads(file.read_text(encoding="utf-8"))
        wanted = (told.requests, told.requests * told.output)
        if (report["completed"], report["total_output_tokens"]) != wanted:
            raise PeerError(f"vllm bench serve was not answered as asked:\n{said}")
        return report

    def _run(self, *flags: str) -> str:
        """What it says. Raises PeerError with the end of its log if it fails."""
        log = self._folder / "asking.log"
        with log.open("wb") as errors:
            ended = subprocess.run(
                [str(self._told.vllm_python), _COMMAND, *flags],
                env=others_environment() | _ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                encoding="utf-8",
                check=False,
            )
        if ended.returncode:
            raise PeerError(f"vllm {' '.join(flags[:2])} failed:\n{last_lines(log)}")
        return ended.stdout


def rows(reports: Mapping[str, Sequence[Report]]) -> list[dict[str, Any]]:
    """A row for each server, of medians; `times_vllm`: its tokens/s, by rounds."""

    def all_of(name: str, figure: str) -> list[float]:
        return [float(report[figure]) for report in reports[name]]

    def median(name: str, figure: str, digits: int = 1) -> float:
        return round(statistics.median(all_of(name, figure)), digits)

    return [
        {
            "name": name,
            "tokens_per_s": median(name, _RATE),
            "times_vllm": round(ratio(all_of(name, _RATE), all_of(_THEIRS, _RATE)), 2),
            "total_s": median(name, "duration", 3),
            "ttft_ms": {part: median(name, f"{part}_ttft_ms") for part in ("mean", "median", "p99")},
            "tpot_ms": {part: median(name, f"{part}_tpot_ms") for part in ("mean", "median", "p99")},
            "itl_ms": {part: median(name, f"{part}_itl_ms") for part in ("mean", "median", "p99")},
            "input_tokens": statistics.median(all_of(name, "total_input_tokens")),
            "rounds_s": [round(s, 3) for s in all_of(name, "duration")],
            "rounds_tokens_per_s": [round(s, 1) for s in all_of(name, _RATE)],
        }
        for name in reports
    ]


def plot(result: dict[str, Any], figure: Any) -> None:
    rows = result["rows"][::-1]
    names = [row["name"] for row in rows]
    at, first, between = figure.subplots(1, 3, sharey=True)
    bars = at.barh(names, [row["tokens_per_s"] for row in rows])
    at.bar_label(bars, [f"{row['tokens_per_s']:.0f}" for row in rows], padding=3)
    at.set(xlabel="tokens/s")
    at.margins(x=0.25)
    for axes, kind, label in (
        (first, "ttft_ms", "to the first token, ms"),
        (between, "itl_ms", "between, ms"),
    ):
        for part, marker in (("mean", "o"), ("p99", "D")):
            axes.plot([row[kind][part] for row in rows], names, marker, label=part)
        axes.set(xlabel=label, xlim=(0, 1.1 * max(row[kind]["p99"] for row in rows)))
    figure.legend(*between.get_legend_handles_labels(), loc="outside lower right", ncols=2)
