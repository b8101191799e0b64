"""`prad adapter diff A B --data FILE`: the same prompts under two versions, through a running server.

Both are asked for each prompt side by side, so the prompts of both share passes, and their answers a decode
batch.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import httpx
import typer
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.progress import track

from prad.core.errors import PradError
from prad.core.json_text import json_lines
from prad.core.models import DEFAULT_MODEL
from prad.http.asking import DEFAULT_API, answered, api_client
from prad_cli.extras import installing
from prad_cli.likelihood import ModelHere, Version, log_likelihoods
from prad_cli.model import DEFAULT_CACHE, CacheOption, DeviceOption, DTypeOption, ModelOption
from prad_cli.operating import (
    DEFAULT_REGISTRY,
    Json,
    Registry,
    credential,
    print_json,
    progress_console,
    talking,
)
from prad_cli.tables import show_comparison

ANSWER_TOKENS = 64
"""At most, where neither --max-tokens nor the adapter says how many."""

Name = Annotated[
    str, typer.Argument(help="A task, a version or an alias: support, support@2, support@canary.")
]


class DiffError(PradError):
    """The two cannot be compared; the message says what is wrong."""


class Line(BaseModel):
    """Of a data file. completion: what would be right; label: that it is one of a few classes."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    prompt: Annotated[str, Field(min_length=1)]
    completion: str | None = None
    label: str | None = None
    references: list[str] | None = None


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two versions, as the server tells of it."""

    task: str
    version: int
    digest: str
    end_token: str | None
    body: Mapping[str, Any]

    @property
    def name(self) -> str:
        return f"{self.task}@{self.version}"


@dataclass(frozen=True, slots=True)
class Comparison:
    """`answers`: of each line by the first and by the second; `scores`: of each, none without references."""

    sides: tuple[Side, Side]
    lines: tuple[Line, ...]
    answers: tuple[tuple[str, str], ...]
    scores: tuple[Mapping[str, float], Mapping[str, float]]

    @property
    def changed(self) -> list[tuple[Line, tuple[str, str]]]:
        pairs = zip(self.lines, self.answers, strict=True)
        return [(line, (first, second)) for line, (first, second) in pairs if first != second]

    @property
    def agreement(self) -> float:
        """In percent."""
        return round(100 * (1 - len(self.changed) / len(self.lines)), 2)

    def with_likelihoods(self, means: Sequence[float]) -> "Comparison":
        """With the mean log-likelihood of a token of the right answers, by each, among the scores."""
        first, second = (
            {**scores, "log_likelihood": round(mean, 4)}
            for scores, mean in zip(self.scores, means, strict=True)
        )
        return replace(self, scores=(first, second))

    def report(self) -> dict[str, Any]:
        return {
            "versions": [
                {"task": side.task, "version": side.version, "digest": side.digest, "scores": dict(scores)}
                for side, scores in zip(self.sides, self.scores, strict=True)
            ],
            "prompts": len(self.lines),
            "agreement": self.agreement,
            "changed": [
                {"prompt": line.prompt, "answers": list(pair), "completion": line.completion}
                for line, pair in self.changed
            ],
        }


def diff(
    first: Name,
    second: Name,
    data: Annotated[
        Path,
        typer.Option(help='File of {"prompt"} lines; with "completion" both are scored.', dir_okay=False),
    ],
    url: Annotated[
        str, typer.Option(envvar="PRAD_API_URL", help="URL of the running server's API.")
    ] = DEFAULT_API,
    limit: Annotated[int | None, typer.Option(help="Only the first so many prompts.", min=1)] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(help="Of an answer, at most.  \\[default: what the adapter says, or 64]", min=1),
    ] = None,
    concurrency: Annotated[int, typer.Option(help="Prompts that are under way at once.", min=1)] = 16,
    show: Annotated[int, typer.Option(help="Print so many of the prompts that changed.", min=0)] = 10,
    likelihood: Annotated[
        bool,
        typer.Option(
            "--likelihood",
            help="Also how likely each makes the right answers, a token of them on average: computed here, "
            "with the server's model (--model, --dtype) and the versions' files from the registry.",
        ),
    ] = False,
    registry: Registry = DEFAULT_REGISTRY,
    model: ModelOption = DEFAULT_MODEL,
    cache_dir: CacheOption = DEFAULT_CACHE,
    dtype: DTypeOption = "bfloat16",
    device: DeviceOption = "cpu",
    as_json: Json = False,
) -> None:
    """Compare two versions before one is promoted: agreement, scores, the prompts whose answers changed."""
    lines = read_lines(data, limit)
    right = [(line.prompt, line.completion) for line in lines if line.completion is not None]
    if likelihood and len(right) < len(lines):
        raise DiffError(f'--likelihood needs a "completion" in every line of {data}')
    found = compare(
        url,
        (first, second),
        lines,
        max_tokens=max_tokens,
        concurrency=concurrency,
        key=credential("PRAD_API_KEY"),
    )
    if likelihood:
        here = ModelHere(model, cache_dir, dtype, device)
        versions = [Version(side.task, side.version, side.digest) for side in found.sides]
        with talking(registry) as client:
            found = found.with_likelihoods(log_likelihoods(url, client, here, versions, right))
    if as_json:
        print_json(found.report())
        return
    names = [side.name for side in found.sides]
    print(f"{len(found.lines)} prompts, {found.agreement:g}% answered alike by {' and '.join(names)}")
    if not any(found.scores) and all(line.completion is not None for line in found.lines):
        print(f"no scores: what computes them is not installed; run: {installing('eval')}")
    rows = [(line.prompt, *pair, line.completion or "") for line, pair in found.changed[:show]]
    show_comparison(names, found.scores, rows, len(found.changed))


def read_lines(path: Path, limit: int | None = None) -> tuple[Line, ...]:
    """Raises DiffError."""
    lines = []
    try:
        for number, text in islice(json_lines(path), limit):
            try:
                lines.append(Line.model_validate_json(text))
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(map(str, first["loc"])) or "line"
                raise DiffError(
                    f'{path}:{number}: expected {{"prompt": text}}, with "completion": text if there is a '
                    f"right answer: {where}: {first['msg']}"
                ) from error
    except OSError as error:
        raise DiffError(f"cannot read {path}: {error.strerror}") from error
    if not lines:
        raise DiffError(f'{path} holds no prompts: expected lines of {{"prompt"}}')
    return tuple(lines)


def compare(
    url: str,
    names: tuple[str, str],
    lines: Sequence[Line],
    *,
    max_tokens: int | None,
    concurrency: int,
    key: str = "",
) -> Comparison:
    """Greedy answers. `key`: an API key, where the server asks for one. Raises DiffError."""
    many = 2 * concurrency
    with api_client(url, many, DiffError, key=key) as client, ThreadPoolExecutor(many) as pool:
        sides = (_side(client, names[0], max_tokens), _side(client, names[1], max_tokens))
        if sides[0].name == sides[1].name:
            raise DiffError(f"{names[0]} and {names[1]} are both {sides[0].name}: name two versions")
        asked = [pool.submit(_ask, client, side, line.prompt) for line in lines for side in sides]
        try:
            known = track(asked, "answers", console=progress_console(), transient=True)
            answers = [each.result() for each in known]
        finally:
            pool.shutdown(cancel_futures=True)
    pairs = tuple(zip(answers[::2], answers[1::2], strict=True))
    firsts, seconds = ([pair[at] for pair in pairs] for at in (0, 1))
    scored = (_scores(lines, firsts, sides[0]), _scores(lines, seconds, sides[1]))
    return Comparison(sides, tuple(lines), pairs, scored)


def _side(client: httpx.Client, name: str, max_tokens: int | None) -> Side:
    """The version that a name means now: it is asked by its number, whatever becomes of the name."""
    told = answered(client, DiffError, "GET", f"/v1/models/{quote(name)}").get("prad")
    if told is None:
        raise DiffError(f"{name} is the plain model: name two versions of a task")
    most = max_tokens or told["generation"].get("max_tokens") or ANSWER_TOKENS
    body: dict[str, Any] = {"model": f"{told['task']}@{told['version']}", "temperature": 0.0}
    body["max_tokens"] = most
    if not told["task_tokens"]:  # which the server would cut off
        body["truncate_prompt_tokens"] = -1
    return Side(told["task"], told["version"], told["digest"], told["end_token"], body)


def _ask(client: httpx.Client, side: Side, prompt: str) -> str:
    found = answered(client, DiffError, "POST", "/v1/completions", {**side.body, "prompt": prompt})
    text: str = found["choices"][0]["text"]
    return text


def _scores(lines: Sequence[Line], answers: Sequence[str], side: Side) -> Mapping[str, float]:
    """Empty unless every line has a completion, and what scores texts is installed: `prad eval` says how."""
    if any(line.completion is None for line in lines):
        return {}
    if any(find_spec(module) is None for module in ("rouge_score", "sacrebleu")):
        return {}
    from prad.training.data import Example, without_end
    from prad.training.scores import Judged, scores

    examples = without_end([Example.model_validate(line.model_dump()) for line in lines], side.end_token)
    return scores([Judged(example, answer) for example, answer in zip(examples, answers, strict=True)])
