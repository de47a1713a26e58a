"""Files that somebody else wrote, damaged or hostile: right data, or one line, and soon."""

import contextlib
import json
import os
import struct
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from hostile_files import SECONDS, damaged, said
from safetensors.torch import load_file, save_file
from test_checkpoints import write_gguf
from training_set import tiny_bundle, weights

from compress.artifact.bundle import Bundle
from compress.errors import UserError, door
from compress.host.files import at_home, leaves, parse_json, read_bytes, read_json, read_text
from compress.host.steady import Steady
from compress.host.tensor_files import entries, load_tensors, opened
from compress.host.yaml_files import parse_yaml
from compress.models.checkpoints import load_config, load_tokenizer, meta_model
from compress.models.gguf_files import check_gguf
from compress.models.sizes import require_possible
from compress.run.recipe import load_recipe
from compress.text.documents import load_documents


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A Hugging Face directory."""
    folder, bundle = tmp_path_factory.mktemp("doors") / "model", tiny_bundle()
    bundle.model.save_pretrained(folder)
    bundle.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(plain, tmp_path):
    """A copy of it."""
    copy = tmp_path / "model"
    copy.mkdir()
    for file in plain.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


class TestWords:
    @pytest.mark.parametrize(
        ("text", "line"),
        [
            ("a\nb", "a b"),
            ("a:\n", "a"),
            ("\x1b]0;owned\x07", r"\x1b]0;owned\x07"),
            ("caf\xe9  two", "caf\xe9  two"),
            ("\ud800\u202e", r"\ud800\u202e"),
            ("x" * 5000, "x" * 498 + " ... " + "x" * 497),
        ],
    )
    def test_every_error_is_one_line_without_controls(self, text, line):
        assert str(UserError(text)) == line

    def test_what_libraries_raise_is_told_and_what_ends_the_process_is_not(self):
        class PanicException(BaseException):  # as Rust's bindings call it
            pass

        for error in (ValueError("no\nway"), RecursionError("no"), PanicException("no"), OSError(5, "no")):
            with pytest.raises(UserError, match=r"^f: .*no; mend$"), door("f", "mend"):
                raise error
        for other in (KeyboardInterrupt, SystemExit, GeneratorExit):
            with pytest.raises(other), door("f"):
                raise other


class TestSmallFiles:
    @pytest.mark.parametrize("read", [read_bytes, read_text, read_json])
    def test_what_is_no_file(self, tmp_path, read):
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "zero").symlink_to("/dev/zero")
        (tmp_path / "loop").symlink_to(tmp_path / "loop")
        for name, words in {
            "pipe": "a pipe or device", "zero": "a pipe or device", ".": "a folder", "gone": "no such file",
            "loop": "symbolic links",
        }.items():  # fmt: skip
            assert words in said(read, tmp_path / name)

    def test_six_gigabytes_in_a_small_file_s_place(self, folder):
        os.truncate(folder / "config.json", 6 << 30)
        for call in (load_config, load_tokenizer, Bundle.load, lambda at: meta_model(str(at))):
            assert "6,442,450,944 bytes where at most 4,194,304 are read" in said(call, folder)

    def test_a_short_file_takes_short_memory(self, tmp_path):
        (tmp_path / "a.txt").write_bytes(b"abc")
        tracemalloc.start()
        assert read_text(tmp_path / "a.txt", 1 << 32) == "abc"
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
        tracemalloc.stop()

    def test_a_configuration_of_millions_of_names(self, folder):
        content = json.loads((folder / "config.json").read_text())
        names = {str(i): f"LABEL_{i}" for i in range(300_000)}
        (folder / "config.json").write_text(json.dumps({**content, "id2label": names}))
        assert "at most 4,194,304 are read" in said(Bundle.load, folder)

    @pytest.mark.parametrize("name", ["../x", "/etc/passwd", "", "\0", "a" * 300, "a/../b"])
    def test_names_that_are_no_file_of_the_folder(self, folder, name):
        assert leaves(name)
        index = {"weight_map": {"a": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        for call in (Bundle.load, lambda at: Bundle.load(at, stream=True)):
            assert "which lies outside it" in said(call, folder)
        assert not leaves("model-00001-of-00002.safetensors")

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_link_to_nothing_among_the_weights(self, folder, stream):
        (folder / "other.safetensors").symlink_to(folder / "nothing")
        Bundle.load(folder, stream=stream)
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors").symlink_to(folder / "nothing")
        assert "no weights" in said(Bundle.load, folder, stream=stream)

    def test_a_pipe_that_would_be_mapped(self, tmp_path):
        os.mkfifo(tmp_path / "model.onnx_data")
        assert "a pipe or device" in said(Steady, [tmp_path / "model.onnx_data"])

    @pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
    def test_a_pipe_in_a_model_s_folder(self, folder, name):
        (folder / name).unlink()
        os.mkfifo(folder / name)
        assert "is a pipe or device" in said(Bundle.load, folder)

    def test_json(self):
        assert parse_json(b'{"a": [1, 2.5, "[[[\\"[", null]}', "x") == {"a": [1, 2.5, '[[["[', None]}
        assert parse_json(b"[" * 100 + b"]" * 100, "x")
        for content, words in {
            b"[" * 101 + b"]" * 101: "nested 101 deep",
            b"[" * 500_000: "nested 500,000 deep",
            b'{"a": ' * 99_999: "deep",
            b"9" * 5000: "4300 digits",
            b"\xff": "decode",
            b"{": "Expecting property name",
        }.items():
            assert words in said(parse_json, content, "x")

    def test_homes(self, monkeypatch):
        monkeypatch.setenv("HOME", "/home/me")
        assert at_home("~/a") == Path("/home/me/a")
        assert "nobody has that home" in said(at_home, "~nobody-of-this-name/a")
        for call in (load_recipe, load_documents):
            assert "nobody has that home" in said(call, "~nobody-of-this-name/a")


class TestYaml:
    def test_plain_values_come_as_they_are(self):
        text = "a: &x [1, 2.5, yes, ~, text]\nb: *x\nc: {d: .inf}\n"
        items = [1, 2.5, True, None, "text"]
        assert parse_yaml(text, "r.yaml") == {"a": items, "b": items, "c": {"d": float("inf")}}

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40)),
             "aliases repeat more than"),
            (f"a: &a {'x' * 9000}\nb: [{', '.join(['*a'] * 900)}]", "aliases repeat more than"),
            ("a: &a [*a]", "'*a' repeats itself"),
            ("[" * 9000, "nested 50 deep"),
            ("a: 2024-01-01", "date in YAML; quote it"),
            ("a: 2024-99-99", "not valid YAML (month must be"),
            ("a: !!set {b, c}", "set in YAML"),
            ("a: !!binary aGk=", "bytes in YAML"),
            ("a: !!timestamp b", "not valid YAML"),
            ("a: !!int ''", "not valid YAML"),
            ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
            ("? [1]\n: 2", "unhashable"),
            ("a: " + "9" * 5000, "not valid YAML"),
            ("a: 0x" + "f" * 5000, "digits"),
            ("a: 1\na: 2", "r.yaml:2: not valid YAML ('a' is given twice)"),
            ("\x07", "not valid YAML"),
            ("#" * 600_000, "600,000 characters"),
        ],
    )  # fmt: skip
    def test_what_is_refused(self, text, words):
        assert words in said(parse_yaml, text, "r.yaml")

    @pytest.mark.parametrize(
        ("override", "words"),
        [
            ("base.passes.²=1", "'²' is no entry"),
            ("base.passes." + "9" * 5000 + "=1", "is no entry"),
            ("seed=" + "9" * 5000, "not valid YAML"),
            ("seed=" + "9" * 400, "400 digits"),
            ("name=2024-01-01", "quote it"),
            ("name=&a [*a]", "repeats itself"),
        ],
    )
    def test_overrides(self, override, words):
        assert words in said(load_recipe, "demo", [override])


class TestSafetensors:
    @pytest.fixture
    def file(self, tmp_path):
        tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2], dtype=torch.int16)}
        save_file(tensors, tmp_path / "w.safetensors", metadata={"format": "pt"})
        return tmp_path / "w.safetensors"

    @staticmethod
    def write(file, header, data=b"\0" * 16):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + data)
        return file

    def test_what_a_header_says(self, file):
        found = {e.name: (e.dtype, e.shape, e.stop - e.start) for e in entries(file)}
        assert found == {"a": ("F32", [2, 3], 24), "b": ("I16", [2], 4)}
        assert max(e.stop for e in entries(file)) == file.stat().st_size
        assert torch.equal(load_tensors(file)["a"], torch.arange(6.0).reshape(2, 3))

    @pytest.mark.parametrize(
        ("header", "words"),
        [
            ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}, "has 8 bytes"),
            ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}, "begins at"),
            ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, "header promises"),
            ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
              "b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}, "begins at"),
            ({"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, -16]}}, "no count"),
            ({"a": {"dtype": "F32", "shape": [True, 4], "data_offsets": [0, 16]}}, "no count"),
            ({"a": {"dtype": "F33", "shape": [4], "data_offsets": [0, 16]}}, "unknown type"),
            ({"a": {"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]}}, "unreadable"),
            ({"a": {"dtype": "F32", "shape": [2**40, 0], "data_offsets": [0, 16]}}, "has 16 bytes"),
            (b'{"a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}, '
             b'"a": {"dtype": "U8", "shape": [8], "data_offsets": [8, 16]}}', "given twice"),
            (b"[" * 5000, "nested"),
        ],
    )  # fmt: skip
    def test_headers_that_do_not_fit_their_file(self, tmp_path, header, words):
        file = self.write(tmp_path / "w.safetensors", header)
        for read in (entries, load_tensors):
            assert words in said(read, file)

    def test_what_the_library_finds_itself_is_told(self, file, monkeypatch):
        monkeypatch.setattr("compress.host.tensor_files.entries", lambda file: [])
        file.write_bytes(b"\1" * 99)

        def read(at):
            with opened(at) as stream:
                stream.keys()

        assert "truncated or damaged" in said(read, file)

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_damaged_header_gives_the_same_weights_or_none(self, folder, plain, stream):
        file = folder / "model.safetensors"
        whole, expected = file.read_bytes(), load_file(plain / "model.safetensors")
        end = 8 + struct.unpack("<Q", whole[:8])[0]
        for seed in range(24):
            file.write_bytes(damaged(whole, seed, end))
            try:
                loaded = Bundle.load(folder, stream=stream)
            except UserError:
                continue
            found = loaded.shards.read(expected) if loaded.shards else weights(loaded)
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
)
def test_damaged_settings_load_or_are_refused(folder, name):
    whole = (folder / name).read_bytes()
    for seed in range(12):
        (folder / name).write_bytes(damaged(whole, seed))
        started = time.monotonic()
        with contextlib.suppress(UserError):
            assert Bundle.load(folder).model.num_parameters() < 10**7
        assert time.monotonic() - started < SECONDS


class TestSizes:
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("num_hidden_layers", 10**7), ("num_hidden_layers", 10**30), ("hidden_size", 2**24),
            ("intermediate_size", 2**24), ("vocab_size", 2**31), ("num_attention_heads", 10**9),
        ],
    )  # fmt: skip
    def test_more_than_the_files_hold_is_refused_before_a_model_is_made(self, folder, field, value):
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, field: value}))
        for call in (load_config, lambda at: meta_model(str(at)), Bundle.load):
            line = said(call, folder)
            assert f"config.json: {field}: {value:,}" in line

    def test_what_real_models_ask_for_passes(self):
        """Llama 3.2 1B in 16 bits and, packed, in 2; ALBERT xxlarge, whose layers share one's tensors."""
        llama = {
            "num_hidden_layers": 16,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "vocab_size": 128256,
        }
        for size in (2_471_645_608, 309_000_000):
            require_possible({**llama, "vocab_size": 128_256}, "config.json", 146, size)
        albert = {"num_hidden_layers": 12, "hidden_size": 4096, "intermediate_size": 16384}
        require_possible(
            {**albert, "embedding_size": 128, "vocab_size": 30000}, "config.json", 25, 890_000_000
        )

    def test_no_number_is_none(self):
        """An infinite one may be meant: a limit that there is none of."""
        require_possible({"time_step_limit": [0.0, float("inf")]}, "c", 1, 100)
        line = said(require_possible, {"text_config": {"attention_dropout": float("nan")}}, "c", 1, 100)
        assert line == "c: attention_dropout: is not a number (NaN); copy the file again"

    def test_in_a_format_whose_layers_share_nothing(self):
        require_possible({"num_hidden_layers": 200}, "m.gguf", 255, 10**6)
        require_possible({"num_hidden_layers": 38}, "m.gguf", 38, 10**6, sharing=0)
        line = said(require_possible, {"num_hidden_layers": 255}, "m.gguf", 38, 10**6, sharing=0)
        assert line.startswith("m.gguf: num_hidden_layers: 255, but there are 38 tensors")

    def test_inside_a_model_of_several(self):
        assert "n_head: -4 is no count" in said(require_possible, {"n_head": -4}, "c", 300, 10**9)
        line = said(require_possible, {"text_config": {"n_layer": 10**7}}, "c", 300, 10**9)
        assert line.startswith("c: n_layer: 10,000,000, but there are 300 tensors")

    @pytest.mark.parametrize("name", ["adapter_config.json", "quantize_config.json", "hf_quant_config.json"])
    def test_settings_that_the_configuration_does_not_know(self, folder, name):
        (folder / name).write_text("{}")
        assert f"{name}: the settings of " in said(Bundle.load, folder)


class TestGguf:
    @pytest.fixture
    def file(self, tmp_path):
        return write_gguf(tmp_path / "model.gguf")

    def test_tensors_do_not_lie_on_each_other_and_settings_are_numbers(self, file):
        whole = file.read_bytes()
        place = whole.index(b"blk.0.ffn_down.weight") + len(b"blk.0.ffn_down.weight")
        dimensions = struct.unpack_from("<I", whole, place)[0]
        place += 4 + 8 * dimensions + 4  # its shape and type
        first = bytearray(whole)
        struct.pack_into("<Q", first, place, 0 if struct.unpack_from("<Q", whole, place)[0] else 32)
        file.write_bytes(first)
        with pytest.raises(UserError, match="lies on another"):
            check_gguf(file)
        key = whole.index(b"layer_norm_rms_epsilon") + len(b"layer_norm_rms_epsilon")
        second = bytearray(whole)
        struct.pack_into("<f", second, key + 4, float("nan"))
        file.write_bytes(second)
        with pytest.raises(UserError, match="layer_norm_rms_epsilon is nan"):
            check_gguf(file)

    def test_a_whole_one_passes_and_damage_is_refused_or_harmless(self, file):
        check_gguf(file)
        whole = file.read_bytes()
        end = whole.index(b"ffn_down.weight")
        for seed in range(40):
            file.write_bytes(damaged(whole, seed, end))
            started = time.monotonic()
            with contextlib.suppress(UserError):
                check_gguf(file)
            assert time.monotonic() - started < SECONDS

    @pytest.mark.parametrize(
        ("body", "words"),
        [
            (struct.pack("<IQQ", 3, 2**60, 0), "tensors in the"),
            (struct.pack("<IQQ", 3, 0, 2**60), "settings in the"),
            (struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 4, 2**60), "values in the"),
            (struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 8, 2**60), "values in the"),
            (struct.pack("<IQQQ1sIQ", 3, 0, 1, 1, b"a", 8, 2**60), "bytes of text"),
            (struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"a", 99), "unknown type 99"),
            (struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"a", 9) + struct.pack("<IQ", 9, 1) * 9, "unknown type 9"),
            (struct.pack("<IQQQ1sI", 3, 1, 0, 1, b"a", 9), "9 dimensions"),
            (struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"a", 1, 2**50, 0, 0), "beyond its end"),
            (struct.pack("<IQQ", 1, 0, 0), "version 1"),
        ],
    )
    def test_counts_that_the_file_cannot_hold(self, tmp_path, body, words):
        file = tmp_path / "model.gguf"
        file.write_bytes(b"GGUF" + body + b"\0" * 32)
        assert words in said(check_gguf, file)
