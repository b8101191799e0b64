"""transformers' generate, plain or with PEFT's mixed-adapter batch.

Options: model, adapters {name: folder}.
"""

from typing import Any

import torch
from protocol import Prompts, claim_stdout, options, serve
from transformers import AutoModelForCausalLM


def main() -> None:
    answers = claim_stdout()
    wanted = options()
    model: Any = AutoModelForCausalLM.from_pretrained(wanted["model"], dtype=torch.bfloat16).eval()
    folders: dict[str, str] = wanted["adapters"]
    if folders:
        model = _with_adapters(model, folders)

    def generate(prompts: Prompts, output: int, adapters: list[str | None]) -> list[int]:
        ids = torch.tensor(prompts)
        named = {"adapter_names": [name or "__base__" for name in adapters]} if folders else {}
        with torch.inference_mode():
            full = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=output,
                min_new_tokens=output,
                do_sample=False,
                pad_token_id=0,
                **named,
            )
        return [full.shape[1] - ids.shape[1]] * len(prompts)

    serve(answers, ["transformers", "torch", *(["peft"] if folders else [])], generate)


def _with_adapters(model: Any, folders: dict[str, str]) -> Any:
    from peft import PeftModel

    (first, folder), *others = folders.items()
    kept = {"autocast_adapter_dtype": False}  # in bf16, as the model and as our adapters are
    adapted = PeftModel.from_pretrained(model, folder, adapter_name=first, **kept)
    for name, path in others:
        adapted.load_adapter(path, adapter_name=name, **kept)
    return adapted.eval()


if __name__ == "__main__":
    main()
