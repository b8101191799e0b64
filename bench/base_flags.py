"""What every benchmark can be told, and those that load a model or ask servers."""

from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from bench.kinds import RESULTS, cpu_kind
from prad.core.models import DEFAULT_MODEL


class Flags(BaseModel):
    """Of every benchmark. `SMOKE`: the values that make it small, unless others are given."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    SMOKE: ClassVar[dict[str, Any]] = {}

    smoke: bool = Field(False, description="tiny sizes: shows that it runs, measures nothing")
    out: Path = Field(RESULTS / cpu_kind(), description="folder of the result; --smoke: bench/results/smoke")

    @model_validator(mode="before")
    @classmethod
    def _smoke(cls, given: dict[str, Any]) -> dict[str, Any]:
        return {"out": RESULTS / "smoke", **cls.SMOKE, **given} if given.get("smoke") else given


class ModelFlags(Flags):
    model: str = Field(DEFAULT_MODEL, description="folder, .gguf file, hub id, or the default model")
    cache_dir: Path = Field(Path("~/.cache/prad"), description="where converted models are")


class ShapeFlags(ModelFlags):
    """Of benchmarks that ask servers for completions."""

    prompt: int = Field(64, description="tokens in")
    output: int = Field(64, description="tokens out")
    r: int = Field(16, description="rank of the adapters")
    rounds: int = Field(3, ge=1)
