"""Everything that configures a decode service, read once at its start."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from prad.core.models import DEFAULT_MODEL, Choice, Precision
from prad.settings import ServiceSettings


class DecodeSettings(ServiceSettings):
    """Set by flags of `prad decode`, or PRAD_DECODE_* in the environment; flags win. Times in seconds."""

    model_config = SettingsConfigDict(
        env_prefix="PRAD_DECODE_", frozen=True, extra="forbid", use_attribute_docstrings=True
    )

    host: str = "127.0.0.1"
    """Address that the gRPC server listens on."""
    port: int = Field(default=50051, ge=0, le=65535)
    """Port that the gRPC server listens on."""
    unprotected: bool = False
    """Start beyond loopback, where whoever reaches the port may decode, and see what others do: this service
    asks nobody for a key. For a network that only its prefill services reach."""
    metrics_port: int | None = Field(default=None, ge=0, le=65535)
    """Port of /metrics; none if not given."""

    model: str = DEFAULT_MODEL
    """Folder, .gguf file, Hugging Face id, or the default model."""
    cache_dir: Path = Path("~/.cache/prad")
    """Where converted models are kept."""
    kernel_cache_mib: Annotated[int, Field(ge=0)] = 64
    """Disk for kernels compiled for other sources or processors; least recently used ones leave first."""
    packed_cache_mib: Annotated[int, Field(ge=0)] = 8192
    """Disk for packed models beside the one that is served; least recently used ones leave first, those that
    a process serves stay."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """What the model computes in; prefill must use the same."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    threads: int | None = Field(default=None, ge=1)
    """Computing threads; torch's default if not given."""
    kernels: Choice = "auto"
    """Own kernels where installed or where a compiler is (auto), these or an error (native), or torch."""
    weights: Precision = "full"
    """Of linear layers. full: the model's own. Faster and not exact, with inputs in 8 bits: int8, rounded to
    8 bits; int4, the blocks of 4 to 8 bits of a .gguf file, or rounded to such. Prefill may have others."""

    kv_cache_mib: int = Field(default=512, ge=1)
    """Memory of the KV cache; on a CPU taken as it fills."""
    block_size: int = Field(default=16, ge=1)
    """Tokens of one KV block."""
    max_sequences: int = Field(default=256, ge=1)
    """Sequences that decode together."""
    speculate: int = Field(default=8, ge=0, le=31)
    """Tokens that a step of few sequences guesses for each at most, and checks, where that pays: by its text
    and recent answers of its task's version. The same tokens are drawn. 0: none are guessed."""

    request_state_mib: int = Field(default=256, ge=0)
    """Memory for vectors that requests of some methods bring along (PARA); 0 takes no such request."""

    retry_after_s: float = Field(default=0.2, ge=0)
    """Hint that a full service gives."""
    hand_off_idle_s: float = Field(default=60.0, gt=0)
    """A hand-off that says nothing for so long gives its room back."""
    detach_s: float = Field(default=10.0, gt=0)
    """How long a client without a token stream keeps its sequences, unless it is started anew before; more
    than its `--decode-silence-s`. One whose host is gone without a word has none from 10 s later on."""
    shared_memory: bool = True
    """Take KV through shared memory where a prefill service of this host offers it."""
    outbox_frames: int = Field(default=4096, ge=1)
    """Frames kept for a client that does not take them; there is at most one per step."""
    drain_s: float = Field(default=30.0, ge=0)
    """How long running sequences may go on when the service stops."""
