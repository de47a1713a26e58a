"""Does Transformers.js say what ONNX Runtime says? A classifier's decisions on 20 texts, or the answers of a
model that finds them in their contexts, in Node.

    python benchmarks/transformers_js.py VARIANT --labelled FILE --node-modules FOLDER

VARIANT is a folder of a run with an `onnx` folder in it: just the layout that Transformers.js reads. FOLDER
is where `npm install @huggingface/transformers` left its `node_modules`. A line per text that differs, and a
count.
Transformers.js cuts a text that is too long without the token after it, so its numbers are others there. The
probability of an answer is over the context there, over the whole text here; answers are compared without
case.
"""

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from transformers import AutoConfig, AutoTokenizer

from compress import LabelledConfig, encode, load_labelled, open_runtime

TEXTS = 20
MOST_TOKENS = 30  # of an answer
SCRIPT = """
import { pipeline, env } from '@huggingface/transformers';
import { readFileSync } from 'fs';
const [folder, name, texts] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = folder + '/';
const options = { dtype: 'fp32', use_external_data_format: true };
const asked = JSON.parse(readFileSync(texts));
const task = Array.isArray(asked[0]) ? 'question-answering' : 'text-classification';
const ask = await pipeline(task, name, options);
const found = [];
for (const each of asked) found.push([await ask(...[each].flat())].flat()[0]);
console.log(JSON.stringify(found));
"""


def main(
    variant: Path,
    labelled: Annotated[str, typer.Option(help="texts, as data.labelled of a recipe")],
    node_modules: Annotated[Path, typer.Option(help="with @huggingface/transformers in it")],
) -> None:
    """Compare label and probability of each text."""
    rows = load_labelled(LabelledConfig(source=labelled)).evaluation[:TEXTS]
    if AutoConfig.from_pretrained(variant).architectures[0].endswith("ForQuestionAnswering"):
        answers(variant, rows, node_modules)
        return
    texts = [row.text for row in rows]
    tokenizer, names = AutoTokenizer.from_pretrained(variant), AutoConfig.from_pretrained(variant).id2label
    graph = open_runtime(variant / "onnx", "onnxruntime")
    apart, worst = 0, 0.0
    for text, theirs in zip(texts, in_node(variant, texts, node_modules), strict=True):
        ids = tokenizer(text, truncation=True, max_length=graph.context)["input_ids"]
        logits = graph.logits(np.array([ids], dtype=np.int32))[0, 0].astype(np.float64)
        p = np.exp(logits - logits.max())
        p /= p.sum()
        worst = max(worst, abs(float(p.max()) - float(theirs["score"])))
        if names[int(p.argmax())] != theirs["label"]:
            apart += 1
            print(f"{names[int(p.argmax())]} here, {theirs['label']} in Transformers.js: {text[:80]!r}")
    print(f"{len(texts) - apart} of {len(texts)} alike; probabilities differ by {worst:.2g} at most")


def answers(variant: Path, rows: Sequence[Any], node_modules: Path) -> None:
    """Compare the answer to each question, leaving out that there may be none."""
    tokenizer, graph = AutoTokenizer.from_pretrained(variant), open_runtime(variant / "onnx", "onnxruntime")
    apart, asked = 0, [(row.text, row.pair or "") for row in rows]
    examples = encode(rows, "span", (), tokenizer, graph.context, range(len(rows)))
    for (question, context), theirs, item in zip(
        asked, in_node(variant, asked, node_modules), examples.items, strict=True
    ):
        types = () if item.types is None else (item.types[None],)
        assert item.passage is not None
        outside = np.full(len(item.ids), -np.inf)
        outside[item.passage.inside] = 0
        start, end = graph.logits(item.ids[None], *types)[0].T + outside
        score, last = start[:, None] + end[None], np.arange(len(start))
        far = (last[None] < last[:, None]) | (last[None] >= last[:, None] + MOST_TOKENS)
        first, final = np.unravel_index(np.where(far, -np.inf, score).argmax(), score.shape)
        a, b = item.passage.places[first, 0], item.passage.places[final, 1]
        if context[a:b].lower() != theirs["answer"].lower():
            apart += 1
            print(f"{context[a:b]!r} here, {theirs['answer']!r} in Transformers.js: {question[:80]!r}")
    print(f"{len(asked) - apart} of {len(asked)} alike")


def in_node(variant: Path, texts: Sequence[Any], node_modules: Path) -> list[dict[str, Any]]:
    """What the pipeline of the package says of each text, or question and context."""
    with tempfile.TemporaryDirectory(dir=node_modules.parent) as place:
        script, given = Path(place) / "classify.mjs", Path(place) / "texts.json"
        script.write_text(SCRIPT)
        given.write_text(json.dumps(texts))
        command = ["node", script, variant.absolute().parent, variant.name, given]
        done = subprocess.run([str(part) for part in command], check=True, stdout=subprocess.PIPE, text=True)
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    typer.run(main)
