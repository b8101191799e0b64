"""`prad adapter diff --likelihood`: how likely two versions make the right answers, computed here.

Right answers count with the end token behind them, which no text of a client can hold. So the versions' files
are fetched from the registry, and the model that the server has is loaded here; that it is the same is
checked.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from adapter_registry.client import RegistryClient
from prad.core.errors import PradError
from prad.http.asking import answered, api_client
from prad_cli.model import load_model


class LikelihoodError(PradError):
    """It cannot be computed here; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Version:
    """One that the server answers with. digest: as the server tells it."""

    task: str
    version: int
    digest: str


@dataclass(frozen=True, slots=True)
class ModelHere:
    """What to load."""

    name: str
    cache_dir: Path
    dtype: str
    device: str


def log_likelihoods(
    url: str,
    registry: RegistryClient,
    here: ModelHere,
    versions: Sequence[Version],
    lines: Sequence[tuple[str, str]],
) -> list[float]:
    """Of each version: the mean over all tokens of the right answers, end tokens included, of the natural
    logarithm of their probability. lines: prompts and right answers. Raises LikelihoodError, and what
    loading and the registry raise."""
    with api_client(url, 1, LikelihoodError) as client:
        served = answered(client, LikelihoodError, "GET", "/version")["model_fingerprint"]
    with TemporaryDirectory() as folder:
        folders = [Path(folder, str(number)) for number in range(len(versions))]
        for each, own in zip(versions, folders, strict=True):
            if registry.pull(each.task, each.version, own).digest != each.digest:
                raise LikelihoodError(
                    f"{each.task}@{each.version} of the registry is not the one that {url} has: name the "
                    "registry of that server with --registry"
                )
        return _computed(served, here, folders, lines)


def _computed(
    served: str, here: ModelHere, folders: Sequence[Path], lines: Sequence[tuple[str, str]]
) -> list[float]:
    from prad.adapters import load_adapter
    from prad.artefact import read_artefact
    from prad.training.data import Example
    from prad.training.likelihood import log_likelihoods

    model, tokenizer = load_model(here.name, here.cache_dir, here.dtype, here.device, kernels="auto")
    if model.fingerprint.digest != served:
        raise LikelihoodError(
            f"the server has another model than {here.name} in {here.dtype}: name that one with --model and "
            "--dtype"
        )
    examples = [Example(prompt=prompt, completion=completion) for prompt, completion in lines]
    means = []
    for folder in folders:
        artefact = read_artefact(folder)
        adapter = load_adapter(artefact, model, allow_other_weights=True)  # the server has loaded it
        found = log_likelihoods(model, tokenizer, artefact.record, adapter, examples)
        means.append(sum(each.total for each in found) / sum(each.tokens for each in found))
    return means
