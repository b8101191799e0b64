"""A push from a trainer's memory until it answers everywhere: where its time goes, on an idle stack.

A trainer's tensors become a version of a task in one request, answered when all prefill services are ready
for it (`wait=ready`). The parts are

serialise     tensors to the bytes of a safetensors file, at the trainer
receive       the request's body, at the registry
check         form, names, bounds, digest, signatures
store         files flushed to disk and put in their place, the version entered
announce      all prefill services hear of it, and that it is verified: what is left of the wait
fetch         its files come to a prefill service
probe         the adapter is loaded onto the model and run there; of both, the slower service counts

and then, of no part of it, the first answer: the adapter comes into memory, one token is drawn.
"""

import re
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from safetensors.torch import load_file

from adapter_registry.tensor_files import files_of
from bench.adapters import write_artefacts
from bench.flags import Push
from bench.model import load, model_flags
from local_stack.stack import Stack, StackError, answers, free_ports
from prad.artefact import read_artefact

TASK = "trained"
PARTS = ("serialise", "receive", "check", "store", "announce", "fetch", "probe")
_PROBED = re.compile(rf"probed {TASK}@(\d+): ok \(fetched in ([0-9.]+) ms, loaded and run in ([0-9.]+) ms\)")
_READY_S = 30


@dataclass(frozen=True, slots=True)
class _Running:
    registry: str
    apis: tuple[str, ...]
    logs: tuple[Path, ...]


def run(arguments: Push) -> dict[str, Any]:
    model = load(arguments)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        others = int(
            time.time()
        )  # in each run: what a prefill service fetched before it does not fetch again
        count = 1 + arguments.rounds
        named = write_artefacts(root / "adapters", model, arguments.method, count, arguments.r, others)
        del model
        with _served(arguments, root) as running, httpx.Client(trust_env=False, timeout=60) as http:
            rows = [_pushed(running, http, root / "adapters" / each) for each in named][1:]  # one to warm up
    (nbytes,) = {row.pop("bytes") for row in rows}
    summed = [
        {"part": part, "ms": round(statistics.median(row[part] for row in rows), 1), "worst_ms": worst}
        for part in rows[0]
        for worst in (max(row[part] for row in rows),)
    ]
    return {"model": arguments.model, "adapter_bytes": nbytes, "rows": summed, "rounds_ms": rows}


def _pushed(running: _Running, http: httpx.Client, folder: Path) -> dict[str, Any]:
    """Milliseconds of each part of one push, and the bytes of its files."""
    record, tensors = read_artefact(folder).record, load_file(folder / "adapter_model.safetensors")
    start = time.perf_counter()
    files = files_of(record, tensors)
    serialised = time.perf_counter()
    response = http.post(
        f"{running.registry}/v1/tasks/{TASK}/versions",
        params={"wait": "ready", "seconds": _READY_S},
        files=[("files", file) for file in files],
    )
    total = time.perf_counter() - start
    said = response.json()
    if response.status_code != httpx.codes.CREATED or said["pending"] or said["state"] == "pushed":
        raise StackError(f"a push was answered {response.status_code}: {said}")
    took = dict(re.findall(r"(\w+);dur=([0-9.]+)", response.headers["server-timing"]))
    found = {part: float(took[part]) for part in ("receive", "check", "store", "ready")}
    fetch, probe = _probed(running.logs, said["version"])
    answered = [_first_answer(http, api, said["version"]) for api in running.apis]
    return {
        "serialise": _ms(serialised - start),
        **{part: found[part] for part in ("receive", "check", "store")},
        "announce": round(found["ready"] - fetch - probe, 1),
        "fetch": fetch,
        "probe": probe,
        "until ready": _ms(total),
        "first answer": max(answered),
        "bytes": sum(file["size"] for file in said["files"]),
    }


def _probed(logs: Sequence[Path], version: int) -> tuple[float, float]:
    """Of the slower prefill service: how long the files took, and the probe."""
    times = [
        (float(fetch), float(probe))
        for log in logs
        for number, fetch, probe in _PROBED.findall(log.read_text(encoding="utf-8"))
        if int(number) == version
    ]
    return max(times, key=sum)


def _first_answer(http: httpx.Client, api: str, version: int) -> float:
    body = {"model": f"{TASK}@{version}", "prompt": "Hello", "max_tokens": 1}
    start = time.perf_counter()
    response = http.post(f"{api}/v1/completions", json=body)
    if response.status_code != httpx.codes.OK or response.json()["prad"]["version"] != version:
        raise StackError(f"{TASK}@{version} was answered {response.status_code}: {response.text[:300]}")
    return _ms(time.perf_counter() - start)


@contextmanager
def _served(arguments: Push, root: Path) -> Iterator[_Running]:
    """A registry, a decode service, and so many prefill services."""
    registry_port, decode_port, *ports = free_ports(2 + arguments.replicas)
    registry, shared = f"http://127.0.0.1:{registry_port}", model_flags(arguments)
    where = ["--decode", f"127.0.0.1:{decode_port}", "--registry", registry]
    logs = [root / f"prefill-{number}" for number in range(arguments.replicas)]
    apis = tuple(f"http://127.0.0.1:{port}" for port in ports)
    with ExitStack() as stacks:
        stack = stacks.enter_context(Stack(root / "logs"))
        stack.start("registry", ["--port", str(registry_port), "--data-dir", str(root / "registry")])
        stack.start("decode", [*shared, "--port", str(decode_port)])
        stack.wait_until(lambda: answers(f"{registry}/ready"), "the registry")
        for log, port in zip(logs, ports, strict=True):
            prefill = stacks.enter_context(Stack(log))
            prefill.start("prefill", [*shared, *where, "--port", str(port)])
        for api in apis:
            stack.wait_until(lambda api=api: answers(f"{api}/ready"), "prefill")  # type: ignore[misc]
        yield _Running(registry, apis, tuple(log / "prefill.log" for log in logs))


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 1)


def plot(result: dict[str, Any], figure: Any) -> None:
    axes = figure.subplots()
    left = 0.0
    widths = {row["part"]: row["ms"] for row in result["rows"]}
    for part in PARTS:
        width = widths[part]
        axes.barh(0, width, left=left, label=f"{part}, {width:g} ms")
        left += width
    axes.set(
        yticks=[],
        ylim=(-0.5, 1.2),
        xlabel="ms of a push from memory, until all prefill services are ready for it",
    )
    axes.legend(ncols=2)
