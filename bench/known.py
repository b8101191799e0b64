"""Which benchmarks there are, and what each can be told."""

import ast
from pathlib import Path

from bench import flags, flags_of_training
from bench.flags import Flags

FLAGS: dict[str, type[Flags]] = {
    "table4": flags.Table4,
    "serve": flags.Serve,
    "flood": flags.Flood,
    "batch": flags.Batch,
    "registry": flags.Registry,
    "memory": flags.Memory,
    "push": flags.Push,
    "versions": flags.Versions,
    "decode": flags.Decode,
    "growth": flags.Growth,
    "choices": flags.Choices,
    "beams": flags.Beams,
    "step": flags.Step,
    "structured": flags.Structured,
    "para": flags.Para,
    "floor": flags.Floor,
    "libraries": flags.Libraries,
    "gpu": flags.Gpu,
    "handoff": flags.Handoff,
    "rounding": flags.Rounding,
    "greedy": flags.Greedy,
    "prefill": flags.Prefill,
    "chunking": flags.Chunking,
    "speculation": flags.Speculation,
    "peers": flags.Peers,
    "stream": flags.Stream,
    "vllm_serve": flags.VllmServe,
    "quality": flags_of_training.Quality,
    "train": flags_of_training.Train,
}


def described(name: str) -> str:
    """The docstring of a benchmark's module, which is not imported: that takes seconds."""
    tree = ast.parse((Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8"))
    return ast.get_docstring(tree) or ""
