"""PrAd-SA: a bottleneck behind every FFN (paper, equation 6; sequential adapter of Houlsby et al. 2019).

    [x', y'] = [A(h), FFN(y)]      h = FFN(x)      A(h) = h + s · ReLU(h Wd + b) Wu

It has PrAd-PA's parameters and reads the FFN's output where that reads its input.
"""

import torch
from torch import Tensor

from prad.adapters.method import Group
from prad.adapters.parallel import ParallelAdapter
from prad.lm import Site


class SequentialAdapter(ParallelAdapter):
    name = "prad-sa"

    def contribute(self, group: Group, layer: int, site: Site, value: Tensor, source: Tensor) -> None:
        # the backward pass needs what was read, and a pass writes where it read
        read = value.clone() if torch.is_grad_enabled() else value
        super().contribute(group, layer, site, value, read)
