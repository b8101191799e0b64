"""A task that a tiny model learns in seconds, and what its tests share."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from prad.adapters import Adapter, find_method, new_adapter
from prad.artefact import AdapterRecord, BaseModelRef
from prad.lm import LanguageModel, Tokenizer
from prad.training.data import collate, read_examples, tokenise
from prad.training.objective import AdapterTuning
from prad.training.settings import TrainSettings


def settings(data: Path, out: Path, **more: Any) -> TrainSettings:
    defaults: dict[str, Any] = {
        "config": {"r": 8},
        "batch": 16,
        "learning_rate": 1e-2,
        "eval_every": 20,
        "template": "{prompt}",
    }
    return TrainSettings(data=data, out=out, **defaults | more)


def frozen_digest(model: LanguageModel) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.module.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def validation_loss(model: LanguageModel, tokenizer: Tokenizer, data: Path, adapter: Adapter | None) -> float:
    """`adapter` None: a fresh prad-pa, which is the plain model."""
    method = find_method("prad-pa")
    chosen = adapter or new_adapter(method, method.config_type(), model, seed=0)
    base = BaseModelRef(name="", architecture="", weights="")
    record = AdapterRecord(
        method="prad-pa", config={}, base=base, template="{prompt}", virtual_tokens=chosen.virtual_tokens
    )
    examples = read_examples(data / "validation.jsonl")
    batch = collate(tokenise(examples, tokenizer, record, context=512))
    with torch.no_grad():
        return float(AdapterTuning(model, chosen)(**batch)["loss"])


def answers_of_unequal_length(folder: Path) -> Path:
    folder.mkdir()
    lines = [
        json.dumps({"prompt": f"t{i} t{i + 1}", "completion": " ".join(["t5"] * (1 + i % 7))})
        for i in range(48)
    ]
    for name in ("train", "validation"):
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder
