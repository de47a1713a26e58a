"""Does Transformers.js say what ONNX Runtime says? A classifier's decisions on 20 texts, in Node.

    python benchmarks/transformers_js.py VARIANT --labelled FILE --node-modules FOLDER

VARIANT is a folder of a run with an `onnx` folder in it: just the layout that Transformers.js reads. FOLDER
is where `npm install @huggingface/transformers` left its `node_modules`. A line per text that differs, and a
count.
Transformers.js cuts a text that is too long without the token after it, so its numbers are others there.
"""

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from transformers import AutoConfig, AutoTokenizer

from compress import LabelledConfig, load_labelled, open_runtime

TEXTS = 20
SCRIPT = """
import { pipeline, env } from '@huggingface/transformers';
import { readFileSync } from 'fs';
const [folder, name, texts] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = folder + '/';
const options = { dtype: 'fp32', use_external_data_format: true };
const classify = await pipeline('text-classification', name, options);
const found = [];
for (const text of JSON.parse(readFileSync(texts))) found.push((await classify(text))[0]);
console.log(JSON.stringify(found));
"""


def main(
    variant: Path,
    labelled: Annotated[str, typer.Option(help="texts, as data.labelled of a recipe")],
    node_modules: Annotated[Path, typer.Option(help="with @huggingface/transformers in it")],
) -> None:
    """Compare label and probability of each text."""
    rows = load_labelled(LabelledConfig(source=labelled)).evaluation[:TEXTS]
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


def in_node(variant: Path, texts: list[str], node_modules: Path) -> list[dict[str, Any]]:
    """What the pipeline of the package says of each text: label and score."""
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
