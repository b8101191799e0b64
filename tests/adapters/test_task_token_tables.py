"""The table of a task token: how it begins, in every family's own scale, and what is refused on load or by a
probe."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from prad.adapters import (
    AdapterError,
    ParameterMismatchError,
    PromptAdaptation,
    find_method,
    first_embeddings,
    load_adapter,
    new_adapter,
    require_free_names,
    split_task_tokens,
)
from prad.artefact import WEIGHTS, Artefact, read_artefact, write_record
from prad.lm import LanguageModel, PackedBatch, Tokenizer
from prad.lm.kernels import Kernels
from prad.lm.kv import Pools
from prefill_service.passes import run_prompt_pass
from prefill_service.probing import probe_prompt
from tests.conftest import random_artefact

TEMPLATE, NAMES = "<|one|> {prompt} <|two|>", ("<|one|>", "<|two|>")
PROMPT = [-1, 5, 80, -2, 7, -1]


def with_tokens(folder: Path, model: LanguageModel, method: str = "prad-pa") -> Artefact:
    return random_artefact(folder, model, 1, method=method, config={}, template=TEMPLATE, task_tokens=NAMES)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "opt", "gpt-neox"])
def test_one_that_begins_as_a_word_is_that_word(
    family: str, fused: bool, tiny_model: Callable[[str], Path], kernels: Kernels
) -> None:
    """A fresh adapter changes nothing else. Gemma 3 scales embeddings, GPT-2 and OPT add positions."""
    model, tokenizer = (
        LanguageModel.load(tiny_model(family), dtype=torch.float32),
        Tokenizer(tiny_model(family)),
    )
    if fused:
        model.accelerate(kernels)
    method = find_method("prad-pa")
    first = first_embeddings(["t40", "t50"], tokenizer, model)
    adapter = new_adapter(method, method.configure({}), model, 0, first)
    table = adapter.task_embeddings
    assert table is not None
    ids, task_rows = split_task_tokens([table], [PROMPT], "cpu")
    adaptation = PromptAdaptation.of_prompts([adapter], [6], [6], "cpu", model.kernels, task_rows=task_rows)
    with torch.inference_mode():
        found = model.forward(PackedBatch.of_sequences(ids), adaptation)
        expected = model.forward(PackedBatch.of_sequences([[40, 5, 80, 50, 7, 40]]))
        without = model.forward(PackedBatch.of_sequences(ids))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(without, expected, atol=1e-2)


def test_they_begin_as_means(
    tiny_model: Callable[[str], Path], load_tiny: Callable[[str], LanguageModel]
) -> None:
    model, tokenizer = load_tiny("llama"), Tokenizer(tiny_model("llama"))
    weight = model.module.get_parameter("model.embed_tokens.weight")
    words, every = first_embeddings(["t3 t9", None], tokenizer, model)
    torch.testing.assert_close(words, (weight[3] + weight[9]) / 2)
    torch.testing.assert_close(every, weight.mean(dim=0))
    with pytest.raises(AdapterError, match="a task token cannot begin as ' ': these are no words"):
        first_embeddings([" "], tokenizer, model)


def test_blank_words_are_none_even_if_a_space_is_a_token(
    tiny_model: Callable[[str], Path],
    load_tiny: Callable[[str], LanguageModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = Tokenizer(tiny_model("llama"))
    monkeypatch.setattr(tokenizer, "encode_continuation", lambda _: [3])
    first_embeddings(["t3"], tokenizer, load_tiny("llama"))
    for blank in ("", " \t"):
        with pytest.raises(AdapterError, match="these are no words"):
            first_embeddings([blank], tokenizer, load_tiny("llama"))


@pytest.mark.parametrize(
    "method", ["prad-pa", "prad-lora", "prad-dora", "prad-prefix", "prad-prompt", "para"]
)
def test_what_was_saved_is_loaded_beside_any_methods_own(
    method: str, load_tiny: Callable[[str], LanguageModel], tmp_path: Path
) -> None:
    artefact = with_tokens(tmp_path / "a", load_tiny("llama"), method)
    loaded = load_adapter(artefact, load_tiny("llama"))
    stored = load_file(artefact.weights)
    assert loaded.task_embeddings is not None
    assert torch.equal(loaded.task_embeddings, stored["input.task_tokens"])
    alone = load_adapter(
        random_artefact(tmp_path / "b", load_tiny("llama"), 1, method=method, config={}), load_tiny("llama")
    )
    assert alone.task_embeddings is None
    assert alone.own_names == loaded.own_names, "they share a group"
    assert loaded.nbytes == alone.nbytes + 2 * 48 * 4
    assert artefact.nbytes(4) == sum(tensor.nbytes for tensor in stored.values())


def test_a_table_that_does_not_fit_quotes_both(
    load_tiny: Callable[[str], LanguageModel], tmp_path: Path
) -> None:
    model = load_tiny("llama")
    artefact = with_tokens(tmp_path / "a", model)
    tensors = load_file(artefact.weights)
    table = tensors.pop("input.task_tokens")
    for wrong, found in (
        ({"input.task_tokens": table[:1].contiguous()}, r"\(1, 48\)"),
        ({"input.task_tokens": table[:, :40].contiguous()}, r"\(2, 40\)"),
        ({}, "none"),
    ):
        save_file(tensors | wrong, artefact.folder / WEIGHTS)
        with pytest.raises(
            ParameterMismatchError, match=rf"input\.task_tokens: expected \(2, 48\), the file has {found}"
        ):
            load_adapter(read_artefact(artefact.folder), model)
    save_file(tensors | {"input.task_tokens": table / 0}, artefact.folder / WEIGHTS)
    with pytest.raises(ParameterMismatchError, match=r"input\.task_tokens: expected finite"):
        load_adapter(read_artefact(artefact.folder), model)
    save_file(tensors | {"input.task_tokens": table}, artefact.folder / WEIGHTS)
    write_record(artefact.folder, artefact.record.model_copy(update={"task_tokens": ()}))
    with pytest.raises(
        ParameterMismatchError, match=r"input\.task_tokens: expected none, the file has \(2, "
    ):
        load_adapter(read_artefact(artefact.folder), model)


def test_a_probe_reads_the_whole_table(load_tiny: Callable[[str], LanguageModel], tmp_path: Path) -> None:
    """Whatever becomes infinite on the way: the logits of the version's probe tell."""
    model = load_tiny("llama")
    artefact = with_tokens(tmp_path / "a", model)
    adapter, pools = load_adapter(artefact, model), Pools(model.layout, 1, 16, "cpu")
    for broken in (None, 0, 1):
        table = adapter.parameters["input.task_tokens"].clone()
        if broken is not None:
            table[0, broken] = torch.inf
        tried = replace(adapter, parameters=adapter.parameters | {"input.task_tokens": table})
        item = probe_prompt(model.vocab_size, artefact.record, tried)
        first = run_prompt_pass(model, pools, [item.as_chunk()])[item]
        assert (first is None) == (broken is not None)


def test_a_name_of_the_base_models_is_refused(
    tiny_model: Callable[[str], Path], load_tiny: Callable[[str], LanguageModel], tmp_path: Path
) -> None:
    """Of a task token; an end token is text, which may be that of the base's own EOS."""
    record = with_tokens(tmp_path / "a", load_tiny("llama")).record
    require_free_names(record, Tokenizer(tiny_model("llama")))
    known = Tokenizer(tiny_model("llama"))
    known._tokenizer.add_tokens(["<|two|>"], special_tokens=True)
    known.save(tmp_path / "known")
    with pytest.raises(AdapterError, match=r"<\|two\|> is a token of the base model"):
        require_free_names(record, Tokenizer(tmp_path / "known"))
    ending = record.model_copy(update={"task_tokens": (), "end_token": "<|two|>"})
    require_free_names(ending, Tokenizer(tmp_path / "known"))
