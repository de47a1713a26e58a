"""An artifact that continues text, loaded once: prompts in, text out, piece by piece or whole."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, overload

from compress.errors import UserError
from compress.generation.chat import render, special_token
from compress.generation.counts import Counts
from compress.generation.plain import continue_tokens
from compress.generation.sampling import Chooser, Sampling
from compress.generation.speculative import speculate
from compress.generation.text import (
    Writing,
    end_tokens,
    forced_first_token,
    load_tokenizer,
    pieces,
    rows_of,
    stop_tokens,
)
from compress.generation.together import continue_together
from compress.host.tokenizer_files import encoding
from compress.runtimes import detect_runtime, open_text_runtime
from compress.runtimes.base import TextRuntime
from compress.tasks.base import require_row
from compress.text.chats import Message
from compress.text.framing import require_known

Prompt: TypeAlias = str | Sequence[Message]  # text to continue, or messages to reply to

TOKENS = 128  # new ones at most
BATCH = 8
DRAFT_TOKENS = 4


class TextGenerator:
    """A model, its tokenizer, and perhaps a draft that guesses ahead; `counts` tells of the last request."""

    def __init__(
        self,
        artifact: Path | str,
        *,
        draft: Path | str | None = None,
        draft_tokens: int = DRAFT_TOKENS,
        threads: int | None = None,
        prefill_chunk: int | None = None,
        provider: str = "cpu",
        verify: bool = True,
    ) -> None:
        """Load `artifact`, and `draft`, an artifact with the same tokenizer that guesses up to
        `draft_tokens` tokens at a time. Prompts are read `prefill_chunk` tokens at a time;
        `provider` runs ONNX graphs; `verify`: compare every file's SHA-256 with the one stated.

        Raises:
            UserError: no artifact there, an encoder, a draft of another tokenizer, or one of the two cannot
                step back; a provider that is absent, or none of the two is an ONNX graph.
        """
        self.folder = Path(artifact)
        self.tokenizer = load_tokenizer(self.folder)
        if draft is not None:
            _check_draft(self.folder, self.tokenizer, Path(draft), draft_tokens)
        for name, value in (("prefill_chunk", prefill_chunk), ("threads", threads)):
            if value is not None and value < 1:
                raise UserError(f"{name}: {value} is not valid; it must be at least 1")

        def opened(path: Path) -> TextRuntime:
            return open_text_runtime(
                path,
                threads,
                prefill_chunk=prefill_chunk,
                provider=provider,
                waiting="spin" if draft is None else "stop",
                verify=verify,
            )

        if provider != "cpu" and all(
            detect_runtime(p) == "torch" for p in (self.folder, Path(draft or artifact))
        ):
            raise UserError(
                f"provider: '{provider}' runs ONNX graphs, and {artifact} is none; export it first"
            )
        self.runtime = opened(self.folder)
        self.draft = None if draft is None else opened(Path(draft))
        for path, runtime in ((artifact, self.runtime), (draft, self.draft)):
            if self.draft is not None and runtime is not None and not runtime.rewinds:
                raise UserError(f"{path}: cannot step back in its text; leave the draft out")
        self.draft_tokens = draft_tokens
        self.rows = rows_of(self.folder)
        self.ends = set(end_tokens(self.folder))
        own_end = special_token(self.folder, "eos_token")
        if own_end is not None and (found := self.tokenizer.token_to_id(own_end)) is not None:
            self.ends.add(found)
        self.first = None if self.continues else forced_first_token(self.folder)
        if self.first is not None:
            require_row(self.first, self.rows, f"{self.folder}: forced_bos_token_id")
        self.counts = Counts()

    @property
    def continues(self) -> bool:
        """Whether a text goes on from its prompt; that of an encoder-decoder answers it."""
        return self.runtime.task.continues

    def stream(
        self, prompt: Prompt, tokens: int = TOKENS, sampling: Sampling | None = None, stop: Sequence[str] = ()
    ) -> Iterator[str]:
        """Continue `prompt`, or reply to it, by at most `tokens` tokens, piece by piece.

        `stop`: strings before the first of which the text ends; they are not shown.

        Raises:
            UserError: an empty prompt, or one that fills the model's context; messages without a template.
        """
        ids = self.encode(prompt)
        writing = self._writing(ids, stop)
        self.counts = Counts()
        choose = Chooser(sampling or Sampling(), first=self.first)
        return pieces(writing, self._tokens(ids, self._room(ids, tokens), choose, self._ends(stop)))

    def generate(
        self,
        prompts: Sequence[Prompt],
        tokens: int = TOKENS,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        batch: int = BATCH,
    ) -> list[str]:
        """Continue each of `prompts` as `stream` does, up to `batch` of them at once.

        Text i is what its prompt alone would give with the seed `sampling.seed + i`. With a draft one text
        follows another.

        Raises:
            UserError: as `stream`.
        """
        if batch < 1:
            raise UserError(f"batch: {batch} is not valid; it must be at least 1")
        sampling = sampling or Sampling()
        ids = [self.encode(prompt) for prompt in prompts]
        writings = [self._writing(i, stop) for i in ids]
        choosers = [Chooser(sampling, row, self.first) for row in range(len(ids))]
        ends = self._ends(stop)
        self.counts = Counts()
        if self.draft is not None:
            return [
                "".join(pieces(writing, self._tokens(i, self._room(i, tokens), choose, ends)))
                for writing, i, choose in zip(writings, ids, choosers, strict=True)
            ]
        left = [self._room(i, tokens) for i in ids]
        texts = [""] * len(ids)

        def take(row: int, token: int) -> bool:
            texts[row] += writings[row].add(token)
            left[row] -= 1
            return left[row] > 0 and not writings[row].stopped

        continue_together(self.runtime, ids, choosers, take, ends, batch=batch, counts=self.counts)
        return [text + writing.close() for text, writing in zip(texts, writings, strict=True)]

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt.

        Text gets what the tokenizer puts before one (a beginning-of-text token) and, where an encoder reads
        it, after it; messages what their template writes. Raises UserError as `stream`.
        """
        if isinstance(prompt, str):
            try:
                prompt.encode()
            except UnicodeEncodeError:  # bytes of a command line that are no text
                raise UserError(f"prompt: {prompt!r} is not UTF-8; give text") from None
            with encoding():
                found = self.tokenizer.encode(prompt)
            ids, added = list(found.ids), list(found.special_tokens_mask)
            # what the tokenizer puts after a text would end it
            while self.continues and added and added.pop():
                ids.pop()
            ids = ids or [i for i in found.ids if i not in self.ends]
        else:
            text = render(self.folder, prompt)
            with encoding():
                ids = list(self.tokenizer.encode(text, add_special_tokens=False).ids)
        if not ids:
            raise UserError("prompt: is empty; give some text to continue")
        if self.rows is not None:
            require_known(ids, self.rows, "prompt", self.tokenizer.id_to_token)
        # one that an encoder reads leaves the text all its room
        longest = self.runtime.context - (1 if self.continues else 0)
        if len(ids) > longest:
            whole = ", what it writes included" if self.continues else ""
            raise UserError(
                f"prompt: has {len(ids)} tokens, but the model takes at most {self.runtime.context}{whole}"
            )
        return ids

    def _writing(self, ids: Sequence[int], stop: Sequence[str]) -> Writing:
        """What is shown of a text: it goes on from its prompt, or answers one that an encoder read."""
        return Writing(self.tokenizer, ids if self.continues else [], _strings(stop))

    def _ends(self, stop: Sequence[str]) -> set[int]:
        """Ids before which a text ends."""
        return self.ends | stop_tokens(self.tokenizer, _strings(stop))

    def _room(self, ids: Sequence[int], tokens: int) -> int:
        if tokens < 1:
            raise UserError(f"tokens: {tokens} is not valid; it must be at least 1")
        read = len(ids) if self.continues else 0  # a prompt that an encoder reads is no part of the text
        return min(tokens, self.runtime.context - read)

    def _tokens(self, ids: list[int], limit: int, choose: Chooser, ends: set[int]) -> Iterator[int]:
        if self.draft is None:
            return continue_tokens(self.runtime, ids, choose, limit, ends, self.counts)
        return speculate(
            self.runtime,
            self.draft,
            ids,
            choose,
            limit,
            ends,
            longest=self.draft_tokens,
            counts=self.counts,
        )


@overload
def generate(
    artifact: Path | str,
    prompt: Prompt,
    *,
    tokens: int = TOKENS,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    batch: int = BATCH,
    draft: Path | str | None = None,
    draft_tokens: int = DRAFT_TOKENS,
    threads: int | None = None,
    prefill_chunk: int | None = None,
    provider: str = "cpu",
) -> str: ...
@overload
def generate(
    artifact: Path | str,
    prompt: list[str] | list[list[Message]],
    *,
    tokens: int = TOKENS,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    batch: int = BATCH,
    draft: Path | str | None = None,
    draft_tokens: int = DRAFT_TOKENS,
    threads: int | None = None,
    prefill_chunk: int | None = None,
    provider: str = "cpu",
) -> list[str]: ...
def generate(
    artifact: Path | str,
    prompt: Prompt | list[str] | list[list[Message]],
    *,
    tokens: int = TOKENS,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    batch: int = BATCH,
    draft: Path | str | None = None,
    draft_tokens: int = DRAFT_TOKENS,
    threads: int | None = None,
    prefill_chunk: int | None = None,
    provider: str = "cpu",
) -> str | list[str]:
    """Load `artifact`, continue `prompt`, and give the new text.

    Args:
        artifact: an artifact folder of either runtime, or a model directory.
        prompt: text to continue; or messages, {"role": "user", "content": "..."}, to reply to; or a list of
            such, whose texts are written together.
        tokens: at most this many new ones for each prompt.
        sampling: how a token is chosen; None is greedy.
        stop: strings that end a text; they are not part of it.
        batch: at most this many texts at once.
        draft: an artifact with the same tokenizer that guesses up to `draft_tokens` tokens at a time.
        threads: of the CPU; None leaves the number to the runtime.
        prefill_chunk: tokens of a prompt that are read at a time, fewer in less memory; None: what is fast.
        provider: what runs ONNX graphs: cpu, cuda, openvino or coreml.

    Raises:
        UserError: as `TextGenerator` and its `generate`.
    """
    generator = TextGenerator(
        artifact,
        draft=draft,
        draft_tokens=draft_tokens,
        threads=threads,
        prefill_chunk=prefill_chunk,
        provider=provider,
    )
    single = isinstance(prompt, str) or any(isinstance(part, Mapping) for part in prompt)
    prompts: Any = [prompt] if single else prompt
    texts = generator.generate(prompts, tokens, sampling, stop, batch)
    return texts[0] if single else texts


def _strings(stop: Sequence[str]) -> Sequence[str]:
    """One string is one stop string, not its letters."""
    return (stop,) if isinstance(stop, str) else stop


def _check_draft(artifact: Path, tokenizer: Any, draft: Path, count: int) -> None:
    """The same ids must mean the same text."""
    if count < 1:
        raise UserError(f"draft_tokens: {count} is not valid; it must be at least 1")
    known, other = (t.get_vocab(with_added_tokens=True) for t in (tokenizer, load_tokenizer(draft)))
    if known != other:
        raise UserError(
            f"{draft}: has another tokenizer than {artifact} ({len(other):,} and {len(known):,} tokens); "
            "a draft must share its target's"
        )
