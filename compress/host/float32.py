"""Products of float32 matrices on a CPU, as exact as ever, and faster where that can be had.

torch multiplies float32 through MKL, which reaches half of what processors other than Intel's can do: 220 G
operations a second where oneDNN, which torch carries too, does 500 (two threads of an AMD EPYC with AVX512).
torch goes to oneDNN once it may round factors to bfloat16; oneDNN rounds only where there are tiles for that
(AMX), and computes in float32 elsewhere. Whether it does is found out by multiplying.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_SIZE = 256
_EXACT = 1e-5  # relative; float32 comes to some 4e-7 here, factors in bfloat16 to 2e-3


@contextmanager
def fast_float32() -> Iterator[None]:
    """While the block runs, torch may take oneDNN for float32 products if those stay float32."""
    with rounded_factors(rounding_is_off()):
        yield


@contextmanager
def rounded_factors(allowed: bool) -> Iterator[None]:
    """While the block runs, the CPU may round factors of float32 products to bfloat16; sums stay float32."""
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    setting.fp32_precision = "bf16" if allowed else before
    try:
        yield
    finally:
        setting.fp32_precision = before


@functools.cache
def rounding_is_off() -> bool:
    """Whether products keep float32's exactness on this machine even where rounding is allowed."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, _SIZE, _SIZE, generator=generator).unbind()
    with rounded_factors(True):
        product = left @ right
    exact = left.double() @ right.double()
    return float((product - exact).norm() / exact.norm()) < _EXACT
