"""One cell of the quality study: a method trained on a task with one seed, and scored. Kept as a JSON file.

A finished cell is never computed again under the same settings; a killed training goes on from its last
checkpoint.
"""

import hashlib
import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.quality_bootstrap import each_counted
from bench.quality_table import Column, Row
from bench.record import setting
from prad.adapters import load_adapter
from prad.artefact import AdapterRecord, BaseModelRef, GenerationDefaults, read_artefact
from prad.lm import LanguageModel, Tokenizer
from prad.training.data import read_examples
from prad.training.evaluate import evaluate
from prad.training.settings import TrainSettings
from prad.training.train import train


@dataclass(frozen=True, slots=True)
class Study:
    """What every cell shares. data: folder of task folders; cells: where finished ones lie."""

    model: LanguageModel
    tokenizer: Tokenizer
    stop_ids: frozenset[int]
    name: str
    data: Path
    cells: Path
    work: Path
    beams: int

    def path(self, row: Row, column: Column, seed: int) -> Path:
        return self.cells / f"{row.name.lower().replace(' ', '-')}_{column.task}_{seed}.json"

    def finished(self, row: Row, column: Column, seed: int) -> dict[str, Any] | None:
        """The cell, if it was computed under these settings."""
        path = self.path(row, column, seed)
        if not path.is_file():
            return None
        cell: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return cell if cell["settings"] == self._settings(row, column) else None

    def compute(self, row: Row, column: Column, seed: int) -> dict[str, Any]:
        """Trains, scores, and keeps the cell."""
        started = time.monotonic()
        settings = json.dumps(self._settings(row, column), sort_keys=True).encode()
        # other settings must not go on from these checkpoints
        out = self.work / f"{self.path(row, column, seed).stem}-{hashlib.sha256(settings).hexdigest()[:8]}"
        data = self.data / column.task
        if row.method is None:
            record, adapter = self._plain(column), None
        else:
            steps = max(1, round(column.train / 16 * column.epochs))
            record = train(
                self.model,
                self.tokenizer,
                self.name,
                TrainSettings(
                    data,
                    out,
                    method=row.method,
                    config=dict(row.config),
                    positions=row.positions,
                    examples=column.train,
                    epochs=column.epochs,
                    batch=16,
                    learning_rate=row.learning_rate,
                    seed=seed,
                    eval_every=max(1, steps // 4),
                    eval_examples=96,
                    max_tokens=column.max_tokens,
                    resume=True,
                ),
            )
            adapter = load_adapter(read_artefact(out), self.model, allow_all_positions=True)
        test = data / "test.jsonl"
        result = evaluate(
            self.model,
            self.tokenizer,
            record,
            adapter,
            test,
            stop_ids=self.stop_ids,
            limit=column.test,
            beams=self.beams,
        )
        cell = {
            "settings": self._settings(row, column),
            "row": row.name,
            "column": column.task,
            "seed": seed,
            "setting": setting(str(self.model.device)),
            "seconds": round(time.monotonic() - started),
            "scores": result.scores,
            "training": record.training,
            "each": each_counted(column.metric, read_examples(test, column.test), result.answers),
        }
        self._keep(self.path(row, column, seed), cell)
        shutil.rmtree(out, ignore_errors=True)
        return cell

    def _settings(self, row: Row, column: Column) -> dict[str, Any]:
        own = {"method": row.method, "positions": row.positions, "learning_rate": row.learning_rate}
        config = {"config": dict(row.config)} if row.config else {}
        shared = {
            "model": self.name,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "beams": self.beams,
        }
        of_column = {name: value for name, value in asdict(column).items() if name != "seeds"}
        return shared | own | config | of_column

    def _plain(self, column: Column) -> AdapterRecord:
        """No adapter, but the same template and limits."""
        return AdapterRecord(
            method="none",
            config={},
            base=BaseModelRef(name=self.name, architecture="", weights=""),
            generation=GenerationDefaults(max_tokens=column.max_tokens),
        )

    def _keep(self, path: Path, cell: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(cell, ensure_ascii=False) + "\n", encoding="utf-8")
        unfinished.rename(path)
