"""Conversion of colours, compared with the formulas of IEC 61966-2-1 in plain Python."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import blendtorch.btt as btt
from blendtorch_shm.errors import ConfigurationError


def encoded(light: float) -> float:
    return 12.92 * light if light <= 0.0031308 else 1.055 * light ** (1 / 2.4) - 0.055


def decoded(srgb: float) -> float:
    return srgb / 12.92 if srgb <= 0.04045 else ((srgb + 0.055) / 1.055) ** 2.4


CONVERSIONS: dict[str, tuple[Callable[..., Any], Callable[[float], float]]] = {
    "linear_to_srgb": (btt.colors.linear_to_srgb, encoded),
    "srgb_to_linear": (btt.colors.srgb_to_linear, decoded),
    "gamma 2.2": (btt.colors.gamma, lambda x: x ** (1 / 2.2)),
    "gamma 1.8": (lambda x, **kwargs: btt.colors.gamma(x, 1.8, **kwargs), lambda x: x ** (1 / 1.8)),
}
KINDS: dict[str, Callable[[Any], Any]] = {"ndarray": np.asarray, "tensor": torch.from_numpy}
STEPS = np.arange(256, dtype=np.uint8)

conversions = pytest.mark.parametrize(("convert", "formula"), CONVERSIONS.values(), ids=CONVERSIONS)
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@conversions
@kinds
def test_each_of_the_256_values_becomes_the_nearest_to_the_formula(convert: Any, formula: Any, kind: Any) -> None:
    x = kind(STEPS)
    y = convert(x)
    assert type(y) is type(x)
    assert y.dtype == x.dtype
    assert y.tolist() == [round(255 * formula(i / 255)) for i in range(256)]
    assert x.tolist() == list(range(256))


@conversions
@kinds
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-15), (np.float32, 3e-7), (np.float16, 2e-3)])
def test_floating_point_follows_the_formula_in_its_own_precision(
    convert: Any, formula: Any, kind: Any, dtype: Any, tolerance: float
) -> None:
    light = np.concatenate([np.linspace(0, 1, 1001), np.linspace(0, 0.05, 501), [1.5, 4.0]]).astype(dtype)
    y = convert(kind(light))
    assert y.dtype == kind(light).dtype
    np.testing.assert_allclose(
        np.asarray(y, np.float64), [formula(float(x)) for x in light], rtol=tolerance, atol=tolerance
    )


@kinds
def test_all_256_values_survive_decoding_and_encoding_in_floating_point(kind: Any) -> None:
    for dtype in (np.float32, np.float64):
        there = btt.colors.srgb_to_linear(kind(STEPS.astype(dtype) / dtype(255)))
        back = 255 * np.asarray(btt.colors.linear_to_srgb(there))
        assert np.rint(back).astype(np.uint8).tolist() == STEPS.tolist()
        np.testing.assert_allclose(back, STEPS, atol=1e-4)


def test_the_inverse_of_a_gamma_is_that_of_its_reciprocal() -> None:
    x = np.linspace(0, 1, 101)
    np.testing.assert_allclose(btt.colors.gamma(btt.colors.gamma(x, 2.4), 1 / 2.4), x, atol=1e-12)


LAYOUTS = {
    "one image": ((5, 7, 3), -1),
    "grey": ((5, 7), -1),
    "batch": ((2, 5, 7, 3), -1),
    "channels first": ((2, 3, 5, 7), -3),
    "one value": ((), -1),
    "nothing": ((0, 5, 7, 3), -1),
}


@conversions
@kinds
@pytest.mark.parametrize(("shape", "axis"), LAYOUTS.values(), ids=LAYOUTS)
def test_any_shape_is_converted_value_by_value(
    convert: Any, formula: Any, kind: Any, shape: tuple[int, ...], axis: int
) -> None:
    x = np.asarray(np.random.default_rng(0).integers(0, 256, shape, np.uint8))
    y = convert(kind(x), channel_axis=axis)
    assert type(convert(kind(np.asarray(x / 255)), channel_axis=axis)) is type(y) is type(kind(x))
    assert y.shape == shape
    assert np.asarray(y).reshape(-1).tolist() == [round(255 * formula(i / 255)) for i in x.reshape(-1).tolist()]


@kinds
def test_views_with_strides_are_converted_like_their_copies(kind: Any) -> None:
    x = kind(np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8))
    for view in (x[::2, 1::3], x.swapaxes(0, 2), x[..., :2]):
        copy = kind(np.ascontiguousarray(np.asarray(view)))
        assert (btt.colors.linear_to_srgb(view) == btt.colors.linear_to_srgb(copy)).all()


@conversions
@kinds
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize(("shape", "axis"), [((5, 7, 4), -1), ((2, 5, 7, 4), 3), ((2, 4, 5, 7), 1), ((4, 5, 7), -3)])
def test_alpha_stays_as_it_is(
    convert: Any, formula: Any, kind: Any, dtype: Any, shape: tuple[int, ...], axis: int
) -> None:
    values = np.random.default_rng(0).integers(60, 200, shape).astype(dtype)
    x = kind(values if dtype is np.uint8 else values / dtype(255))
    y = convert(x, channel_axis=axis)
    color, alpha = (y.swapaxes(axis, -1)[..., channels] for channels in (slice(3), 3))
    assert (alpha == x.swapaxes(axis, -1)[..., 3]).all()
    assert (color == convert(x, channel_axis=None).swapaxes(axis, -1)[..., :3]).all()
    assert (color != x.swapaxes(axis, -1)[..., :3]).all()
    assert (convert(x, channel_axis=None) != x).all()


def test_gradients_pass_and_are_finite_on_both_sides_of_the_knee() -> None:
    for convert, slope_at_zero in ((btt.colors.linear_to_srgb, 12.92), (btt.colors.srgb_to_linear, 1 / 12.92)):
        x = torch.tensor([0.0, 0.001, 0.0031308, 0.04045, 0.5, 1.0], dtype=torch.float64, requires_grad=True)
        convert(x).sum().backward()
        assert x.grad is not None
        assert x.grad[0].item() == pytest.approx(slope_at_zero)
        assert torch.isfinite(x.grad).all()
        assert torch.autograd.gradcheck(
            convert, torch.tensor([0.0007, 0.3, 0.9], dtype=torch.float64, requires_grad=True)
        )


def test_a_tensor_on_another_device_is_converted_there() -> None:
    """On the device that every torch has, and that keeps no values; a graphics card takes the same way."""
    y = btt.colors.linear_to_srgb(torch.empty((5, 7, 4), dtype=torch.uint8, device="meta"))
    assert (y.device.type, y.dtype, tuple(y.shape)) == ("meta", torch.uint8, (5, 7, 4))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_gives_what_the_cpu_gives() -> None:
    x = torch.from_numpy(STEPS).repeat(3).reshape(3, 256)
    assert (btt.colors.linear_to_srgb(x.cuda()).cpu() == btt.colors.linear_to_srgb(x)).all()


def test_what_is_no_picture_is_refused_with_what_would_be() -> None:
    for x in ([1, 2, 3], 0.5, b"abc"):
        with pytest.raises(ConfigurationError, match=f"{type(x).__name__} .* tensor or an ndarray"):
            btt.colors.gamma(x)
    for x in (np.zeros(3, np.int32), torch.zeros(3, dtype=torch.int64), np.zeros(3, bool)):
        with pytest.raises(ConfigurationError, match=f"uint8 or floating point, not {x.dtype}"):
            btt.colors.linear_to_srgb(x)
    for coeff in (0, -2.2, float("nan")):
        with pytest.raises(ConfigurationError, match="coeff=.* above 0"):
            btt.colors.gamma(STEPS, coeff)
