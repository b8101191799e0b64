"""A grammar in trouble at a prompt's first token: the prompt is told that, and nobody else is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from prad.core.sampling import SamplingParams
from prad.lm import CompiledRules, Grammars, LanguageModel, Tokenizer
from prad.lm.kv import Pools
from prefill_service.errors import GrammarBrokeError
from prefill_service.passes import run_prompt_pass
from prefill_service.prompt import Prompt
from tests.conftest import VOCAB
from tests.lettered import lettered
from tests.prefill.fakes import Setting, request


class Broken:
    def unsafe_compute_mask_ptr(self, *_: Any) -> None:
        raise RuntimeError("it has no bounds")


def test_a_pass_says_whose_grammar_is_in_trouble(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    folder = lettered(tiny_model("llama"), tmp_path / "lettered")
    model, tokenizer = LanguageModel.load(folder, dtype=torch.float32), Tokenizer(folder)
    grammars = Grammars(lambda: tokenizer, VOCAB)
    begun = grammars.begin_written("regex", "[a-c]+", spaced=False)
    rules = CompiledRules(grammar=begun.result().text, compiled=begun)
    ruled, free = (
        Prompt(request(name, range(9), sampling=SamplingParams(max_tokens=5, rules=its)))
        for name, its in (("ruled", rules), ("free", None))
    )
    grammars._loaded.executor = Broken()
    pools = Pools(model.layout, 0, 16, "cpu")
    drawn = run_prompt_pass(model, pools, [ruled.as_chunk(), free.as_chunk()])
    assert (drawn[ruled], ruled.trouble) == (None, "its grammar broke: it has no bounds")
    assert (len(drawn[free] or ()), free.trouble) == (1, None)
    grammars.close()


async def test_it_is_told_as_what_it_is_and_the_prompt_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its numbers are sound: who begins alike finds them, as behind any other."""
    setting = Setting()
    run = setting.passes.run

    async def troubled(chunks: Any) -> Any:
        result = await run(chunks)
        for prompt in result.first_tokens:
            prompt.trouble, result.first_tokens[prompt] = "its grammar broke: out of fuel", None
        return result

    async with setting.running():
        with monkeypatch.context() as context:
            context.setattr(setting.passes, "run", troubled)
            with pytest.raises(GrammarBrokeError, match="out of fuel") as told:
                await setting.only_token(request("r", range(25), max_tokens=1))
        assert (told.value.status, told.value.code) == (500, "grammar_broke")
        assert "not finite" not in told.value.message
        again = await setting.only_token(request("s", range(25), max_tokens=1))
        assert again.cached_tokens == 24
