"""N requests at once through HTTP: of N tasks, of one task, and of the plain model, in turn, several times.

    python -m bench.tasks               # 64 requests, 64 tokens in, 64 out

Starts the stack itself, with N random adapters. The result goes to bench/results/tasks.json.
"""

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from pathlib import Path

import httpx
import torch

from bench.record import write_result
from prad.adapters import find_method, new_adapter, save_parameters
from prad.artefact import AdapterRecord, BaseModelRef, write_record
from prad.cli.serve import push_all
from prad.cli.stack import Stack, answers
from prad.lm import DEFAULT_MODEL, LanguageModel, resolve_model

API, REGISTRY, DECODE = 18000, 18001, 18051


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=64, help="tokens in")
    parser.add_argument("--output", type=int, default=64, help="tokens out")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--r", type=int, default=16)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        _make_adapters(root / "adapters", arguments.requests, arguments.r)
        with Stack(root / "logs") as stack:
            registry = f"http://127.0.0.1:{REGISTRY}"
            stack.start("registry", ["--port", str(REGISTRY), "--data-dir", str(root / "registry")])
            stack.start("decode", ["--port", str(DECODE)])
            where = ["--decode", f"127.0.0.1:{DECODE}", "--registry", registry]
            stack.start("prefill", [*where, "--port", str(API)])
            stack.wait_until(lambda: answers(f"{registry}/ready"), 60, "the registry")
            stack.wait_until(lambda: answers(f"http://127.0.0.1:{API}/ready"), 120, "prefill")
            push_all(root / "adapters", registry)
            tasks = sorted(path.name for path in (root / "adapters").iterdir())
            listed = [f"http://127.0.0.1:{API}/v1/models/{task}" for task in tasks]
            stack.wait_until(lambda: all(map(answers, listed)), 300, "the adapters")
            figures = asyncio.run(_measure(tasks, arguments))
    for name, figure in figures.items():
        print(f"{name:12} {figure['median_s']:6.2f} s  {figure['tokens_per_s']:6.0f} tokens/s")
    shape = {k: getattr(arguments, k) for k in ("requests", "prompt", "output", "rounds", "r")}
    print(write_result("tasks", {"model": DEFAULT_MODEL, "shape": shape, "figures": figures}))


async def _measure(
    tasks: list[str], arguments: argparse.Namespace
) -> dict[str, dict[str, float | list[float]]]:
    kinds: dict[str, list[str | None]] = {
        "all tasks": list(tasks),
        "one task": [tasks[0]] * len(tasks),
        "plain model": [None] * len(tasks),
    }
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    limits = httpx.Limits(max_connections=len(tasks))
    async with httpx.AsyncClient(timeout=600, limits=limits) as client:
        for _ in range(arguments.rounds + 1):
            for name, chosen in kinds.items():
                started = time.perf_counter()
                await asyncio.gather(*(_ask(client, task, arguments) for task in chosen))
                seconds[name].append(time.perf_counter() - started)
    tokens = len(tasks) * arguments.output
    return {
        name: {
            "median_s": round(statistics.median(each[1:]), 3),  # the first round warms up
            "tokens_per_s": round(tokens / statistics.median(each[1:]), 1),
            "rounds_s": [round(s, 3) for s in each[1:]],
        }
        for name, each in seconds.items()
    }


async def _ask(client: httpx.AsyncClient, task: str | None, arguments: argparse.Namespace) -> None:
    body = {
        "prompt": [random.randrange(100, 40_000) for _ in range(arguments.prompt)],
        "max_tokens": arguments.output,
        "temperature": 0,
        "ignore_eos": True,
        **({} if task is None else {"task": task}),
    }
    response = await client.post(f"http://127.0.0.1:{API}/v1/completions", json=body)
    response.raise_for_status()
    assert response.json()["usage"]["completion_tokens"] == arguments.output


def _make_adapters(folder: Path, count: int, r: int) -> None:
    """PrAd-PA adapters with random parameters: their work is that of trained ones."""
    model = LanguageModel.load(resolve_model(DEFAULT_MODEL, Path("~/.cache/prad")))
    method = find_method("prad-pa")
    config = method.config_type.model_validate({"r": r})
    base = BaseModelRef(
        name=DEFAULT_MODEL,
        architecture=model.fingerprint.architecture,
        weights=model.fingerprint.weights,
    )
    for i in range(count):
        path = folder / f"task-{i:03}"
        path.mkdir(parents=True)
        parameters = new_adapter(method, config, model, seed=i).parameters
        generator = torch.Generator().manual_seed(i)
        parameters["ffn.up"].normal_(0.0, 0.02, generator=generator)
        save_parameters(parameters, path, model.dtype)
        write_record(path, AdapterRecord(method=method.name, config=config.model_dump(), base=base))


if __name__ == "__main__":
    main()
