"""Named places in a layer where an adapter may act, and where each model family keeps them.

The paper's FFN (equations 4 and 6) is what lies between the norm before it and whatever comes behind it:
FFN_IN is the output of the norm before it (for an OPT that norms behind its sublayers, the residual stream),
FFN_OUT what it adds to the residual stream, before Gemma 3's second norm and OPT's norm behind the addition.
"""

from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor


class Site(StrEnum):
    Q = "q"
    K = "k"
    V = "v"
    O = "o"  # noqa: E741 - the field's name for the output projection
    GATE = "gate"
    UP = "up"
    DOWN = "down"
    DOWN_IN = "down_in"
    FFN_IN = "ffn_in"
    FFN_OUT = "ffn_out"
    EMBEDDING = "embedding"
    KEYS = "keys"
    VALUES = "values"


@dataclass(frozen=True, slots=True)
class Tap:
    """Where a site is: a module below the layer, its input or output, and which part of a fused output.

    `by_head`: the parts of each head lie side by side (GPT-NeoX), not those of all heads. `entry`: the
    module whose input is the source, where it is not `path`'s own. `shared`: the input is also the residual
    stream in some models of the family, which an adapter of the site must not change.
    """

    path: str
    is_input: bool = False
    part: int = 0
    parts: int = 1
    by_head: bool = False
    entry: str | None = None
    shared: bool = False

    @property
    def is_projection(self) -> bool:
        """Whether the site is what its module makes of its own input."""
        return not self.is_input and self.entry is None

    def part_of(self, fused: Tensor, heads: int) -> Tensor:
        """fused [T, all parts] -> the site's own, a view: [T, width], or [T, heads, head_dim] by_head."""
        if self.by_head:
            return fused.view(len(fused), heads, self.parts, -1)[:, :, self.part]
        width = fused.shape[-1] // self.parts
        return fused.narrow(-1, self.part * width, width)


@dataclass(frozen=True, slots=True)
class Family:
    layers: str
    taps: dict[Site, Tap]


_LLAMA = Family(
    "model.layers",
    {
        Site.Q: Tap("self_attn.q_proj"),
        Site.K: Tap("self_attn.k_proj"),
        Site.V: Tap("self_attn.v_proj"),
        Site.O: Tap("self_attn.o_proj"),
        Site.GATE: Tap("mlp.gate_proj"),
        Site.UP: Tap("mlp.up_proj"),
        Site.DOWN: Tap("mlp.down_proj"),
        Site.DOWN_IN: Tap("mlp.down_proj", is_input=True),
        Site.FFN_IN: Tap("mlp", is_input=True),
        Site.FFN_OUT: Tap("mlp"),
    },
)
_GPT2 = Family(
    "transformer.h",
    {
        Site.Q: Tap("attn.c_attn", part=0, parts=3),
        Site.K: Tap("attn.c_attn", part=1, parts=3),
        Site.V: Tap("attn.c_attn", part=2, parts=3),
        Site.O: Tap("attn.c_proj"),
        Site.UP: Tap("mlp.c_fc"),
        Site.DOWN: Tap("mlp.c_proj"),
        Site.DOWN_IN: Tap("mlp.c_proj", is_input=True),
        Site.FFN_IN: Tap("mlp", is_input=True),
        Site.FFN_OUT: Tap("mlp"),
    },
)
_GPT_NEOX = Family(
    "gpt_neox.layers",
    {
        Site.Q: Tap("attention.query_key_value", part=0, parts=3, by_head=True),
        Site.K: Tap("attention.query_key_value", part=1, parts=3, by_head=True),
        Site.V: Tap("attention.query_key_value", part=2, parts=3, by_head=True),
        Site.O: Tap("attention.dense"),
        Site.UP: Tap("mlp.dense_h_to_4h"),
        Site.DOWN: Tap("mlp.dense_4h_to_h"),
        Site.DOWN_IN: Tap("mlp.dense_4h_to_h", is_input=True),
        Site.FFN_IN: Tap("mlp", is_input=True),
        Site.FFN_OUT: Tap("mlp"),
    },
)
_OPT = Family(
    "model.decoder.layers",
    {
        Site.Q: Tap("self_attn.q_proj"),
        Site.K: Tap("self_attn.k_proj"),
        Site.V: Tap("self_attn.v_proj"),
        Site.O: Tap("self_attn.out_proj"),
        Site.UP: Tap("fc1"),
        Site.DOWN: Tap("fc2"),
        Site.DOWN_IN: Tap("fc2", is_input=True),
        Site.FFN_IN: Tap("fc1", is_input=True, shared=True),  # no module is the FFN
        Site.FFN_OUT: Tap("fc2", entry="fc1"),
    },
)
FAMILIES = {
    "gemma3_text": _LLAMA,
    "gpt2": _GPT2,
    "gpt_neox": _GPT_NEOX,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "opt": _OPT,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
}
