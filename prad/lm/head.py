"""The generic forward's LM head: logits stay in the float32 in which they are summed.

A model in bfloat16 would round them to 8 bits of mantissa: between 16 and 32 that is steps of 1/8, the best
two tokens of a row often tie exactly, and the lower id wins whatever the model thinks.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_PART = 1 << 20  # numbers of the weight that are widened at once: they stay in a core's cache


class Float32Head(nn.Linear):
    """An LM head with the weight of another, whose logits are float32 whatever the weight's dtype."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__(head.in_features, head.out_features, bias=False, device="meta")
        self.weight, self.bias = head.weight, head.bias

    def forward(self, input: Tensor) -> Tensor:
        """input [..., hidden], in the weight's dtype; float32 [..., vocab].

        With gradients the product is of the weight's own dtype and rounds as that does: the loss over all
        completion tokens gains nothing from twice the time.
        """
        if torch.is_grad_enabled() or self.weight.dtype is torch.float32:
            return super().forward(input).float()
        rows = input.flatten(0, -2)
        if rows.is_cuda:
            logits = torch.mm(rows, self.weight.T, out_dtype=torch.float32)
        else:
            logits = _product(rows, self.weight)
        if self.bias is not None:
            logits += self.bias
        return logits.view(*input.shape[:-1], -1)


def widen_head(module: Any) -> None:
    """The causal LM `module` computes its logits in float32 from now on, and what its family does to them
    behind the head (a soft cap, a scale) as well."""
    head = module.get_output_embeddings()
    if type(head) is nn.Linear:
        module.set_output_embeddings(Float32Head(head))


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x [R, hidden] W^T in float32 [R, vocab]. On a CPU torch has no product of bfloat16 that keeps its sums:
    the weight is widened a part at a time, never all of it."""
    x = x.float()
    logits = x.new_empty(len(x), len(weight))
    rows = max(1, _PART // weight.shape[1])
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        torch.mm(x, weight[part].float().T, out=logits[:, part])
    return logits


@contextmanager
def entering_head(module: Any, changed: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside the `with`, the head of the causal LM `module` gets what `changed` makes of its input
    [1, R, hidden]: what the family does to logits behind it stays the family's."""

    def enter(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (changed(args[0]), *args[1:])

    handle = module.get_output_embeddings().register_forward_pre_hook(enter)
    try:
        yield
    finally:
        handle.remove()
