"""transformers' generate, plain or with PEFT's mixed-adapter batch.

Options: model, dtype, adapters {name: folder}.
"""

from typing import Any

import torch
from protocol import Prompts, claim_stdout, options, serve
from transformers import AutoModelForCausalLM


def main() -> None:
    answers = claim_stdout()
    wanted = options()
    folders: dict[str, str] = wanted["adapters"]
    model = loaded(wanted["model"], getattr(torch, wanted["dtype"]), folders)

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


def loaded(folder: str, dtype: torch.dtype, adapters: dict[str, str]) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    return _with_adapters(model, adapters).to(dtype) if adapters else model


def _with_adapters(model: Any, folders: dict[str, str]) -> Any:
    from peft import PeftModel

    (first, folder), *others = folders.items()
    kept = {"autocast_adapter_dtype": False}  # as the files are; the model's dtype follows
    adapted = PeftModel.from_pretrained(model, folder, adapter_name=first, **kept)
    for name, path in others:
        adapted.load_adapter(path, adapter_name=name, **kept)
    return adapted.eval()


if __name__ == "__main__":
    main()
