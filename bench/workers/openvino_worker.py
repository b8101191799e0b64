"""OpenVINO GenAI over a 4-bit .gguf, continuous batching. Options: gguf, sequences."""

import numpy
import openvino
import openvino_genai
from protocol import Prompts, claim_stdout, options, serve


def main() -> None:
    answers = claim_stdout()
    wanted = options()
    scheduling = openvino_genai.SchedulerConfig()
    scheduling.cache_size = 2  # GiB
    scheduling.max_num_seqs = wanted["sequences"]
    scheduling.max_num_batched_tokens = 4096
    scheduling.enable_prefix_caching = False
    pipeline = openvino_genai.LLMPipeline(wanted["gguf"], "CPU", scheduler_config=scheduling)

    def generate(prompts: Prompts, output: int, adapters: list[str | None]) -> list[int]:
        if any(adapters):
            raise SystemExit("OpenVINO GenAI takes no adapters with a .gguf")
        config = openvino_genai.GenerationConfig(
            max_new_tokens=output, ignore_eos=True, do_sample=False, apply_chat_template=False
        )
        ids = openvino.Tensor(numpy.array(prompts, dtype=numpy.int64))
        mask = openvino.Tensor(numpy.ones((len(prompts), len(prompts[0])), dtype=numpy.int64))
        result = pipeline.generate(openvino_genai.TokenizedInputs(ids, mask), config)
        return [len(tokens) for tokens in result.tokens]

    serve(answers, ["openvino", "openvino-genai"], generate)


if __name__ == "__main__":
    main()
