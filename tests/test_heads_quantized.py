"""What an encoder has outside its blocks is quantized with its table, and exported from those codes."""

import pytest
import torch
from encoder_models import tiny_encoder
from labelled_models import tiny_labeller

from compress.formats import Int4, Int8, QuantizedLinear
from compress.passes.quantize_round import QuantizeRound

HEADS = {
    "bert": {"bert.pooler.dense", "classifier"},
    "roberta": {"classifier.dense", "classifier.out_proj"},
    "distilbert": {"pre_classifier", "classifier"},
    "modernbert": {"head.dense", "classifier"},
}


@pytest.mark.parametrize("family", list(HEADS))
def test_heads_hold_codes_of_the_tables_format(family):
    bundle = tiny_labeller("class", family)
    step = QuantizeRound(format=Int4(group=16), embeddings=Int8())
    assert HEADS[family] <= set(step.layers(bundle.model))
    coded = bundle.apply(step).model
    for name in HEADS[family]:
        module = coded.get_submodule(name)
        assert isinstance(module, QuantizedLinear)
        assert module.quantized.format == Int8()
    assert not [n for n, m in coded.named_modules() if isinstance(m, torch.nn.Linear)], (
        "nothing is left in float"
    )


def test_a_masked_lm_head_holds_codes_too_and_stays_near():
    bundle = tiny_encoder("bert")
    coded = bundle.apply(QuantizeRound(format=Int8())).model
    assert isinstance(coded.cls.predictions.transform.dense, QuantizedLinear)
    ids = torch.arange(5, 40)[None]
    with torch.inference_mode():
        torch.testing.assert_close(
            coded(input_ids=ids).logits, bundle.model(input_ids=ids).logits, rtol=0.1, atol=0.1
        )


def test_tables_left_in_float_leave_heads_too():
    bundle = tiny_labeller("class")
    coded = bundle.apply(QuantizeRound(format=Int8(), embeddings=None)).model
    assert type(coded.classifier) is torch.nn.Linear
