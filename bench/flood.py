"""A quiet task beside a neighbour's flood: the time to its first token, through HTTP.

The quiet task asks once in a while; meanwhile another task has

full    as many requests running as fill the decode batch, but for what it leaves to others;
flood   several times as many, of which the rest wait in the queue.

Fair is a quiet task that waits no longer beside the flood than beside a batch that is just full.
"""

import random
from functools import partial
from itertools import count
from typing import Any

from bench.flags import Flood
from bench.model import load
from bench.prompts import random_prompts
from bench.rounds import interleaved, ratio
from bench.serving import Served, bodies, served
from local_stack.stack import StackError
from prad.http.load import Run, latencies
from prad.lm import LanguageModel

_PATIENCE = ["--queue-timeout-s", "600", "--request-timeout-s", "900"]  # a flood's own waiting is its affair


def run(arguments: Flood) -> dict[str, Any]:
    model = load(arguments)
    kinds = {"full": arguments.full, "flood": arguments.flood}
    heard: dict[str, list[Run]] = {kind: [] for kind in kinds}
    seeds = count()

    def p99_ms(kind: str) -> float:
        heard[kind].append(_beside(server, model, kinds[kind], next(seeds), arguments))
        return float(latencies(heard[kind][-1])["ttft_ms"]["p99"])

    decode = ["--max-sequences", str(arguments.sequences)]
    with served(arguments, model, {"prad-pa": 2}, prefill=_PATIENCE, decode=decode) as server:
        variants = {kind: partial(p99_ms, kind) for kind in kinds}
        p99 = interleaved(variants, arguments.rounds, "flood", warm_up=0).values
    rows = [
        {
            "beside": kind,
            "neighbour_requests": kinds[kind],
            "quiet_requests": sum(len(each.answers) for each in runs),
            "rounds_ttft_ms": [latencies(each)["ttft_ms"] for each in runs],
            "ttft_ms": latencies(_together(runs))["ttft_ms"],
        }
        for kind, runs in heard.items()
    ]
    return {"model": arguments.model, "rows": rows, "p99_flood_of_full": ratio(p99["flood"], p99["full"])}


def _beside(server: Served, model: LanguageModel, at_once: int, seed: int, arguments: Flood) -> Run:
    """What the quiet task was answered while `at_once` requests of its neighbour were under way.

    Answers of the neighbour have different lengths, so that its requests do not come in waves.
    """
    busy, quiet = server.tasks["prad-pa"]
    loud, asked = at_once + arguments.more, at_once + arguments.more + arguments.quiet
    prompts = random_prompts(asked, arguments.prompt, model.vocab_size, seed)
    requests = bodies(prompts, arguments.output, [busy] * loud + [quiet] * arguments.quiet, stream=True)
    lengths = random.Random(seed)
    for request in requests[:loud]:
        request["max_tokens"] = lengths.randint(1, 2 * arguments.output - 1)
    first, every = arguments.after_s, arguments.every_s
    at_s = [None] * loud + [first + every * number for number in range(arguments.quiet)]
    done = server.run(requests, at_s=at_s, at_once=at_once)
    last = max(answer.sent_s for answer in done.answers[:loud])
    heard = tuple(answer for answer in done.answers[loud:] if answer.sent_s < last)
    if not heard:
        raise StackError("the neighbour was done before the quiet task asked: --more was too few")
    return Run(heard, done.wall_s, done.cpu_s)


def _together(runs: list[Run]) -> Run:
    return Run(
        tuple(answer for each in runs for answer in each.answers),
        sum(each.wall_s for each in runs),
        sum(each.cpu_s for each in runs),
    )


def plot(result: dict[str, Any], figure: Any) -> None:
    axes = figure.subplots()
    names = [f"beside {row['neighbour_requests']} requests" for row in result["rows"]]
    for number, part in enumerate(("p50", "p90", "p99")):
        places = [at + number / 4 for at in range(len(names))]
        bars = axes.barh(places, [row["ttft_ms"][part] for row in result["rows"]], 0.22, label=part)
        axes.bar_label(bars, fmt="%.0f", padding=3)
    axes.set(yticks=[at + 0.25 for at in range(len(names))], yticklabels=names)
    axes.set(xlabel="time to a quiet task's first token, ms")
    axes.margins(x=0.1)  # for the labels
    axes.legend()
