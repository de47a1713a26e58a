"""Every tensor of a checkpoint is used, may be left out, or is named; scaled numbers are read scaled."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from compress.artifact import streamed
from compress.artifact.bundle import Bundle
from compress.errors import UserError
from compress.models.checkpoints import meta_model
from compress.models.pretrained import pretrained
from compress.models.stock import load_stock
from compress.models.unused import unused
from compress.passes.quantize_round import QuantizeRound

IDS = torch.arange(3, 43)[None]
SHAPE = {
    "vocab_size": 300, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture
def folder(bundle, tmp_path):
    bundle.model.save_pretrained(tmp_path / "m")
    bundle.tokenizer.save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def add(folder, **tensors):
    file = folder / "model.safetensors"
    named = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({**load_file(file), **named}, file, metadata={"format": "pt"})


def settings(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture
def fp8(bundle, tmp_path):
    """(folder, the weights it stands for): values of 8 bits, in blocks of 128 x 128 with a scale each."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    stored, true = {}, {}
    for name, weight in model.state_dict().items():
        stored[name] = true[name] = weight
        if name.endswith("proj.weight"):
            out, columns = (-(-side // 128) for side in weight.shape)
            scales = weight.abs().max() / 448 * torch.linspace(1.0, 1.5, out * columns).view(out, columns)
            wide = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[: weight.shape[0]]
            wide = wide[:, : weight.shape[1]]
            stored[name] = (weight / wide).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = scales
            true[name] = stored[name].float() * wide
    model.save_pretrained(tmp_path / "fp8")
    bundle.tokenizer.save_pretrained(tmp_path / "fp8")
    save_file(stored, tmp_path / "fp8" / "model.safetensors", metadata={"format": "pt"})
    method = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    settings(tmp_path / "fp8", quantization_config=method)
    return tmp_path / "fp8", true


@pytest.mark.parametrize("stream", [False, True])
def test_block_scaled_values_are_read_with_their_scales(fp8, stream, make_context, tmp_path):
    folder, true = fp8
    loaded = Bundle.load(folder, stream=stream)
    assert loaded.model.state_dict().keys() == true.keys()
    for name, value in loaded.model.state_dict().items():
        assert torch.allclose(value, true[name], rtol=1e-6, atol=0), name
    QuantizeRound(format="int8")(loaded, make_context(loaded)).save(tmp_path / "int8")
    small = Bundle.load(tmp_path / "int8").model
    name = "model.layers.0.mlp.up_proj"
    weight = true[f"{name}.weight"]
    assert (small.get_submodule(name).weight - weight).norm() < 0.02 * weight.norm()
    loaded.save(tmp_path / "float")  # not marked as quantized any more: stock loads it
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "float")
    assert torch.equal(stock.get_submodule(name).weight, loaded.model.get_submodule(name).weight)


@pytest.mark.parametrize("stream", [False, True])
def test_scales_without_a_word_in_the_configuration(fp8, stream):
    folder, _ = fp8
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    told = (
        r"the stored tensor 'model\.layers\.0\..*_scale_inv' and 13 more; the weights are quantized in a way"
    )
    with pytest.raises(UserError, match=told):
        Bundle.load(folder, stream=stream)


def mx(codes, scales):
    """What microscaling means by 4-bit codes (..., 32) and a shared scale (...,), in float64.

    OCP Microscaling 1.0: an element is E2M1 (sign, two bits of exponent with bias 1, one of mantissa; an
    exponent of 0 is subnormal), the scale E8M0 (a power of two with bias 127).
    """
    sign, exponent, mantissa = codes >> 3, (codes >> 1) & 3, codes & 1
    size = np.where(exponent == 0, mantissa / 2, (1 + mantissa / 2) * 2.0 ** (exponent.astype(float) - 1))
    return np.where(sign == 1, -size, size) * 2.0 ** (scales.astype(float)[..., None] - 127)


@pytest.fixture
def mxfp4(bundle, tmp_path):
    """(folder, the values that its experts' matrices stand for by name): blocks of 32 codes along the inputs,
    two in a byte, the first in the lower half."""
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=3, num_experts_per_tok=2, bos_token_id=0,
        eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model, random = GptOssForCausalLM(config), np.random.default_rng(0)
    stored, true = {}, {}
    for name, weight in model.state_dict().items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[name] = weight
            continue
        experts, columns, rows = weight.shape  # (experts, inputs, outputs) in the model
        codes = random.integers(0, 16, (experts, rows, columns // 32, 32), dtype=np.uint8)
        codes[0, 0, 0, :16] = np.arange(16)  # all there are
        scales = random.integers(110, 130, codes.shape[:-1], dtype=np.uint8)
        scales[0, 0, :2] = 1, 230  # down to 2^-127, up to 2^105
        values = mx(codes, scales).reshape(experts, rows, columns)
        true[name] = torch.from_numpy(values.astype(np.float32)).transpose(1, 2)
        assert np.array_equal(true[name].transpose(1, 2).double().numpy(), values)
        stored[f"{name}_blocks"] = torch.from_numpy(codes[..., 0::2] | codes[..., 1::2] << 4)
        stored[f"{name}_scales"] = torch.from_numpy(scales)
    model.save_pretrained(tmp_path / "mx")
    bundle.tokenizer.save_pretrained(tmp_path / "mx")
    save_file(stored, tmp_path / "mx" / "model.safetensors", metadata={"format": "pt"})
    settings(tmp_path / "mx", quantization_config={"quant_method": "mxfp4"})
    return tmp_path / "mx", true


@pytest.mark.parametrize("stream", [False, True])
def test_microscaled_values_are_those_of_the_definition(mxfp4, stream, tmp_path):
    folder, true = mxfp4
    assert len(true) == 4
    loaded = Bundle.load(folder, stream=stream)
    state = loaded.model.state_dict()
    for name, values in true.items():
        assert state[name].dtype == torch.float32
        assert torch.equal(state[name], values), name
    loaded.save(tmp_path / "float")  # not marked as quantized any more
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "float").state_dict()
    for name, values in true.items():
        assert torch.equal(stock[name].float(), values), name


def test_a_microscale_that_is_no_number_is_refused(mxfp4):
    folder, _ = mxfp4
    name = "model.layers.1.mlp.experts.down_proj_scales"
    scales = load_file(folder / "model.safetensors")[name]
    scales[1, 2, 0] = 255  # NaN in E8M0
    add(folder, **{name: scales})
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.experts\.down_proj"):
        Bundle.load(folder)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", "hqq"])
def test_other_methods_are_refused_by_name(folder, method):
    settings(folder, quantization_config={"quant_method": method, "bits": 4})
    for load in (
        Bundle.load,
        lambda f: Bundle.load(f, stream=True),
        lambda f: meta_model(str(f), for_passes=True),
    ):
        with pytest.raises(UserError, match=rf"quantized already \({method}\)") as caught:
            load(folder)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "name", ["model.layers.0.mlp.up_proj.bias", "model.layers.9.mlp.up_proj.weight", "adapter"]
)
def test_a_tensor_without_a_place_is_named(folder, name, stream):
    add(folder, **{name: torch.ones(64)})
    with pytest.raises(UserError, match=rf"nothing in the model takes the stored tensor '{name}'; name the"):
        Bundle.load(folder, stream=stream)


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_computed_anyway_may_be_stored(folder, bundle, stream):
    add(
        folder,
        model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(8),
        model__rotary_emb__inv_freq=torch.ones(8),
        model__position_ids=torch.arange(8),
    )
    loaded = Bundle.load(folder, stream=stream)
    assert (loaded.shards is not None) == stream
    frequencies = bundle.model.model.rotary_emb.inv_freq
    assert torch.equal(loaded.model.model.rotary_emb.inv_freq, frequencies)


def test_heads_of_pretraining_and_of_an_encoder_that_embeds(bundle, tmp_path):
    config = BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    model = BertForPreTraining(config)
    model.save_pretrained(tmp_path / "m")
    bundle.tokenizer.save_pretrained(tmp_path / "m")
    for name, kind in (("BertForMaskedLM", BertForMaskedLM), ("BertModel", BertModel)):
        settings(tmp_path / "m", architectures=[name])
        for stream in (False, True):
            loaded = Bundle.load(tmp_path / "m", stream=stream)
            assert type(loaded.model) is kind
    assert unused(loaded.model, ["cls.predictions.bias", "encoder.layer.0.output.dense.weight_scale"]) == [
        "encoder.layer.0.output.dense.weight_scale"
    ]


def test_names_that_are_translated_are_loaded_whole(bundle, tmp_path, monkeypatch):
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "m")
    bundle.tokenizer.save_pretrained(tmp_path / "m")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    loaded = Bundle.load(tmp_path / "m", stream=True)
    if loaded.shards is None:
        with torch.no_grad():
            assert torch.equal(loaded.model(input_ids=IDS).logits, stock(input_ids=IDS).logits)
        monkeypatch.setattr(streamed, "available_memory_bytes", lambda: 1000)
        with pytest.raises(UserError, match=r"cannot be streamed \(.*more than is free"):
            Bundle.load(tmp_path / "m", stream=True)


def reshaped(folder, rename=lambda name: name, **shapes):
    """Files whose tensors have other names, and those whose name ends so another shape."""
    file = folder / "model.safetensors"
    state = {rename(name): tensor for name, tensor in load_file(file).items()}
    for end, shape in shapes.items():
        hit = [name for name in state if name.endswith(end.replace("__", "."))]
        assert hit
        state |= {name: torch.zeros(shape) for name in hit}
    save_file(state, file, metadata={"format": "pt"})


def old_bert(bundle, folder):
    config = BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    BertForMaskedLM(config).save_pretrained(folder)
    bundle.tokenizer.save_pretrained(folder)
    reshaped(folder, lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma"))
    assert Bundle.load(folder)
    reshaped(folder, embeddings__LayerNorm__gamma=(16,))
    return r"'bert\.embeddings\.LayerNorm\.weight' is \[16\] in the files and \[32\] by the configuration"


def experts(bundle, folder, damaged="w2__weight"):
    config = MixtralConfig(**SHAPE, num_local_experts=2)
    MixtralForCausalLM(config).save_pretrained(folder)
    bundle.tokenizer.save_pretrained(folder)
    assert Bundle.load(folder)
    reshaped(folder, **{damaged: (128, 250)})
    return r"'model\.layers\.\d\.mlp\.experts\.down_proj' is \[2, 128, 250\] in .*\[2, 128, 256\] by the"


def one_expert(bundle, folder):
    experts(bundle, folder, "0__block_sparse_moe__experts__1__w2__weight")
    return "shapes that do not fit together"


@pytest.mark.parametrize("make", [old_bert, experts, one_expert])
def test_other_shapes_under_other_names_are_told_in_one_line(make, bundle, tmp_path):
    told = make(bundle, tmp_path / "m")
    for load in (Bundle.load, lambda folder: Bundle.load(folder, stream=True), load_stock):
        with pytest.raises(UserError, match=told) as caught:
            load(tmp_path / "m")
        assert "\n" not in str(caught.value)
        assert "report" not in str(caught.value)


def test_other_shapes_of_a_hub_id_are_told_in_one_line(folder):
    """Nothing looks at its headers before."""
    reshaped(folder, model__norm__weight=(16,))
    config = AutoConfig.from_pretrained(folder)
    with pytest.raises(UserError, match=r"'model\.norm\.weight' is \[16\] in the files and \[32\] by"):
        pretrained(folder, config)


def test_a_buffer_that_is_stored_is_read(bundle, tmp_path, monkeypatch):
    def with_buffer(config):
        model = original(config)
        model.model.layers[0].register_buffer("shift", torch.zeros(3))
        return model

    original = streamed.skeleton
    bundle.model.save_pretrained(tmp_path / "m")
    bundle.tokenizer.save_pretrained(tmp_path / "m")
    add(tmp_path / "m", model__layers__0__shift=torch.arange(3.0))
    monkeypatch.setattr(streamed, "skeleton", with_buffer)
    loaded = Bundle.load(tmp_path / "m", stream=True)
    assert torch.equal(loaded.model.model.layers[0].shift, torch.arange(3.0))
