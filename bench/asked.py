"""What was asked of the server: each gate, and where in bench/results it is read off."""

from collections.abc import Callable, Sequence
from typing import Any

from bench.gates import Gate
from bench.rounds import ratio


def _row(rows: list[dict[str, Any]], **wanted: str) -> dict[str, Any]:
    """The first whose values begin so."""
    return next(row for row in rows if all(str(row[k]).startswith(v) for k, v in wanted.items()))


def _faster(name: str) -> Callable[[Any], float]:
    """Than the fastest peer whose row begins with `name`."""

    def measure(result: Any) -> float:
        found = [float(row["ours_is_faster"]) for row in result["rows"] if row["name"].startswith(name)]
        return sorted(found)[0]

    return measure


def _stream(name: str) -> Callable[[Any], float]:
    return lambda result: float(_row(result["one"], name=name)["tokens_per_s"])


def _stream_rounds(result: Any, name: str) -> list[float]:
    """Seconds of one request's tokens after the first, by round."""
    rounds = _row(result["one"], name=name)["rounds_s"]
    return [total - prefill for total, prefill in zip(rounds["total"], rounds["prefill"], strict=True)]


def _step(figure: str, sequences: int) -> Callable[[Any], float]:
    def measure(result: Any) -> float:
        return next(float(r[figure]) for r in result["by_batch"] if r["sequences"] == sequences)

    return measure


def _gemms(figure: str, rows: int) -> Callable[[Any], float]:
    """A share, in percent, of what the machine can do."""
    return lambda result: next(float(r[figure]) for r in result["gemms"] if r["batch"] == rows)


def _pass(tokens: int) -> Callable[[Any], dict[str, Any]]:
    """The growth of prompt passes at so many tokens."""
    return lambda result: next(row for row in result["growth"] if row["tokens"] == tokens)


def _handed_over(burst: str, payload: str, figure: str) -> Callable[[Any], float]:
    return lambda result: 100 * float(_row(result["rows"], burst=burst, payload=payload)[figure])


def _spread(rounds: Sequence[Sequence[float]]) -> float:
    """In percent: the two that differ most, by their rounds' ratios."""
    return 100 * (max(ratio(a, b) for a in rounds for b in rounds) - 1)


def _steps(result: Any, name: str) -> list[float]:
    """Of the benchmark `serve`, by round."""
    steps: list[float] = _row(result["tasks"], name=name)["rounds_step_ms"]
    return steps


def _adapted(shape: str, figure: str = "of_plain", r: int = 16) -> Callable[[Any], float]:
    """What the dearer of two methods adds to a prompt pass, in percent."""

    def measure(result: Any) -> float:
        found = [
            100 * (float(row[figure]) - 1)
            for row in result["rows"]
            if row["shape"] == f"{shape}, r={r}" and row["adapters"] != "plain"
        ]
        return sorted(found)[-1]

    return measure


def _rounded_step(weights: str, sequences: int) -> Callable[[Any], float]:
    def measure(result: Any) -> float:
        took = {r["weights"]: float(r["step_ms"]) for r in result["rows"] if r["sequences"] == sequences}
        return took[weights] / took["full"]

    return measure


def _ruled(result: Any, rules: str) -> float:
    """A step of 64 with these rules, times the same without."""
    return float(next(r["of_free"] for r in result["rows"] if (r["sequences"], r["rules"]) == (64, rules)))


def _int4(streams: str, name: str) -> Callable[[Any], float]:
    """How much faster our 4 bits are than who begins so."""
    return lambda result: float(_row(result[streams], name=name)["int4_is_faster"])


def _drafting(task: str) -> Callable[[Any], float]:
    """One stream of the task, by the model's own weights, times the same without drafts."""
    return lambda result: float(_row(result["rows"], task=task)["times"])


def _idle(name: str) -> Callable[[Any], float]:
    """MiB that are there whatever was asked: without the KV cache as far as it is filled."""

    def measure(result: Any) -> float:
        row = _row(result["rows"], name=name)
        return float(row["mib"]) - float(row["pools"])

    return measure


_INT8 = "PrAd server, one task, PrAd-PA, int8"

GATES = (
    Gate(
        "64 tasks, PrAd-LoRA, faster than PEFT, 64 LoRAs",
        10,
        16,
        "×",
        "peers",
        _faster("PEFT"),
        True,
    ),
    Gate("than vLLM with 64 LoRAs", 15, 25, "×", "peers", _faster("vLLM, 64"), True),
    Gate("than vLLM without adapters", 1.5, 2, "×", "peers", _faster("vLLM, no"), True),
    Gate("than OpenVINO, 4-bit, without adapters", 1.3, 1.7, "×", "peers", _faster("OpenVINO"), True),
    Gate("GEMMs of 64 rows, of the measured peak", 75, 90, " %", "floor", _gemms("own_of_peak", 64), True),
    Gate("of 256", 80, None, " %", "floor", _gemms("own_of_peak", 256), True),
    Gate("of one row, of the bandwidth", 90, None, " %", "floor", _gemms("own_of_bandwidth", 1), True),
    Gate("of 8", 90, None, " %", "floor", _gemms("own_of_bandwidth", 8), True),
    Gate(
        "a decode step of 64 sequences, times the hardware's limit",
        1.5,
        1.2,
        "×",
        "decode",
        _step("times_limit", 64),
    ),
    Gate(
        "a step of one, in-process: beside the kernels",
        0.7,
        None,
        " ms",
        "step",
        lambda result: float(
            next(r["beside_ms"] for r in result["rows"] if (r["sequences"], r["weights"]) == (1, "full"))
        ),
    ),
    Gate(
        "a prompt pass of 64 × 64 tokens, times its products' limit",
        1.25,
        None,
        "×",
        "prefill",
        lambda result: float(_pass(4096)(result)["times_limit"]),
    ),
    Gate(
        "its products, of the measured peak",
        80,
        None,
        " %",
        "prefill",
        lambda result: 100 * _pass(4096)(result)["limit_ms"] / _pass(4096)(result)["short_gemms_ms"],
        True,
    ),
    Gate(
        "one prompt of 4,096 tokens: attention, of the pass",
        50,
        None,
        " %",
        "prefill",
        lambda result: 100 * _pass(4096)(result)["one_attention_ms"] / _pass(4096)(result)["one_ms"],
    ),
    Gate(
        "a decode step of 64 sequences, times its floor",
        1.5,
        1.2,
        "×",
        "decode",
        _step("times_floor", 64),
        of_floor=True,
    ),
    Gate("of 8", 1.8, 1.2, "×", "decode", _step("times_floor", 8), of_floor=True),
    Gate("of one", 1.3, None, "×", "decode", _step("times_floor", 1), of_floor=True),
    Gate(
        "step time by number of tasks (0 to 64), in-process: spread",
        2,
        None,
        " %",
        "decode",
        lambda result: _spread([row["rounds_ms"] for row in result["by_tasks"]]),
    ),
    Gate(
        "step time of 64 tasks, one and none, through HTTP: spread",
        2,
        None,
        " %",
        "serve",
        lambda result: _spread([_steps(result, name) for name in ("64 tasks", "one task", "plain model")]),
    ),
    Gate(
        "step time of 64 tasks while adapters are pushed: longer by",
        10,
        None,
        " %",
        "serve",
        lambda result: 100 * (ratio(_steps(result, "64 tasks, adapters"), _steps(result, "64 tasks")) - 1),
    ),
    Gate(
        "time between tokens, p99, during a 4k prompt, times undisturbed",
        3,
        None,
        "×",
        "chunking",
        lambda result: float(_row(result["long_prompt"], name="chunks")["itl_p99_ratio"]),
    ),
    Gate(
        "adapters' part of a prompt pass, r=16, 64 × 64 tokens", 10, 5, " %", "prefill", _adapted("uniform")
    ),
    Gate("the same in CPU time", 10, 5, " %", "prefill", _adapted("uniform", "cpu_of_plain")),
    Gate("16 to 256 tokens each", 10, 5, " %", "prefill", _adapted("ragged")),
    Gate("the same in CPU time", 10, 5, " %", "prefill", _adapted("ragged", "cpu_of_plain")),
    Gate("r=108, 64 × 64 tokens", 15, None, " %", "prefill", _adapted("uniform", r=108)),
    Gate("16 to 256 tokens each", 15, None, " %", "prefill", _adapted("ragged", r=108)),
    Gate(
        "hand-off over gRPC, 64 × 64: CPU, of the pass",
        15,
        5,
        " %",
        "handoff",
        _handed_over("64 x 64", "messages", "cpu_of_pass"),
    ),
    Gate(
        "the same: time added to the pass",
        8,
        5,
        " %",
        "handoff",
        _handed_over("64 x 64", "messages", "behind_wall_of_pass"),
    ),
    Gate(
        "through shared memory: CPU",
        5,
        None,
        " %",
        "handoff",
        _handed_over("64 x 64", "shared", "cpu_of_pass"),
    ),
    Gate(
        "time added",
        5,
        None,
        " %",
        "handoff",
        _handed_over("64 x 64", "shared", "behind_wall_of_pass"),
    ),
    Gate(
        "over gRPC, 8 × 512: CPU",
        5,
        None,
        " %",
        "handoff",
        _handed_over("8 x 512", "messages", "cpu_of_pass"),
    ),
    Gate("time added", 5, None, " %", "handoff", _handed_over("8 x 512", "messages", "behind_wall_of_pass")),
    Gate(
        "64 streams through HTTP, of the engine's own tokens/s",
        95,
        None,
        " %",
        "serve",
        lambda result: 100 * float(result["streaming"][0]["of_engine_alone"]),
        True,
    ),
    Gate(
        "a file of 2,000 requests of 64 tasks, of the tokens/s of 64 at once",
        95,
        None,
        " %",
        "batch",
        lambda result: 100 * float(result["of_burst"]),
        True,
    ),
    Gate(
        "one request through HTTP, 8-bit weights: tokens/s after the first",
        75,
        None,
        "",
        "stream",
        _stream(_INT8),
        True,
    ),
    Gate(
        "the same, times OpenVINO's (4-bit)",
        1,
        None,
        "×",
        "stream",
        lambda result: ratio(_stream_rounds(result, "OpenVINO"), _stream_rounds(result, _INT8)),
        True,
    ),
    Gate(
        "64 sequences that keep to JSON schemas: a decode step longer by",
        10,
        None,
        " %",
        "structured",
        lambda result: 100 * (max(_ruled(result, name) for name in ("one schema", "own schemas")) - 1),
    ),
    Gate(
        "searches by three beams: a step, times one of as many plain sequences, at most",
        1.3,
        None,
        "×",
        "beams",
        lambda result: max(float(r["ratio"]) for r in result["rows"] if r["kind"] == "beams"),
    ),
    Gate("8 bits: a step of 64, times bf16's", 0.65, None, "×", "step", _rounded_step("int8", 64)),
    Gate("of one", 0.6, None, "×", "step", _rounded_step("int8", 1)),
    Gate(
        "4 bits, one stream, times llama.cpp's on the same file",
        1.5,
        None,
        "×",
        "stream",
        _int4("one", "llama.cpp"),
        True,
    ),
    Gate("times OpenVINO's", 1.5, None, "×", "stream", _int4("one", "OpenVINO"), True),
    Gate("8 streams, times llama.cpp's", 1.5, None, "×", "peers", _int4("eight", "llama.cpp"), True),
    Gate("times OpenVINO's", 1.5, None, "×", "peers", _int4("eight", "OpenVINO"), True),
    Gate("drafts, one stream on e2e: times without", 1.5, None, "×", "speculation", _drafting("e2e"), True),
    Gate(
        "the task and number of streams that gain the least",
        0.97,
        None,
        "×",
        "speculation",
        lambda result: min(float(row["times"]) for row in result["rows"]),
        True,
    ),
    Gate("prefill and decode idle, together", 1144, None, " MiB", "memory", _idle("prefill and decode")),
    Gate("decode alone", 572, None, " MiB", "memory", _idle("decode")),
    Gate(
        "the second start, until ready",
        5,
        None,
        " s",
        "memory",
        lambda result: float(result["start"][0]["s"]),
    ),
    Gate(
        "a push from memory, until every prefill service is ready for it, at worst",
        1000,
        None,
        " ms",
        "push",
        lambda result: float(_row(result["rows"], part="until ready")["worst_ms"]),
    ),
)
