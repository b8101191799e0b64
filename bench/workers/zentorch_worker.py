"""Products by zentorch. Options: shapes [[out, in], ...], rows [n, ...], dtype of weights and rows (bfloat16,
float32 or int8: that of the weights, by rows in bfloat16).

    bench -> worker   {"rows": n}: every matrix once
"""

from collections.abc import Callable
from typing import Any

from protocol import answer, claim_stdout, options


def main() -> None:
    answers = claim_stdout()
    wanted = options()
    import torch
    import zentorch  # noqa: F401  # its operations

    zen = torch.ops.zentorch
    dtype = getattr(torch, wanted["dtype"])
    of_rows = torch.bfloat16 if dtype is torch.int8 else dtype

    def packed(shape: list[int]) -> Callable[[Any], Any]:
        weight = torch.randn(shape) / shape[1] ** 0.5
        if dtype is torch.int8:
            scales = weight.abs().amax(dim=1) / 127
            whole = (weight / scales[:, None]).round().to(torch.int8)
            bytes_ = zen.zentorch_weight_prepack_for_dynamic_qlinear(whole)
            return lambda x: zen.zentorch_dynamic_qlinear(x, bytes_, scales, is_weight_prepacked=True)
        ready = zen.zentorch_weight_prepack_for_linear(weight.to(dtype))
        return lambda x: zen.zentorch_linear_unary(x, ready, is_weight_prepacked=True)

    products = [(packed(shape), shape[1]) for shape in wanted["shapes"]]
    widths = {width for _, width in products}
    inputs = {(n, width): torch.randn(n, width).to(of_rows) for n in wanted["rows"] for width in widths}

    @torch.inference_mode()
    def once(asked: dict[str, Any]) -> None:
        for product, width in products:
            product(inputs[asked["rows"], width])

    answer(answers, ["zentorch", "torch"], once)


if __name__ == "__main__":
    main()
