"""llama.cpp over a .gguf, all sequences in one batch, by its C interface. Options: gguf, sequences, context.

llama-cpp-python's own completions take one sequence at a time.
"""

import ctypes
import os
from itertools import pairwise

import llama_cpp
import numpy
from protocol import Prompts, claim_stdout, options, serve

_BATCH = 4096  # tokens of a call, 512 of which are computed together as is its default


def main() -> None:
    answers = claim_stdout()
    wanted = options()
    llama_cpp.llama_backend_init()
    path = wanted["gguf"].encode()
    model = llama_cpp.llama_model_load_from_file(path, llama_cpp.llama_model_default_params())
    settings = llama_cpp.llama_context_default_params()
    settings.n_seq_max = wanted["sequences"]
    settings.n_ctx = wanted["sequences"] * (-(-wanted["context"] // 256) * 256)
    settings.n_batch = _BATCH
    settings.n_threads = settings.n_threads_batch = os.cpu_count() or 1
    context = llama_cpp.llama_init_from_model(model, settings)
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    batch = llama_cpp.llama_batch_init(_BATCH, 0, 1)

    def decode(rows: list[tuple[int, int, int, bool]]) -> None:
        """Rows of token, position, sequence, and whether its logits are wanted."""
        batch.n_tokens = len(rows)
        for at, (token, position, sequence, last) in enumerate(rows):
            batch.token[at] = token
            batch.pos[at] = position
            batch.n_seq_id[at] = 1
            batch.seq_id[at][0] = sequence
            batch.logits[at] = last
        if code := llama_cpp.llama_decode(context, batch):
            raise SystemExit(f"llama_decode said {code}")

    def best(at: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(context, at)
        row = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float * vocabulary)).contents
        return int(numpy.frombuffer(row, dtype=numpy.float32).argmax())

    def first_tokens(prompts: Prompts) -> list[int]:
        """Whole prompts together, as many as a call takes."""
        tokens = []
        per_call = max(1, _BATCH // max(map(len, prompts)))
        starts = [*range(0, len(prompts), per_call), len(prompts)]
        for start, end in pairwise(starts):
            rows = [
                (token, position, sequence, position == len(prompts[sequence]) - 1)
                for sequence in range(start, end)
                for position, token in enumerate(prompts[sequence])
            ]
            decode(rows)
            tokens += [best(at) for at, row in enumerate(rows) if row[3]]
        return tokens

    def generate(prompts: Prompts, output: int, adapters: list[str | None]) -> list[int]:
        if any(adapters):
            raise SystemExit("the llama.cpp of this benchmark takes no adapters")
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        tokens = first_tokens(prompts)
        for step in range(output - 1):
            decode([(t, len(prompts[s]) + step, s, True) for s, t in enumerate(tokens)])
            tokens = [best(at) for at in range(len(prompts))]
        return [output] * len(prompts)

    serve(answers, ["llama_cpp_python"], generate)


if __name__ == "__main__":
    main()
