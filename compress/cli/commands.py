"""The command line: parsing and printing only.

Exit codes: 0 done, 2 something the user can mend (one line on standard error), 130 interrupted. Heavy
imports happen inside the commands, so that `--help` answers at once.
"""

import errno
import os
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from compress.cli import interrupts
from compress.errors import UserError, one_line, reason
from compress.host.processes import is_main
from compress.version import __version__

if TYPE_CHECKING:
    from pydantic import BaseModel

_Model = TypeVar("_Model", bound="BaseModel")

app = typer.Typer(
    name="compress-lm",
    help="Shrink transformer language models, and tell the truth about what it cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NUMPY_FULL = re.compile(r"\d+ requested and \d+ written")  # its words for it, without a number

_HEADSTART_SECONDS = 3.0

Output = Annotated[Path | None, typer.Option("--output", "-o", help="Folder of the run; default runs/NAME.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Override a field: data.window=256.")
]
Provider = Annotated[
    str, typer.Option(help="What runs ONNX graphs: cpu, cuda, openvino or coreml; see 'doctor'.")
]
Verify = Annotated[
    bool,
    typer.Option("--verify/--no-verify", help="Compare files with the SHA-256 stated beside them, or not."),
]
LabelledOption = Annotated[
    str | None, typer.Option("--labelled", help="Texts with labels: a file, a folder, 'datasets:NAME'.")
]
TextOption = Annotated[
    list[str] | None, typer.Option("--text", help="Text files or folders, 'stdlib', or 'datasets:NAME'.")
]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"compress-lm {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Shrink transformer language models, and tell the truth about what it cost."""


@app.command()
def run(
    recipe: Annotated[
        str, typer.Argument(help="A shipped recipe, such as demo or fit-size, or a YAML file.")
    ],
    output: Output = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Start from this checkpoint: directory, .gguf or hub id.")
    ] = None,
    text: TextOption = None,
    labelled: LabelledOption = None,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and estimate; run nothing.")] = False,
    measured: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Or write the artifacts only, and measure later.")
    ] = True,
) -> None:
    """Run a recipe: train or load, compress, export, measure, report. Run again to resume."""
    from compress.run.recipe import load_recipe

    sections: dict[str, dict[str, object]] = {}
    if model is not None:
        sections["model"] = {"checkpoint": model}
    if text:
        sections["data"] = {"text": text if len(text) > 1 else text[0]}
    if labelled is not None:
        sections.setdefault("data", {})["labelled"] = {"source": labelled}
    plan = load_recipe(recipe, overrides, **sections)
    folder = output or Path("runs") / plan.name
    if dry_run:
        from compress.cli.tables import print_plan
        from compress.run.preflight import preflight

        print_plan(plan, preflight(plan, folder, measured=measured), folder)
        return
    from compress import api
    from compress.cli.tables import print_left, print_results

    if not is_main():
        api.take_part(plan, folder)
        return

    if not measured:
        for variant in api.make_artifacts(plan, folder, _say).variants:
            print(folder / variant.name)
        print("not measured: the same command without --no-measure does that, and writes the report")
        return
    record = api.run(plan, folder, _say)
    print_results(api.load_run(folder)[1], record)
    print_left(record)
    print(f"report: {folder / 'report.html'}")


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="Directory with safetensors, .gguf file or hub id.")],
    bits: Annotated[int | None, typer.Option(help="Of a weight: 2, 3, 4, 5, 6 or 8; default 4.")] = None,
    to: Annotated[str, typer.Option(help="What will run it: onnx, gguf, compressed-tensors.")] = "onnx",
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write.")] = Path("quantized"),
    text: TextOption = None,
    budget: Annotated[str | None, typer.Option(help="The most each file may take: 92MB.")] = None,
    effort: Annotated[str, typer.Option(help="quick, normal, or best: takes longest.")] = "normal",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: all cores.")] = None,
    measured: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Or write and check the files only.")
    ] = True,
) -> None:
    """Quantize a model for the runtimes it ships in, by the best recipe known, and measure it there."""
    from compress import api
    from compress.cli.tables import print_quantized
    from compress.run.request import EFFORTS

    chosen = next((known for known in EFFORTS if known == effort), None)
    if chosen is None:
        raise UserError(f"--effort: '{effort}' is unknown; known: {', '.join(EFFORTS)}")
    done = api.quantize(
        model,
        bits,
        [name.strip() for name in to.split(",") if name.strip()],
        output,
        text=text,
        budget_bytes=None if budget is None else _size(budget),
        effort=chosen,
        threads=threads,
        measured=measured,
        say=_say,
    )
    print_quantized(done)


@app.command()
def bench(
    artifacts: Annotated[list[Path], typer.Argument(help="Artifacts or plain model directories.")],
    text: TextOption = None,
    labelled: LabelledOption = None,
    template: Annotated[str | None, typer.Option(help="Asks decoders: {text} ... {label}.")] = None,
    base: Annotated[Path | None, typer.Option(help="Compare with this one (KL, loss difference).")] = None,
    window: Annotated[int, typer.Option(help="Tokens per window.")] = 1024,
    windows: Annotated[int, typer.Option(help="Evaluation windows.")] = 20,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: all cores.")] = None,
    provider: Provider = "cpu",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write results.jsonl here.")] = None,
    verify: Verify = True,
) -> None:
    """Measure existing artifacts on a text: quality, speed, memory, each in a fresh process."""
    from compress import api
    from compress.cli.tables import print_results
    from compress.records.protocol import MeasureProtocol
    from compress.records.results import write_results
    from compress.text.labelled.config import LabelledConfig
    from compress.text.windows import DataConfig

    for path in [*artifacts, *([base] if base else [])]:
        if not path.exists():
            raise UserError(f"{path}: no such artifact")
    _prepare(output)
    source = text or ["stdlib"]
    data = _checked(DataConfig, text=source, window=window, evaluation_windows=windows)
    protocol = _checked(MeasureProtocol, threads=threads, provider=provider)
    if template is not None and labelled is None:
        raise UserError("--template: asks for labels of texts; give them by --labelled")
    rows = template and _checked(LabelledConfig, source=labelled, template=template)
    results = api.bench(artifacts, data, base, protocol, labelled=rows or labelled, verify=verify, say=_say)
    if output is not None:
        write_results(output, results)
    print_results(results)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write.")] = Path("compare.html"),
) -> None:
    """One page over several runs."""
    from compress import api

    _prepare(output)
    print(f"page: {api.compare(runs, output)}")


@app.command()
def passes(name: Annotated[str | None, typer.Argument(help="Show this one's fields.")] = None) -> None:
    """List the passes, or the fields, bounds and defaults of one."""
    if name is None:
        from compress.cli.listing import print_passes

        print_passes()
    else:
        from compress.cli.tables import print_pass
        from compress.run.registry import pass_class

        print_pass(pass_class(name))


@app.command()
def fields() -> None:
    """List what a recipe may hold, with bounds and defaults; `passes NAME` tells those of a pass."""
    from compress.cli.tables import print_fields

    print_fields()


@app.command()
def generate(
    artifact: Annotated[Path, typer.Argument(help="An artifact (torch or ONNX) or model directory.")],
    prompt: Annotated[
        list[str],
        typer.Option("--prompt", "-p", help="Text to continue, - for standard input; several go together."),
    ],
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Reply to the prompt as a message, by the model's template."),
    ] = False,
    system: Annotated[str | None, typer.Option(help="With --chat: the message before it.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="At most this many new tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample among the k likeliest; 0: all.")] = 0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Sample within this much probability.")
    ] = 1.0,
    min_p: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="Leave out what has less than this share of the likeliest."),
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1: tokens that the text holds already get less likely.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of sampling; text i of several has seed + i.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End a text before this string; repeatable.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="At most this many texts at once.")] = 8,
    draft: Annotated[
        Path | None, typer.Option(help="A smaller artifact with the same tokenizer that guesses ahead.")
    ] = None,
    draft_tokens: Annotated[int, typer.Option(min=1, help="At most this many guesses at a time.")] = 4,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: all cores.")] = None,
    prefill_chunk: Annotated[
        int | None,
        typer.Option(min=1, help="Read prompts this many tokens at a time; default: as many as is fast."),
    ] = None,
    provider: Provider = "cpu",
    stats: Annotated[bool, typer.Option("--stats", help="Tell the speed on standard error.")] = False,
    verify: Verify = True,
) -> None:
    """Continue prompts, or reply to them, token by token."""
    for path in (artifact, draft):
        if path is not None and not path.exists():
            raise UserError(f"{path}: no such artifact; give the folder of one, or of a model")
    prompt = [_piped() if given == "-" else given for given in prompt]
    from compress.cli.terminal import print_counts, print_texts
    from compress.generation.generator import TextGenerator
    from compress.generation.sampling import Sampling

    if system is not None and not chat:
        raise UserError("--system: is part of a chat; add --chat")
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    before = [] if system is None else [{"role": "system", "content": system}]
    prompts = [[*before, {"role": "user", "content": p}] for p in prompt] if chat else prompt
    generator = TextGenerator(
        artifact,
        draft=draft,
        draft_tokens=draft_tokens,
        threads=threads,
        prefill_chunk=prefill_chunk,
        provider=provider,
        verify=verify,
    )
    print_texts(generator, prompts, tokens, sampling, stop or [], batch)
    if stats:
        print_counts(generator.counts)


@app.command()
def doctor() -> None:
    """What this machine can do: cores, instruction sets, memory, runtimes, missing extras."""
    from compress.cli.doctor import print_doctor

    print_doctor()


def main() -> None:
    """Console script: errors a user can mend become one line and exit code 2."""
    interrupts.begin()
    try:
        os.getcwd()
    except FileNotFoundError:  # libraries that are loaded later would end the process, each in its words
        _fail("error: the current folder was deleted; change to one that exists", 2)
    # threads that wait for others should sleep, not spin: training beside any other program halves otherwise
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        try:
            app()
        finally:
            interrupts.leave()
    except (Exception, interrupts.Interrupted) as error:
        if interrupts.asked():
            _fail(interrupts.RESUMABLE, 130)
        if isinstance(error, UserError):
            _fail(f"error: {error}", 2)
        if isinstance(error, OSError):
            _fail(f"error: {_told(error)}", 2)
        if isinstance(error, MemoryError):
            _fail("error: there is not enough memory for this; see --dry-run for what a recipe takes", 2)
        raise


def _piped() -> str:
    """What is written to standard input; its last end of line is the shell's."""
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt: standard input is not UTF-8 text (byte {error.start})") from None
    text = text.removesuffix("\n").removesuffix("\r")
    if not text:
        raise UserError("--prompt: - reads standard input, and nothing came; pipe a text into it")
    return text


def _told(error: OSError) -> str:
    """What the system, or a library in its place, could not do."""
    if error.errno in _FULL or (error.errno is None and _NUMPY_FULL.search(str(error))):
        return f"{error.filename or 'disk'}: no space left; free some and run again to resume"
    if error.filename is None or error.strerror is None:  # libraries say so of what a network lacks
        return reason(error)
    return f"{error.filename}: {error.strerror}"


def _say(line: str) -> None:
    print(one_line(line), file=sys.stderr, flush=True)


def _size(text: str) -> int:
    """Bytes of `92MB`, `1.5 GB`, `800kB` (powers of ten), `88MiB` (powers of two), or of a plain number."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMG]?)(i?)B?\s*", text, re.IGNORECASE)
    if found is None or not float(found[1]):
        raise UserError(f"--budget: '{text}' is no size; write 92MB, 1.5GB or a number of bytes")
    power = " kmg".index(found[2].lower() or " ")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def _checked(model: type[_Model], **fields: object) -> _Model:
    from pydantic import ValidationError

    from compress.run.recipe import explain

    try:
        return model(**fields)
    except ValidationError as error:
        raise UserError(explain(error, model)) from None


def _prepare(output: Path | None) -> None:
    """See to it that a file can be written before the work that fills it."""
    from compress.run.preflight import check_writable

    if output is not None:
        if output.is_dir():
            raise UserError(f"{output}: is a folder; name a file with --output")
        check_writable(output)
        output.parent.mkdir(parents=True, exist_ok=True)


def _fail(line: str, code: int) -> None:
    if not is_main():
        time.sleep(_HEADSTART_SECONDS)  # a launcher ends the others when one ends: the main one speaks first
        sys.exit(code)
    print(one_line(line, UserError.longest + len("error: ")), file=sys.stderr)
    sys.exit(code)
