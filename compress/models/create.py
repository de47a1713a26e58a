"""Models to train from scratch: shapes, random weights, and a tokenizer trained on the same text.

What comes out are stock `transformers` models (`LlamaForCausalLM`, `GPT2LMHeadModel`, `BertForMaskedLM`,
`BertForPreTraining`, `T5ForConditionalGeneration`) and a `PreTrainedTokenizerFast`, so that everything that
loads other people's checkpoints loads ours. A preset is a whole shape; any dimension given beside it wins.
Widths are multiples of 64, so that quantization groups of 64 divide every row.

The tokenizer is the family's usual one or another (create_tokenizers.py). The `pad_token_id` of Llama's and
GPT-2's configuration stays unset on purpose: their one special token also separates texts, and torch never
trains the row it pads with. BERT and T5 have a token for padding alone.
"""

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from compress.models.conv1d import of_config
from compress.models.create_tokenizers import SENTINELS, Family, Kind, specials_of, train_tokenizer
from compress.models.tying import untie


class Preset(NamedTuple):
    """Every dimension of a preset."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int


_DECODERS = {
    "1m": Preset(hidden=128, layers=4, heads=2, kv_heads=1, intermediate=384),
    "3m": Preset(hidden=256, layers=4, heads=4, kv_heads=2, intermediate=704),
    "10m": Preset(hidden=384, layers=6, heads=6, kv_heads=2, intermediate=1024),
    "30m": Preset(hidden=576, layers=8, heads=9, kv_heads=3, intermediate=1536),
}
_FULL_ATTENTION = {name: shape._replace(kv_heads=shape.heads) for name, shape in _DECODERS.items()}
_TWO_STACKS = {  # so many layers in each
    "1m": Preset(hidden=128, layers=2, heads=2, kv_heads=2, intermediate=256),
    "3m": Preset(hidden=256, layers=2, heads=4, kv_heads=4, intermediate=384),
    "10m": Preset(hidden=384, layers=3, heads=6, kv_heads=6, intermediate=640),
    "30m": Preset(hidden=576, layers=4, heads=9, kv_heads=9, intermediate=1024),
}
# family -> name -> shape; the name is the rough number of parameters with a vocabulary of 2048
PRESETS: dict[Family, dict[str, Preset]] = {
    "llama": _DECODERS,
    "gpt2": _FULL_ATTENTION,
    "bert": _FULL_ATTENTION,
    "t5": _TWO_STACKS,
}
_USUAL: dict[Family, Kind] = {"llama": "bpe", "gpt2": "bpe", "bert": "wordpiece", "t5": "unigram"}
# field -> families, or kinds of tokenizers, that have it
_ONLY_OF: dict[str, tuple[str, ...]] = {
    "kv_heads": ("llama",),
    "rope_theta": ("llama",),
    "head_dim": ("llama", "t5"),
    "decoder_layers": ("t5",),
    "relative_buckets": ("t5",),
    "relative_distance": ("t5",),
    "sentinels": ("t5",),
    "type_vocab_size": ("bert",),
    "next_sentence": ("bert",),
    "lowercase": ("wordpiece",),
    "byte_fallback": ("unigram",),
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

    family: Family = Field(
        "llama",
        description="llama: RMSNorm, rotary positions, SwiGLU; gpt2: LayerNorm, learned positions; bert: an "
        "encoder that fills in masked tokens; t5: an encoder-decoder (v1.1: gated GELU), relative positions",
    )
    preset: Literal["1m", "3m", "10m", "30m"] = Field("3m", description="about so many parameters")
    tokenizer: Kind | None = Field(
        None, description="null: bpe for llama and gpt2, wordpiece for bert, unigram for t5"
    )
    hidden: int | None = Field(None, ge=8, le=16384, description="width; from the preset when absent")
    layers: int | None = Field(None, ge=1, le=512, description="blocks; of a t5, of its encoder")
    decoder_layers: int | None = Field(
        None, ge=1, le=512, description="blocks of the decoder; null: as many as the encoder's (t5 only)"
    )
    heads: int | None = Field(None, ge=1, le=512, description="of attention, that queries are made for")
    kv_heads: int | None = Field(None, ge=1, le=512, description="key-value heads (llama only)")
    head_dim: int | None = Field(
        None, ge=2, le=1024, description="width of a head, t5's d_kv; null: hidden / heads (llama, t5)"
    )
    intermediate: int | None = Field(None, ge=8, le=65536, description="width inside the MLP")
    vocab_size: int = Field(
        2048, ge=257, le=262_144, description="of the tokenizer that is trained on the text, all told"
    )
    context: int = Field(
        1024,
        ge=8,
        le=131_072,
        description="the longest text the model takes, in tokens; positions of a t5 have no end, it is said "
        "by its tokenizer",
    )
    tie_embeddings: bool = Field(True, description="the head uses the embedding's matrix")
    dropout: float = Field(
        0.0, ge=0.0, lt=1.0, description="share of values dropped in training, wherever the family has any"
    )
    rope_theta: float = Field(10_000.0, gt=0, description="base of the rotary positions' wavelengths (llama)")
    type_vocab_size: int = Field(2, ge=1, le=16, description="token types, which tell pairs apart (bert)")
    relative_buckets: int = Field(32, ge=4, le=1024, description="of relative positions (t5)")
    relative_distance: int = Field(
        128, ge=4, le=131_072, description="from which on positions are one bucket (t5)"
    )
    next_sentence: bool = Field(
        False,
        description="a second head, which tells whether a text follows another (bert)",
    )
    lowercase: bool = Field(False, description="texts are lower-cased, and lose their accents (wordpiece)")
    byte_fallback: bool = Field(
        True, description="what has no piece is written in bytes, which take 256 tokens (unigram)"
    )
    sentinels: int = Field(
        SENTINELS, ge=0, le=1000, description="tokens that stand for spans left out, <extra_id_0> ... (t5)"
    )

    @property
    def shape(self) -> Preset:
        """The preset's dimensions, replaced by those given."""
        return PRESETS[self.family][self.preset]._replace(**self._given(Preset._fields))

    @property
    def kind(self) -> Kind:
        """The tokenizer's algorithm.

        >>> Architecture(family="bert").kind
        'wordpiece'
        """
        return self.tokenizer or _USUAL[self.family]

    @property
    def label(self) -> str:
        """In words; dimensions that are not the preset's are named.

        >>> Architecture(preset="1m", layers=6).label
        'llama 1m, layers 6'
        >>> Architecture(family="t5", preset="1m", decoder_layers=1, tokenizer="bpe").label
        't5 1m, decoder_layers 1, bpe'
        """
        given = self._given((*Preset._fields, "decoder_layers", "head_dim"))
        named = [f"{self.family} {self.preset}", *(f"{name} {n}" for name, n in given.items())]
        named += ["next sentences"] if self.next_sentence else []
        return ", ".join([*named, *([self.kind] if self.kind != _USUAL[self.family] else [])])

    def _given(self, names: Iterable[str]) -> dict[str, int]:
        return {name: given for name in names if (given := getattr(self, name)) is not None}

    @model_validator(mode="after")
    def _dimensions_fit(self) -> "Architecture":
        for name, owners in _ONLY_OF.items():
            value = getattr(self, name)
            if value != type(self).model_fields[name].default and not {self.family, self.kind} & {*owners}:
                raise ValueError(
                    f"{name}={value}: family '{self.family}' with a {self.kind} tokenizer has no such thing, "
                    f"only {' and '.join(owners)}; leave it out"
                )
        specials = specials_of(self.family, self.kind, self.sentinels)
        fixed = len(specials.tokens) + len(specials.last)
        fixed += 256 if self.kind == "bpe" or (self.kind == "unigram" and self.byte_fallback) else 0
        if self.vocab_size < fixed:
            raise ValueError(f"vocab_size={self.vocab_size}: special tokens and bytes alone take {fixed}")
        hidden, _, heads, kv_heads, _ = self.shape
        if self.head_dim is None and (hidden % heads or (hidden // heads) % 2):
            raise ValueError(f"hidden={hidden} must be an even multiple of heads={heads}")
        if self.head_dim is not None and self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even")
        if self.next_sentence and self.type_vocab_size < 2:
            raise ValueError("type_vocab_size=1: next sentences are told apart by two types; take 2")
        if self.family == "llama" and heads % kv_heads:
            raise ValueError(f"heads={heads} must be a multiple of kv_heads={kv_heads}")
        return self

    def config(self) -> Any:
        """The `transformers` configuration, which names the class of the model."""
        makers = {"llama": self._llama, "gpt2": self._gpt2, "bert": self._bert, "t5": self._t5}
        return makers[self.family]()

    def _llama(self) -> Any:
        from transformers import LlamaConfig

        shape = self.shape
        return LlamaConfig(
            architectures=["LlamaForCausalLM"],
            vocab_size=self.vocab_size,
            hidden_size=shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=self._head_dim,
            intermediate_size=shape.intermediate,
            max_position_embeddings=self.context,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            attention_dropout=self.dropout,
            bos_token_id=0,
            eos_token_id=0,
            tie_word_embeddings=self.tie_embeddings,
        )

    def _gpt2(self) -> Any:
        from transformers import GPT2Config

        shape = self.shape
        return GPT2Config(
            architectures=["GPT2LMHeadModel"],
            vocab_size=self.vocab_size,
            n_positions=self.context,
            n_embd=shape.hidden,
            n_layer=shape.layers,
            n_head=shape.heads,
            n_inner=shape.intermediate,
            resid_pdrop=self.dropout,
            embd_pdrop=self.dropout,
            attn_pdrop=self.dropout,
            bos_token_id=0,
            eos_token_id=0,
            tie_word_embeddings=self.tie_embeddings,
        )

    def _bert(self) -> Any:
        from transformers import BertConfig

        shape = self.shape
        return BertConfig(
            architectures=["BertForPreTraining" if self.next_sentence else "BertForMaskedLM"],
            vocab_size=self.vocab_size,
            hidden_size=shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            intermediate_size=shape.intermediate,
            hidden_act="gelu",
            hidden_dropout_prob=self.dropout,
            attention_probs_dropout_prob=self.dropout,
            max_position_embeddings=self.context,
            type_vocab_size=self.type_vocab_size,
            pad_token_id=self._token("pad_token"),
            tie_word_embeddings=self.tie_embeddings,
        )

    def _t5(self) -> Any:
        from transformers import T5Config

        shape = self.shape
        return T5Config(
            architectures=["T5ForConditionalGeneration"],
            vocab_size=self.vocab_size,
            d_model=shape.hidden,
            d_kv=self._head_dim,
            d_ff=shape.intermediate,
            num_layers=shape.layers,
            num_decoder_layers=self.decoder_layers or shape.layers,
            num_heads=shape.heads,
            relative_attention_num_buckets=self.relative_buckets,
            relative_attention_max_distance=self.relative_distance,
            feed_forward_proj="gated-gelu",
            dropout_rate=self.dropout,
            pad_token_id=self._token("pad_token"),
            eos_token_id=self._token("eos_token"),
            decoder_start_token_id=self._token("pad_token"),
            tie_word_embeddings=self.tie_embeddings,  # which T5 takes for: the head's input is scaled
        )

    @property
    def _head_dim(self) -> int:
        return self.head_dim or self.shape.hidden // self.shape.heads

    def _token(self, role: str) -> int:
        specials = specials_of(self.family, self.kind)
        return specials.tokens.index(specials.roles[role])


def create(architecture: Architecture, documents: Iterable[HasText], seed: int) -> tuple[Any, Any]:
    """A model with random weights and a tokenizer trained on the documents.

    Returns:
        (model in float32 and eval mode, PreTrainedTokenizerFast).

    Raises:
        UserError: the documents hold too little text for the vocabulary asked, or too many characters.
    """
    tokenizer = train_tokenizer(
        (document.text for document in documents),
        architecture.vocab_size,
        architecture.context,
        architecture.kind,
        architecture.family,
        lowercase=architecture.lowercase,
        byte_fallback=architecture.byte_fallback,
        sentinels=architecture.sentinels,
    )
    return random_model(architecture, seed), tokenizer


def random_model(architecture: Architecture, seed: int) -> Any:
    """A model whose weights depend on architecture and seed only; torch's own generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = of_config(architecture.config(), dtype=torch.float32)
        if architecture.family == "t5" and not architecture.tie_embeddings:
            # transformers ties every T5 that files give no head of its own; its input is not scaled here,
            # so the weights are
            untie(model, ["lm_head.weight"])
            torch.nn.init.normal_(model.lm_head.weight, std=architecture.shape.hidden**-0.5)
    if model.can_generate():
        model.generation_config.pad_token_id = 0  # or generate() warns at every call
    return model.eval()
