"""The arithmetic coder of codes: nothing is lost, little is wasted."""

import math
import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.formats.coded.entropy_coding import decode, encode, inflate, stream_bytes


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


def test_classes_are_logarithms_of_spreads_in_thirds_of_a_bit():
    """Of rows, then of columns once the rows' own are divided out; at least a tenth of a step."""
    spread = torch.full((60, 80), 2.0)
    spread[::2, ::2], spread[5], spread[:, 7] = 6.0, 40.0, 0.0
    codes = codes_of(spread)
    raw = encode(codes)
    classes = zlib.decompress(raw[4 : 4 + int.from_bytes(raw[:4], "little")])[: 60 + 80]
    squares = (codes.double() - 128) ** 2
    across = squares.mean(1).clamp(min=0.01)
    down = (squares / across[:, None]).mean(0).clamp(min=0.01)
    for found, part in ((classes[:60], across), (classes[60:], down)):
        wanted = (1.5 * part.log2()).round()
        assert list(found) == (wanted - wanted.min()).int().tolist()


def test_a_code_that_is_one_in_a_hundred_thousand_is_not_lost():
    codes = torch.full((512, 512), 128, dtype=torch.uint8)
    codes[3, 5], codes[100, 200], codes[511, 511] = 127, 130, 129
    assert (decode(encode(codes), (512, 512)) == codes.numpy()).all()


def test_classes_that_no_place_has_are_no_trouble():
    spread = torch.full((64, 64), 0.4)
    spread[32:] = 60.0
    codes = codes_of(spread)
    assert (decode(encode(codes), (64, 64)) == codes.numpy()).all()


@pytest.mark.parametrize(
    ("change", "most"),
    [(lambda x: x, 99), (lambda x: x[:-3], 100), (lambda x: x + b"more", 100)],
    ids=["more than announced", "cut", "followed by something"],
)
def test_what_is_inflated_is_whole_and_no_more_than_announced(change, most):
    packed = zlib.compress(bytes(100))
    assert inflate(packed, 100) == bytes(100)
    with pytest.raises(ValueError, match="a part of another length"):
        inflate(change(packed), most)
