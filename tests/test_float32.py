"""Products that may be taken to another library stay float32, and the choice does not outlive its block."""

import pytest
import torch

from compress.host import float32
from compress.host.float32 import fast_float32, rounded_factors


def error(size: int = 300) -> float:
    generator = torch.Generator().manual_seed(1)
    left, right = torch.randn(2, size, size, generator=generator).unbind()
    exact = left.double() @ right.double()
    return float((left @ right - exact).norm() / exact.norm())


def setting() -> str:
    return torch.backends.mkldnn.matmul.fp32_precision


def test_products_inside_are_float32():
    with fast_float32():
        assert error() < 2e-6  # factors rounded to bfloat16 give 2e-3


@pytest.mark.parametrize("exact", [True, False])
def test_rounding_is_allowed_only_where_it_is_seen_not_to_happen(monkeypatch, exact):
    monkeypatch.setattr(float32, "rounding_is_off", lambda: exact)
    before = setting()
    with fast_float32():
        assert setting() == ("bf16" if exact else before)
    assert setting() == before


def test_what_is_found_is_what_the_machine_does():
    with rounded_factors(allowed=True):
        assert float32.rounding_is_off() == (error() < 1e-5)


def test_the_setting_is_put_back_after_an_error():
    before = setting()
    with pytest.raises(ZeroDivisionError), rounded_factors(allowed=True):
        _ = 1 / 0
    assert setting() == before
