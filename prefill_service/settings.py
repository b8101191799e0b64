"""Everything an operator can set about the prefill service: flags of `prad prefill`, or PRAD_PREFILL_*."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from prad.lm import DEFAULT_MODEL, served_name


class PrefillSettings(BaseSettings):
    """Read once at the start; parts receive only their slice."""

    model_config = SettingsConfigDict(env_prefix="PRAD_PREFILL_", frozen=True, extra="forbid")

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    decode: str = "127.0.0.1:50051"
    registry: str = "http://127.0.0.1:8001"

    model: str = DEFAULT_MODEL
    model_name: str | None = None
    """The plain model's id in the API; None takes it from `model`."""
    cache_dir: Path = Path("~/.cache/prad")
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    device: str = "cpu"
    threads: Annotated[int, Field(ge=1)] | None = None

    pass_tokens: Annotated[int, Field(ge=1)] = 4096
    """Prompt tokens of one packed pass; a longer prompt gets a pass of its own."""
    pass_prompts: Annotated[int, Field(ge=1)] = 64
    max_waiting: Annotated[int, Field(ge=1)] = 1024
    queue_timeout_s: Annotated[float, Field(gt=0)] = 60.0

    adapters_mib: Annotated[int, Field(ge=1)] = 1024
    """Memory for resident adapters; least recently used ones leave first."""
    allow_other_weights: bool = False
    """Serve adapters trained on other weights of the same architecture."""

    @property
    def base_name(self) -> str:
        return self.model_name or served_name(self.model)
