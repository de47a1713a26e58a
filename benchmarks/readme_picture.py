"""Draw the README's picture: KL to the original against bytes, ours and other tools.

    python benchmarks/readme_picture.py

Reads `results/quantization.jsonl` alone and writes `docs/images/kl-light.svg` and `kl-dark.svg`, which differ
in colours only. Left the bytes of the linear layers, since most tools leave embeddings alone; right those of
the whole file, beside llama.cpp, which does not. Each file carries the digest of what it shows, so that a
test knows without drawing whether it is up to date.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from bench import HERE
from quantization_picture import NAMES, is_coded, is_variation, mean
from results_files import Groups, points, put_labels, save

MODEL = "SmolLM2-135M-Instruct"
IMAGES = HERE.parent / "docs" / "images"
LINEAR, FILE = "linear_bytes", "file_bytes"
COLOURS = {  # of each tool, on white and on black
    "ours": ("#0969da", "#4493f8"),
    "gptqmodel": ("#bc4c00", "#f0883e"),
    "auto_round": ("#8250df", "#b083f0"),
    "hqq": ("#bf3989", "#f778ba"),
    "bitsandbytes": ("#6e7781", "#9198a1"),
    "llama_cpp": ("#1a7f37", "#3fb950"),
}
INK = {"light": "#1f2328", "dark": "#d1d7e0"}
WORST_KL = 1.2  # nats; beyond it no one ships
LEFT_OUT = ("iterations", "round to nearest", "2 bits, o", "3 bits, o", "4 bits, o")  # the table has them


@dataclass(frozen=True)
class Mark:
    """One setting of one tool, and where it stands."""

    panel: str
    tool: str
    setting: str
    coded: bool
    megabytes: float
    kl: float


def marks(groups: Groups) -> list[Mark]:
    """What the picture shows: every setting that is no variation, in the panel whose bytes it chose."""
    found = []
    for lines in groups:
        tool, setting = lines[0]["tool"], lines[0]["setting"]
        if (
            is_variation(lines[0])
            or mean(lines, "kl") > WORST_KL
            or any(word in setting for word in LEFT_OUT)
        ):
            continue
        whole = tool == "llama_cpp" or "embeddings too" in setting or "MB" in setting
        panel = FILE if whole else LINEAR
        size, kl = round(mean(lines, panel) / 1e6, 1), round(mean(lines, "kl"), 4)
        found.append(Mark(panel, tool, setting, is_coded(lines[0]), size, kl))
    return found


def digest(found: list[Mark]) -> str:
    """Of all that is drawn."""
    return hashlib.sha256(json.dumps([vars(mark) for mark in found]).encode()).hexdigest()


def draw(found: list[Mark], theme: str, file: Path) -> None:
    """Two panels side by side on a transparent ground, text as text."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "compress", "svg.fonttype": "none", "font.size": 9})
    ink, dark = INK[theme], theme == "dark"
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.6), sharey=True)
    figure.patch.set_alpha(0)
    words = {LINEAR: "linear layers, MB", FILE: "whole file, MB"}
    for axis, panel in zip(axes, words, strict=True):
        axis.patch.set_alpha(0)
        for tool, colours in COLOURS.items():
            for coded in (False, True):
                own = [m for m in found if (m.panel, m.tool, m.coded) == (panel, tool, coded)]
                if own:
                    axis.plot(
                        [m.megabytes for m in own], [m.kl for m in own],
                        "D" if tool == "ours" else "o", color=colours[dark], markersize=6,
                        fillstyle="none" if coded else "full",
                        label=NAMES[tool] + (", coded in the file" if coded else ""),
                    )  # fmt: skip
        axis.set(xlabel=words[panel], yscale="log")
        axis.grid(alpha=0.25, color=ink, linewidth=0.5)
        axis.tick_params(colors=ink, which="both")
        axis.xaxis.label.set_color(ink)
        for side in axis.spines.values():
            side.set_color(ink)
            side.set_alpha(0.4)
        axis.legend(
            frameon=False, labelcolor=ink, fontsize=8, loc="upper right" if panel == FILE else "lower left"
        )
    axes[0].set_ylabel("KL to the original, nats per token", color=ink)
    figure.suptitle(
        f"{MODEL}: what a quantizer loses at a size (lower left is better)", color=ink, fontsize=10
    )
    for axis, panel in zip(axes, words, strict=True):
        put_labels(axis, [(m.megabytes, m.kl, short(m)) for m in found if m.panel == panel], ink)
    save(figure, file, transparent=True, metadata={"Identifier": digest(found)})
    plt.close(figure)


def short(mark: Mark) -> str:
    """The setting without what the legend says."""
    text = mark.setting.replace("outputs weighed, tuned", "tuned").replace("auto, coded", "auto")
    text = text.replace("coded, ", "")
    return text.replace(" group 64, embeddings too", ", all").replace(
        "symmetric, embeddings too", "symmetric, all"
    )


def main() -> None:
    """Write both files."""
    found = marks(points(HERE / "results" / "quantization.jsonl", MODEL))
    IMAGES.mkdir(parents=True, exist_ok=True)
    for theme in INK:
        draw(found, theme, IMAGES / f"kl-{theme}.svg")


if __name__ == "__main__":
    main()
