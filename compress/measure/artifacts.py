"""Measure artifacts that lie somewhere, each in the runtime it is for, on one text."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from compress.artifact.folder import whole
from compress.artifact.labels import GivenLabels, fitted, labelled_for, rows_of_labels, seed_of
from compress.errors import UserError
from compress.measure import harness
from compress.measure.prompt_reference import require_asked
from compress.measure.turns import Target
from compress.models.checkpoints import load_tokenizer, meta_model
from compress.models.heads import labels_of
from compress.records.protocol import MeasureProtocol
from compress.records.results import Result
from compress.runtimes import detect_runtime
from compress.runtimes.null_pass import null_pass
from compress.runtimes.providers import require_provider
from compress.tasks.base import longest_text, rows_of
from compress.tasks.registry import task_of
from compress.text.documents import load_documents
from compress.text.encode import apart, asked_by
from compress.text.examples import Examples
from compress.text.labelled.base import Labelled
from compress.text.labelled.config import LabelledConfig
from compress.text.labelled.encoded import LabelledData
from compress.text.prompts import Prompt
from compress.text.translation import translation
from compress.text.windows import DataConfig, Windows, prepare


def measure_artifacts(
    artifacts: Sequence[Path],
    data: DataConfig,
    base: Path | None,
    protocol: MeasureProtocol | None,
    *,
    labelled: GivenLabels | None = None,
    verify: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> list[Result]:
    """Measure artifacts or plain model directories on a text, or by `labelled` ones, against a `base`.

    The windows are cut with the tokenizer of `base`, or of the first artifact; the others must have the
    same vocabulary, or with a `base` fewer of its tokens, since perplexities over different tokens cannot
    be compared. Labelled texts are those to judge by, of a file the part that a recipe leaves out of
    training; every artifact cuts them with its own tokenizer, and must have the labels of the first, in their
    order.
    `verify`: compare the files' hashes with those stated beside them;
    `say`: gets a line for what cannot be compared with the stock loader's model.

    Raises:
        UserError: an artifact that cannot be loaded, or is not what was written, text that is too short,
            another vocabulary, other labels, an execution provider that is absent, windows beyond an
            artifact's context.
    """
    require_provider((protocol or MeasureProtocol()).provider)
    first = base or artifacts[0]
    windows: Windows | Examples
    if labelled is None:
        windows = _windows(artifacts, data, base)
    else:
        windows = _texts(artifacts, labelled, first, base, say)
    for path in artifacts:
        # a GGUF that llama.cpp runs is read by us only as a base
        if detect_runtime(path) != "torch" and path != base:
            continue
        if (reason := null_pass(path, verify=verify)) is not None:
            say(f"{path}: not compared with the stock loader's model: {reason}")
    targets = [
        Target(name, runtime, path, artifact=str(path))
        for name, path in zip(_short([whole(path) for path in artifacts]), artifacts, strict=True)
        for runtime in _runtimes(path, base)
    ]
    return harness.measure(targets, base, windows, protocol, verify=verify)


def _windows(artifacts: Sequence[Path], data: DataConfig, base: Path | None) -> Windows:
    """The windows that all are scored on."""
    first = base or artifacts[0]
    windows = evaluation_windows(first, data)
    _require_vocabulary(artifacts, first, base)
    for path in artifacts:
        if not (path / "config.json").is_file():
            continue
        if data.window > (longest := longest_text(meta_model(str(path)))):
            raise UserError(f"window: {data.window} tokens, but {path} takes at most {longest}")
    return windows


def _require_vocabulary(artifacts: Sequence[Path], first: Path, base: Path | None) -> None:
    known = _vocabulary(first)
    for path in artifacts:
        if _vocabulary(path) != known and not _trimmed(path, base):
            raise UserError(f"{path}: has another vocabulary than {first}; measure it on its own")


def _texts(
    artifacts: Sequence[Path],
    labelled: GivenLabels,
    first: Path,
    base: Path | None,
    say: Callable[[str], None],
) -> Examples:
    """The texts that all are judged by, as the first one's tokenizer cuts them."""
    seeds = {seed for path in (first, *artifacts) if (seed := seed_of(whole(path))) is not None}
    if len(seeds) > 1:
        say(
            f"the artifacts come of runs of the seeds {sorted(seeds)}, "
            "which may have trained on some of these rows"
        )
    rows, model = rows_of_labels(labelled, min(seeds, default=0)), meta_model(str(whole(first)))
    prompt = labelled.prompt if isinstance(labelled, LabelledConfig) else None
    if prompt is not None:
        examples = _asked(artifacts, first, rows, prompt)
        say(f"judged by {len(examples)} texts of {rows.source}, the part that is left out of training")
        return examples
    rows = fitted(rows, model.config) if isinstance(rows, Labelled) else rows
    known = _labels(model, rows.kind, first)
    if task_of(model.config).predicts:  # tokens are what is judged
        _require_vocabulary(artifacts, first, base)
    for path in artifacts:
        if (own := _labels(meta_model(str(whole(path))), rows.kind, path)) != known:
            raise UserError(
                f"{path}: has other labels than {first}, or in another order ({_few(own)}; {_few(known)}); "
                "measure it on its own"
            )
    tokenizer = _tokenizer(first)
    examples = labelled_for(model, tokenizer, rows).evaluation
    if task_of(model.config).embeds:  # whatever the rows are: of one text it refuses them
        examples = apart(examples, tokenizer, longest_text(model), wanted=True)
    if isinstance(labelled, str | Path | LabelledConfig):
        say(f"judged by {len(examples.rows)} texts of {rows.source}, the part that is left out of training")
    return examples


def _asked(artifacts: Sequence[Path], first: Path, rows: Labelled | LabelledData, prompt: Prompt) -> Examples:
    """Texts as prompts for decoders without a head."""
    for path in artifacts:
        require_asked(meta_model(str(whole(path))).config, str(path), rows.kind)
    model, tokenizer = meta_model(str(whole(first))), _tokenizer(first)
    texts = labelled_for(model, tokenizer, rows).evaluation
    return asked_by(texts, prompt, tokenizer, longest_text(model))


def _labels(model: Any, kind: str, path: Path) -> tuple[str, ...]:
    """Those of a model's head, which is for labels of a kind; none where rows judge it that need no head."""
    task = task_of(model.config)
    if not task.judged_by(kind):
        raise UserError(
            f"{path}: is {task.noun} ({task}), which labels of the kind '{kind}' do not judge; give one "
            "that was fine-tuned on such labels"
        )
    return () if task.embeds else labels_of(model.config)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")


def evaluation_windows(artifact: Path, data: DataConfig) -> Windows:
    """The windows `artifact` would be scored on."""
    few = data.model_copy(update={"calibration_windows": 1, "heldout_windows": 1})
    tokenizer, rows = _tokenizer(artifact), rows_of(meta_model(str(whole(artifact))).config)
    documents = load_documents(data.text)
    return prepare(few, documents, tokenizer, training=False, calibrating=False, rows=rows).evaluation


def _tokenizer(artifact: Path) -> Any:
    return load_tokenizer(whole(artifact))


def _vocabulary(artifact: Path) -> dict[str, int]:
    """Token -> id: two tokenizers of one size may have different ones."""
    found: dict[str, int] = _tokenizer(artifact).get_vocab()
    return found


def _trimmed(path: Path, base: Path | None) -> bool:
    """Whether an artifact has some of the base's tokens and no others."""
    files = [folder / "tokenizer.json" for folder in (base, path) if folder is not None]
    return len(files) == 2 and all(f.is_file() for f in files) and translation(*files) is not None


def _runtimes(path: Path, base: Path | None) -> tuple[str, ...]:
    """Where an artifact is measured; a base also in torch, whose logits the others are compared with."""
    own = detect_runtime(path)
    return ("torch", own) if own == "llama.cpp" and path == base else (own,)


def _short(paths: Sequence[Path]) -> list[str]:
    """As many of each path's last parts as tell it from the others."""
    parts = [path.absolute().parts for path in paths]
    for count in range(1, max(map(len, parts))):
        names = ["/".join(own[-count:]) for own in parts]
        if len(set(names)) == len(set(paths)):
            return names
    return [str(path) for path in paths]
