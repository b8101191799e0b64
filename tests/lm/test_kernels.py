"""The kernels for rows and for adapters against the same written out in torch; how the kernels are built."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from near import ACTIVATIONS, DTYPES, EACH_KIND, assert_near, some
from torch import Tensor
from torch.nn.functional import layer_norm, relu

from prad.lm.kernels import Activation, BuildError, Kernels, LowRankSpan, load_kernels, view_of
from prad.lm.kernels.build import built

MIXED = [  # matrices; whether value, and source, are float32 beside them
    (torch.float32, False, False),
    (torch.bfloat16, False, False),
    (torch.bfloat16, True, False),
    (torch.bfloat16, True, True),
]


@EACH_KIND
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("width", [16, 40, 7])
def test_activation_alone(kernels: Kernels, dtype: torch.dtype, activation: Activation, width: int) -> None:
    x, out = some(9, 2 * width, dtype=dtype), torch.full((10, width), 7.0, dtype=dtype)
    gate, up = x.float().chunk(2, dim=1)
    kernels.activate(x, out[:9], activation)
    assert_near(out[:9], ACTIVATIONS[activation](gate) * up, DTYPES[dtype])
    kernels.activate(gate.to(dtype).contiguous(), out[:9], activation)
    assert_near(out[:9], ACTIVATIONS[activation](gate), DTYPES[dtype])
    kernels.activate(x.float(), out[:9], activation)
    assert_near(out[:9], ACTIVATIONS[activation](gate) * up, DTYPES[dtype])
    assert (out[9] == 7).all()


@EACH_KIND
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 40, 7])
def test_rows_are_scaled_by_their_own_vectors(kernels: Kernels, dtype: torch.dtype, width: int) -> None:
    layers, rows, site, layer = 3, 19, 1, 2
    vectors = {i: some(layers, width, dtype=dtype, seed=i) for i in range(0, rows, 3)}
    addresses = torch.zeros(2, rows, dtype=torch.long)
    for i, own in vectors.items():
        addresses[site, i] = own.data_ptr()
    nothing = torch.zeros(1, 1, dtype=torch.long)
    whole = some(rows, width + 5, dtype=dtype, seed=99)
    expected = whole.float()
    for i, own in vectors.items():
        expected[i, 2 : 2 + width] *= 1 + own[layer].float()
    view, wide = view_of(nothing, nothing, addresses), whole.float()
    kernels.scale(whole[:, 2 : 2 + width], site, layer, view, dtype)
    assert_near(whole, expected, DTYPES[dtype])
    kernels.scale(wide[:, 2 : 2 + width], site, layer, view, dtype)
    assert_near(wide, expected, DTYPES[torch.float32])


@EACH_KIND
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [48, 64, 100])
def test_norms(kernels: Kernels, dtype: torch.dtype, width: int) -> None:
    x, weight, bias = 3 * some(19, width) + 1, some(width, seed=1), some(width, seed=2)
    out = torch.empty(19, width, dtype=dtype)
    kernels.norm(x, weight, None, False, 1e-5, out)
    assert_near(out, x * (x.square().mean(1, keepdim=True) + 1e-5).rsqrt() * weight, DTYPES[dtype])
    kernels.norm(x, weight, bias, True, 1e-5, out)
    assert_near(out, layer_norm(x, (width,), weight, bias, 1e-5), DTYPES[dtype])


@EACH_KIND
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True])
def test_rotation(kernels: Kernels, dtype: torch.dtype, normed: bool) -> None:
    heads, queries, dim, rows = 5, 3, 8, 21
    x = some(rows, (heads + 2) * dim, dtype=dtype)
    angles = some(rows, dim // 2, seed=1).repeat(1, 2)
    cosine, sine = angles.cos(), angles.sin()
    norms = (some(dim, seed=2), some(dim, seed=3)) if normed else None
    expected = x.float().view(rows, heads + 2, dim).clone()
    turned = expected[:, :heads]
    if norms is not None:
        weights = torch.stack([norms[0]] * queries + [norms[1]] * (heads - queries))
        turned = turned * (turned.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weights
    half = torch.cat((-turned[..., dim // 2 :], turned[..., : dim // 2]), dim=-1)
    expected[:, :heads] = turned * cosine[:, None] + half * sine[:, None]
    kernels.rotate(x, heads, queries, dim, cosine, sine, norms, 1e-6)
    assert_near(x, expected.flatten(1), DTYPES[dtype])


@EACH_KIND
@pytest.mark.parametrize("dtype", DTYPES)
def test_argmax_takes_the_lowest_of_a_tie(kernels: Kernels, dtype: torch.dtype) -> None:
    logits = some(4, 50, dtype=dtype)
    logits[1, [7, 33, 49]] = 9.0
    logits[2, [48, 49]] = 9.0
    logits[3] = float("-inf")
    assert kernels.argmax(logits) == [int(logits[0].argmax()), 7, 48, 0]
    wide = torch.zeros(3, 50_000, dtype=dtype)
    wide[0, [41_000, 17, 30_000]] = 4.0
    wide[1, [49_999, 49_998]] = 1.0
    assert kernels.argmax(wide) == [17, 49_998, 0]


@EACH_KIND
@pytest.mark.parametrize(("dtype", "wide_value", "wide_source"), MIXED)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("width_in", "width_out"), [(48, 64), (50, 21)])
def test_low_rank(
    kernels: Kernels,
    dtype: torch.dtype,
    wide_value: bool,
    wide_source: bool,
    relu: bool,
    width_in: int,
    width_out: int,
) -> None:
    """Spans of several ranks, with and without a bias."""
    layers, layer, rows = 3, 1, 40
    source = some(rows, width_in + 3, dtype=torch.float32 if wide_source else dtype)[:, :width_in]
    value = some(rows, width_out + 5, dtype=torch.float32 if wide_value else dtype, seed=8)[:, :width_out]
    expected = value.float().clone()
    spans, kept = [], []
    for seed, (start, stop, r, factor) in enumerate([(0, 1, 4, 1.0), (2, 11, 16, 0.5), (11, 40, 37, -2.0)]):
        down, up = (some(layers, *shape, dtype=dtype, seed=seed) for shape in ((width_in, r), (r, width_out)))
        bias = some(layers, r, dtype=torch.float32, seed=9) if seed else None
        kept += [down, up, bias]
        spans.append(LowRankSpan(start=start, stop=stop, down=down, bias=bias, up=up, r=r, factor=factor))
        hidden = source[start:stop].float() @ down[layer].float()
        if bias is not None:
            hidden = hidden + bias[layer]
        expected[start:stop] += factor * (relu_or_not(hidden, relu) @ up[layer].float())
    kernels.low_rank(value, source, (LowRankSpan * len(spans))(*spans), layer, relu, dtype)
    assert_near(value, expected, DTYPES[value.dtype])


@EACH_KIND
@pytest.mark.parametrize(("dtype", "wide_value", "wide_source"), MIXED)
@pytest.mark.parametrize(("width_in", "r", "width_out"), [(64, 108, 80), (96, 33, 21), (32, 7, 16)])
def test_low_rank_of_any_number_of_rows(
    kernels: Kernels,
    dtype: torch.dtype,
    wide_value: bool,
    wide_source: bool,
    width_in: int,
    r: int,
    width_out: int,
) -> None:
    """As written out, by whichever products; a row's bits are those it has alone."""
    down, up = some(1, width_in, r, dtype=dtype, seed=1), some(1, r, width_out, dtype=dtype, seed=2)
    for rows in (1, 5, 6, 7, 8, 9, 15, 16, 17, 63, 64, 65):
        source = some(rows, width_in, dtype=torch.float32 if wide_source else dtype, seed=rows)
        value = some(rows, width_out, dtype=torch.float32 if wide_value else dtype, seed=rows + 100)
        expected = value.float() + 0.5 * (source.float() @ down[0].float()) @ up[0].float()
        alone = value.clone()
        for spans, into in (([(0, rows)], value), ([(i, i + 1) for i in range(rows)], alone)):
            each = [
                LowRankSpan(start=a, stop=b, down=down, bias=None, up=up, r=r, factor=0.5) for a, b in spans
            ]
            kernels.low_rank(into, source, (LowRankSpan * len(each))(*each), 0, False, dtype)
        assert_near(value, expected, DTYPES[dtype])
        assert torch.equal(value, alone)


@EACH_KIND
@pytest.mark.parametrize("dtype", DTYPES)
def test_low_rank_reads_what_it_writes(kernels: Kernels, dtype: torch.dtype) -> None:
    value, down, up = (
        some(21, 48, dtype=dtype),
        some(1, 48, 8, dtype=dtype, seed=1),
        some(1, 8, 48, dtype=dtype, seed=2),
    )
    expected = value.float() + (value.float() @ down[0].float()) @ up[0].float()
    span = LowRankSpan(start=0, stop=21, down=down, bias=None, up=up, r=8, factor=1.0)
    kernels.low_rank(value, value, (LowRankSpan * 1)(span), 0, False, dtype)
    assert_near(value, expected, DTYPES[dtype])


@EACH_KIND
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [7, 16, 50])
def test_affine(kernels: Kernels, dtype: torch.dtype, width: int) -> None:
    """Pieces with vectors of their own; rows in none stay, and so does what lies beside."""
    layers, layer, bounds = 3, 2, torch.tensor([[1, 2], [4, 20], [20, 33]])
    beside = some(40, width + 5, dtype=dtype)
    x = beside[:, :width]
    vectors = [some(layers, width, dtype=torch.float32, seed=seed) for seed in range(10, 16)]
    gains, shifts = vectors[:3], vectors[3:]
    for by_gain, by_shift in ((True, False), (False, True), (True, True)):
        expected = beside.float().clone()
        for (start, stop), gain, shift in zip(bounds.tolist(), gains, shifts, strict=True):
            if by_gain:
                expected[start:stop, :width] *= gain[layer]
            if by_shift:
                expected[start:stop, :width] += shift[layer]
        at = [torch.tensor([v.data_ptr() for v in own]) for own in (gains, shifts)]
        kernels.affine(x, bounds, at[0] if by_gain else None, at[1] if by_shift else None, layer)
        assert_near(beside, expected, DTYPES[dtype])


@EACH_KIND
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [7, 16, 50])
def test_mean(kernels: Kernels, dtype: torch.dtype, width: int) -> None:
    beside, bounds = some(70, width + 5, dtype=dtype), torch.tensor([[0, 1], [3, 67], [60, 70]])
    out = torch.empty(3, width, dtype=dtype)
    kernels.mean(beside[:, :width], bounds, out)
    expected = [beside[start:stop, :width].double().mean(0) for start, stop in bounds.tolist()]
    assert_near(out, torch.stack(expected), DTYPES[dtype])


def relu_or_not(x: Tensor, wanted: bool) -> Tensor:
    return relu(x) if wanted else x


def test_without_a_compiler_torch_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    assert load_kernels("auto", tmp_path, "cpu") is None
    with pytest.raises(BuildError, match="did not build"):
        load_kernels("native", tmp_path, "cpu")


def test_a_compiler_that_refuses_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing = tmp_path / "cxx"
    refusing.write_text("#!/bin/sh\necho 'error: no such standard' >&2\nexit 1\n", encoding="utf-8")
    refusing.chmod(0o755)
    assert subprocess.run([refusing], capture_output=True).returncode == 1
    monkeypatch.setenv("CXX", str(refusing))
    with pytest.raises(BuildError, match="no such standard"):
        load_kernels("native", tmp_path, "cpu")


def test_what_is_compiled_is_only_ours_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where new files are the group's: the next start would refuse it."""
    compiler = tmp_path / "cxx"
    compiler.write_text('#!/bin/sh\nfor out; do :; done\necho library > "$out"\n', encoding="utf-8")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    before = os.umask(0o002)
    try:
        kept = built(tmp_path)
        assert not kept.stat().st_mode & 0o022
        assert built(tmp_path) == kept
    finally:
        os.umask(before)


@pytest.mark.parametrize("whose", ["folder", "library"])
def test_a_library_that_others_may_have_written_is_not_loaded(
    whose: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "cxx"
    compiler.write_text('#!/bin/sh\nfor out; do :; done\necho library > "$out"\n', encoding="utf-8")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    kept = built(tmp_path)
    (kept if whose == "library" else kept.parent).chmod(0o777)
    with pytest.raises(BuildError, match="can be written by other users"):
        built(tmp_path)


def test_libraries_of_older_sources_go_least_recently_used_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "cxx"
    compiler.write_text('#!/bin/sh\nfor out; do :; done\necho library > "$out"\n', encoding="utf-8")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    kept = built(tmp_path)
    ages = {"a.so": 3, "a.lock": 3, "b.so": 2, "b.lock": 2, "c.new": 1}
    for name, used in ages.items():
        (kept.parent / name).write_bytes(bytes(100))
        os.utime(kept.parent / name, (used, used))
    fresh = kept.parent / "fresh.so"
    fresh.write_bytes(bytes(100))
    os.utime(fresh)
    os.utime(kept, (0, 0))
    assert built(tmp_path, 250) == kept
    there = {path.name for path in kept.parent.iterdir()} - {kept.name, kept.with_suffix(".lock").name}
    assert there == {"a.so", "a.lock", "fresh.so"}
    built(tmp_path, 0)
    assert fresh.exists(), "another process may be about to load it"
    assert kept.exists()
    assert not (kept.parent / "a.so").exists()
