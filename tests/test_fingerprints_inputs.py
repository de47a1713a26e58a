"""What a step's fingerprint covers of its inputs: settings, text, checkpoints, models of a hub."""

import json
import os
import shutil
from pathlib import Path

import pytest
from cli_helpers import write_recipe, write_text

from compress.artifact.bundle import Bundle
from compress.errors import UserError
from compress.host import reach as reaching
from compress.models.checkpoints import hub_revision, load_checkpoint, meta_model
from compress.run import identity as identities
from compress.run.identity import FileHashes, identity
from compress.run.pipeline import make
from compress.run.recipe import load_recipe
from compress.run.registry import names, pass_class

TRAINING = {"tokens": 600, "batch": 4, "heldout_points": 2}


def run(recipe: Path, folder: Path) -> list[str]:
    """Make a recipe's artifacts: what was said."""
    said: list[str] = []
    folder.mkdir(exist_ok=True)
    make(load_recipe(str(recipe)), folder, said.append)
    return said


def steps(folder: Path) -> list[dict[str, object]]:
    return json.loads((folder / "manifest.json").read_text())["lineage"]["steps"]


def test_another_tracker_and_interval_train_nothing_again(tmp_path):
    text = write_text(tmp_path / "text")
    first = write_recipe(tmp_path / "a.yaml", text, base=[{"train": TRAINING}])
    incidental = {"checkpoint_seconds": 3.0, "trackers": ["tensorboard"]}
    other = write_recipe(tmp_path / "b.yaml", text, base=[{"train": {**TRAINING, **incidental}}])
    longer = write_recipe(tmp_path / "c.yaml", text, base=[{"train": {**TRAINING, "tokens": 700}}])
    assert not any("done before" in line for line in run(first, tmp_path / "run"))
    before = steps(tmp_path / "run" / "base")
    assert run(other, tmp_path / "run")[-1] == "base 1/1 train: done before"
    assert steps(tmp_path / "run" / "base") == before
    assert before[-1]["config"]["trackers"] == []  # what it was made with stays on record
    assert "done before" not in run(longer, tmp_path / "run")[-1]


def test_the_same_tokens_in_other_windows_are_other_data(tmp_path):
    text, found = write_text(tmp_path / "text"), []
    for window in (32, 64):
        data = {"window": window} | {
            f"{part}_windows": count // window
            for part, count in (("evaluation", 384), ("calibration", 256), ("heldout", 128))
        }
        recipe = write_recipe(
            tmp_path / "r.yaml", text, data={"text": str(text), **data}, variants={"pruned": ["prune_wanda"]}
        )
        (tmp_path / str(window)).mkdir()
        made = make(load_recipe(str(recipe)), tmp_path / str(window))
        found.append((made.data_record.calibration_sha256, made.variants[-1].fingerprint))
    assert found[0][0] == found[1][0]
    assert found[0][1] != found[1][1]


@pytest.mark.parametrize("name", names())
def test_the_fields_that_decide(name):
    step = pass_class(name).model_construct()  # without the fields that have no default
    fields = set(step.model_dump())
    assert fields - set(step.deciding_fields()) == fields & {"checkpoint_seconds", "trackers"}


@pytest.fixture
def folder(bundle, tmp_path):
    """A whole checkpoint."""
    bundle.model.save_pretrained(tmp_path / "model")
    bundle.tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages }}")
    return tmp_path / "model"


class TestCheckpoints:
    @pytest.mark.parametrize(
        ("name", "counts"),
        [
            ("config.json", True), ("generation_config.json", True), ("tokenizer.json", True),
            ("tokenizer_config.json", True), ("chat_template.jinja", True), ("special_tokens_map.json", True),
            ("added_tokens.json", True), ("vocab.txt", True), ("tokenizer.model", True),
            ("preprocessor_config.json", True), ("additional_chat_templates/tools.jinja", True),
            ("manifest.json", True), ("quantized.safetensors", True),
            ("README.md", False), ("pytorch_model.bin", False), (".gitattributes", False),
            ("onnx/config.json", False), ("other.safetensors", False),
        ],
    )  # fmt: skip
    def test_all_that_is_read_counts_and_nothing_else(self, folder, tmp_path, name, counts):
        hashes = FileHashes(tmp_path / "hashes.json")
        before = identity(str(folder), hashes)
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes((file.read_bytes() if file.is_file() else b"") + b"\n")
        assert (identity(str(folder), hashes) != before) == counts

    def test_a_second_run_takes_over_changed_settings(self, folder, tmp_path):
        text = write_text(tmp_path / "text")
        recipe = write_recipe(
            tmp_path / "r.yaml",
            text,
            model={"checkpoint": str(folder)},
            variants={"int8": ["quantize_round"]},
        )
        run(recipe, tmp_path / "run")
        settings = json.loads((folder / "generation_config.json").read_text())
        (folder / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": [0, 9]}))
        (folder / "chat_template.jinja").write_text("new {{ messages }}")
        run(recipe, tmp_path / "run")
        for name in ("base", "int8"):
            artifact = tmp_path / "run" / name
            assert json.loads((artifact / "generation_config.json").read_text())["eos_token_id"] == [0, 9]
            assert (artifact / "chat_template.jinja").read_text() == "new {{ messages }}"
            assert Bundle.load(artifact).model.generation_config.eos_token_id == [0, 9]
        assert all("done before" in line for line in run(recipe, tmp_path / "run"))

    def test_a_file_is_hashed_once(self, tmp_path, monkeypatch):
        read = []
        actual = identities.file_record
        monkeypatch.setattr(identities, "file_record", lambda path: read.append(path.name) or actual(path))
        memory, file = tmp_path / "hashes.json", tmp_path / "weights"
        file.write_bytes(b"1" * 100)
        young = FileHashes(memory)
        first = young(file)
        assert FileHashes(memory)(file) == first
        assert read == ["weights"] * 2  # it could still change within the clock's resolution
        monkeypatch.setattr(identities, "_STEADY_SECONDS", -1.0)
        assert (
            FileHashes(memory, keeps=False)(file)
            == FileHashes(memory)(file)
            == FileHashes(memory)(file)
            == first
        )
        assert read == ["weights"] * 4
        state = file.stat()
        file.write_bytes(b"2" * 100)
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
        assert FileHashes(memory)(file) != first  # as long, as old, and another
        memory.write_text("[")
        assert FileHashes(memory)(file) != first

    def test_a_gguf_and_the_settings_beside_it(self, tmp_path):
        file, hashes = tmp_path / "model.gguf", FileHashes(tmp_path / "hashes")
        file.write_bytes(b"GGUF")
        found = [identity(str(file), hashes)]
        (tmp_path / "tokenizer_config.json").write_text("{}")
        found.append(identity(str(file), hashes))
        file.write_bytes(b"GGUF2")
        found.append(identity(str(file), hashes))
        assert len(set(map(tuple, found))) == 3
        assert found[0][1] == reaching.version_of("gguf") != ""


class TestHub:
    OLD, NEW = "a" * 40, "b" * 40

    @pytest.fixture
    def hub(self, folder, tmp_path, monkeypatch):
        """A cache with two commits of a model, and no hub."""
        place = tmp_path / "hub" / "models--owner--name"
        for commit in (self.OLD, self.NEW):
            shutil.copytree(folder, place / "snapshots" / commit)
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text(self.OLD)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        return place

    def test_a_model_is_known_by_its_commit(self, hub):
        def refuse(path):
            raise AssertionError(path)

        assert identity("owner/name", refuse) == ["owner/name", self.OLD]
        (hub / "refs" / "main").write_text(self.NEW)
        assert identity("owner/name", refuse) == ["owner/name", self.NEW]

    def test_the_commit_it_is_known_by_is_loaded(self, hub):
        (hub / "snapshots" / self.OLD / "config.json").write_text("{}")
        with pytest.raises(UserError, match="model: 'owner/name' cannot be loaded"):
            load_checkpoint("owner/name")
        (hub / "refs" / "main").write_text(self.NEW)
        assert (
            load_checkpoint("owner/name")[0].config.vocab_size == meta_model("owner/name").config.vocab_size
        )

    def test_one_that_is_nowhere(self, hub):
        with pytest.raises(UserError, match="model: 'owner/other' cannot be loaded: ") as caught:
            hub_revision("owner/other")
        assert "\n" not in str(caught.value)
