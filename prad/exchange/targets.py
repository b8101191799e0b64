"""Which modules a PEFT configuration means: PEFT's own rules, over nothing but names."""

import re
from collections.abc import Collection, Mapping
from functools import cache

from prad.exchange.errors import FieldError
from prad.exchange.peft_config import IA3Source, LoraSource, TargetedConfig

ALL_LINEAR = "all-linear"


def targeted(config: TargetedConfig, names: Collection[str], linear: Collection[str]) -> frozenset[str]:
    """The targeted ones of a model's module `names`; `linear`: its projections without the output head.

    Raises FieldError for a pattern that is none, or one that no module matches.
    """
    targets = config.target_modules
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        found = set(linear)
    elif isinstance(targets, str):
        found = {name for name in names if _full(targets, "target_modules", name)}
    else:
        found = {n for n in names if n in targets or (_ends(n, targets) and _in_layers(config, n))}
    found -= {name for name in found if _excluded(config, name)}
    if not found:
        raise FieldError("target_modules", "names of modules that this model has", targets)
    return frozenset(found)


def is_feedforward(config: IA3Source, name: str) -> bool:
    """Whether IA3 scales the module's input instead of its output."""
    modules = config.feedforward_modules
    if isinstance(modules, str):
        return _full(modules, "feedforward_modules", name)
    return any(name.endswith(module) for module in modules)  # as PEFT does it: no dot before it


def rank_of(config: LoraSource, name: str) -> int:
    return config.rank_pattern.get(_key(config.rank_pattern, "rank_pattern", name), config.r)


def alpha_of(config: LoraSource, name: str) -> float:
    return config.alpha_pattern.get(_key(config.alpha_pattern, "alpha_pattern", name), config.lora_alpha)


def _key(patterns: Mapping[str, object], field: str, name: str) -> str:
    """The first pattern that `name` ends with."""
    return next((p for p in patterns if _compiled(rf"(.*\.)?({p})$", field).match(name)), name)


def _excluded(config: TargetedConfig, name: str) -> bool:
    excluded = config.exclude_modules
    if not excluded:
        return False
    if isinstance(excluded, str):
        return _full(excluded, "exclude_modules", name)
    return name in excluded or _ends(name, excluded)


def _in_layers(config: TargetedConfig, name: str) -> bool:
    """Whether the module's layer, the first number in its name, is one of those to transform."""
    layers = config.layers_to_transform if isinstance(config, LoraSource) else None
    if not isinstance(config, LoraSource) or layers is None or layers == []:
        return True
    pattern = config.layers_pattern or []
    lists = [pattern] if isinstance(pattern, str) else pattern
    tried = [rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\." for p in lists] or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
    matches = (_compiled(p, "layers_pattern").match(name) for p in tried)
    match = next((m for m in matches if m is not None), None)
    return match is not None and int(match["idx"]) in ([layers] if isinstance(layers, int) else layers)


def _ends(name: str, endings: Collection[str]) -> bool:
    return any(name.endswith(f".{ending}") for ending in endings)


def _full(pattern: str, field: str, name: str) -> bool:
    return _compiled(pattern, field).fullmatch(name) is not None


@cache
def _compiled(pattern: str, field: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise FieldError(field, "a regular expression", pattern, str(error)) from error
