"""The arithmetic coder of codes: nothing is lost, little is wasted."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.formats.coded.entropy_coding import decode, encode, stream_bytes


def codes_of(spread: torch.Tensor, seed: int = 0) -> torch.Tensor:
    noise = torch.randn(spread.shape, generator=torch.Generator().manual_seed(seed))
    return ((noise * spread).round() + 128).clamp(0, 255).to(torch.uint8)


def entropy(codes: torch.Tensor) -> float:
    """Bits per code, all places alike."""
    share = torch.bincount(codes.flatten().int(), minlength=256) / codes.numel()
    return float(-(share[share > 0] * share[share > 0].log2()).sum())


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 255), st.integers(0, 10**6))
def test_decoding_undoes_encoding(out, columns, reach, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(255 - reach, 256, (out, columns), dtype=torch.uint8, generator=generator)
    assert (decode(encode(codes), (out, columns)) == codes.numpy()).all()


def test_rows_and_columns_of_any_spread_come_back():
    rows, columns = torch.logspace(-3, 2, 200)[:, None], torch.logspace(-2, 0.3, 300)
    codes = codes_of(rows * columns)
    assert (decode(encode(codes), (200, 300)) == codes.numpy()).all()


def test_codes_of_one_spread_take_little_more_than_their_entropy():
    """Half a percent over the entropy, tables and classes included."""
    codes = codes_of(torch.full((512, 1024), 2.4))
    bits = 8 * len(encode(codes)) / codes.numel()
    assert entropy(codes) < bits < 1.005 * entropy(codes)


def test_the_spread_of_rows_and_columns_is_made_use_of():
    spread = 2.4 * torch.logspace(-0.3, 0.3, 512)[:, None] * torch.logspace(0.3, -0.3, 1024)
    codes = codes_of(spread)
    # differential entropy of a normal distribution, less a step of 1
    ideal = float((spread * math.sqrt(2 * math.pi * math.e)).log2().mean())
    bits = 8 * len(encode(codes)) / codes.numel()
    assert entropy(codes) > ideal + 0.15
    assert bits < ideal + 0.05


@pytest.mark.parametrize("spread", [0.3, 2.4, 40.0])
def test_the_length_is_known_without_writing(spread):
    codes = codes_of(torch.full((96, 160), spread))
    assert stream_bytes(codes) == pytest.approx(len(encode(codes)), abs=16)


@pytest.mark.parametrize("shape", [(31, 32), (32, 31), (1, 1), (64, 64)])
def test_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match="length|smaller|divide"):
        decode(encode(codes_of(torch.full((32, 32), 2.4))), shape)
