"""A stack whose prefill rounds its weights and whose decode does not: first tokens are drawn from the rounded
model's logits with the adapters on top of it, and the answers go on.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from prad.adapters import METHODS, load_adapter
from prad.artefact import read_artefact
from prad.core.sampling import SamplingParams
from prad.lm import LanguageModel
from prad.lm.kernels import Kernels, Precision
from prad.lm.kv import Pools
from prefill_service.passes import prompt_logits
from prefill_service.prompt import Prompt, PromptRequest
from tests.conftest import GROUPED, SIZES, StackMaker, random_artefact, randomised, save_model
from tests.oracle.comparing import Served, body, served
from tests.oracle.test_oracle import SETTINGS

WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
TASKS: tuple[str | None, ...] = (*METHODS, None)
TOKENS = 6


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose widths have blocks of 4 bits, with an adapter of every method."""
    folder = tmp_path_factory.mktemp("rounded")
    save_model(randomised(LlamaConfig(**SIZES | GROUPED | WIDE), 1), folder / "model")
    model = LanguageModel.load(folder / "model")
    for seed, method in enumerate(METHODS):
        config = SETTINGS.get(method, {})
        random_artefact(folder / "adapters" / method, model, seed, method=method, config=config)
    return folder


def ids(task: str | None) -> list[int]:
    number = TASKS.index(task)
    return [(7 * number + 13 * j + j * j) % 119 for j in range(9 + 3 * number)]


def loaded(root: Path, kernels: Kernels, weights: Precision) -> LanguageModel:
    model = LanguageModel.load(root / "model")
    model.accelerate(kernels, weights)
    return model


def first_logits(root: Path, model: LanguageModel, task: str | None) -> Tensor:
    """[vocab], of this process."""
    adapter = None if task is None else load_adapter(read_artefact(root / "adapters" / task), model)
    prompt = Prompt(PromptRequest("p", None, tuple(ids(task)), SamplingParams(max_tokens=1)), adapter)
    pools = Pools(model.layout, 1, 16, "cpu", model.kernels)
    with torch.inference_mode():
        return prompt_logits(model, pools, [prompt.as_chunk()])[0][0]


def off(answer: Served, logits: Tensor) -> float:
    """The largest difference of a first token's log-probability, of the logits' range."""
    expected = logits.log_softmax(-1)
    worst = max(abs(float(expected[i]) - p) for i, p in answer.logprobs[0].items())
    return worst / float(logits.max() - logits.min())


@pytest.mark.parametrize("weights", ["int8", pytest.param("int4", marks=pytest.mark.long)])
def test_prefill_rounds_and_decode_does_not(
    weights: Precision, root: Path, kernels: Kernels, tmp_path: Path, running_stack: StackMaker
) -> None:
    rounding = {"dtype": "bfloat16", "weights": weights}
    with running_stack(
        root / "model", root / "adapters", tmp_path, prefill=rounding, dtype="bfloat16"
    ) as running:

        def ask(task: str | None) -> Served:
            return served(running.api.post("/v1/completions", json=body(ids(task), task, TOKENS)))

        alone = {task: ask(task) for task in TASKS}
        with ThreadPoolExecutor(len(TASKS)) as pool:
            together = list(pool.map(ask, TASKS))
        said = {service.name: service.log.read_text(encoding="utf-8") for service in running.stack.services}
    assert {len(answer.tokens) for answer in together} == {TOKENS}
    models = loaded(root, kernels, weights), loaded(root, kernels, "full")
    for task, answer in alone.items():
        rounded, exact = (first_logits(root, model, task) for model in models)
        assert off(answer, rounded) < 1e-5, task
        assert off(answer, exact) > 1e-4, f"nothing was rounded for {task}"
    for name, has in (("prefill", weights), ("decode", "full")):
        assert f"the kernels compute all of the model, weights {has}" in said[name]
    kept = {path.name.split("-")[2] for path in (tmp_path / "cache" / "packed").iterdir() if path.is_dir()}
    assert kept == {weights, "full"}
