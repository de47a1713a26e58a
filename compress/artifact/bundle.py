"""Bundle: a model, its tokenizer and where they come from; saved as an artifact and loaded back.

An artifact is a directory: `config.json`, tokenizer, weights and `manifest.json`. A float model is saved
as transformers saves it, so stock `from_pretrained` loads it. A model with codes keeps them in
`quantized.safetensors`, one whose zeros are not stored in `sparse.safetensors`; the names differ on purpose,
because a loader that does not know them must fail rather than fill in random weights.
"""

import copy
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from compress.artifact.adapted import adapted
from compress.artifact.applied import GivenLabels, Step, Text, applied
from compress.artifact.coded import with_streams
from compress.artifact.counts import file_record, unique_state
from compress.artifact.folder import CODES, EXPORTS, MANIFEST, has_manifest
from compress.artifact.integrity import stated, write_sums
from compress.artifact.integrity import verify as verified
from compress.artifact.masks import loaded_masks, read_bits, stored_masks, write_bits
from compress.artifact.reopened import require_reopens
from compress.artifact.restored import restored
from compress.artifact.shards import Offload, ShardReader, join, write_index
from compress.artifact.sparse import SPARSE, compact
from compress.artifact.streamed import streamed
from compress.errors import UserError
from compress.formats import QuantizedEmbedding, QuantizedLinear
from compress.formats.sparse import SparseLinear, SparseQuantizedTensor
from compress.host.scratch import Scratch
from compress.models.checkpoints import (
    inside,
    load_checkpoint,
    place_of,
    quiet_transformers,
    save_configurations,
    tokenizer_of,
)
from compress.models.companions import companions, write_companions
from compress.models.conv1d import linears
from compress.models.finite import BROKEN, numbers_of, require_finite
from compress.models.tying import settled
from compress.records.manifest import LayerRecord, Lineage, Manifest, SparseRecord, Storage
from compress.tasks.registry import task_of
from compress.version import __version__


@dataclass(frozen=True)
class Bundle:
    """What goes into a pass and comes out of it.

    Attributes:
        model: a `transformers` language model, in eval mode, float32 or with layers of codes.
        tokenizer: its fast tokenizer.
        lineage: the source and every pass so far.
        masks: module name of a linear layer -> bool (out, in), True where a weight is kept.
        exports: folders a pass wrote for other runtimes (`onnx`), taken along when the bundle is saved.
        shards: where the weights are that `model` holds no data for; None when all are in memory.
        parts: safetensors files that hold what such weights have become.
        storage: how `save` writes matrices with many zeros; a bundle that was loaded is dense again.
        notes: what the last pass reports; the pipeline moves it into the lineage.
        scratch: temporary folders that `exports` or `parts` lie in, removed with the last that holds them.
        origin: what `load` was given, with `adapter` what it merged.
        companions: small files by name that say how an encoder's states become a vector; they are saved with
            a model that embeds.
    """

    model: Any
    tokenizer: Any
    lineage: Lineage
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    exports: Mapping[str, Path] = field(default_factory=dict)
    shards: ShardReader | None = None
    parts: tuple[Path, ...] = ()
    storage: Storage = "dense"
    notes: Mapping[str, Any] = field(default_factory=dict)
    scratch: tuple[Scratch, ...] = ()
    origin: Path | str | None = None
    adapter: Path | None = None
    companions: Mapping[str, bytes] = field(default_factory=dict)

    def apply(
        self,
        step: Step,
        *,
        text: Text | None = None,
        labelled: GivenLabels | None = None,
        base: "Path | str | Bundle | None" = None,
        seed: int = 0,
    ) -> "Bundle":
        """A copy that a pass has changed; this one, and the caller's process, stay as they are.

        Args:
            step: a pass, such as `QuantizeGPTQ(format=Int4(group=64))`.
            text: where the pass needs some, as in recipes; a `DataConfig` also says how many windows of what
                length, a `TextData` has them. What `compress.measure` scores by default is left out.
            labelled: texts with labels, where the pass learns them, or reads text and none is given: a file,
                a `LabelledConfig`, or rows; what `compress.measure` judges by is left out.
            base: the model to stay close to; by default the one that was loaded.
            seed: of all that is drawn by chance.

        Raises:
            UserError: the pass needs what is not given, or refuses this model.
        """

        def teacher() -> Bundle:
            origin = self.origin if base is None else base
            if origin is None:
                raise UserError(f"base: {step.name()} learns from a model, and none was loaded; give base=")
            if isinstance(origin, Bundle):
                return origin.clone()
            return Bundle.load(origin, adapter=None if base is not None else self.adapter)

        return applied(self, step, text, teacher, seed, labelled)

    def __post_init__(self) -> None:
        settled(linears(self.model))  # one that was made elsewhere comes in here

    def evolve(self, **changes: Any) -> "Bundle":
        """A bundle with some fields changed."""
        return replace(self, **changes)

    def clone(self) -> "Bundle":
        """A bundle whose model may be changed without touching this one's."""
        return replace(self, model=copy.deepcopy(self.model), masks=copy.copy(self.masks), notes={})

    def offload(self, folder: Path, *, whole: bool = False) -> Offload | None:
        """Moves the model's blocks into memory and out again, into `folder`; None when all are in memory.

        With `whole` they are once this returns: for what looks at more than a block.
        """
        store = None if self.shards is None else Offload(self.model, self.shards, folder)
        if store is not None and whole:
            store.load_rest()
            return None
        return store

    def save(self, folder: Path | str) -> Manifest:
        """Write the artifact and open it again; the folder appears whole or not at all.

        Raises:
            UserError: the disk is full or the folder cannot be written; what was written does not come back.
        """
        folder = Path(folder)
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            manifest, written = self._write(partial)
            require_reopens(self.model, self.masks, partial, manifest, Bundle.load, written, self.parts)
            del written
            shutil.rmtree(folder, ignore_errors=True)
            partial.replace(folder)
        except Exception as error:
            shutil.rmtree(partial, ignore_errors=True)
            # safetensors reports a full disk as its own error type
            if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
                raise UserError(
                    f"{folder}: cannot be written ({error}); free some space and run again"
                ) from None
            raise
        return manifest

    def _write(self, folder: Path) -> tuple[Manifest, dict[str, Tensor] | None]:
        """The manifest, and what was handed to the writer, by its names in the files; None where that was
        the model itself."""
        layers = quantized_layers(self.model)
        if any(isinstance(m, SparseLinear | SparseQuantizedTensor) for m in self.model.modules()):
            raise UserError(f"{folder}: a model loaded with its weights packed can only run; load it dense")
        made = self.lineage.steps[-1].name if self.lineage.steps else folder.with_suffix("")
        require_finite(numbers_of(self.model), made, BROKEN)
        sparse: dict[str, SparseRecord] = {}
        written: dict[str, Tensor] | None = None
        with quiet_transformers():
            if layers or self.storage != "dense":
                save_configurations(self.model, folder)
                written, sparse = self._write_state(folder)
            elif self.parts:
                written = self._write_shards(folder)
            else:
                self.model.save_pretrained(folder, max_shard_size="5GB")
            self.tokenizer.save_pretrained(folder)
        beside = dict(self.companions) if task_of(self.model.config).embeds else {}
        write_companions(beside, folder)
        write_bits(self.masks, self.model, self.parts, layers, folder)
        for name, source in self.exports.items():
            shutil.copytree(source, folder / name)
            if not stated(folder / name):
                write_sums(folder / name)
            verified(folder / name)  # the copy
        steps = self.lineage.steps
        manifest = Manifest(
            kind="huggingface",
            compress_version=__version__,
            fingerprint=steps[-1].fingerprint if steps else "",
            lineage=self.lineage,
            layers=layers,
            masked=tuple(sorted(self.masks)),
            sparse=sparse,
            storage=self.storage,
            files={
                str(p.relative_to(folder)): file_record(p)
                for p in sorted({*folder.iterdir(), *(folder / name for name in beside)})
                if p.is_file()
            },
            exports=tuple(self.exports),
        )
        manifest.write(folder / MANIFEST)
        return manifest, written

    def _write_shards(self, folder: Path) -> dict[str, Tensor]:
        """A float model most of which is in files, as transformers would have saved it."""
        config = copy.copy(self.model.config)
        config.architectures, config.dtype = [type(self.model).__name__], "float32"
        save_configurations(self.model, folder, config)
        rest = unique_state(self.model)
        shards = join((*self.parts, self._rest(rest)), folder, "model")
        if len(shards) > 1:
            write_index(shards)
        return rest

    def _rest(self, state: dict[str, Tensor]) -> Path:
        """A file beside the parts for what is still in memory."""
        rest = self.parts[0].with_name("rest.safetensors")
        save_file(state, rest)
        return rest

    def _write_state(self, folder: Path) -> tuple[dict[str, Tensor], dict[str, SparseRecord]]:
        """Codes, or bitmasks and values; returns what was written, and what was stored so."""
        state = with_streams(unique_state(self.model), self.model)
        if self.storage != "dense":
            packed, records = compact(state, self.model)
            save_file(packed, folder / SPARSE, metadata={"format": "pt"})
            return packed, records
        if not self.parts:
            save_file(state, folder / CODES, metadata={"format": "pt"})
            return state, {}
        join((*self.parts, self._rest(state)), folder, Path(CODES).stem)
        return state, {}

    @classmethod
    def load(
        cls,
        path: Path | str,
        *,
        adapter: Path | str | None = None,
        masks: bool = True,
        stream: bool = False,
        packed: bool = False,
        verify: bool = True,
    ) -> "Bundle":
        """Load an artifact, a Hugging Face directory, a `.gguf` file or a hub id.

        Args:
            path: where it is.
            adapter: folder of a LoRA adapter of this model, merged into its weights (models/adapters.py);
                what is pruned stays zero.
            masks: False leaves the masks out, for those who only run the model and count its memory.
            stream: leave the weights on disk where that is possible (float weights in safetensors), for
                passes that take one block at a time.
            packed: leave what is stored as bitmask and values so in memory; such a model can only run. An
                artifact of the storage `packed` is loaded so whenever masks are left out.
            verify: compare the SHA-256 of every file with the one in the manifest, or in a list beside it.

        Raises:
            UserError: as `load_checkpoint`, or the artifact is not whole, or not what was written.
        """
        folder = Path(path)
        if adapter is not None:
            return adapted(cls.load(path, verify=verify), Path(adapter))
        stream = stream and folder.is_dir()
        if not has_manifest(folder):
            lineage = Lineage(source=str(path))
            if verify and folder.exists():
                verified(folder, whole=False)
            if stream and (found := cls._streaming(folder, lineage, ())):
                return found
            model, tokenizer = load_checkpoint(path)
            return cls(model, tokenizer, lineage, origin=path, companions=companions(place_of(path)))
        manifest = Manifest.read(folder / MANIFEST)
        if manifest.kind != "huggingface":
            raise UserError(f"{folder}: an ONNX artifact; torch needs the folder it was exported from")
        for name, record in manifest.files.items():
            file = inside(folder, name)
            if not record.fits(file):
                raise UserError(
                    f"{file}: missing or not of the {record.bytes} bytes its manifest states; copy it again"
                )
        if verify:
            verified(folder)
        masked = manifest.masked if masks else ()
        dense = not manifest.layers and manifest.storage == "dense"
        if stream and dense and (found := cls._streaming(folder, manifest.lineage, masked)):
            return found
        if not dense:
            packed = packed or (manifest.storage == "packed" and not masks)
            model = restored(folder, manifest, packed)
            tokenizer = tokenizer_of(model, folder)
        else:
            model, tokenizer = load_checkpoint(folder)
        kept = loaded_masks(model, masked, read_bits(folder)) if masked else {}
        folders = dict.fromkeys((*EXPORTS, *manifest.exports))
        exports = {name: folder / name for name in folders if (folder / name).is_dir()}
        return cls(
            model, tokenizer, manifest.lineage, kept, exports, origin=folder, companions=companions(folder)
        )

    @classmethod
    def _streaming(cls, folder: Path, lineage: Lineage, masked: tuple[str, ...]) -> "Bundle | None":
        found = streamed(folder)
        if found is None:
            return None
        model, reader = found
        masks = stored_masks(model, reader, masked, read_bits(folder) if masked else {})
        return cls(
            model, tokenizer_of(model, folder), lineage, masks, shards=reader, origin=folder,
            companions=companions(folder),
        )  # fmt: skip


def quantized_layers(model: nn.Module) -> dict[str, LayerRecord]:
    """The layers of a model that hold codes, tied ones naming the first that holds them."""
    first: dict[int, str] = {}
    records = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear | QuantizedEmbedding):
            owner = first.setdefault(id(module.quantized), name)
            records[name] = LayerRecord(
                format=module.quantized.format.model_dump(),
                shape=module.quantized.shape,
                tied_to=None if owner == name else owner,
                embedding=isinstance(module, QuantizedEmbedding),
                activations=_activations(module),
            )
    return records


def _activations(module: nn.Module) -> dict[str, Any] | None:
    rule = getattr(module, "activations", None)
    return None if rule is None else rule.model_dump()


load = Bundle.load
