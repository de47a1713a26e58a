"""A flag that says the head is the embedding, beside files that hold another head: the files are right, as
for stock transformers, whichever way the model is read, changed, written and read again."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

from compress.artifact.bundle import Bundle
from compress.models.tying import settled
from compress.passes.distill import Distill
from compress.passes.fold_scales import FoldScales
from compress.passes.prune_alps import PruneAlps
from compress.passes.prune_gradual import PruneGradual
from compress.passes.prune_magnitude import PruneMagnitude
from compress.passes.prune_sparsegpt import PruneSparsegpt
from compress.passes.prune_vocabulary import PruneVocabulary
from compress.passes.prune_wanda import PruneWanda
from compress.passes.quantize_auto import QuantizeAuto
from compress.passes.quantize_bitsandbytes import QuantizeBitsandbytes
from compress.passes.quantize_gptq import QuantizeGPTQ
from compress.passes.quantize_hqq import QuantizeHQQ
from compress.passes.quantize_round import QuantizeRound
from compress.passes.store_sparse import StoreSparse
from compress.passes.student import Student
from compress.passes.train import Train
from compress.passes.tune_blocks import TuneBlocks
from compress.passes.tune_scales import TuneScales

IDS = torch.arange(3, 43)[None]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture
def folder(bundle, tmp_path):
    """A checkpoint with a head of its own under a flag that denies it."""
    config = bundle.model.config
    config.tie_word_embeddings = False
    model = type(bundle.model)(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    model.save_pretrained(tmp_path / "m")
    bundle.tokenizer.save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))
    return tmp_path / "m"


@pytest.fixture
def right(folder):
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert stock.lm_head.weight is not stock.model.embed_tokens.weight
    return logits(stock)


def near(found: torch.Tensor, right: torch.Tensor) -> float:
    """Mean KL in nats."""
    p, q = (torch.log_softmax(x.double(), -1) for x in (right, found))
    return float((p.exp() * (p - q)).sum(-1).mean())


# one step of training, too short to go anywhere
LITTLE = {"tokens": 128, "batch": 4, "learning_rate": 1e-6, "muon_learning_rate": 1e-6}
STEPS = {
    "round": QuantizeRound(format="int8"),
    "round without tables": QuantizeRound(format="int8", embeddings=None),
    "gptq": QuantizeGPTQ(format="int8", embeddings=None),
    "hqq": QuantizeHQQ(format="int8"),
    "bitsandbytes": QuantizeBitsandbytes(method="llm_int8"),
    "auto": QuantizeAuto(bits_per_weight=8),
    "magnitude": PruneMagnitude(sparsity=0.01),
    "wanda": PruneWanda(sparsity=0.01),
    "sparsegpt": PruneSparsegpt(sparsity=0.01),
    "alps": PruneAlps(sparsity=0.01, steps=20),
    "gradual": PruneGradual(sparsity=0.01, every=1, **LITTLE),
    "train": Train(**LITTLE),
    "distill": Distill(**LITTLE),
    "fold": FoldScales(),
    "tune_scales": TuneScales(tokens=128, batch=4),
    "tune_blocks": TuneBlocks(steps=2),
    "vocabulary": PruneVocabulary(),
    "student": Student(),
    "sparse": StoreSparse(),
}


STREAMING = (
    "round",
    "round without tables",
    "gptq",
    "hqq",
    "wanda",
    "sparsegpt",
    "alps",
)  # the others take it whole
CASES = [(name, False) for name in STEPS] + [(name, True) for name in STREAMING]


@pytest.mark.parametrize(("name", "stream"), CASES)
def test_every_pass_keeps_the_stored_head(folder, right, name, stream, tmp_path, make_context, bundle):
    if name == "bitsandbytes":
        pytest.importorskip("bitsandbytes")
    given = Bundle.load(folder, stream=stream)
    assert (given.shards is not None) == stream
    context = make_context(bundle)
    context.teacher = lambda: Bundle.load(folder)
    if STEPS[name].only_after:
        given = STEPS["round"](given, context)
    if name == "vocabulary":  # every token is used, so that none goes
        context.data.heldout.tokens.flat[:] = torch.arange(context.data.heldout.tokens.size).numpy() % 300
    result = STEPS[name](given, context)
    result.save(tmp_path / "out")
    for found in (result, Bundle.load(tmp_path / "out")):
        if found.shards is None and not any(p.is_meta for p in found.model.parameters()):
            assert near(logits(found.model), right) < 0.02
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False


def test_what_is_saved_unchanged_is_what_it_was(folder, right, tmp_path):
    whole = Bundle.load(folder)
    assert torch.equal(logits(whole.model), right)
    assert whole.model.config.tie_word_embeddings is False
    whole.save(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), right)


def test_a_head_that_is_stored_twice_is_tied(bundle, tmp_path):
    from safetensors.torch import load_file, save_file

    bundle.save(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    state = load_file(file)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, file, metadata={"format": "pt"})
    (tmp_path / "m" / "manifest.json").unlink()
    for stream in (False, True):
        model = Bundle.load(tmp_path / "m", stream=stream).model
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.config.tie_word_embeddings is True


def test_a_model_that_was_untied_in_memory_says_so(bundle):
    model = bundle.model
    assert settled(model).config.tie_word_embeddings is True
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 2)
    assert Bundle(model, bundle.tokenizer, bundle.lineage).model.config.tie_word_embeddings is False
    assert "lm_head.weight" not in model.all_tied_weights_keys


def test_an_encoder_decoder_keeps_its_own_head_beside_tables_that_are_one(bundle, tmp_path):
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=300, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    model = T5ForConditionalGeneration(config)
    model.lm_head.weight = torch.nn.Parameter(torch.randn(300, 32))
    model.all_tied_weights_keys.pop("lm_head.weight")
    model.save_pretrained(tmp_path / "t5")
    bundle.tokenizer.save_pretrained(tmp_path / "t5")

    def answer(model):
        with torch.no_grad():
            return model(input_ids=IDS, decoder_input_ids=IDS).logits

    right = answer(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "t5").eval())
    given = Bundle.load(tmp_path / "t5")
    assert torch.equal(answer(given.model), right)
    for fields in ({"embeddings": None}, {}):
        given.apply(QuantizeRound(format="int8", **fields)).save(tmp_path / "int8")
        assert near(answer(Bundle.load(tmp_path / "int8").model), right) < 0.05
