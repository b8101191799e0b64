"""What 8-bit keys and values on the wire do to the logits.

Prompts are texts of examples/, cut into 64 tokens of prompt and 32 that follow. The tokens that follow are
fed as they are written, once against the prompt's exact KV cache and once against what int8 leaves of it;
prompt tokens themselves always see exact keys and values, as in the prefill service.
"""

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.model import add_model_arguments, load, model_folder
from bench.record import ROOT
from kvtransfer.int8 import dequantise, quantise
from prad.lm import PackedBatch, Tokenizer
from prad.lm.attention import Ragged, causal_attention

PROMPT, FOLLOWING = 64, 32
SMOKE = {"tokens": FOLLOWING}


@dataclass(frozen=True)
class CodedPrompts:
    """A KVTarget: rows that follow a prompt see its keys and values as int8 leaves them.

    in_prompt [T]: which rows are a prompt's.
    """

    ragged: Ragged
    in_prompt: Tensor

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
    ) -> Tensor:
        prompt = self.in_prompt[:, None, None]
        exact = causal_attention(query, key, value, self.ragged, scale, window)
        coded = (torch.where(prompt, _through_int8(states), states) for states in (key, value))
        return torch.where(prompt, exact, causal_attention(query, *coded, self.ragged, scale, window))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--tokens", type=int, default=512, help="teacher-forced tokens")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    model = load(arguments)
    texts = _texts(Tokenizer(model_folder(arguments)), -(-arguments.tokens // FOLLOWING))
    following = torch.arange(PROMPT + FOLLOWING, device=model.device).repeat(len(texts)) >= PROMPT
    rows = following.nonzero().flatten().tolist()
    batch = PackedBatch.of_sequences(texts, device=model.device, logit_rows=rows)
    ragged = Ragged.of([len(text) for text in texts], model.device)
    coded = PackedBatch(batch.ids, batch.positions, CodedPrompts(ragged, ~following), batch.logit_rows)
    with torch.inference_mode():
        exact, changed = model.forward(batch).float(), model.forward(coded).float()
    difference = (changed - exact).abs()
    spread = exact.amax(dim=-1) - exact.amin(dim=-1)
    return {
        "model": arguments.model,
        "dtype": str(model.dtype).removeprefix("torch."),
        "tokens": len(exact),
        "rows": [
            {
                "encoding": "int8",
                "logit_difference_max": round(float(difference.max()), 4),
                "logit_difference_mean": round(float(difference.mean()), 4),
                "difference_max_of_range": round(float((difference.amax(dim=-1) / spread).max()), 4),
                "greedy_tokens_changed": round(
                    float((exact.argmax(-1) != changed.argmax(-1)).float().mean()), 4
                ),
                "nll_exact": round(_nll(exact, batch, following), 4),
                "nll": round(_nll(changed, batch, following), 4),
            }
        ],
    }


def _nll(logits: Tensor, batch: PackedBatch, following: Tensor) -> float:
    """Mean negative log-likelihood of the text's own next tokens."""
    targets = batch.ids.roll(-1)[following].view(-1, FOLLOWING)[:, :-1]
    logits = logits.view(-1, FOLLOWING, logits.shape[-1])[:, :-1]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()))


def _through_int8(states: Tensor) -> Tensor:
    data, scales = (memoryview(part.view(torch.uint8).numpy()).cast("B") for part in quantise(states.cpu()))
    raw = dequantise(data, scales, (states.shape[1], states.shape[2]), states.dtype)
    return torch.frombuffer(bytearray(raw), dtype=states.dtype).view(states.shape).to(states.device)


def _texts(tokenizer: Tokenizer, count: int) -> list[list[int]]:
    """`count` stretches of the examples' texts, from places spread evenly over them."""
    files = sorted((ROOT / "examples").rglob("*.md")) + sorted((ROOT / "examples").rglob("*.json"))
    ids = [i for file in files for i in tokenizer.encode_continuation(file.read_text())]
    length = PROMPT + FOLLOWING
    return [ids[k * (len(ids) - length) // count :][:length] for k in range(count)]
