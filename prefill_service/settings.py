"""Everything an operator can set about the prefill service: flags of `prad prefill`, or PRAD_PREFILL_*."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from prad.core.host_names import is_loopback
from prad.core.models import DEFAULT_MODEL, Choice, Precision, served_name
from prad.settings import ServiceSettings


class PrefillSettings(ServiceSettings):
    """Set by flags of `prad prefill`, or PRAD_PREFILL_* in the environment; flags win."""

    model_config = SettingsConfigDict(
        env_prefix="PRAD_PREFILL_", frozen=True, extra="forbid", use_attribute_docstrings=True
    )

    host: str = "127.0.0.1"
    """Address that the API listens on."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port that the API listens on."""
    max_connections: Annotated[int, Field(ge=1)] = 1024
    """Connections to the API; requests on further ones get 503."""
    body_timeout_s: Annotated[float, Field(gt=0)] = 10.0
    """Seconds in which a request's body must come, or go on coming at 64 KiB/s; it is refused with 408."""
    max_body_mib: Annotated[int, Field(ge=1)] = 4
    """Largest body of a request; a larger one is refused with 413."""
    tokenising_mchars: Annotated[int, Field(ge=1)] = 8
    """Millions of characters of long prompts that are tokenised or wait for it at once; more get 429."""
    unknown_fields: Literal["strict", "warn"] = "strict"
    """What becomes of fields of a request that are not known: strict, it is refused; warn, it is answered
    without them, and the header x-prad-ignored-fields names them. What is known and not supported is refused
    in both."""
    allowed_hosts: str = ""
    """Further names that clients may call the API by, separated by commas: a name, *.example.com for those
    below one, * for any. Addresses, and names without a dot, are always allowed."""
    cors_origins: str = ""
    """Origins whose pages may use the API in a browser, separated by commas, as in http://localhost:5173; *
    for any; none if not given."""
    unprotected: bool = False
    """Beyond loopback the API asks everyone for an API key (`prad keys create`), from the start. With this,
    as on loopback, from the registry's first key on: for where nobody else reaches it, as in a container."""
    access_log: bool = False
    """Write a line to the log for every request, not only for those that fail. Prompts are in neither."""
    decode: str = "127.0.0.1:50051"
    """The decode service, host:port."""
    decode_silence_s: Annotated[float, Field(ge=0.5)] = 3.0
    """Seconds without a sign of life of the decode service after which it counts as lost: answers under way
    wait for it as `queue_timeout_s` says, and go on where they were if it is back in time, else end with an
    error; after two thirds of it requests are refused, and it is connected to anew. A busy one gives signs.
    Less on a machine that is short of cores takes it for frozen when it is not. Keep it below decode's
    `--detach-s`, after which that drops what an answer under way would go on with."""
    registry: str = "http://127.0.0.1:8001"
    """The adapter registry's URL."""
    registry_secret_file: Path | None = None
    """The registry's replica_secret_file, if it has one: what it knows its prefill replicas by."""

    traffic_s: Annotated[float, Field(ge=0)] = 5.0
    """Seconds between reports to the registry of what was answered here, which its console shows; 0: none."""

    model: str = DEFAULT_MODEL
    """Folder, .gguf file, Hugging Face id, or the default model."""
    model_name: str | None = None
    """The plain model's id in the API; taken from the model's name if not given."""
    cache_dir: Path = Path("~/.cache/prad")
    """Where converted models and fetched adapters are kept."""
    special_tokens_in_text: bool = False
    """Whether special tokens in the text of prompts and messages are tokens. If not, they are text, and
    nobody can end a turn from within a message; templates and token ids may hold them anyway."""
    adapter_cache_mib: Annotated[int, Field(ge=0)] = 4096
    """Disk for fetched adapters; least recently used ones leave first, those that can answer stay."""
    kernel_cache_mib: Annotated[int, Field(ge=0)] = 64
    """Disk for kernels compiled for other sources or processors; least recently used ones leave first."""
    packed_cache_mib: Annotated[int, Field(ge=0)] = 8192
    """Disk for packed models beside the one that is served; least recently used ones leave first, those that
    a process serves stay."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """What the model computes in; decode must use the same."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """Computing threads; torch's default if not given."""
    kernels: Choice = "auto"
    """Own kernels where installed or where a compiler is (auto), these or an error (native), or torch."""
    weights: Precision = "full"
    """Of linear layers, beneath adapters, which add what they learned in their own numbers. full: the model's
    own, on which they were trained. Faster and not exact, with inputs in 8 bits: int8, rounded to 8 bits;
    int4, the blocks of 4 to 8 bits of a .gguf file, or rounded to such. Decode may have others."""
    nice: Annotated[int, Field(ge=0, le=19)] = 0
    """How far prompt passes step back for whoever else computes on these cores (Linux); 0 is not at all."""
    yield_s: Annotated[float, Field(ge=0)] = 0.0
    """Seconds of rest between two passes while sequences of ours decode."""

    pass_tokens: Annotated[int, Field(ge=1)] = 4096
    """Prompt tokens of one packed pass; the KV of up to two passes is in memory until it has gone out."""
    chunk_tokens: Annotated[int, Field(ge=1)] = 512
    """Tokens of a pass for longer prompts, which are computed in chunks; short ones go in beside them."""
    gather_s: Annotated[float, Field(ge=0, le=0.1)] = 0.003
    """A pass begins when no prompt came for so long: those that come together then decode together. It waits
    0.1 s at most, and never while a prompt is under way in chunks."""
    pass_prompts: Annotated[int, Field(ge=1)] = 64
    """Prompts of one packed pass."""
    block_size: Annotated[int, Field(ge=1)] = 16
    """Tokens of one block of prompt KV: what the prefix cache finds is a multiple of it."""
    chunked_kv_mib: Annotated[int, Field(ge=0)] = 512
    """Memory for prompts that are under way in chunks; one for which it is too small is never cut."""
    prefix_cache_mib: Annotated[int, Field(ge=0)] = 512
    """Memory for prompt blocks that later prompts may begin with, least recently used out; 0 keeps none."""
    max_waiting: Annotated[int, Field(ge=1)] = 1024
    """Prompts in the queue, those that wait for their adapter included; further ones are refused, or the last
    ones of the task that has more of them there, but for those of answers that have begun."""
    queue_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """Seconds that a prompt waits for room at decode, and before that for an adapter that is not on this disk
    yet; if the first would take longer, it is refused on arrival. An answer under way waits as long for a
    decode service that is lost."""
    request_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Seconds from arrival to last token; a request that takes longer ends with an error."""

    files_dir: Path | None = None
    """Folder for files of /v1/files and batches of /v1/batches, which go on in it after a restart; each
    service needs its own. Neither is served if not given."""
    files_mib: Annotated[int, Field(ge=1)] = 1024
    """Disk for files. What goes beyond is refused, and batches wait until something is deleted or expires."""
    file_mib: Annotated[int, Field(ge=1)] = 64
    """Largest file that is taken."""
    max_files: Annotated[int, Field(ge=1)] = 1000
    """Files that are kept; further ones are refused."""
    files_days: Annotated[float, Field(gt=0)] = 30.0
    """Days after which a file, and the record of a batch that ended, is deleted."""
    max_batches: Annotated[int, Field(ge=1)] = 64
    """Batches that have not ended; further ones are refused."""
    batch_lines: Annotated[int, Field(ge=1)] = 50_000
    """Requests of one batch."""
    batch_at_once: Annotated[int, Field(ge=1)] = 128
    """Requests of batches that are under way at once, behind all others: enough to fill decode's steps."""
    kept_answers_mib: Annotated[int, Field(ge=0)] = 64
    """Memory for answers of /v1/responses that `previous_response_id` may name, least recently used out; 0:
    none."""

    kv_wire: Literal["raw", "int8"] = "raw"
    """How KV travels to decode: raw (exact), or as 8-bit numbers (half the bytes, not exact)."""
    kv_overlap: Literal["auto", "yes", "no"] = "auto"
    """Whether a layer's KV goes out while later layers compute, or all of it behind the pass, which is faster
    on cores that the pass keeps busy; auto: while they compute if a core is left, or a GPU computes."""
    kv_shared_mib: Annotated[int, Field(ge=0, le=1024)] = 16
    """Shared memory offered to a decode service of this host for KV; 0: none."""

    adapters_mib: Annotated[int, Field(ge=1)] = 1024
    """Memory for resident adapters; least recently used ones leave first, and while all are in use, prompts
    that want others wait their turn."""
    pinned_tasks: str = ""
    """Tasks whose adapters are loaded before anybody asks, and leave memory last, separated by commas; * for
    all. They count in `adapters_mib`: what is pinned beyond it leaves as others do."""
    allow_other_weights: bool = False
    """Serve adapters trained on other weights of the same architecture."""
    allow_unmoved: bool = False
    """Let a pushed version pass its probe whose adapter leaves the logits as they are, as one that was never
    trained."""

    @property
    def hosts(self) -> tuple[str, ...]:
        """Names that clients may call the API by."""
        return (self.host, *_listed(self.allowed_hosts))

    @property
    def origins(self) -> tuple[str, ...]:
        return _listed(self.cors_origins)

    @property
    def pinned(self) -> tuple[str, ...]:
        return _listed(self.pinned_tasks)

    @property
    def keys_required(self) -> bool:
        """Whether clients need a key also while the registry has none."""
        return not is_loopback(self.host) and not self.unprotected

    @property
    def base_name(self) -> str:
        return self.model_name or served_name(self.model)


def _listed(names: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in names.split(",") if name.strip())
