"""What drafts bring: tokens a second of the decode engine with drafts, times those without, by task.

Real prompts of a folder of tasks (--data: test.jsonl; those with a demo adapter are asked with it, the others
of the plain model as they are) and short chats, greedy, up to the end token. Prompt passes come first and are
not measured. A stream is a client that asks its next prompt when it has its answer. Both engines get the same
prompts, one round after the other in turn; the drafter begins knowing nothing, and learns from what it sees.
Answers that differ are counted: there must be none.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.demo_scores import ADAPTERS
from bench.engine import LayersKV, hand_over
from bench.flags import Speculation
from bench.model import load, model_folder
from bench.own_engine import prompt_kv
from bench.prompts import CHAT
from decode_service.engine import PagedEngine
from decode_service.runner import ModelRunner
from decode_service.scheduler import Scheduler
from kvtransfer.messages import Open
from prad.adapters import PromptAdaptation, load_adapter
from prad.artefact import read_artefact
from prad.core.kv import BlockPool
from prad.core.sampling import Drafter, SamplingParams, Token, TokenEvent
from prad.lm import LanguageModel, Tokenizer
from prad.lm.kv import Pools
from prad.training.data import read_examples

_BLOCK, _LONGEST_PROMPT, _ROUNDS = 16, 512, 6


@dataclass(frozen=True)
class Prompted:
    """A prompt behind its pass: its ids, keys and values, and the answer's first token."""

    ids: Sequence[int]
    kv: LayersKV
    first: int


@dataclass
class Taken:
    """What a round took."""

    seconds: float
    answers: dict[str, list[int]]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.answers.values()))


class Streams:
    """The engine of one variant, which decodes for so many clients."""

    def __init__(self, model: LanguageModel, streams: int, output: int, longest: int) -> None:
        blocks = streams * -(-(_LONGEST_PROMPT + output) // _BLOCK)
        self.drafted = self.accepted = self._number = 0
        self._model, self._streams, self._output = model, streams, output
        self._answers: dict[str, list[int]] = {}
        self._engine = PagedEngine(
            ModelRunner(model, Pools(model.layout, blocks, _BLOCK, "cpu", model.kernels)),
            Scheduler(BlockPool(blocks, _BLOCK), streams),
            self._told,
            self._observe,
            drafter=Drafter(longest, model.vocab_size),
        )

    def answer(self, prompts: Sequence[Prompted], stop_ids: frozenset[int]) -> Taken:
        """Seconds of steps alone."""
        waiting, seconds = list(prompts)[::-1], 0.0
        self._answers, sampling = {}, SamplingParams(max_tokens=self._output, stop_ids=stop_ids)
        while waiting or self._engine.status().sequences:
            while waiting and self._engine.status().sequences < self._streams:
                self._number += 1
                prompt = waiting.pop()
                size = len(prompt.ids)
                request = Open(f"{self._number}", self._model.spec, size, size, size, sampling)
                hand_over(self._engine, request, prompt.kv, Token(prompt.first), text_ids=prompt.ids, alike=1)
            started = time.perf_counter()
            self._engine.step()
            seconds += time.perf_counter() - started
        return Taken(seconds, self._answers)

    def _told(self, events: Mapping[str, Sequence[TokenEvent]]) -> None:
        for event in (event for each in events.values() for event in each):
            self._answers.setdefault(event.request_id, []).extend(token.id for token in event.tokens)

    def _observe(self, seconds: float, tokens: int, drafted: int, accepted: int) -> None:
        self.drafted += drafted
        self.accepted += accepted


def run(arguments: Speculation) -> dict[str, Any]:
    """Raises DataError for a task without prompts."""
    folder, model = model_folder(arguments), load(arguments)
    tokenizer = Tokenizer(folder)
    stop_ids = model.stop_ids(folder) | tokenizer.end_ids
    tasks = {name: _prompted(model, tokenizer, name, stop_ids, arguments) for name in _names(arguments)}
    rows = []
    for weights in arguments.weights:
        if model.kernels is not None:
            model.accelerate(model.kernels, weights)
        for name, prompts in tasks.items():
            for streams in arguments.streams:
                shown = {"task": name, "streams": streams, "weights": weights}
                rows.append(shown | _compared(model, prompts, streams, stop_ids, arguments))
                print(rows[-1], flush=True)
    return {"model": arguments.model, "rows": rows}


def _names(arguments: Speculation) -> list[str]:
    return ["chat"] if arguments.data is None else [*arguments.adapted, *arguments.plain, "chat"]


def _prompted(
    model: LanguageModel, tokenizer: Tokenizer, name: str, stop_ids: frozenset[int], arguments: Speculation
) -> list[Prompted]:
    adapter = None
    if name == "chat":
        texts = [tokenizer.encode_chat([{"role": "user", "content": c}]) for c in CHAT]
    else:
        assert arguments.data is not None
        examples = read_examples(arguments.data / name / "test.jsonl", arguments.prompts)
        said = [example.prompt for example in examples]
        if name in arguments.adapted:
            artefact = read_artefact(Path(ADAPTERS) / name)
            adapter = load_adapter(artefact, model)
            said = [artefact.record.template.replace("{prompt}", text) for text in said]
        texts = [tokenizer.encode_prompt(text) for text in said]
    prompts = []
    for ids in (text[:_LONGEST_PROMPT] for text in texts[: arguments.prompts]):
        adaptation = None
        if adapter is not None:
            adaptation = PromptAdaptation.of_prompts(
                [adapter], [len(ids)], [len(ids)], model.device, model.kernels
            )
        logits, kv = prompt_kv(model, [ids], adaptation)
        first = int(logits[0].argmax())
        if first not in stop_ids:
            prompts.append(Prompted(ids, [(key.clone(), value.clone()) for key, value in kv], first))
    return prompts


def _compared(
    model: LanguageModel,
    prompts: Sequence[Prompted],
    streams: int,
    stop_ids: frozenset[int],
    arguments: Speculation,
) -> dict[str, Any]:
    engines = {
        longest: Streams(model, streams, arguments.output, longest) for longest in (0, arguments.longest)
    }
    for engine in engines.values():  # whatever is made at a first step
        engine.answer(prompts[:streams], stop_ids)
    drafting = engines[arguments.longest]
    drafting.drafted = drafting.accepted = 0
    each = max(streams, len(prompts) // _ROUNDS)
    rounds: list[dict[int, Taken]] = []
    for start in range(0, len(prompts) - each + 1, each):
        order = list(engines)[:: 1 if len(rounds) % 2 else -1]
        rounds.append({n: engines[n].answer(prompts[start : start + each], stop_ids) for n in order})
    plain, drafted = ([taken[n] for taken in rounds] for n in engines)
    ratios = [p.seconds / d.seconds for p, d in zip(plain, drafted, strict=True)]
    told = [list(taken.answers.values()) for taken in (*plain, *drafted)]
    differ = sum(
        len(set(map(tuple, a)) ^ set(map(tuple, b))) > 0
        for a, b in zip(told[: len(plain)], told[len(plain) :], strict=True)
    )
    return {
        "tokens_per_s": round(sum(p.tokens for p in plain) / sum(p.seconds for p in plain), 1),
        "drafting_tokens_per_s": round(sum(d.tokens for d in drafted) / sum(d.seconds for d in drafted), 1),
        "times": round(statistics.median(ratios), 3),
        "rounds_times": [round(ratio, 3) for ratio in ratios],
        "accepted": round(drafting.accepted / max(1, drafting.drafted), 3),
        "drafted_per_token": round(drafting.drafted / max(1, sum(d.tokens for d in drafted)), 3),
        "differing_rounds": differ,
    }


def plot(result: dict[str, Any], figure: Any) -> None:
    weights = list(dict.fromkeys(row["weights"] for row in result["rows"]))
    for axes, kind in zip(
        figure.subplots(1, len(weights), sharey=True, squeeze=False)[0], weights, strict=True
    ):
        rows = [row for row in result["rows"] if row["weights"] == kind]
        names = [f"{row['task']}, {row['streams']}" for row in rows]
        bars = axes.barh(names, [row["times"] for row in rows])
        axes.bar_label(bars, [f"{row['times']:.2f}×" for row in rows], padding=3)
        axes.axvline(1, color="black", linewidth=1)
        axes.set(xlabel="tokens a second, times those without drafts", title=f"weights: {kind}")
        axes.margins(x=0.15)
        axes.invert_yaxis()
    figure.suptitle("Drafts: by task and number of streams")
