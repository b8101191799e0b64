"""What the benchmark of growth says about a curve, and what it measures beside the default model."""

import pytest

from bench.flags import Growth
from bench.grown_models import SIZES, random_llama
from bench.growth import curve_row, exponent
from prad.lm.kernels import Kernels


def test_the_exponent_is_the_power() -> None:
    assert exponent([(x, 3 * x**1.5) for x in (1, 2, 8, 64)]) == pytest.approx(1.5)
    assert exponent([(x, 7.0) for x in (1, 10, 100)]) == pytest.approx(0)


def test_what_is_fixed_counts_less_in_the_upper_half() -> None:
    row = curve_row("a step", "sequences", {x: 10 + x for x in (1, 4, 16, 64, 256, 1024)})
    assert (row["first"], row["last"], row["first_ms"], row["last_ms"]) == (1, 1024, 11, 1034)
    assert row["exponent"] < 0.75 < row["upper"] < 1


def test_a_random_llama_is_one_that_the_kernels_serve(kernels: Kernels) -> None:
    model = random_llama("small", kernels)
    assert model.is_fused
    assert model.num_layers == SIZES["small"].num_hidden_layers


def test_every_size_is_known() -> None:
    assert set(Growth.model_validate({}).sizes) <= set(SIZES)
