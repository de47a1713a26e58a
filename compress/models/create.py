"""Models to train from scratch: shapes, random weights, and a tokenizer trained on the same text.

What comes out are ordinary `transformers` models and a `PreTrainedTokenizerFast`, so that everything that
loads other people's checkpoints loads ours. A preset is a whole shape; any dimension given beside it
wins. Widths are multiples of 64, so that quantization groups of 64 divide every row.

The tokenizer is a byte-level BPE (Sennrich et al. 2016, on bytes as in GPT-2): every text can be encoded,
and decodes to itself. One token, `<|endoftext|>`, begins, separates and pads: small vocabularies have no
rows to waste. The model's `pad_token_id` stays unset on purpose: torch never trains the row it pads with.
"""

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from compress.errors import UserError
from compress.models.conv1d import of_config

END_OF_TEXT = "<|endoftext|>"
_BYTES = 256


class Preset(NamedTuple):
    """Every dimension of a preset."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int


PRESETS = {  # name -> shape; the name is the rough number of parameters with a vocabulary of 2048
    "1m": Preset(hidden=128, layers=4, heads=2, kv_heads=1, intermediate=384),
    "3m": Preset(hidden=256, layers=4, heads=4, kv_heads=2, intermediate=704),
    "10m": Preset(hidden=384, layers=6, heads=6, kv_heads=2, intermediate=1024),
    "30m": Preset(hidden=576, layers=8, heads=9, kv_heads=3, intermediate=1536),
}


class HasText(Protocol):
    """A document, as `compress.text.documents` reads them."""

    @property
    def text(self) -> str:
        """The whole text."""
        ...


class Architecture(BaseModel):
    """The shape of a model to train.

    >>> Architecture(preset="1m", layers=6).shape
    Preset(hidden=128, layers=6, heads=2, kv_heads=1, intermediate=384)
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    family: Literal["llama", "gpt2"] = Field(
        "llama", description="llama: RMSNorm, rotary positions, SwiGLU; gpt2: LayerNorm, learned positions"
    )
    preset: Literal["1m", "3m", "10m", "30m"] = Field("3m", description="about so many parameters")
    hidden: int | None = Field(None, ge=8, le=16384, description="width; from the preset when absent")
    layers: int | None = Field(None, ge=1, le=512, description="blocks")
    heads: int | None = Field(None, ge=1, le=512, description="of attention, that queries are made for")
    kv_heads: int | None = Field(None, ge=1, le=512, description="key-value heads (llama only)")
    intermediate: int | None = Field(None, ge=8, le=65536, description="width inside the MLP")
    vocab_size: int = Field(
        2048, ge=_BYTES + 1, le=262_144, description="of the tokenizer that is trained on the text"
    )
    context: int = Field(1024, ge=8, le=131_072, description="the longest text the model takes, in tokens")
    tie_embeddings: bool = Field(True, description="the head uses the embedding's matrix")
    rope_theta: float = Field(10_000.0, gt=0, description="base of the rotary positions' wavelengths (llama)")

    @property
    def shape(self) -> Preset:
        """The preset's dimensions, replaced by those given."""
        return PRESETS[self.preset]._replace(**self._given())

    @property
    def label(self) -> str:
        """In words; dimensions that are not the preset's are named.

        >>> Architecture(preset="1m", layers=6).label
        'llama 1m, layers 6'
        """
        named = [f"{self.family} {self.preset}", *(f"{name} {n}" for name, n in self._given().items())]
        return ", ".join(named)

    def _given(self) -> dict[str, int]:
        return {name: given for name in Preset._fields if (given := getattr(self, name)) is not None}

    @model_validator(mode="after")
    def _dimensions_fit(self) -> "Architecture":
        hidden, _, heads, kv_heads, _ = self.shape
        if hidden % heads or (hidden // heads) % 2:
            raise ValueError(f"hidden={hidden} must be an even multiple of heads={heads}")
        if self.family == "llama" and heads % kv_heads:
            raise ValueError(f"heads={heads} must be a multiple of kv_heads={kv_heads}")
        return self

    def config(self) -> Any:
        """The `transformers` configuration; token 0 is `<|endoftext|>`."""
        shape = self.shape
        if self.family == "gpt2":
            from transformers import GPT2Config

            return GPT2Config(
                vocab_size=self.vocab_size,
                n_positions=self.context,
                n_embd=shape.hidden,
                n_layer=shape.layers,
                n_head=shape.heads,
                n_inner=shape.intermediate,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=0,
                eos_token_id=0,
                tie_word_embeddings=self.tie_embeddings,
            )
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.hidden // shape.heads,
            intermediate_size=shape.intermediate,
            max_position_embeddings=self.context,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            bos_token_id=0,
            eos_token_id=0,
            tie_word_embeddings=self.tie_embeddings,
        )


def create(architecture: Architecture, documents: Iterable[HasText], seed: int) -> tuple[Any, Any]:
    """A model with random weights and a tokenizer trained on the documents.

    Returns:
        (model in float32 and eval mode, PreTrainedTokenizerFast).

    Raises:
        UserError: the documents hold too little text for the vocabulary asked.
    """
    tokenizer = train_tokenizer((d.text for d in documents), architecture.vocab_size, architecture.context)
    return random_model(architecture, seed), tokenizer


def random_model(architecture: Architecture, seed: int) -> Any:
    """A model whose weights depend on architecture and seed only; torch's own generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = of_config(architecture.config(), dtype=torch.float32)
    model.config.architectures = [type(model).__name__]  # else only the first save puts it there
    model.generation_config.pad_token_id = 0  # or generate() warns at every call
    return model.eval()


def train_tokenizer(texts: Iterable[str], vocab_size: int, context: int) -> Any:
    """A byte-level BPE with exactly `vocab_size` tokens; seconds for ten megabytes.

    Raises:
        UserError: the text has too few repeated pairs for so many merges.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = byte_level
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    if bpe.get_vocab_size() < vocab_size:
        raise UserError(
            f"architecture.vocab_size: {vocab_size} tokens were asked, the text yields only "
            f"{bpe.get_vocab_size()}: give more text or ask for fewer"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
