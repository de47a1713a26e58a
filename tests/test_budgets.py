"""Budgets of what is shipped: each export's weigher against its file, and files under a budget."""

import itertools
import random
from pathlib import Path

import onnx
import pytest
import training_set
from cli_helpers import DATA, invoke, write_recipe, write_text
from encoder_models import tiny_encoder
from export_models import tiny_model, word_tokenizer
from safetensors import safe_open

from compress.artifact.bundle import Bundle
from compress.artifact.folder import disk_bytes
from compress.errors import UserError
from compress.export.compressed_tensors.artifact import write_checkpoint
from compress.export.compressed_tensors.sizes import CompressedTensorsLayout
from compress.export.gguf.artifact import write_gguf
from compress.export.gguf.sizes import GgufLayout
from compress.export.layout import TorchLayout
from compress.export.onnx.artifact import write_artifact
from compress.export.onnx.cache import cache_scales
from compress.export.onnx.sizes import OnnxLayout
from compress.export.weighing import with_any_codes
from compress.formats import Int4, QuantizedEmbedding, QuantizedLinear, QuantizedTensor
from compress.formats.swap import embedding_names, embedding_scale
from compress.layerwise.budget import Candidates
from compress.models.layers import linear_layers, matrix, replace_module
from compress.passes.quantize_auto import QuantizeAuto
from compress.records.manifest import Lineage, Manifest
from compress.run.recipe import Recipe, load_recipe
from compress.tasks.registry import task_of

RUNTIMES = ["onnx", "gguf", "compressed-tensors"]
SERVED = {"onnx": "onnx", "gguf": "gguf/model.gguf", "compressed-tensors": "compressed-tensors"}
LAYOUTS = [
    OnnxLayout(),
    OnnxLayout(widen=True),
    OnnxLayout(int8_form="token"),
    OnnxLayout(cache="int8"),
    GgufLayout(),
    GgufLayout(widen=True, floats="float32"),
    CompressedTensorsLayout(),
    CompressedTensorsLayout(runtimes=("transformers",), dtype="float32"),
]


def names_of(bundle, layout):
    return [*linear_layers(bundle.model), *(embedding_names(bundle.model) if layout.tables else [])]


def candidates_of(bundle, layout):
    """All formats that every layer of a model can have there."""
    widths = {matrix(bundle.model.get_submodule(name)).shape[1] for name in names_of(bundle, layout)}
    found = [format for bits in layout.widths() for format in layout.formats(bits)]
    return [f for f in found if all(layout.objection(f, width) is None for width in widths)]


def coded(bundle, plan, weigher):
    """A copy with the nearest codes in place of the matrices, tied ones tied."""
    result = bundle.clone()
    held = {}
    for name, format in plan.items():
        module, owner = result.model.get_submodule(name), weigher.owners[name]
        if owner not in held:
            held[owner] = QuantizedTensor.round(format, matrix(module))
        if name in embedding_names(bundle.model) and not hasattr(module, "in_features"):
            new = QuantizedEmbedding(held[owner], embedding_scale(module))
        else:
            new = QuantizedLinear(held[owner], getattr(module, "bias", None))
        replace_module(result.model, name, new)
    return result


def write(bundle, layout, folder, windows):
    """As the export does, without its check; returns what is counted."""
    if layout.kind == "onnx":
        scales = cache_scales(bundle.model, windows) if layout.cache == "int8" else None
        write_artifact(bundle, folder, layout.forms(task_of(bundle.model.config).continues), scales)
        return folder
    if layout.kind == "gguf":
        write_gguf(bundle, folder / "model.gguf", floats=layout.floats, widen=layout.widen)
        return folder / "model.gguf"
    write_checkpoint(bundle, folder, layout.dtype)
    return folder


def code_bytes(layout, counted):
    """Bytes of the codes, scales and zero-points in a file, padding aside."""
    if layout.kind == "onnx":
        graph = onnx.load(counted / "model.onnx", load_external_data=False).graph
        found = {}
        for tensor in graph.initializer:
            place = {entry.key: entry.value for entry in tensor.external_data}
            if any(f".{part}" in tensor.name for part in ("codes", "scales", "zeros")):
                # two views of one matrix are in the file once
                key = place.get("offset", tensor.name.removesuffix(".2d").removesuffix(".3d"))
                found[key] = int(place["length"]) if place else len(tensor.raw_data)
        return sum(found.values())
    if layout.kind == "gguf":
        from gguf import GGUFReader

        kinds = (t for t in GGUFReader(counted).tensors if t.tensor_type.name.startswith("Q"))
        return sum(int(tensor.n_bytes) for tensor in kinds)
    with safe_open(counted / "model.safetensors", "pt") as file:
        keys = [key for key in sorted(file.keys()) if ".weight_" in key]
        return sum(file.get_tensor(key).nbytes for key in keys)


@pytest.fixture
def wide(make_context):
    """A model in which every group divides a row, and arrays are larger than a page."""
    bundle = training_set.tiny_bundle(hidden=128, intermediate=256, heads=4, kv_heads=2, layers=2)
    return bundle, make_context(bundle)


class TestWeighers:
    @pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
    def test_weigh_every_candidate_as_it_is_written(self, layout, wide, tmp_path):
        bundle, context = wide
        names, windows = names_of(bundle, layout), context.data.calibration.tokens
        weigher = layout.weigher(bundle, names, 0, tmp_path / "scratch")
        formats = candidates_of(bundle, layout)
        assert len({f.bits for f in formats}) == len(layout.widths())
        for number, format in enumerate(formats):
            plan = dict.fromkeys(names, format)
            counted = write(coded(bundle, plan, weigher), layout, tmp_path / str(number), windows)
            assert sum(weigher.stored(name, format) for name in names) == code_bytes(layout, counted)
            bound, size = weigher.total(plan), disk_bytes(counted)
            assert bound == size or (
                layout.kind == "onnx" and size < bound
            )  # the manifest is not written here

    @pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
    def test_files_of_zeros_are_as_long_as_those_of_codes(self, layout, wide, tmp_path):
        """With widths mixed: what is stacked, padded and listed depends on the plan."""
        bundle, context = wide
        names, windows = names_of(bundle, layout), context.data.calibration.tokens
        weigher = layout.weigher(bundle, names, 0, tmp_path / "scratch")
        formats, draw = candidates_of(bundle, layout), random.Random(0)
        for number in range(3):
            plan = {n: draw.choice(formats) for together in layout.together(names) for n in together}
            plan |= dict.fromkeys(embedding_names(bundle.model), formats[0]) if layout.tables else {}
            sizes = [
                {
                    file.name: file.stat().st_size
                    for file in sorted(path.iterdir() if path.is_dir() else [path])
                }
                for path in (
                    write(made, layout, tmp_path / f"{number}{kind}", windows)
                    for kind, made in (
                        ("zeros", with_any_codes(bundle, plan, weigher.owners)),
                        ("codes", coded(bundle, plan, weigher)),
                    )
                )
            ]
            assert sizes[0] == sizes[1]

    @pytest.mark.parametrize("family", ["gpt2", "gemma2", "phi3", "gpt_neox", "bert"])
    def test_other_families_weigh_what_they_are(self, family, tmp_path):
        if family == "bert":
            pytest.importorskip("onnxscript")
            bundle = tiny_encoder("bert")
        else:
            bundle = Bundle(tiny_model(family), word_tokenizer(), Lineage(source="tiny"))
        layout = OnnxLayout()
        names = names_of(bundle, layout)
        weigher = layout.weigher(bundle, names, 0, tmp_path / "scratch")
        formats, draw = candidates_of(bundle, layout), random.Random(1)
        plan = {name: draw.choice(formats) for name in names}
        plan |= dict.fromkeys(embedding_names(bundle.model), formats[-1])
        real = write(coded(bundle, plan, weigher), layout, tmp_path / "codes", None)
        zeros = write(with_any_codes(bundle, plan, weigher.owners), layout, tmp_path / "zeros", None)
        assert sum(weigher.stored(name, plan[name]) for name in names) == code_bytes(layout, real)
        assert disk_bytes(zeros) == disk_bytes(real)


class TestTheChoice:
    """Files that add to the bytes of their members what depends on the plan."""

    @pytest.mark.parametrize("seed", range(20))
    def test_never_exceeds_and_is_the_best_where_nothing_depends(self, seed):
        draw = random.Random(seed)
        formats = tuple(Int4(group=16 * (k + 1)) for k in range(4))  # mere names here
        members = [[f"m{i}"] for i in range(5)]
        costs = [sorted(draw.randrange(100, 5000) for _ in formats) for _ in members]
        losses = [sorted((draw.random() for _ in formats), reverse=True) for _ in members]
        candidates = Candidates(members, [formats] * 5, costs)

        def plain(plan):
            return sum(costs[i][formats.index(plan[f"m{i}"])] for i in range(5)) + 777

        def padded(plan):  # to pages, and more where two neighbours differ
            differ = sum(plan[f"m{i}"] != plan[f"m{i + 1}"] for i in range(4))
            return (
                sum(-(-costs[i][formats.index(plan[f"m{i}"])] // 256) * 256 for i in range(5)) + 300 * differ
            )

        every = [list(chosen) for chosen in itertools.product(range(4), repeat=5)]
        for total in (plain, padded):
            budget = total(candidates.plan(candidates.smallest)) + 100 + draw.randrange(8000)
            chosen = candidates.within_bytes(losses, total, budget, 100)
            lost = sum(row[k] for row, k in zip(losses, chosen, strict=True))
            fitting = [each for each in every if total(candidates.plan(each)) <= budget - 100]
            best = min(sum(row[k] for row, k in zip(losses, each, strict=True)) for each in fitting)
            assert chosen in fitting
            assert lost == pytest.approx(best) if total is plain else lost >= best

    def test_too_small_a_budget_names_what_is_needed(self):
        candidates = Candidates([["m"]], [(Int4(),)], [[10]])
        with pytest.raises(UserError, match=r"budget_bytes 99 is too small.*takes 100; raise it"):
            candidates.within_bytes([[0.0]], lambda plan: 80, 99, 20)


def recipe(variants, **more):
    return Recipe.parse({"name": "x", "model": {"checkpoint": "m"}, "variants": variants, **more})


class TestRecipes:
    """Which runtime a recipe's quantize_auto is for, and what it says of it."""

    @pytest.mark.parametrize(
        ("later", "kind", "widths", "embeddings", "reserve"),
        [
            ([], "torch", (2, 3, 4, 5, 6, 8), (3, 4, 5, 6, 8), 0),
            (["tune_scales"], "torch", (2, 3, 4, 5, 6, 8), (3, 4, 5, 6, 8), 4096),
            (["export_onnx"], "onnx", (2, 4, 8), (4, 8), 0),
            (["tune_scales", "export_onnx"], "onnx", (2, 4, 8), (4, 8), 4096),
            (["tune_scales", "export_gguf"], "gguf", (4, 5, 8), (4, 5, 8), 0),
            (["export_compressed_tensors"], "compressed-tensors", (4, 8), None, 0),
        ],
    )
    def test_the_export_that_follows_decides(self, later, kind, widths, embeddings, reserve):
        chain = [{"quantize_auto": {"budget_bytes": 10**6}}, *later]
        resolved = recipe({"a": chain})
        step = resolved.variants["a"].passes[0]
        found = (step.runtime.kind, step.widths, step.embedding_widths, step.reserve_bytes)
        assert found == (kind, widths, embeddings, reserve)
        assert resolved.variants["a"].passes[-1].refuses(step.writes()) is None
        assert f"kind: {kind}" in resolved.to_yaml()
        # in a variant that goes on, too
        assert recipe({"a": chain[:1], "b": {"from": "a", "passes": later}}).variants["a"].passes[0] == step

    def test_its_settings_are_those_of_the_export(self):
        chain = [{"quantize_auto": {"bits_per_weight": 4}}, {"export_onnx": {"int8_form": "token"}}]
        assert recipe({"a": chain}).variants["a"].passes[0].runtime == OnnxLayout(int8_form="token")
        chain[0]["quantize_auto"]["runtime"] = "torch"
        chain[0]["quantize_auto"]["widths"] = [4, 8]
        assert recipe({"a": chain}).variants["a"].passes[0].runtime == TorchLayout()

    def test_what_is_resolved_resolves_to_itself(self, tmp_path):
        first = recipe({"a": [{"quantize_auto": {"budget_bytes": 10**6}}, "tune_scales", "export_gguf"]})
        (tmp_path / "recipe.yaml").write_text(first.to_yaml())
        assert load_recipe(str(tmp_path / "recipe.yaml")) == first

    @pytest.mark.parametrize(
        ("fields", "later", "message"),
        [
            (
                {"widths": [3, 4]},
                ["export_onnx"],
                r"variants\.a\.passes\.0\.quantize_auto: widths: onnx has no kernel for 3 bits; it has 2, 4",
            ),
            ({"embedding_widths": [2]}, ["export_gguf"], r"embedding_widths: gguf has no kernel for 2 bits"),
            (
                {"embedding_widths": [8]},
                ["export_compressed_tensors"],
                "compressed-tensors keeps embeddings in float; leave them out",
            ),
            ({"coded": True}, ["export_gguf"], "coded: gguf has no kernel for streams"),
            ({"runtime": "onxx"}, [], r"quantize_auto\.runtime: 'onxx' is unknown; did you mean 'onnx'\?"),
            (
                {},
                ["export_onnx", "export_gguf"],
                r"quantize_auto\.runtime: exports for onnx and gguf follow, .* set runtime: onnx, or",
            ),
        ],
    )
    def test_what_cannot_be_is_one_line(self, fields, later, message):
        with pytest.raises(UserError, match=message):
            recipe({"a": [{"quantize_auto": {"budget_bytes": 10**6, **fields}}, *later]})

    def test_which_of_two_exports_can_be_said(self):
        chain = [{"quantize_auto": {"budget_bytes": 10**6, "runtime": "gguf"}}, "export_onnx", "export_gguf"]
        assert recipe({"a": chain}).variants["a"].passes[0].runtime == GgufLayout()

    def test_rows_that_a_runtime_cannot_take_are_refused_before_any_work(self):
        bundle = Bundle(tiny_model("llama"), word_tokenizer(), Lineage(source="tiny"))  # rows of 112
        with pytest.raises(UserError, match=r"rows of 112: GGUF stores codes in blocks of 32; .*\(skip\)"):
            QuantizeAuto(budget_bytes=1, runtime="gguf").layers(bundle.model)
        with pytest.raises(UserError, match=r"groups that divide a row, and 24 does not; set group"):
            QuantizeAuto(budget_bytes=1, runtime="compressed-tensors", widths=(4,), group=24).layers(
                bundle.model
            )


def layers_in(bundle):
    return {name: m.quantized for name, m in bundle.model.named_modules() if hasattr(m, "quantized")}


class TestThePass:
    def test_layers_that_vllm_fuses_get_one_format_and_tables_stay_float(self, wide, tmp_path):
        bundle, context = wide
        result = QuantizeAuto(bits_per_weight=5, runtime="compressed-tensors")(bundle, context)
        formats = {name: held.format for name, held in layers_in(result).items()}
        assert result.notes["embeddings"] == "float"
        assert not set(formats) & set(embedding_names(bundle.model))
        assert len(set(formats.values())) > 1
        for together in CompressedTensorsLayout().together(list(formats)):
            assert len({formats[name] for name in together}) == 1
        assert all(format.symmetric for format in formats.values())
        facts = write_checkpoint(result, tmp_path / "out", "float16")
        assert facts["vllm"] is None
        assert not facts["zero_points_absorbed"]

    def test_bits_per_weight_are_those_of_the_file(self, wide, tmp_path):
        bundle, context = wide
        result = QuantizeAuto(bits_per_weight=5.3, runtime="gguf")(bundle, context)
        write_gguf(result, tmp_path / "model.gguf")
        held = layers_in(result).values()
        bits = code_bytes(GgufLayout(), tmp_path / "model.gguf") * 8
        weights = sum(out * columns for out, columns in {id(each): each.shape for each in held}.values())
        assert 5.1 < bits / weights <= 5.3

    def test_a_budget_below_the_smallest_is_told_before_losses_are_measured(self, wide, monkeypatch):
        monkeypatch.setattr(QuantizeAuto, "_measure", None)
        bundle, context = wide
        with pytest.raises(UserError, match=r"budget_bytes 1,000 is too small: .* takes [\d,]+; raise it"):
            QuantizeAuto(budget_bytes=1000, runtime="onnx")(bundle, context)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("budgets") / "text", documents=40, words=200)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("budgets") / "model"
    training_set.tiny_bundle(hidden=160, intermediate=448, heads=5, kv_heads=5, layers=4).save(folder)
    return folder


class TestFromTheShell:
    @pytest.mark.parametrize(
        ("to", "budget"), [("onnx", 800_000), ("gguf", 900_000), ("compressed-tensors", 1_000_000)]
    )
    def test_what_is_shipped_is_below_its_budget_and_near(self, to, budget, model, text, tmp_path):
        out = tmp_path / "out"
        done = invoke(
            "quantize", model, "--to", to, "-o", out, "--text", text, "--budget", str(budget), "--no-measure",
            "--threads", 1,
        )  # fmt: skip
        assert done.code == 0, done.err
        assert 0.995 * budget < disk_bytes(out / SERVED[to]) <= budget
        assert done.err.count("budget 1/2 quantize_auto: ") == 1
        resolved = load_recipe(str(out / "recipe.yaml"))
        step = next(iter(resolved.variants.values())).passes[0]
        assert (step.runtime.kind, step.budget_bytes) == (to, budget)
        assert f"{', '.join(map(str, step.widths))} bits, groups of" in done.err

    def test_an_artifact_of_torch_has_a_budget_of_its_own(self, model, text, tmp_path):
        passes = {"torch": [], "onnx": ["export_onnx"]}
        fields = {"budget_bytes": 800_000, "measured_windows": 1, "moment_windows": 2}
        path = write_recipe(
            tmp_path / "recipe.yaml",
            text,
            model={"checkpoint": str(model)},
            data={"text": str(text), **DATA},
            variants={name: [{"quantize_auto": fields}, *later] for name, later in passes.items()},
        )
        run = tmp_path / "run"
        planned = invoke("run", path, "--dry-run", "-o", run)
        assert "for torch: 2, 3, 4, 5, 6, 8 bits, embeddings 3, 4, 5, 6, 8" in planned.out
        assert "for onnx: 2, 4, 8 bits, embeddings 4, 8" in planned.out
        done = invoke("run", path, "--no-measure", "-o", run)
        assert done.code == 0, done.err
        assert 796_000 < disk_bytes(run / "torch") <= 800_000
        assert 796_000 < disk_bytes(run / "onnx/onnx") <= 800_000
        record = Manifest.read(run / "onnx/onnx/manifest.json").lineage.steps[-2]
        assert disk_bytes(run / "onnx/onnx") <= record.notes["planned_bytes"] <= 800_000

    def test_a_file_that_is_larger_than_foreseen_is_an_error(self, model, text, tmp_path, monkeypatch):
        monkeypatch.setattr("compress.export.weighing.disk_bytes", lambda path: disk_bytes(path) - 50_000)
        out = tmp_path / "out"
        done = invoke(
            "quantize", model, "--to", "gguf", "-o", out, "--text", text, "--budget", "880000",
            "--no-measure", "--threads", 1,
        )  # fmt: skip
        assert done.code == 2
        assert "which was foreseen wrongly; please report it, and give a smaller budget" in done.err
