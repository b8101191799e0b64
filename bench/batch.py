"""A file of requests through /v1/batches against bursts of as many requests at once as there are tasks.

burst  one completion of each task at once, through HTTP, again and again.
file   the same requests as the lines of one file: from the batch's creation until it is completed.

Both decode the same tokens of the same tasks; what is compared is tokens/s.
"""

import json
import statistics
import tempfile
import time
from itertools import count, cycle, islice
from typing import Any

import httpx

from bench.flags import Batch
from bench.model import load
from bench.prompts import random_prompts
from bench.rounds import interleaved, ratio
from bench.serving import Served, bodies, served
from local_stack.stack import StackError

_LOOK_S = 0.05
_COMPLETIONS = "/v1/completions"


def run(arguments: Batch) -> dict[str, Any]:
    model = load(arguments)
    seeds = count()

    def prompts(number: int) -> list[list[int]]:
        return random_prompts(number, arguments.prompt, model.vocab_size, next(seeds))

    with tempfile.TemporaryDirectory() as folder:
        prefill = ["--files-dir", folder, "--batch-at-once", str(arguments.at_once)]
        with served(arguments, model, {"prad-pa": arguments.tasks}, prefill=prefill) as server:
            names = server.tasks["prad-pa"]

            def burst() -> float:
                took = [
                    server.generate(prompts(len(names)), arguments.output, names)
                    for _ in range(arguments.bursts)
                ]
                return len(names) * arguments.output / statistics.median(took)

            def file() -> float:
                tasks = list(islice(cycle(names), arguments.requests))
                asked = bodies(prompts(arguments.requests), arguments.output, tasks)
                return arguments.requests * arguments.output / _batch(server, asked)

            rates = interleaved({"burst": burst, "file": file}, arguments.rounds, "batch")
    return {
        "model": arguments.model,
        "rows": [
            {"name": f"{arguments.tasks} requests at once", "tokens_per_s": round(rates["burst"], 1)},
            {"name": f"a file of {arguments.requests}", "tokens_per_s": round(rates["file"], 1)},
        ],
        "of_burst": round(ratio(rates.values["file"], rates.values["burst"]), 3),
        "rounds_tokens_per_s": rates.figures(1),
    }


def _batch(server: Served, asked: list[dict[str, Any]]) -> float:
    """Seconds that a file of completions takes. Raises StackError if one was not answered."""
    lines = [
        {"custom_id": str(number), "method": "POST", "url": _COMPLETIONS, "body": body}
        for number, body in enumerate(asked)
    ]
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
        sent = client.post(
            "/v1/files", files={"file": ("in.jsonl", content)}, data={"purpose": "batch"}
        ).json()
        wanted = {"input_file_id": sent["id"], "endpoint": _COMPLETIONS, "completion_window": "24h"}
        began = time.perf_counter()
        batch = client.post("/v1/batches", json=wanted).json()
        while batch["status"] not in ("completed", "failed", "expired"):
            time.sleep(_LOOK_S)
            batch = client.get(f"/v1/batches/{batch['id']}").json()
        took = time.perf_counter() - began
        if batch["request_counts"]["completed"] != len(asked):
            raise StackError(
                f"the batch ended as {batch['status']}: {batch['request_counts']}, {batch['errors']}"
            )
        for name in (sent["id"], batch["output_file_id"]):
            client.delete(f"/v1/files/{name}")
    return took


def plot(result: dict[str, Any], figure: Any) -> None:
    axes = figure.subplots()
    axes.barh([row["name"] for row in result["rows"]], [row["tokens_per_s"] for row in result["rows"]])
    axes.set(xlabel="tokens/s")
