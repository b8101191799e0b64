"""A packed model on disk: the same model to the bit, opened without what made it, and never a stale one."""

import errno
import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from filelock import FileLock
from tiny import SIZES, packed_logits, save_random, some_ids

from prad.adapters.method import FrozenModel
from prad.lm import LanguageModel, Tokenizer, UnsupportedModelError, placements, projection
from prad.lm.errors import ModelNotFoundError
from prad.lm.kernels import Kernels, Precision
from prad.lm.kernels.build import built
from prad.lm.kv import Pools
from prad.lm.packed import PackedModel
from prad.lm.serving import accelerated
from tests.cache import CACHE

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {"sliding_window": 8}),
    "qwen2": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
    "qwen3": ("Qwen3Config", {"head_dim": 16, "num_hidden_layers": 12}),  # layer 10 is not behind layer 1
    "gpt2": ("GPT2Config", {"n_inner": 96}),
}
SEQUENCES = [some_ids(length, length) for length in (5, 1, 70)]

Opened = Callable[..., LanguageModel]


@pytest.fixture
def opened(tmp_path: Path, kernels: Kernels) -> Opened:
    """A model of `tmp_path / "model"` as it is served."""

    def served(precision: Precision = "full", dtype: torch.dtype = torch.float32) -> LanguageModel:
        return accelerated(tmp_path / "model", tmp_path / "cache", dtype, kernels, precision)

    return served


def save(tmp_path: Path, family: str, **special: Any) -> Path:
    name, own = FAMILIES[family]
    return save_random(getattr(transformers, name)(**SIZES | own | special), tmp_path / "model")


def kept_in(tmp_path: Path) -> Path:
    (folder,) = (path for path in (tmp_path / "cache" / "packed").iterdir() if path.is_dir())
    return folder


def halved(folder: Path) -> None:
    """Its weights in bfloat16."""
    module = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    module.save_pretrained(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_model_to_the_bit(family: str, tmp_path: Path, opened: Opened, kernels: Kernels) -> None:
    folder = save(tmp_path, family)
    loaded = LanguageModel.load(folder, dtype=torch.float32)
    loaded.accelerate(kernels)
    for model in (opened(), opened()):
        assert isinstance(model, PackedModel)
        assert model.fingerprint == loaded.fingerprint
        assert (model.max_context, model.state_widths) == (loaded.max_context, loaded.state_widths)
        assert (model.vocab_size, model.stop_ids(folder)) == (loaded.vocab_size, loaded.stop_ids(folder))
        for ours, expected in zip(
            packed_logits(model, SEQUENCES), packed_logits(loaded, SEQUENCES), strict=True
        ):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("precision", ["full", "int8", "int4"])
def test_every_precision(precision: Precision, tmp_path: Path, opened: Opened, kernels: Kernels) -> None:
    folder = save(tmp_path, "tied", hidden_size=64, intermediate_size=96)
    halved(folder)
    loaded = LanguageModel.load(folder, dtype=torch.bfloat16)
    loaded.accelerate(kernels, precision)
    sequences = [some_ids(length, length) for length in (5, 1, 20)]  # as many rows as any CPU's kernels take
    expected = packed_logits(loaded, sequences)
    for model in (opened(precision, torch.bfloat16), opened(precision, torch.bfloat16)):
        assert isinstance(model, PackedModel)
        assert all(map(torch.equal, packed_logits(model, sequences), expected))


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_find_what_they_look_up(family: str, tmp_path: Path, opened: Opened) -> None:
    loaded, model = LanguageModel.load(save(tmp_path, family), dtype=torch.float32), opened()
    kind = model.config.model_type
    there, here = (list(placements(each.frozen, kind)) for each in (loaded, model))
    assert [place[:3] for place in here] == [place[:3] for place in there]
    for layer, site, _, outputs in here:
        if outputs is not None:
            for ours, its in zip(
                *(projection(m.frozen, kind, layer, site) for m in (model, loaded)), strict=True
            ):
                assert (ours is None) == (its is None)
                assert ours is None or its is None or torch.equal(ours, its)
    ours, its = FrozenModel(model), FrozenModel(loaded)
    assert ours.embedding_width == its.embedding_width
    assert torch.equal(ours.embeddings([3, 1]), its.embeddings([3, 1]))


def test_what_made_it_is_loaded_when_somebody_asks(tmp_path: Path, opened: Opened, kernels: Kernels) -> None:
    save(tmp_path, "llama")
    opened()
    model = opened()
    with pytest.raises(UnsupportedModelError, match="bfloat16 models"):
        model.accelerate(kernels, "int8")
    assert model.module.get_submodule("model.layers.0.mlp").__class__.__name__ == "LlamaMLP"
    model.accelerate(kernels)
    assert Pools(model.layout, 1, 16, "cpu").layout == model.layout


def test_another_models_files_are_never_served_by_it(tmp_path: Path, opened: Opened) -> None:
    folder = save(tmp_path, "llama")
    before, kept = opened(), opened()
    save(tmp_path, "llama", rms_norm_eps=0.1)
    weight = transformers.AutoModelForCausalLM.from_pretrained(folder)
    weight.model.norm.weight.data.add_(1)
    weight.save_pretrained(folder)
    after = opened()
    assert before.fingerprint == kept.fingerprint != after.fingerprint
    expected = packed_logits(LanguageModel.load(folder, dtype=torch.float32), SEQUENCES)
    torch.testing.assert_close(packed_logits(after, SEQUENCES), expected)
    with pytest.raises(ModelNotFoundError, match="has changed since"):
        _ = kept.module
    assert all(map(torch.equal, packed_logits(kept, SEQUENCES), packed_logits(before, SEQUENCES)))


@pytest.mark.parametrize("then", ["other weights", "another model", "gone"])
def test_adapters_look_up_no_other_models_weights(then: str, tmp_path: Path, opened: Opened) -> None:
    folder = save(tmp_path, "llama")
    opened()
    used, kept = opened(), opened()
    weight = "model.layers.0.self_attn.q_proj.weight"
    before = used.frozen.get_parameter(weight).clone()
    shutil.rmtree(folder)
    if then == "other weights":
        save(tmp_path, "llama", initializer_range=0.5)
    if then == "another model":
        save(tmp_path, "gpt2")
    assert torch.equal(used.frozen.get_parameter(weight), before), "they were mapped before"
    with pytest.raises(ModelNotFoundError, match=r"has changed since .* start it again"):
        _ = kept.frozen


def test_what_changes_while_it_is_packed_is_not_kept(
    tmp_path: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tmp_path, "llama")
    accelerate = LanguageModel.accelerate

    def meanwhile(model: LanguageModel, *given: Any) -> None:
        accelerate(model, *given)
        (folder / "config.json").touch()

    with monkeypatch.context() as patched:
        patched.setattr(LanguageModel, "accelerate", meanwhile)
        assert not isinstance(opened(), PackedModel)
    assert isinstance(opened(), PackedModel)


@pytest.mark.parametrize("lacking", ["config", "weights", "both", "a link's end"])
def test_a_folder_without_a_model_is_called_so(lacking: str, tmp_path: Path, opened: Opened) -> None:
    folder = save(tmp_path, "llama")
    (weights,) = folder.glob("*.safetensors")
    for path in {"config": [folder / "config.json"], "both": [folder / "config.json", weights]}.get(
        lacking, [weights]
    ):
        path.unlink()
    if lacking == "a link's end":
        weights.symlink_to(tmp_path / "nothing")
    with pytest.raises(ModelNotFoundError, match=str(folder)):
        opened()


@pytest.mark.parametrize("damage", ["page", "weights", "neither"])
def test_what_is_not_whole_is_packed_anew(damage: str, tmp_path: Path, opened: Opened) -> None:
    save(tmp_path, "llama")
    expected = packed_logits(opened(), SEQUENCES)
    folder = kept_in(tmp_path)
    if damage == "page":
        (folder / "model.json").write_text("{", encoding="utf-8")
    if damage == "weights":
        os.truncate(folder / "weights.bin", 1000)
    model = opened()
    assert isinstance(model, PackedModel)
    assert all(map(torch.equal, packed_logits(model, SEQUENCES), expected))


@pytest.mark.parametrize("what", ["packed", "folder", "model.json", "weights.bin"])
@pytest.mark.parametrize("how", ["mode", "owner"])
def test_what_others_may_have_written_is_not_served(
    what: str, how: str, tmp_path: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, "llama")
    expected = packed_logits(opened(), SEQUENCES)
    folder = kept_in(tmp_path)
    path = {"packed": folder.parent, "folder": folder}.get(what, folder / what)
    if how == "mode":
        path.chmod(path.stat().st_mode | 0o020)
    else:
        found, its = Path.stat, path.stat()
        theirs = os.stat_result((*its[:4], os.getuid() + 1, *its[5:]))
        monkeypatch.setattr(Path, "stat", lambda self, **how: theirs if self == path else found(self, **how))
    model = opened()
    assert not isinstance(model, PackedModel)
    assert all(map(torch.equal, packed_logits(model, SEQUENCES), expected))


def test_what_is_kept_is_ours_whatever_the_umask(tmp_path: Path, opened: Opened) -> None:
    save(tmp_path, "llama")
    before = os.umask(0)
    try:
        assert isinstance(opened(), PackedModel)
    finally:
        os.umask(before)
    folder = kept_in(tmp_path)
    for path in (folder.parent, folder, *folder.iterdir()):
        assert not path.stat().st_mode & 0o077


@pytest.mark.parametrize("precision", ["full", "int8", "int4"])
@pytest.mark.parametrize(("name", "factor"), [("out_features", 1 << 12), ("in_features", 2), ("weights", 0)])
def test_sizes_that_the_weights_do_not_have_are_not_believed(
    name: str, factor: int, precision: Precision, tmp_path: Path, opened: Opened
) -> None:
    folder = save(tmp_path, "llama", hidden_size=64, intermediate_size=96)
    halved(folder)
    opened(precision, torch.bfloat16)
    path = kept_in(tmp_path) / "model.json"
    whole = path.read_text(encoding="utf-8")
    page = json.loads(whole)
    for linear in (page["fused"]["head"], page["fused"]["layers"][1]["up"]):
        was = linear[name]
        linear[name] = was * factor
        path.write_text(json.dumps(page), encoding="utf-8")
        assert opened(precision, torch.bfloat16).is_fused
        assert path.read_text(encoding="utf-8") == whole, "packed anew"
        linear[name] = was


def test_tensors_that_are_not_in_the_file_are_not_believed(tmp_path: Path, opened: Opened) -> None:
    save(tmp_path, "llama")
    opened()
    path = kept_in(tmp_path) / "model.json"
    whole = path.read_text(encoding="utf-8")
    for offset in (-64, 32, 1 << 40):
        page = json.loads(whole)
        page["fused"]["embedding"][2] = offset
        path.write_text(json.dumps(page), encoding="utf-8")
        assert isinstance(opened(), PackedModel)
        assert path.read_text(encoding="utf-8") == whole, "packed anew"


def test_a_cache_that_can_only_be_read_is_used(
    tmp_path: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, "llama")
    opened()

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    monkeypatch.setattr(os, "utime", refuse)
    assert isinstance(opened(), PackedModel)


def test_it_is_served_where_nothing_can_be_kept(tmp_path: Path, opened: Opened) -> None:
    save(tmp_path, "llama")
    (tmp_path / "cache").write_text("no folder", encoding="utf-8")
    model = opened()
    assert not isinstance(model, PackedModel)
    assert model.is_fused


def test_a_family_that_is_not_packed(tmp_path: Path, opened: Opened) -> None:
    save_random(transformers.GPTNeoXConfig(**SIZES), tmp_path / "model")
    model = opened()
    assert not isinstance(model, PackedModel)
    assert not model.is_fused
    assert (kept_in(tmp_path) / "weights.bin").stat().st_size == 0
    with FileLock(f"{kept_in(tmp_path)}.lock"):
        assert not opened().is_fused, "who loads it next waits for nobody"
    shutil.rmtree(tmp_path / "model")
    save(tmp_path, "llama")
    assert isinstance(opened(), PackedModel), "that was another model"


@pytest.mark.parametrize("others", ["none", "mapped", "being packed"])
def test_packed_models_that_were_not_used_for_longest_go(
    others: str, tmp_path: Path, opened: Opened, kernels: Kernels
) -> None:
    folder = save(tmp_path, "llama")
    kept = tmp_path / "cache" / "packed"
    size = 0
    for name, used in (("a", 3), ("b", 1), ("c", 2)):
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        accelerated(copy, tmp_path / "cache", torch.float32, kernels, "full")
        (its,) = kept.glob(f"{name}-*[!k]")
        os.utime(its, (used, used))
        size = (its / "weights.bin").stat().st_size
    oldest = next(kept.glob("b-*[!k]"))
    (kept / f"{oldest.name}.partial").mkdir()  # a killed process's
    serves = accelerated(tmp_path / "b", tmp_path / "cache", torch.float32, kernels, "full")
    os.utime(oldest, (1, 1))
    if others != "mapped":
        del serves
        gc.collect()
    with FileLock(f"{oldest}.lock") if others == "being packed" else nullcontext():
        opened_with = accelerated(folder, tmp_path / "cache", torch.float32, kernels, "full", 2 * size)
    assert isinstance(opened_with, PackedModel)
    there = {path.name.partition("-")[0] for path in kept.iterdir() if path.is_dir()}
    assert there == ({"a", "c", "model"} if others == "none" else {"a", "b", "model"})
    assert (kept / f"{oldest.name}.partial").exists() == (others == "being packed")
    accelerated(folder, tmp_path / "cache", torch.float32, kernels, "full", 0)
    there = {path.name.partition("-")[0] for path in kept.iterdir() if path.is_dir()}
    assert there == ({"model", "b"} if others == "mapped" else {"model"}), "the one in use stays"


def test_weights_of_another_page_are_not_served(tmp_path: Path, opened: Opened) -> None:
    """As if they were written between a reader's look at the page and at them, which takes no lock."""
    save(tmp_path, "llama")
    expected = packed_logits(opened(), SEQUENCES)
    page = (kept_in(tmp_path) / "model.json").read_bytes()
    key = json.loads(page)["key"].encode()
    file = kept_in(tmp_path) / "weights.bin"
    assert file.read_bytes()[:64] == key
    with file.open("r+b") as other:
        other.write(bytes(64))
    model = opened()
    assert all(map(torch.equal, packed_logits(model, SEQUENCES), expected))
    assert file.read_bytes()[:64] == key, "packed anew"


def test_a_start_imports_no_models_of_transformers_and_leaves_nothing_to_collect(
    tiny_model: Callable[[str], Path], tmp_path: Path, kernels: Kernels
) -> None:
    """Imports are most of a start's time and a hundred MB; what is collected later stops a step."""
    folder = tiny_model("llama")
    accelerated(folder, tmp_path, torch.float32, kernels, "full")
    (tmp_path / "kernels").symlink_to(built(CACHE).parent)
    program = (
        "import gc, sys\nfrom pathlib import Path\nfrom prad.lm import Tokenizer\n"
        "from prad.lm.serving import load_served\n"
        "import decode_service.server, prefill_service.server\n"
        f"load_served({str(folder)!r}, Path({str(tmp_path)!r}), dtype='float32', kernels='native')\n"
        "assert not {'transformers', 'gguf', 'sympy', 'torch._dynamo'} & sys.modules.keys()\n"
        "assert gc.get_freeze_count() > 100 * len(gc.get_objects())\n"
        f"Tokenizer(Path({str(folder)!r}))\n"
        "assert not {'transformers.modeling_utils', 'sympy', 'torch._dynamo'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_tokenizer_is_the_one_that_transformers_would_find(
    family: str, tiny_model: Callable[[str], Path]
) -> None:
    ours, its = (
        Tokenizer(tiny_model(family))._tokenizer,
        transformers.AutoTokenizer.from_pretrained(tiny_model(family)),
    )
    assert type(ours) is type(its)
    assert ours.backend_tokenizer.to_str() == its.backend_tokenizer.to_str()
    assert ours.special_tokens_map == its.special_tokens_map
    assert (ours.chat_template, ours.model_max_length) == (its.chat_template, its.model_max_length)
