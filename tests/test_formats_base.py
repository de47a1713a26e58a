"""What every format keeps to, those of the registry and one that is written here, as a plugin would."""

from typing import ClassVar, Literal

import pytest
import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from compress.artifact.bundle import quantized_layers
from compress.artifact.coded import without_streams
from compress.errors import UserError
from compress.export.compressed_tensors import artifact as compressed_tensors
from compress.export.gguf import blocks as gguf
from compress.export.onnx import blocks as onnx
from compress.formats import AffineFormat, AnyFormat, Coded, Format, Grid, Int8, Nf4, QuantizedTensor
from compress.formats.base import OneByOne, float16_exact
from compress.formats.registry import FORMATS
from compress.formats.swap import quantize_embeddings
from compress.layerwise.quantize import LayerSolver, quantize_sequentially
from compress.models.layers import linear_layers, matrix
from compress.records.manifest import LayerRecord


class Powers(Format):
    """Powers of two, of either sign, times the largest magnitude of each group."""

    bits: ClassVar[int] = 3
    kind: Literal["powers"] = "powers"
    group: int | None = 16

    @property
    def zero(self) -> int:
        return 3

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Grid:
        columns = weight.shape[1]
        padding = self.groups(columns) * self.group_width(columns) - columns
        grouped = torch.nn.functional.pad(weight, (0, padding)).view(len(weight), self.groups(columns), -1)
        scales = float16_exact(grouped.abs().amax(2))
        return Grid(scales, torch.full_like(scales, 3, dtype=torch.uint8))

    def codes(self, weight: Tensor, grid: Grid) -> Tensor:
        scales, _ = grid.columns(self.group_width(weight.shape[1]), weight.shape[1])
        return ((weight / scales)[..., None] - self.steps()).abs().argmin(-1).to(torch.uint8)

    def values(self, codes: Tensor, grid: Grid) -> Tensor:
        scales, _ = grid.columns(self.group_width(codes.shape[1]), codes.shape[1])
        return self.steps()[codes.int()] * scales

    def places(self, weight: Tensor, grid: Grid) -> Tensor:
        scales, _ = grid.columns(self.group_width(weight.shape[1]), weight.shape[1])
        scaled, steps = weight / scales, self.steps()
        above = torch.bucketize(scaled, steps).clamp(1, 6)
        return above - 1 + (scaled - steps[above - 1]) / (steps[above] - steps[above - 1])

    def column_rounder(self, grid: Grid, columns: int):
        def rounded(column: Tensor, index: int) -> Tensor:
            of_group = slice(index // self.group_width(columns), None)
            group = Grid(grid.scales[:, of_group][:, :1], grid.zeros[:, of_group][:, :1])
            return self.values(self.codes(column[:, None], group), group)[:, 0]

        return rounded

    def steps(self) -> Tensor:
        return torch.tensor([-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0])


EVERY = [*(each() for each in FORMATS), Powers()]


def weight(out: int = 24, columns: int = 70) -> Tensor:
    return torch.randn(out, columns, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("format", EVERY, ids=str)
class TestEveryFormat:
    def test_codes_fit_their_bits_and_mean_themselves(self, format):
        w = weight()
        grid = format.fit(w)
        codes = format.round(w, grid)
        assert codes.dtype == torch.uint8
        assert int(codes.max()) < format.levels
        assert torch.equal(format.codes(format.values(codes, grid), grid), codes)

    def test_values_lie_at_the_places_of_their_codes(self, format):
        w = weight()
        grid = format.fit(w)
        codes = format.codes(w, grid)
        places = format.places(format.values(codes, grid), grid)
        assert torch.allclose(places, codes.float(), atol=1e-3)

    def test_zero_is_on_the_grid_and_has_the_code_it_says(self, format):
        w = weight()
        grid = format.fit(w)
        if format.symmetric:
            assert (grid.zeros == format.zero).all()
        zero = torch.full_like(w, format.zero, dtype=torch.uint8)
        assert not format.values(zero, Grid(grid.scales, torch.full_like(grid.zeros, format.zero))).any()
        zeros = torch.zeros_like(w)
        assert not format.values(format.codes(zeros, grid), grid).any()
        assert (
            format.keeping_zeros().round(w * (w > 0), grid)[w <= 0] == format.codes(zeros, grid)[w <= 0]
        ).all()

    def test_what_is_affine_is_the_grid_of_integers_it_says(self, format):
        w = weight()
        tensor = QuantizedTensor.round(format, w)
        scales, zeros = tensor.grid.columns(format.group_width(70), 70)
        integers = (tensor.unpacked().float() - zeros) * scales
        assert torch.equal(integers, tensor.dequantize()) == format.affine

    def test_the_rounder_of_columns_gives_values_of_the_grid(self, format):
        w = weight()
        grid = format.fit(w)
        rounder = format.column_rounder(grid, 70)
        values = torch.stack([rounder(w[:, i], i) for i in range(70)], dim=1)
        assert torch.equal(format.values(format.codes(values, grid), grid), values)
        if format.run == 1:
            assert torch.equal(values, format.values(format.codes(w, grid), grid))

    def test_a_file_has_the_bytes_it_says(self, format):
        tensor = QuantizedTensor.round(format, weight(64, 192))
        wanted = format.stored_bytes((64, 192))
        if format.streamed:
            stream = format.to_stream(tensor.unpacked(), tensor.scales)
            codes, scales = format.from_stream(stream, (64, 192))
            assert torch.equal(codes, tensor.unpacked())
            assert torch.equal(scales, tensor.scales)
            assert len(stream) == pytest.approx(wanted, rel=0.02)
            assert len(stream) < format.longest_stream(weight(64, 192))
        else:
            assert sum(t.numel() * t.element_size() for t in tensor.state_dict().values()) == wanted
            with pytest.raises(UserError, match=f"{format.kind} has none"):
                format.from_stream(torch.zeros(9, dtype=torch.uint8), (64, 192))

    def test_layers_are_solved_one_after_another_and_masks_kept(self, format, bundle):
        """No solver knows which format it is."""
        windows = torch.randint(0, 300, (4, 32), generator=torch.Generator().manual_seed(0))
        names = linear_layers(bundle.model)[:4]
        masks = {names[0]: matrix(bundle.model.get_submodule(names[0])) > 0}
        quantize_sequentially(bundle.model, windows, dict.fromkeys(names, format), LayerSolver(), masks=masks)
        for name in names:
            found = bundle.model.get_submodule(name).quantized
            assert found.format in (format, format.keeping_zeros())
            assert found.dequantize().isfinite().all()
        assert not bundle.model.get_submodule(names[0]).quantized.dequantize()[~masks[names[0]]].any()

    def test_exporters_refuse_what_is_no_grid_of_integers(self, format):
        said = [
            gguf.refusal(format, True),
            onnx.refusal(format, True),
            compressed_tensors.refusal(format),
        ]
        if format.affine:
            assert said == [None] * 3
        else:
            assert all(format.kind in reason and "use int4" in reason for reason in said)

    def test_a_manifest_says_it_all(self, format, bundle):
        quantize_embeddings(bundle.model, format)
        assert quantized_layers(bundle.model)["lm_head"].format == format.model_dump()
        assert type(format).model_validate(format.model_dump(mode="json")) == format


def test_only_integers_with_a_searched_range_are_of_the_affine_class():
    assert {each for each in FORMATS if not issubclass(each, AffineFormat)} == {Nf4, Coded}
    assert Format in Nf4.__bases__
    assert Format in Coded.__bases__


def test_what_manifests_say_of_the_formats_that_are_no_integers_has_not_changed():
    assert Nf4().model_dump_json() == '{"kind":"nf4","group":64,"symmetric":true,"clip_search":0}'
    assert Coded().model_dump_json() == (
        '{"kind":"coded","group":null,"symmetric":true,"clip_search":0,"rate":3.25,"trellis":true}'
    )
    assert Int8().model_dump_json() == '{"kind":"int8","group":null,"symmetric":true,"clip_search":20}'


def test_the_base_is_no_format_and_a_field_of_any_takes_each_by_its_name():
    class Settings(BaseModel):
        format: AnyFormat

    assert [Settings(format=f.kind).format for f in EVERY[:-1]] == EVERY[:-1]
    with pytest.raises(ValidationError, match="powers"):
        Settings(format="powers")
    with pytest.raises(TypeError, match="abstract"):
        Format(kind="int4")


def test_matrices_of_one_kind_share_what_fits_them():
    assert isinstance(Int8().fitter(10), OneByOne)
    fitter = Coded(rate=3).fitter(2 * 64 * 256)
    w = weight(64, 256)
    first = fitter.fit(Coded(rate=3), w)
    fitter.spent(Coded(rate=3), [(Coded(rate=4).round(w, Coded(rate=4).fit(w)), first.scales)])
    assert (fitter.fit(Coded(rate=3), w).scales > first.scales).all(), "what was overdrawn is saved now"


def test_a_format_says_what_tables_call_it():
    assert [f.label for f in (Int8(), Nf4(), Coded(rate=3.5))] == ["int8", "nf4", "coded 3.5"]
    assert [f.nominal_bits for f in (Int8(), Nf4(), Coded(rate=3.5))] == [8, 4, 3.5]


def test_a_stream_of_another_format_names_file_and_layer(tmp_path):
    layers = {"layer": LayerRecord(format=Int8().model_dump(), shape=(4, 4), tied_to=None, embedding=False)}
    state = {"layer.quantized.stream": torch.zeros(9, dtype=torch.uint8)}
    with pytest.raises(UserError, match=r"file: 'layer.*int8 has none; write the artifact again"):
        without_streams(state, layers, tmp_path / "file")
