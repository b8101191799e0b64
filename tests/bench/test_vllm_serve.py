"""`vllm bench serve`, asked by our benchmark: what it makes of reports; a long test runs all of it."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from bench.flags import VllmServe
from bench.peer import PeerError
from bench.pictures import drawn
from bench.runner import run
from bench.vllm_serve import Report, rows
from prad.lm.kernels.build import built
from tests.bench.test_pictures import assert_readable
from tests.cache import CACHE
from tests.conftest import SIZES, randomised, save_model
from tests.outside.clients import interpreter

NAMES = ["PrAd server, no adapters", "PrAd server, 64 tasks, PrAd-LoRA", "vLLM, no adapters"]


def report(tokens_per_s: float, ms: float) -> Report:
    kinds = {
        f"{part}_{kind}_ms": ms for part in ("mean", "median", "p99") for kind in ("ttft", "tpot", "itl")
    }
    whole = {"output_throughput": tokens_per_s, "duration": 4096 / tokens_per_s, "total_input_tokens": 4096}
    return kinds | whole


def test_servers_are_compared_by_rounds() -> None:
    found = rows(
        {
            NAMES[0]: [report(400, 10), report(100, 30), report(300, 20)],
            NAMES[2]: [report(200, 40), report(100, 80), report(100, 60)],
        }
    )
    assert [row["times_vllm"] for row in found] == [2.0, 1.0]  # of medians it would be 3
    assert [row["tokens_per_s"] for row in found] == [300, 100]
    assert [row["ttft_ms"]["p99"] for row in found] == [20, 60]
    assert found[0]["rounds_tokens_per_s"] == [400, 100, 300]


def test_its_picture_can_be_read() -> None:
    setting = {"commit": "0123abc", "when": "2026-11-29T20:00:00", "cpu": "2 x some CPU"}
    found = rows({name: [report(1234.5, 98765)] for name in NAMES})
    figure = drawn("vllm_serve", {"rows": found, "setting": setting})
    assert_readable(figure)


def test_an_interpreter_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match="there is no interpreter"):
        run("vllm_serve", VllmServe(smoke=True, out=tmp_path, vllm_python=tmp_path / "no-python"))


@pytest.mark.long
@pytest.mark.timeout(2400)  # vLLM compiles for minutes
def test_both_servers_answer_it(tmp_path: Path) -> None:
    """Of a model with heads that vLLM knows."""
    python = Path(interpreter("VLLM"))
    heads = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    save_model(randomised(LlamaConfig(**SIZES | heads), seed=1).to(torch.bfloat16), tmp_path / "model")
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "kernels").symlink_to(built(CACHE).parent)
    told = VllmServe(
        smoke=True, out=tmp_path, model=str(tmp_path / "model"), cache_dir=cache, vllm_python=python
    )
    result = json.loads(run("vllm_serve", told).read_text(encoding="utf-8"))
    ours = "PrAd server, no adapters", "PrAd server, one task, PrAd-LoRA", "PrAd server, 2 tasks, PrAd-LoRA"
    assert [row["name"] for row in result["rows"]] == [*ours, "vLLM, no adapters"]
    assert {row["input_tokens"] for row in result["rows"]} == {2 * 8}
    assert "torch" in result["peers"]["vLLM"]
