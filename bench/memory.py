"""What `prad serve` holds when it is idle, item by item, and how long it takes until it is ready.

start      the whole stack, from the command to the API's first answer that it is ready: the second start and
           later ones, which find the model converted, packed, and most likely in the page cache
memory     after one request, as the system shares it out (PSS): a page that two processes map counts half
           in each. `weights`: what is mapped of the packed model and of the model's files; `code`: libraries;
           `shared`: the hand-off's shared memory; `pools`: memory in huge pages, which are the KV caches as
           far as they are filled; `heap`: everything else, mostly what imports leave behind
imports    the CPU time and memory of parts, each in a process of its own
"""

import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psutil

from bench.flags import Memory
from bench.model import model_flags
from local_stack.stack import Stack, answers, free_ports

_MIB = 1 << 10  # of what smaps counts in, KiB
_IMPORTS = {
    "Python": "pass",
    "torch": "import torch",
    "the command's": "import prad_cli.app",
    "decode's, torch's among them": "import decode_service.server",
    "prefill's, torch's among them": "import prefill_service.server",
    "a tokenizer of transformers": "from transformers import PreTrainedTokenizerFast",
    "a model of transformers": "from transformers import LlamaForCausalLM",
}
_MAPPING = re.compile(r"[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \S+ *(.*)")
_FIGURE = re.compile(r"(Pss|AnonHugePages): +(\d+) kB")
_SAYS = """
import os
t = os.times()
with open("/proc/self/smaps_rollup") as file:
    kib = next(line.split()[1] for line in file if line.startswith("Pss_Anon:"))
print(t.user + t.system, kib)
"""


def run(arguments: Memory) -> dict[str, Any]:
    starts: list[float] = []
    with tempfile.TemporaryDirectory() as root:
        for number in range(arguments.rounds + 1):
            took, rows = _served(Path(root), model_flags(arguments))
            starts += [took] if number else []  # the first one packs
    return {
        "model": arguments.model,
        "start": [
            {"name": "prad serve, again", "s": round(statistics.median(starts), 2), "rounds_s": starts}
        ],
        "rows": rows,
        "imports": [_imported(name, program, arguments.rounds) for name, program in _IMPORTS.items()],
    }


def plot(result: dict[str, Any], figure: Any) -> None:
    axes = figure.subplots()
    rows = [row for row in result["rows"] if row["name"] != _TOGETHER][::-1]
    left = [0.0] * len(rows)
    for item in _ITEMS:
        widths = [row[item] for row in rows]
        axes.barh([row["name"] for row in rows], widths, left=left, label=item)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set(xlabel="MiB", title="prad serve, idle")
    figure.legend(loc="outside lower center", ncols=len(_ITEMS))


_ITEMS = ("weights", "code", "shared", "pools", "heap")
_TOGETHER = "prefill and decode"


def _served(root: Path, model: list[str]) -> tuple[float, list[dict[str, Any]]]:
    """Seconds until it is ready, and what its processes then hold."""
    api, registry, decode, metrics = free_ports(4)
    url = f"http://127.0.0.1:{api}"
    flags = {
        "--port": api,
        "--registry-port": registry,
        "--decode-port": decode,
        "--decode-metrics-port": metrics,
        "--data-dir": root / "data",
    }
    with Stack(root / "logs") as stack:
        begun = time.perf_counter()
        stack.start("serve", [*model, *(str(part) for pair in flags.items() for part in pair)])
        stack.wait_until(lambda: answers(f"{url}/ready"), "prad serve")
        took = round(time.perf_counter() - begun, 2)
        body = {"prompt": "Once", "max_tokens": 8}
        httpx.post(f"{url}/v1/completions", json=body, timeout=60, trust_env=False).raise_for_status()
        command = psutil.Process(stack.services[0].process.pid)
        held = {"the command": _held(command.pid)}
        for child in command.children():
            held[child.cmdline()[3]] = _held(child.pid)
    rows = [{"name": name} | items for name, items in sorted(held.items())]
    both = {key: round(held["prefill"][key] + held["decode"][key], 1) for key in held["decode"]}
    return took, [*rows, {"name": _TOGETHER} | both]


def _held(pid: int) -> dict[str, float]:
    """MiB by item, and all of it."""
    found: Counter[str] = Counter()
    item = ""
    for line in Path(f"/proc/{pid}/smaps").read_text(encoding="utf-8").splitlines():
        if mapping := _MAPPING.fullmatch(line):
            item = _item(mapping[1])
        elif figure := _FIGURE.fullmatch(line):
            kib = int(figure[2])
            found[item] += kib if figure[1] == "Pss" else -kib
            found["pools"] += kib if figure[1] == "AnonHugePages" else 0
    mib = {key: round(found[key] / _MIB, 1) for key in _ITEMS}
    return mib | {"mib": round(sum(mib.values()), 1)}


def _item(path: str) -> str:
    if path.endswith((".safetensors", "weights.bin")):
        return "weights"
    if path.startswith("/memfd:prad-kv"):
        return "shared"
    return "code" if path.startswith("/") else "heap"


def _imported(name: str, program: str, rounds: int) -> dict[str, Any]:
    told = [
        subprocess.run(
            [sys.executable, "-c", program + _SAYS], check=True, capture_output=True, encoding="utf-8"
        )
        for _ in range(rounds)
    ]
    figures = [tuple(map(float, each.stdout.split())) for each in told]
    cpu_s, kib = (statistics.median(each) for each in zip(*figures, strict=True))
    return {"name": name, "cpu_s": round(cpu_s, 2), "mib": round(kib / _MIB, 1)}
