"""How much faster a small draft makes a model decode.

    python benchmarks/speculative.py TARGET DRAFT --text TEXT [--draft-tokens 4]

TARGET and DRAFT are artifacts or model directories with one tokenizer, each in torch or ONNX Runtime. The
prompts are pieces of the text, evenly spaced. Models guess best what they were trained on: for those of a run
give its `evaluation.npy` as the text. Appends a line to `results/speculative.jsonl`: the speed-up
with its interval over prompts, the share of drafted tokens that were kept, tokens per call of the target.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from compress import Sampling, TextGenerator, load_documents, machine, measure_speedup, versions

RESULTS = Path(__file__).parent / "results" / "speculative.jsonl"


def main(
    target: Path,
    draft: Path,
    text: Annotated[str, typer.Option()] = "stdlib",
    prompts: int = 16,
    prompt_characters: int = 400,
    tokens: int = 128,
    draft_tokens: int = 4,
    rounds: int = 3,
    temperature: float = 0.0,
    threads: Annotated[int | None, typer.Option()] = None,
    output: Path = RESULTS,
) -> None:
    """Measure one pair."""
    if text.endswith(".npy"):
        whole = TextGenerator(target).tokenizer.decode(np.load(text).ravel().tolist())
    else:
        whole = "\n".join(document.text for document in load_documents(text))
    spread = max(1, len(whole) // prompts)
    pieces = [whole[i * spread : i * spread + prompt_characters] for i in range(prompts)]
    found = measure_speedup(
        target,
        draft,
        pieces,
        tokens=tokens,
        draft_tokens=draft_tokens,
        rounds=rounds,
        sampling=Sampling(temperature=temperature),
        threads=threads,
    )
    line = {
        "target": "/".join(target.resolve().parts[-3:]),
        "draft": "/".join(draft.resolve().parts[-3:]),
        "text": Path(text).name,
        "prompts": prompts,
        "prompt_characters": prompt_characters,
        "new_tokens": tokens,
        "longest_draft": draft_tokens,
        "rounds": rounds,
        "temperature": temperature,
        "threads": threads or machine()["cores"],
        **asdict(found),
        "machine": machine(),
        "versions": versions(),
    }
    with output.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(asdict(found)))


if __name__ == "__main__":
    typer.run(main)
