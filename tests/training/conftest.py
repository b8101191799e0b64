"""The toy task's data."""

import json
from pathlib import Path

import pytest
import torch

YES, NO = "t50", "t60"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whether a prompt of three words ends in t1 or t2."""
    folder = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    for name, count in (("train", 256), ("validation", 32), ("test", 64)):
        lines = []
        for first, second, last in torch.randint(0, 1000, (count, 3), generator=generator).tolist():
            words = f"t{3 + first % 30} t{3 + second % 30} t{1 + last % 2}"
            answer = YES if last % 2 else NO
            lines.append(json.dumps({"prompt": words, "completion": answer, "label": answer}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
