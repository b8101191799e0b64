"""Named hyper-parameters. `prad train --preset NAME`; what is given beside it wins.

paper-*: learning rates, lengths of runs, widths and longest texts of the paper's appendix A and Table 5
(GPT-2 Small; its rows of PrAd, of prefix tuning and of full fine-tuning). What these do not say is that of
the configuration files that the authors released for GPT-2 (github.com, younengma/prad, gpt2/configs at
ef524df): ranks of LoRA, tokens of prefixes and their MLPs' width, scales, MaM, SA on E2E, DoRA on MT. SA on
SST-2 and MNLI, for which there is neither, is PA. paper-*-ffn: LoRA on the FFN, where their DoRA always is.
Neither has BitFit, IA3, PARA, or prompt tuning by itself. docs/training.md lists where the files differ from
the tables.

Where both differ from us: their LoRA and DoRA scale by alpha itself, not by alpha / r, so alpha is r times
theirs here, and the files have a dropout of 0.1, which we do not have. Their MaM, except on E2E and WebNLG,
has a soft prompt of 30 tokens besides. Some files on MT and XSum name 4096 tokens per batch, too; ours count
examples.

quick: ours, for a first adapter on a CPU.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from prad.adapters import AdapterError

_Fields = Mapping[str, Any]


class UnknownPresetError(AdapterError):
    """No preset of that name, or none for the method."""


@dataclass(frozen=True, slots=True)
class Preset:
    """run: fields of TrainSettings for every method; methods: further ones by method, `config` among them."""

    run: _Fields
    methods: Mapping[str, _Fields] = field(default_factory=lambda: MappingProxyType({}))


def _paper(methods: Mapping[str, _Fields], **run: Any) -> Preset:
    return Preset({"batch": 32, "warmup_ratio": 0.06} | run, methods)


def _with(rate: float, run: _Fields, **config: Any) -> _Fields:
    return {"learning_rate": rate, "config": config, **run}


def _bottlenecks(r: int, pa: float, sa: float) -> dict[str, _Fields]:
    return {f"prad-{name}": _with(rate, {}, r=r, scale=1.0) for name, rate in (("pa", pa), ("sa", sa))}


def _lora(r: int, rate: float, **run: Any) -> _Fields:
    return _with(rate, run, r=r, alpha=4.0 * r)


def _ffn(r: int, rate: float, **run: Any) -> _Fields:
    """LoRA's or DoRA's on the two projections of GPT-2's FFN."""
    return _with(rate, run, r=r, alpha=4.0 * r, targets=["up", "down"])


def _mam(virtual_tokens: int, r: int, rate: float, scale: float = 1.0) -> _Fields:
    return _with(rate, {}, virtual_tokens=virtual_tokens, projection=None, r=r, scale=scale)


def _prefix(virtual_tokens: int, rate: float, projection: int | None = 108, **run: Any) -> _Fields:
    return _with(rate, run, virtual_tokens=virtual_tokens, projection=projection)


def _full(rate: float, **run: Any) -> _Fields:
    return _with(rate, run)


_LONG = {"max_steps": 60_000, "eval_every": 3000}
_MT: dict[str, Any] = {**_LONG, "max_prompt": 100, "max_completion": 100}
_XSUM: dict[str, Any] = {**_LONG, "max_prompt": 400, "max_completion": 130}

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "quick": Preset({"batch": 16, "epochs": 2.0, "learning_rate": 1e-3, "eval_every": 50, "patience": 4}),
        "paper-sst2": _paper(
            {
                **_bottlenecks(16, pa=1e-3, sa=1e-3),
                "prad-lora": _lora(8, 1e-4),
                "prad-dora": _ffn(4, 1e-3),
                "prad-mam": _mam(8, 6, 1e-3),
                "prad-prefix": _prefix(32, 1e-4),
                "full": _full(5e-5, epochs=5.0),
            },
            epochs=10.0,
            eval_every=500,
            max_prompt=128,
            max_completion=16,
        ),
        "paper-mnli": _paper(
            {
                **_bottlenecks(32, pa=2e-3, sa=2e-3),
                "prad-lora": _lora(16, 1e-4),
                "prad-mam": _mam(16, 16, 1e-3),
                "prad-prefix": _prefix(64, 2e-3),
                "full": _full(5e-5),
            },
            epochs=5.0,
            eval_every=3000,
            max_prompt=128,
            max_completion=24,
        ),
        "paper-e2e": _paper(
            {
                **_bottlenecks(108, pa=1e-3, sa=2e-3),
                "prad-lora": _lora(56, 5e-4),
                "prad-mam": _mam(32, 78, 2e-3, scale=4.0),
                "prad-prefix": _prefix(108, 2e-3),
                "full": _full(5e-5),
            },
            **_LONG,
            max_prompt=256,
            max_completion=256,
        ),
        "paper-webnlg": _paper(
            {
                **_bottlenecks(108, pa=1e-3, sa=5e-4),
                "prad-lora": _lora(56, 5e-4),
                "prad-mam": _mam(32, 78, 1e-3),
                "prad-prefix": _prefix(108, 1e-3),
                "full": _full(5e-5),
            },
            max_steps=18_000,
            eval_every=3000,
            max_prompt=256,
            max_completion=256,
        ),
        "paper-mt": _paper(
            {
                **_bottlenecks(200, pa=3e-3, sa=1e-3),
                "prad-lora": _lora(100, 6e-4),
                "prad-dora": _ffn(40, 2e-3, max_steps=80_000, batch=16),
                "prad-mam": _mam(32, 136, 5e-4),
                "prad-prefix": _prefix(200, 2e-3),
                "full": _full(5e-5),
            },
            **_MT,
        ),
        "paper-mt-ffn": _paper({"prad-lora": _ffn(40, 1e-3)}, **_MT),
        "paper-xsum": _paper(
            {
                **_bottlenecks(200, pa=2e-3, sa=5e-4),
                "prad-lora": _lora(100, 5e-4),
                "prad-dora": _ffn(40, 5e-4),
                "prad-mam": _mam(30, 168, 3e-3),
                "prad-prefix": _prefix(200, 1e-3, projection=None),
                "full": _full(5e-5),
            },
            **_XSUM,
        ),
        "paper-xsum-ffn": _paper({"prad-lora": _ffn(40, 5e-4)}, **_XSUM),
    }
)


def with_own(config: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """A preset's configuration with what was given beside it. Another r keeps the preset's alpha / r."""
    merged = {**config, **own}
    if {"r", "alpha"} <= config.keys() and "alpha" not in own and isinstance(merged["r"], int):
        merged["alpha"] = config["alpha"] / config["r"] * merged["r"]
    return merged


def preset_fields(name: str, method: str) -> dict[str, Any]:
    """Fields of TrainSettings. Raises UnknownPresetError with the known ones."""
    if name not in PRESETS:
        raise UnknownPresetError(f"unknown preset '{name}'; known: {', '.join(PRESETS)}")
    preset = PRESETS[name]
    if preset.methods and method not in preset.methods:
        known = ", ".join(preset.methods)
        raise UnknownPresetError(f"preset '{name}' is for {known}, not for {method}")
    return {**preset.run, **preset.methods.get(method, {})}
