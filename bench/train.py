"""How fast `prad train` is: tokens per second of a step, on the examples of a task.

A step is forward, backward and AdamW on one packed batch, as in `prad train`, without evaluations. Beside it,
in the same rounds and on the same examples:

    gemms   what no way of training an adapter can do without: each frozen projection by the batch's rows,
            once forward and once backward (towards its input; frozen weights need no gradient of their own),
            and the LM head for the rows that have a label; torch's, in the model's dtype
    PEFT    LoRA on q and v by PEFT in transformers' own model, padded batches: a plain eager step

    prad bench train --data DIR/sentiment_movie
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from bench.flags_of_training import Train
from bench.model import model_folder
from bench.rounds import interleaved, ratio, seconds
from prad.adapters import METHODS, find_method, new_adapter, reparametrised
from prad.artefact import AdapterRecord, BaseModelRef
from prad.lm import LanguageModel, Tokenizer
from prad.training.data import collate, read_examples, tokenise
from prad.training.objective import AdapterTuning, CompletionLoss, FullTuning, Positions

FLOOR, PEFT, FULL = "gemms", "PEFT: LoRA", "full"
_BATCHES = 4
_SHOWN = 12  # operations of the profile

Batch = dict[str, Tensor]


def run(arguments: Train) -> dict[str, Any]:
    folder, methods = model_folder(arguments), arguments.methods or list(METHODS)
    model = LanguageModel.load(folder, device=arguments.device)
    batches = _batches(arguments, Tokenizer(folder), model.device)
    tokens = [int(batch["ids"].numel()) for batch in batches]
    steps: dict[str, Callable[[Batch], object]] = {FLOOR: _gemms(model, batches)}
    for method in methods:
        steps[method] = _step(_tuning(model, method, "prompt"))
    steps["LoRA, all positions"] = _step(_tuning(model, "prad-lora", "all"))
    if not arguments.smoke:
        whole = LanguageModel.load(folder, dtype=torch.float32, device=arguments.device)
        steps[FULL] = _step(FullTuning(whole, torch.bfloat16))
    steps[PEFT] = _peft_step(folder, model.device)
    took = interleaved(
        {name: seconds(_next(step, batches)) for name, step in steps.items()}, arguments.rounds, "steps"
    )
    return {
        "model": arguments.model,
        "data": arguments.data.name,
        "examples": arguments.batch,
        "tokens": tokens,
        "steps": [
            {
                "variant": name,
                "ms": round(1e3 * took[name], 1),
                "tokens_per_second": round(_rate(took.values[name], tokens)),
                "of_gemms": round(ratio(took.values[name], took.values[FLOOR]), 2),
                "of_peft": round(ratio(took.values[PEFT], took.values[name]), 2),
                "rounds_ms": [round(1e3 * value, 1) for value in took.values[name]],
            }
            for name in steps
        ],
        "profile": _profile(lambda: steps[methods[0]](batches[0])),
    }


def _rate(took: Sequence[float], tokens: Sequence[int]) -> float:
    """Tokens per second: the median of the rounds, of which the first one's batch is the second."""
    return statistics.median(tokens[i % len(tokens)] / s for i, s in enumerate(took, start=1))


def _next(step: Callable[[Batch], object], batches: Sequence[Batch]) -> Callable[[], None]:
    """A step on the next batch. All variants meet the same one in a round."""
    number = 0

    def once() -> None:
        nonlocal number
        step(batches[number % len(batches)])
        number += 1

    return once


def _batches(arguments: Train, tokenizer: Tokenizer, device: torch.device) -> list[Batch]:
    record = AdapterRecord(
        method="none", config={}, base=BaseModelRef(name=arguments.model, architecture="", weights="")
    )
    count = arguments.batch * _BATCHES
    examples = tokenise(
        read_examples(arguments.data / "train.jsonl", count),
        tokenizer,
        record,
        context=512,
    )
    return [
        {name: tensor.to(device) for name, tensor in collate(examples[i : i + arguments.batch]).items()}
        for i in range(0, count, arguments.batch)
    ]


def _tuning(model: LanguageModel, name: str, positions: Positions) -> CompletionLoss:
    method = find_method(name)
    adapter = new_adapter(method, method.configure({}), model, 0)
    derived = reparametrised(adapter, model, 0)
    return AdapterTuning(model, adapter, positions, derived).to(model.device)


def _step(module: CompletionLoss) -> Callable[[Batch], None]:
    optimiser = torch.optim.AdamW(module.parameters(), lr=1e-4, weight_decay=0.0)
    template = module.adapter if isinstance(module, AdapterTuning) else None
    virtual = 0 if template is None else template.virtual_tokens

    def once(batch: Batch) -> None:
        module(**_behind(batch, virtual))["loss"].backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()

    return once


def _behind(batch: Batch, virtual: int) -> Batch:
    """The batch with so many virtual tokens in front of each prompt."""
    if not virtual:
        return batch
    lengths = batch["lengths"]
    ids = [torch.cat((own.new_zeros(virtual), own)) for own in _cut(batch["ids"], lengths.tolist())]
    owners = torch.repeat_interleave(torch.arange(len(ids), device=lengths.device), lengths)
    return batch | {
        "ids": torch.cat(ids),
        "lengths": lengths + virtual,
        "prompt_lengths": batch["prompt_lengths"] + virtual,
        "label_rows": batch["label_rows"] + virtual * (owners[batch["label_rows"]] + 1),
    }


def _cut(whole: Tensor, lengths: list[int]) -> tuple[Tensor, ...]:
    return whole.split(lengths)  # type: ignore[no-untyped-call, no-any-return]


def _gemms(model: LanguageModel, batches: Sequence[Batch]) -> Callable[[Batch], None]:
    """The floor: products only."""
    whole: Any = model.module
    head = whole.get_output_embeddings()
    weights = [m.weight for m in whole.modules() if isinstance(m, nn.Linear) and m is not head]
    assert weights, "no projections that are nn.Linear: this floor is not theirs"

    def once(batch: Batch) -> None:
        rows = {id(w): len(batch["ids"]) for w in weights} | {id(head.weight): len(batch["labels"])}
        with torch.no_grad():
            for weight in (*weights, head.weight):
                states = weight.new_zeros(rows[id(weight)], weight.shape[1])
                out = states @ weight.T
                out @ weight

    return once


def _peft_step(folder: Path, device: torch.device) -> Callable[[Batch], None]:
    from peft import LoraConfig, get_peft_model

    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device)
    targets = LoraConfig(r=16, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    module: Any = get_peft_model(plain, targets).train()
    optimiser = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-4)

    def once(batch: Batch) -> None:
        padded = _padded(batch)
        module(**padded).loss.backward()
        nn.utils.clip_grad_norm_([p for p in module.parameters() if p.requires_grad], 1.0)
        optimiser.step()
        optimiser.zero_grad()

    return once


def _padded(batch: Batch) -> Batch:
    """As transformers wants it: [examples, longest], completions as labels."""
    lengths, prompts = batch["lengths"].tolist(), batch["prompt_lengths"].tolist()
    own = _cut(batch["ids"], lengths)
    labels = _cut(batch["labels"], [n - p + 1 for n, p in zip(lengths, prompts, strict=True)])
    pad = nn.utils.rnn.pad_sequence
    whole = [torch.cat((ids, last[-1:])) for ids, last in zip(own, labels, strict=True)]
    wanted = [
        torch.cat((ids.new_full((p,), -100), label))
        for ids, p, label in zip(own, prompts, labels, strict=True)
    ]
    return {
        "input_ids": pad(whole, batch_first=True),
        "attention_mask": pad([torch.ones_like(ids) for ids in whole], batch_first=True),
        "labels": pad(wanted, batch_first=True, padding_value=-100),
    }


def _profile(step: Callable[[], object]) -> list[dict[str, Any]]:
    """Where a step's time goes: the operations that take most, by their own time."""
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU]) as profiler:
        step()
    averages = [e for e in profiler.key_averages() if e.self_cpu_time_total > 0]
    total = sum(e.self_cpu_time_total for e in averages)
    averages.sort(key=lambda e: -e.self_cpu_time_total)
    shown = [(e.key, e.count, e.self_cpu_time_total) for e in averages[:_SHOWN]]
    rest = averages[_SHOWN:]
    shown.append(("everything else", sum(e.count for e in rest), sum(e.self_cpu_time_total for e in rest)))
    return [
        {"operation": name, "calls": calls, "ms": round(us / 1e3, 1), "share": f"{us / total:.0%}"}
        for name, calls, us in shown
    ]


def plot(result: Mapping[str, Any], figure: Any) -> None:
    axes = figure.subplots()
    rows = result["steps"][::-1]
    axes.barh([row["variant"] for row in rows], [row["tokens_per_second"] for row in rows])
    axes.set(xlabel="tokens per second", title="A training step")
