import pytest
import torch
from pydantic import ValidationError
from training_set import TINY, documents, equal, tiny_bundle, weights

from compress.errors import UserError
from compress.models.create import PRESETS, Architecture, create
from compress.models.create_tokenizers import train_tokenizer


@pytest.mark.parametrize(
    ("preset", "low", "high"), [("1m", 0.8, 1.3), ("3m", 2.4, 3.6), ("10m", 9, 12), ("30m", 26, 34)]
)
def test_presets_have_the_parameters_their_names_say(preset, low, high):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Architecture(preset=preset).config())
    assert low < sum(p.numel() for p in model.parameters()) / 1e6 < high
    assert PRESETS["llama"][preset].hidden % 64 == 0
    assert PRESETS["llama"][preset].intermediate % 64 == 0


def test_every_dimension_can_be_set():
    model, _ = create(TINY, documents(), seed=0)
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (32, 4, 64)
    assert (config.num_attention_heads, config.num_key_value_heads, config.vocab_size) == (2, 1, 300)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    untied = tiny_bundle(tie_embeddings=False).model
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


@pytest.mark.parametrize(
    "wrong", [{"hidden": 100, "heads": 3}, {"heads": 4, "kv_heads": 3}, {"preset": "2m"}, {"width": 4}]
)
def test_impossible_shapes_are_refused(wrong):
    with pytest.raises(ValidationError):
        Architecture(**wrong)


def test_the_seed_decides_the_weights_and_torchs_generator_is_left_alone():
    torch.manual_seed(5)
    first = torch.rand(1)
    torch.manual_seed(5)
    one, again, other = (weights(tiny_bundle(seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), first)
    assert equal(one, again)
    assert not equal(one, other)


@pytest.mark.parametrize("text", ["def f(x):\n\treturn 'é' # 漢字 🙂\r\n", "  <|x|>  ", "\x00\x7f"])
def test_the_tokenizer_is_lossless_and_names_its_special_token(text):
    tokenizer = train_tokenizer([d.text for d in documents()], 300, 64)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == 300
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == tokenizer.pad_token_id == 0


def test_the_separator_can_be_learned():
    """Torch never trains the embedding row of `pad_token_id`: ours must have none."""
    assert tiny_bundle().model.get_input_embeddings().padding_idx is None


def test_too_little_text_for_the_vocabulary_is_an_error():
    with pytest.raises(UserError, match="vocab_size"):
        train_tokenizer(["abc"], 300, 64)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_saved_model_loads_with_stock_tools_and_generates(family, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    bundle = tiny_bundle(family=family)
    bundle.model.save_pretrained(tmp_path)
    bundle.tokenizer.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert equal(weights(bundle), model.state_dict())
    tokens = tokenizer("def alpha(x)", return_tensors="pt")
    assert model.generate(**tokens, max_new_tokens=4, do_sample=False).shape[1] > tokens["input_ids"].shape[1]
