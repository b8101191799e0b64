"""What rounding does to the logits: of keys and values on the wire to 8 bits, of decode's weights to 8 or 4,
and of prefill's.

Prompts are texts of examples/, cut into 64 tokens of prompt and 32 that follow. The tokens that follow are
fed as they are written. The prompt's keys and values are the exact model's, as they come from the prefill
service, or what int8 leaves of them, or a rounded model's; the tokens behind them are computed by the exact
model, or with rounded weights and rows. int4 is the file's own blocks where it has some; "made" are blocks of
the weights, as a model without gets them (bench/reordered.py).

`passes`: how long prompts take by rounded weights (bench/rounded_passes.py).

`schemes`: ways to round the linear layers, of prompts too, in float32 (bench/rounded_linears.py).

`scores`: of the demo adapters, where --data names a folder of their tasks' folders: answers by rounded
weights, prompts computed exactly and by rounded weights, too (bench/rounded_scores.py).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.flags import Rounding
from bench.model import load, model_folder
from bench.record import ROOT
from bench.reordered import with_made_blocks
from bench.rounded_linears import SCHEMES, rounded_linears
from bench.rounded_passes import pass_rows
from bench.rounded_scores import demo_rows
from kvtransfer.int8 import dequantise, quantise
from prad.lm import LanguageModel, ModelError, PackedBatch, Tokenizer
from prad.lm.attention import Ragged

PROMPT, FOLLOWING = 64, 32

Layers = list[tuple[Tensor, Tensor]]
"""Per layer keys and values [T, kv_heads, dim]."""


@dataclass(frozen=True)
class GivenPrompts:
    """A KVTarget: whatever the pass computes for prompt rows, their keys and values are the given ones.

    in_prompt [T]: which rows are a prompt's.
    """

    ragged: Ragged
    in_prompt: Tensor
    given: Layers

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
    ) -> Tensor:
        prompt = self.in_prompt[:, None, None]
        key, value = (
            torch.where(prompt, given, own)
            for given, own in zip(self.given[layer], (key, value), strict=True)
        )
        return self.ragged.attend(query, key, value, scale, window)


def run(arguments: Rounding) -> dict[str, Any]:
    """Raises ModelError where the kernels, which alone have rounded weights, are not in use."""
    model, eights, fours = (load(arguments) for _ in range(3))
    if eights.kernels is None or fours.kernels is None:
        raise ModelError("rounded weights need the kernels; is there a C++ compiler?")
    eights.accelerate(eights.kernels, "int8")
    fours.accelerate(fours.kernels, "int4")
    variants = {"bf16": model, "int8": eights, "int4": fours}
    made = with_made_blocks(model, model_folder(arguments))
    texts = _texts(Tokenizer(model_folder(arguments)), -(-arguments.tokens // FOLLOWING))
    following = torch.arange(PROMPT + FOLLOWING, device=model.device).repeat(len(texts)) >= PROMPT
    ragged = Ragged.of([len(text) for text in texts], model.device)

    def computed(of: LanguageModel) -> tuple[Tensor, PackedBatch, Layers]:
        layers: Layers = []
        batch = PackedBatch.of_sequences(
            texts,
            device=model.device,
            logit_rows=following.nonzero().flatten().tolist(),
            layer_done=lambda _, key, value: layers.append((key, value)),
        )
        return of.forward(batch), batch, layers

    def logits(of: LanguageModel, given: Layers) -> Tensor:
        kv = GivenPrompts(ragged, ~following, given)
        return of.forward(PackedBatch(batch.ids, batch.positions, kv, batch.logit_rows))

    with torch.inference_mode():
        exact, batch, layers = computed(model)
        by_eights, by_fours = computed(eights)[2], computed(fours)[2]
        coded = [(_through_int8(key), _through_int8(value)) for key, value in layers]
        stepping = {"int8": eights, "int4": fours} | ({} if made is None else {"int4, made": made})
        changed = {
            "KV on the wire": logits(model, coded),
            **{f"decode's weights and rows, {name}": logits(each, layers) for name, each in stepping.items()},
            "KV and int8": logits(eights, coded),
            "KV and int4": logits(fours, coded),
            "prefill's weights and rows, int8": logits(model, by_eights),
            "prefill's weights and rows, int4": logits(model, by_fours),
            "prefill's and decode's, int8": logits(eights, by_eights),
            "prefill's and decode's, int4": logits(fours, by_fours),
        }
    return {
        "model": arguments.model,
        "dtype": str(model.dtype).removeprefix("torch."),
        "tokens": len(exact),
        "rows": [
            {"rounded": what} | _effect(exact, other, batch, following) for what, other in changed.items()
        ],
        "passes": pass_rows(variants, arguments.passes, arguments.rounds),
        "schemes": _schemes(load(arguments, dtype=torch.float32, choice="torch"), texts, following),
        "scores": []
        if arguments.data is None
        else demo_rows(
            {name: (model, each) for name, each in ({"bf16": model} | stepping).items()}
            | {f"{name}, prompts too": (variants[name], variants[name]) for name in ("int8", "int4")}
            | {"int8, prompts alone": (eights, model)},
            model_folder(arguments),
            arguments.data,
            arguments.examples,
        ),
    }


@torch.inference_mode()
def _schemes(model: LanguageModel, texts: list[list[int]], following: Tensor) -> list[dict[str, Any]]:
    batch = PackedBatch.of_sequences(texts, logit_rows=following.nonzero().flatten().tolist())
    exact = model.forward(batch)
    rows: list[dict[str, Any]] = []
    for what, scheme in SCHEMES.items():
        with rounded_linears(model.module, scheme):
            changed = model.forward(batch)
        right, found = (logits.log_softmax(-1) for logits in (exact, changed))
        divergence = (right.exp() * (right - found)).sum(-1).mean()
        effect = _effect(exact, changed, batch, following)
        rows.append({"rounded": what, "divergence": round(float(divergence), 4)} | effect)
    return rows


def _effect(exact: Tensor, changed: Tensor, batch: PackedBatch, following: Tensor) -> dict[str, float]:
    difference = (changed - exact).abs()
    spread = exact.amax(dim=-1) - exact.amin(dim=-1)
    figures: dict[str, Any] = {
        "logit_difference_max": difference.max(),
        "logit_difference_mean": difference.mean(),
        "difference_max_of_range": (difference.amax(dim=-1) / spread).max(),
        "greedy_tokens_changed": (exact.argmax(-1) != changed.argmax(-1)).float().mean(),
        "nll_exact": _nll(exact, batch, following),
        "nll": _nll(changed, batch, following),
    }
    return {name: round(float(figure), 4) for name, figure in figures.items()}


def _nll(logits: Tensor, batch: PackedBatch, following: Tensor) -> float:
    """Mean negative log-likelihood of the text's own next tokens."""
    targets = batch.ids.roll(-1)[following].view(-1, FOLLOWING)[:, :-1]
    logits = logits.view(-1, FOLLOWING, logits.shape[-1])[:, :-1]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()))


def _through_int8(states: Tensor) -> Tensor:
    raws: list[Any] = [part.view(torch.uint8).numpy() for part in quantise(states.cpu())]
    data, scales = (memoryview(raw).cast("B") for raw in raws)
    raw = dequantise(data, scales, (states.shape[1], states.shape[2]), states.dtype)
    return torch.frombuffer(bytearray(raw), dtype=states.dtype).view(states.shape).to(states.device)


def _texts(tokenizer: Tokenizer, count: int) -> list[list[int]]:
    """`count` stretches of the examples' texts, from places spread evenly over them."""
    files = sorted((ROOT / "examples").rglob("*.md")) + sorted((ROOT / "examples").rglob("*.json"))
    ids = [i for file in files for i in tokenizer.encode_continuation(file.read_text(encoding="utf-8"))]
    length = PROMPT + FOLLOWING
    return [ids[k * (len(ids) - length) // count :][:length] for k in range(count)]


def plot(result: dict[str, Any], figure: Any) -> None:
    rows = result["rows"][::-1]
    scores = [row for row in result.get("scores", ()) if row["interval"]]
    names = [row["rounded"] for row in rows]
    figure.set_size_inches(13, 4.5)
    left, right, *behind = figure.subplots(1, 3 if scores else 2)
    left.barh(names, [100 * row["difference_max_of_range"] for row in rows])
    left.set(xlabel="% of the logits' range", title="a logit, at most")
    right.barh(names, [100 * row["greedy_tokens_changed"] for row in rows])
    right.set(xlabel="% changed", title="greedy tokens", yticklabels=[])
    for at in behind:
        tasks = [f"{row['task']}, {row['weights']}" for row in scores]
        at.barh(tasks, [row["difference"] for row in scores])
        for place, row in enumerate(scores):
            at.plot(row["between"], [place, place], color="black")
        at.set(xlabel="points; 95% lie on the line", title="score, less bf16's")
        at.margins(x=0.1)
        at.invert_yaxis()
