"""Weights rounded to ggml's Q4_K and Q6_K, which the gguf package reads and does not write; for tests."""

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import quantize
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


def rounded(weight: Floats, kind: str) -> Bytes:
    """weight [out, in] as a file keeps it."""
    own = {"Q4_K": _q4_k, "Q6_K": _q6_k}.get(kind)
    return quantize(weight, GGMLQuantizationType[kind]) if own is None else own(weight)


def _q4_k(weight: Floats) -> Bytes:
    """To the nearest: no block's scale is looked for, as ggml does."""
    blocks = weight.reshape(len(weight), -1, 8, 32)
    least = np.maximum(-blocks.min(axis=-1), 0)
    scale = (blocks.max(axis=-1) + least) / 15
    d, scale_steps = _steps(scale, 63)
    dmin, least_steps = _steps(least, 63)
    own = (d * scale_steps)[..., None]
    shifted = blocks + (dmin * least_steps)[..., None]
    numbers = np.rint(np.divide(shifted, own, out=np.zeros_like(blocks), where=own != 0)).clip(0, 15)
    numbers = numbers.astype(np.uint8).reshape(*blocks.shape[:2], 4, 2, 32)
    first, second = (steps.astype(np.uint8)[..., :4] for steps in (scale_steps, least_steps))
    third, fourth = (steps.astype(np.uint8)[..., 4:] for steps in (scale_steps, least_steps))
    parts = (
        _half(d),
        _half(dmin),
        first | third >> 4 << 6,
        second | fourth >> 4 << 6,
        third & 15 | fourth << 4,
        (numbers[..., 0, :] | numbers[..., 1, :] << 4).reshape(*blocks.shape[:2], 128),
    )
    return np.concatenate(parts, axis=-1).reshape(len(weight), -1)


def _q6_k(weight: Floats) -> Bytes:
    """The number of the largest magnitude becomes -32, so that scales have either sign."""
    blocks = weight.reshape(len(weight), -1, 16, 16)
    places = np.abs(blocks).argmax(axis=-1)[..., None]
    d, steps = _steps(np.take_along_axis(blocks, places, axis=-1)[..., 0] / -32, 127)
    own = (d * steps)[..., None]
    numbers = np.rint(np.divide(blocks, own, out=np.zeros_like(blocks), where=own != 0)).clip(-32, 31) + 32
    numbers = numbers.astype(np.uint8).reshape(*blocks.shape[:2], 2, 128)
    low = (numbers[..., :64] & 15) | (numbers[..., 64:] & 15) << 4
    high = sum((numbers[..., 32 * i : 32 * i + 32] >> 4) << 2 * i for i in range(4))
    parts = (low, np.asarray(high), steps.astype(np.int8).view(np.uint8), _half(d))
    flat = [part.reshape(*blocks.shape[:2], -1) for part in parts]
    return np.concatenate(flat, axis=-1).reshape(len(weight), -1)


def _steps(factors: Floats, most: int) -> tuple[Floats, Floats]:
    """factors [out, n, blocks]: what the n share, in float16 [out, n, 1], and how many times that each is."""
    shared = (np.abs(factors).max(axis=-1, keepdims=True) / most).astype(np.float16).astype(np.float32)
    steps = np.rint(np.divide(factors, shared, out=np.zeros_like(factors), where=shared != 0))
    return shared, steps.clip(-most, most)


def _half(shared: Floats) -> Bytes:
    return shared.astype(np.float16).view(np.uint8)
