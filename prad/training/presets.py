"""Named hyper-parameters. `prad train --preset NAME`; what is given beside it wins.

paper-*: those of the configuration files that the authors of the paper released for GPT-2 (github.com,
younengma/prad, gpt2/configs at ef524df); the tables of the paper itself were not at hand when this was
written. They ran for 10 epochs or 60,000 steps on whole data sets, on GPUs. Their LoRA uses a dropout of
0.1, which we do not have.

quick: ours, for a first adapter on a CPU.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from prad.adapters import AdapterError


class UnknownPresetError(AdapterError):
    """No preset of that name, or none for the method."""


@dataclass(frozen=True, slots=True)
class Preset:
    """run: fields of TrainSettings for every method; methods: further ones by method, `config` among them."""

    run: Mapping[str, Any]
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: MappingProxyType({}))


def _paper(pa: tuple[int, float], lora: tuple[int, float] | None = None, **run: Any) -> Preset:
    """pa and lora: (r, learning rate)."""
    bottleneck = {"config": {"r": pa[0], "scale": 1.0}, "learning_rate": pa[1]}
    methods: dict[str, Mapping[str, Any]] = {"prad-pa": bottleneck, "prad-sa": bottleneck}
    if lora is not None:
        methods["prad-lora"] = {"config": {"r": lora[0], "alpha": 4.0}, "learning_rate": lora[1]}
    return Preset({"batch": 32, "warmup_ratio": 0.06} | run, methods)


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "quick": Preset({"batch": 16, "epochs": 2.0, "learning_rate": 1e-3, "eval_every": 50, "patience": 4}),
        "paper-sst2": _paper(
            (16, 1e-3), (8, 1e-3), epochs=10.0, eval_every=500, max_prompt=128, max_completion=16
        ),
        "paper-mnli": _paper((32, 1e-3), epochs=4.0, eval_every=3000, max_prompt=128, max_completion=24),
        "paper-e2e": _paper((108, 2e-3), (56, 1e-4), max_steps=60_000, eval_every=3000, max_prompt=256),
        "paper-mt": _paper(
            (200, 5e-4), (100, 5e-4), max_steps=60_000, eval_every=3000, max_prompt=100, max_completion=100
        ),
        "paper-xsum": _paper(
            (200, 3e-3), (100, 1e-4), max_steps=60_000, eval_every=3000, max_prompt=400, max_completion=130
        ),
    }
)


def preset_fields(name: str, method: str) -> dict[str, Any]:
    """Fields of TrainSettings. Raises UnknownPresetError with the known ones."""
    if name not in PRESETS:
        raise UnknownPresetError(f"unknown preset '{name}'; known: {', '.join(PRESETS)}")
    preset = PRESETS[name]
    if preset.methods and method not in preset.methods:
        known = ", ".join(preset.methods)
        raise UnknownPresetError(f"preset '{name}' is for {known}, not for {method}")
    return {**preset.run, **preset.methods.get(method, {})}
