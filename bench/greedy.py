"""How many greedy tokens in bf16 are float32's: ours, on the kernels and on torch, and transformers' own.

Prompts are those of a folder of tasks (--data: each task's test.jsonl in turn) and short chats. Our engine
continues each greedily in float32, up to its end token; the continuation is fed to everybody as it is
written, so that one other token does not make the next ones others. What a token should be, at every place,
is transformers' choice in float32.

Ours computes as it is served: a prompt pass over packed prompts, then decode steps over blocks. transformers
sees one sequence at a time, whole, in one plain forward. "Rounded": the same logits of ours, rounded to bf16
before they are compared. A tie: the two best logits are equal, and the lower id wins. "int8", "int4": prompt
passes as well as steps by rounded layers, in 4 bits by the file's own blocks where it has some; "made": by
blocks of the weights, as a model without gets them (bench/reordered.py).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from bench.flags import Greedy
from bench.model import load, model_folder
from bench.own_engine import OwnEngine
from bench.prompts import CHAT, task_prompts
from bench.reordered import with_made_blocks
from prad.lm import LanguageModel, Tokenizer
from prad.lm.kernels import Choice, Precision

_TOGETHER = 50  # prompts of a prompt pass, sequences of a step

_PATHS: dict[str, tuple[Choice, Precision]] = {
    "kernels": ("native", "full"),
    "kernels, int8": ("native", "int8"),
    "kernels, int4": ("native", "int4"),
    "torch": ("torch", "full"),
}

Ids = list[list[int]]


class Winners(NamedTuple):
    """Of every place of every continuation: the largest logit's lowest id, and whether another is as large;
    both [prompts, tokens]."""

    tokens: Tensor
    tied: Tensor

    @classmethod
    def of(cls, logits: Sequence[Tensor], dim: int) -> "Winners":
        """Of logits [n, vocab] each, stacked as `dim`."""
        best = [each.amax(dim=-1, keepdim=True) for each in logits]
        tied = [(each == most).sum(dim=-1) > 1 for each, most in zip(logits, best, strict=True)]
        return cls(torch.stack([each.argmax(dim=-1) for each in logits], dim), torch.stack(tied, dim))


def run(arguments: Greedy) -> dict[str, Any]:
    """Raises BuildError where there are no kernels, ValueError if --data has too few prompts."""
    folder = model_folder(arguments)
    tokenizer = Tokenizer(folder)
    texts = [] if arguments.data is None else task_prompts(arguments.data, arguments.prompts)
    tasks = [tokenizer.encode_prompt(text)[: arguments.longest] for text in texts]
    chats = [tokenizer.encode_chat([{"role": "user", "content": c}]) for c in CHAT[: arguments.chat]]
    prompts = tasks + chats
    exact = load(arguments, dtype=torch.float32)
    ends = torch.tensor(sorted(exact.stop_ids(folder)))
    written = [ids for own in _together(prompts) for ids in OwnEngine(exact).answers(own, arguments.tokens)]
    variants: dict[str, Winners] = {"ours, float32": _ours(exact, prompts, written, "ours, float32")[0]}
    for name, model in _in_bf16(arguments, folder):
        whole, rounded = _ours(model, prompts, written, f"ours, {name}")
        variants |= {f"ours, {name}": whole, f"ours, {name}, rounded": rounded}
    variants["transformers"] = _transformers(folder, torch.bfloat16, prompts, written)
    right = _transformers(folder, torch.float32, prompts, written).tokens
    said = _until_the_end(torch.tensor(written), ends)
    parts = {"prompts": slice(0, len(tasks)), "chat": slice(len(tasks), None), "all": slice(None)}
    return {
        "model": arguments.model,
        "dtype": "bfloat16",
        "tokens": {name: int(said[part].sum()) for name, part in parts.items()},
        "rows": [
            {"who": name}
            | {part: _agreeing(winners, right, said, rows) for part, rows in parts.items()}
            | {"others": int((winners.tokens != right)[said].sum()), "ties": int(winners.tied[said].sum())}
            for name, winners in variants.items()
        ],
    }


def _in_bf16(arguments: Greedy, folder: Path) -> Iterator[tuple[str, LanguageModel]]:
    for name, (choice, precision) in _PATHS.items():
        model = load(arguments, choice=choice)
        if precision != "full" and model.kernels is not None:
            model.accelerate(model.kernels, precision)
        yield name, model
        if precision == "int4" and (made := with_made_blocks(model, folder)) is not None:
            yield f"{name}, made", made


def _ours(model: LanguageModel, prompts: Ids, written: Ids, what: str) -> tuple[Winners, Winners]:
    """By our logits, and by the same rounded to bf16."""
    engine = OwnEngine(model)
    whole: list[Winners] = []
    rounded: list[Winners] = []
    for own, following in zip(_shown(list(_together(prompts)), what), _together(written), strict=True):
        steps = list(engine.forced(own, following))
        whole.append(Winners.of(steps, dim=1))
        rounded.append(Winners.of([logits.bfloat16() for logits in steps], dim=1))
    return _joined(whole), _joined(rounded)


def _transformers(folder: Path, dtype: torch.dtype, prompts: Ids, written: Ids) -> Winners:
    """By transformers' logits as it gives them; its forward is no code of ours."""
    disable_progress_bar()  # of the weights
    module = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    rows = []
    with torch.inference_mode():
        for ids, following in zip(_shown(prompts, f"transformers, {dtype}"), written, strict=True):
            seen = torch.tensor([[*ids, *following[:-1]]])
            logits = module(seen, use_cache=False, logits_to_keep=len(following)).logits
            rows.append(Winners.of(list(logits), dim=0))
    return _joined(rows)


def _together(sequences: Ids) -> Iterator[Ids]:
    for start in range(0, len(sequences), _TOGETHER):
        yield sequences[start : start + _TOGETHER]


def _joined(parts: Sequence[Winners]) -> Winners:
    return Winners(torch.cat([part.tokens for part in parts]), torch.cat([part.tied for part in parts]))


def _until_the_end(written: Tensor, ends: Tensor) -> Tensor:
    """[prompts, tokens]: which places lie up to the first end token, with it."""
    ended = torch.isin(written, ends).int()
    return (ended.cumsum(dim=1) - ended) == 0


def _agreeing(winners: Winners, right: Tensor, said: Tensor, rows: slice) -> float | None:
    """Percent; None without any place."""
    if not said[rows].any():
        return None
    return round(100 * float((winners.tokens == right)[rows][said[rows]].float().mean()), 2)


def _shown(items: Ids | list[Ids], what: str) -> Any:
    return track(items, description=what, console=Console(stderr=True), transient=True)


def plot(result: dict[str, Any], figure: Any) -> None:
    rows = [row for row in result["rows"] if row["who"] != "ours, float32"][::-1]
    axes = figure.subplots(1, 2, sharey=True)
    for at, part in zip(axes, ("prompts", "chat"), strict=True):
        shown = [row for row in rows if row[part] is not None]
        at.barh([row["who"] for row in shown], [100 - row[part] for row in shown])
        at.set(xlabel="%", title=part)
    figure.suptitle("Greedy tokens that float32 would not take")
