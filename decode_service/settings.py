"""Everything that configures a decode service, read once at its start."""

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from prad.lm import DEFAULT_MODEL


class DecodeSettings(BaseSettings):
    """From keyword arguments or PRAD_DECODE_* in the environment; unknown arguments are refused.

    Times in seconds. `threads` None leaves torch's default; `metrics_port` None exports no metrics;
    `detach_s` is how long a client without a token stream keeps its sequences.
    """

    model_config = SettingsConfigDict(env_prefix="PRAD_DECODE_", frozen=True, extra="forbid")

    host: str = "127.0.0.1"
    port: int = Field(default=50051, ge=0, le=65535)
    metrics_port: int | None = Field(default=None, ge=0, le=65535)

    model: str = DEFAULT_MODEL
    cache_dir: Path = Path("~/.cache/prad")
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    device: str = "cpu"
    threads: int | None = Field(default=None, ge=1)

    kv_cache_mib: int = Field(default=512, ge=1)
    block_size: int = Field(default=16, ge=1)
    max_sequences: int = Field(default=256, ge=1)

    retry_after_s: float = Field(default=0.2, ge=0)
    hand_off_idle_s: float = Field(default=60.0, gt=0)
    detach_s: float = Field(default=30.0, gt=0)
    outbox_frames: int = Field(default=4096, ge=1)
    drain_s: float = Field(default=30.0, ge=0)
