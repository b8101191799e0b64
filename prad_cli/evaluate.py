"""`prad eval`: how well an adapter does, and the plain model; here, or through a running server."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prad.core.models import DEFAULT_MODEL
from prad_cli.extras import require_extra
from prad_cli.model import (
    DEFAULT_CACHE,
    CacheOption,
    DeviceOption,
    DTypeOption,
    ModelOption,
    load_model,
)

if TYPE_CHECKING:
    from prad.adapters import Adapter
    from prad.artefact import AdapterRecord
    from prad.lm import LanguageModel, Tokenizer
    from prad.training.evaluate import Evaluation


def eval_command(
    data: Annotated[
        Path, typer.Option(help='File of {"prompt", "completion"} lines.', exists=True, dir_okay=False)
    ],
    adapter: Annotated[
        Path | None,
        typer.Option(
            help="Adapter folder, or that of a fully fine-tuned model.",
            exists=True,
            file_okay=False,
            resolve_path=True,
        ),
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="Ask this running server instead; PRAD_API_KEY is shown to it.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="With --url: the task; the plain model if left out.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many examples.", min=1)] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(help="Of an answer, at most.  \\[default: what the adapter says, or 64]", min=1),
    ] = None,
    beams: Annotated[
        int, typer.Option(help="Beam search with so many beams; 1 is greedy; with --url at most 16.", min=1)
    ] = 1,
    length_penalty: Annotated[
        float,
        typer.Option(
            help="Of beam search: an answer is worth its log-probability by its tokens to this power.",
            min=-10,
            max=10,
        ),
    ] = 1.0,
    batch: Annotated[int, typer.Option(help="Sequences that are decoded together.", min=1)] = 64,
    plain: Annotated[
        bool,
        typer.Option(
            help="Score the plain model on the same prompts as well: slower, it seldom stops. Its answers "
            "end at twice the longest right one, unless --max-tokens is given."
        ),
    ] = False,
    show: Annotated[int, typer.Option(help="Print so many answers.", min=0)] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print scores as JSON.")] = False,
    model: ModelOption = DEFAULT_MODEL,
    cache_dir: CacheOption = DEFAULT_CACHE,
    dtype: DTypeOption = "bfloat16",
    device: DeviceOption = "cpu",
) -> None:
    """Score an adapter on a file of examples.

    Examples:  prad eval --adapter adapters/sentiment --data data/sentiment/test.jsonl

    prad eval --url http://127.0.0.1:8000 --task sentiment --data data/sentiment/test.jsonl
    """
    if (adapter is None) == (url is None):
        raise typer.BadParameter("give either --adapter or --url")
    require_extra("eval", "rouge_score", "sacrebleu")
    if url is not None:
        results = _served(
            url,
            task,
            data,
            limit=limit,
            max_tokens=max_tokens,
            beams=beams,
            length_penalty=length_penalty,
            concurrency=batch,
        )
    elif task is not None:
        raise typer.BadParameter("needs --url: a folder knows no task", param_hint="--task")
    else:
        assert adapter is not None
        here = _Computing(
            adapter,
            data,
            limit=limit,
            max_tokens=max_tokens,
            beams=beams,
            length_penalty=length_penalty,
            batch=batch,
            base=model,
            cache_dir=cache_dir,
            dtype=dtype,
            device=device,
        )
        results = here.run(plain)
    if as_json:
        typer.echo(
            json.dumps({name: result.scores | {"examples": result.examples} for name, result in results})
        )
    else:
        _say(results, show)


def _say(results: "Iterable[tuple[str, Evaluation]]", show: int) -> None:
    for name, result in results:
        shown = "  ".join(f"{metric} {value:g}" for metric, value in result.scores.items())
        typer.echo(f"{name}: {shown}  ({result.examples} examples)")
        for answer in result.answers[:show]:
            typer.echo(f"    {answer!r}")


def _served(
    url: str,
    task: str | None,
    data: Path,
    *,
    limit: int | None,
    max_tokens: int | None,
    beams: int,
    length_penalty: float,
    concurrency: int,
) -> "Iterator[tuple[str, Evaluation]]":
    from prad.training.served import evaluate_served
    from prad_cli.operating import credential

    result = evaluate_served(
        url,
        task,
        data,
        limit=limit,
        max_tokens=max_tokens,
        beams=beams,
        length_penalty=length_penalty,
        concurrency=concurrency,
        key=credential("PRAD_API_KEY"),
    )
    yield task or "plain model", result


@dataclass(frozen=True)
class _Computing:
    """An evaluation in this process."""

    folder: Path
    data: Path
    _: KW_ONLY
    limit: int | None
    max_tokens: int | None
    beams: int
    length_penalty: float
    batch: int
    base: str
    cache_dir: Path
    dtype: str
    device: str

    def run(self, plain: bool) -> "Iterator[tuple[str, Evaluation]]":
        """What lies in the folder, then the plain model on the same prompts if wanted."""
        from prad.adapters import load_adapter
        from prad.artefact import FULL, read_artefact, read_record

        record = read_record(self.folder)
        if record.method == FULL:
            yield "fine-tuned model", self._evaluate(self._load(str(self.folder)), record, None)
            if plain:
                yield "plain model", self._evaluate_plain(self._load(self.base), record)
            return
        loaded = self._load(self.base)
        adapter = load_adapter(read_artefact(self.folder), loaded.model, allow_all_positions=True)
        yield "adapter", self._evaluate(loaded, record, adapter)
        if plain:
            yield "plain model", self._evaluate_plain(loaded, record)

    def _evaluate_plain(self, loaded: "_Loaded", record: "AdapterRecord") -> "Evaluation":
        from prad.training.evaluate import ANSWER_TOKENS, plain_answer_tokens

        if self.max_tokens is not None:
            return self._evaluate(loaded, record, None)
        most = record.generation.max_tokens or ANSWER_TOKENS
        needed = plain_answer_tokens(loaded.tokenizer, self.data, self.limit)
        return replace(self, max_tokens=min(most, needed))._evaluate(loaded, record, None)

    def _load(self, name: str) -> "_Loaded":
        from prad.lm import resolve_model

        model, tokenizer = load_model(name, self.cache_dir, self.dtype, self.device, kernels="auto")
        stop_ids = model.stop_ids(resolve_model(name, self.cache_dir)) | tokenizer.end_ids
        return _Loaded(model, tokenizer, stop_ids)

    def _evaluate(
        self, loaded: "_Loaded", record: "AdapterRecord", adapter: "Adapter | None"
    ) -> "Evaluation":
        from prad.training.evaluate import evaluate

        return evaluate(
            loaded.model,
            loaded.tokenizer,
            record,
            adapter,
            self.data,
            stop_ids=loaded.stop_ids,
            limit=self.limit,
            max_tokens=self.max_tokens,
            beams=self.beams,
            length_penalty=self.length_penalty,
            batch=self.batch,
        )


@dataclass(frozen=True)
class _Loaded:
    model: "LanguageModel"
    tokenizer: "Tokenizer"
    stop_ids: frozenset[int]
