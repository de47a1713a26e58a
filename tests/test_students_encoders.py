"""Students of encoders and encoder-decoders: blocks of each list, heads kept, blocks that cannot go."""

from pathlib import Path

import pytest
import torch
import transformers
from export_models import word_tokenizer
from seq2seq_models import SEQ2SEQ, tiny_seq2seq
from taught_models import labelled_context, tiny_body, tiny_classifier
from training_set import equal

from compress.artifact.bundle import Bundle
from compress.errors import UserError
from compress.models.heads import labels_of
from compress.passes.student import Student

HEADS = ["ForMaskedLM", "Model", "ForSequenceClassification", "ForTokenClassification"]
HEADS += ["ForQuestionAnswering"]
IDS = torch.arange(10, 30)[None]


def body(family: str, head: str, blocks: int = 4) -> Bundle:
    kind = {"ForSequenceClassification": "class", "ForTokenClassification": "tags"}.get(head)
    return tiny_body(f"{family}{head}", kind, blocks)


def answer(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids)[0]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", ["Bert", "Roberta", "DistilBert", "ModernBert"])
def test_a_student_of_an_encoder_is_the_encoder_with_its_other_blocks_left_out(family, head, tmp_path: Path):
    """Its answer is the teacher's with the blocks that are not kept passed through; stock tools load it."""
    from compress.models.stacks import decoder_blocks

    teacher = body(family, head)
    student = Student(blocks=(0, 3))(teacher, labelled_context(None, tmp_path, teacher))
    assert student.model.config.num_hidden_layers == 2
    assert labels_of(student.model.config) == labels_of(teacher.model.config)
    student.save(tmp_path / "student")
    loaded = getattr(transformers, f"{family}{head}").from_pretrained(tmp_path / "student").eval()
    assert equal(loaded.state_dict(), student.model.state_dict())
    torch.testing.assert_close(answer(loaded), answer(student.model), rtol=1e-6, atol=1e-6)
    for block in decoder_blocks(teacher.model)[1][1:3]:
        block.forward = lambda hidden, *_, **__: hidden
    torch.testing.assert_close(answer(student.model), answer(teacher.model))


@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert"])
def test_similarity_keeps_the_blocks_of_an_encoder_that_change_most(family, tmp_path):
    from compress.models.stacks import decoder_blocks

    teacher = tiny_classifier("class", family, blocks=4)
    still = decoder_blocks(teacher.model)[1][1]
    with torch.no_grad():
        for parameter in still.parameters():
            parameter.zero_()
        for name, parameter in still.named_parameters():
            if "norm" in name.lower() and name.endswith("weight"):
                parameter.fill_(1.0)
    context = labelled_context("class", tmp_path, teacher)
    kept = Student(blocks=3, choose="similarity")(teacher, context).notes["blocks"]
    assert kept == [0, 2, 3]


def test_a_first_block_that_none_can_replace_stays(tmp_path):
    teacher = tiny_body("ModernBertModel", blocks=3)
    with pytest.raises(UserError, match=r"student.blocks: block 0 has fewer parts than the others"):
        Student(blocks=(1, 2)).layers(teacher.model)
    assert Student(blocks=(1, 2)).layers(tiny_body("BertModel", blocks=3).model)


def seq2seq(name: str) -> Bundle:
    kind, sizes = SEQ2SEQ[name]
    more = {"num_layers": 3, "num_decoder_layers": 4} if name == "t5" else {}
    more |= {"encoder_layers": 3, "decoder_layers": 4} if name == "bart" else {}
    model_class = getattr(transformers, kind)
    tokenizer = word_tokenizer(pad_token="w3")
    config = model_class.config_class(
        **{"vocab_size": len(tokenizer), "pad_token_id": 3, "eos_token_id": 2, **sizes, **more}
    )
    config.architectures = [kind]
    torch.manual_seed(0)
    model = model_class(config).eval()
    return tiny_seq2seq(name, tokenizer=tokenizer).evolve(model=model)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_both_lists_of_an_encoder_decoder_lose_their_own_blocks(name, tmp_path):
    from compress.structured.blocks import lists_of_blocks
    from compress.tasks.seq2seq import SEQ2SEQ as TASK

    teacher = seq2seq(name)
    step = Student(blocks=(0, 2), decoder_blocks=2)
    assert len(step.layers(teacher.model)) == 7
    student = step(teacher, labelled_context(None, tmp_path, teacher))
    assert [len(blocks) for _, blocks in lists_of_blocks(student.model)] == [2, 2]
    assert (student.notes["blocks"], student.notes["decoder_blocks"]) == ([0, 2], [0, 3])
    before, after = (sum(p.numel() for p in b.model.parameters()) for b in (teacher, student))
    assert step.share_left(teacher.model) == pytest.approx(after / before, abs=0.12)
    student.save(tmp_path / "student")
    loaded = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "student").eval()
    with torch.no_grad():
        torch.testing.assert_close(TASK.answers(loaded, IDS), TASK.answers(student.model, IDS))
    text = loaded.generate(input_ids=IDS, max_new_tokens=4, do_sample=False)
    assert torch.equal(text, student.model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False))


def test_relative_positions_are_handed_on_when_the_first_block_goes(tmp_path):
    teacher = seq2seq("t5")
    student = Student(blocks=(1, 2), decoder_blocks=(3,))(teacher, labelled_context(None, tmp_path, teacher))
    for side in ("encoder", "decoder"):
        own, its = (
            getattr(b.model, side).block[0].layer[0].SelfAttention.relative_attention_bias.weight
            for b in (student, teacher)
        )
        assert torch.equal(own, its)
    old, new = teacher.model.encoder.block[1], student.model.encoder.block[0]
    assert torch.equal(old.layer[1].DenseReluDense.wi.weight, new.layer[1].DenseReluDense.wi.weight)


def test_similarity_chooses_in_each_list(tmp_path):
    teacher = seq2seq("t5")
    with torch.no_grad():  # these write nothing to the stream
        for block in (teacher.model.encoder.block[1], teacher.model.decoder.block[2]):
            for part in block.layer[:-1]:
                attention = getattr(part, "SelfAttention", None) or part.EncDecAttention
                attention.o.weight.zero_()
            block.layer[-1].DenseReluDense.wo.weight.zero_()
    step = Student(blocks=2, decoder_blocks=3, choose="similarity")
    notes = step(teacher, labelled_context(None, tmp_path, teacher)).notes
    assert (notes["blocks"], notes["decoder_blocks"]) == ([0, 2], [0, 1, 3])


def test_fields_of_a_second_list_are_refused_where_there_is_none_or_too_little():
    with pytest.raises(UserError, match=r"decoder_blocks: is for encoder-decoders, and this is an encoder;"):
        Student(decoder_blocks=1).layers(tiny_body("BertModel").model)
    teacher = seq2seq("t5").model
    with pytest.raises(UserError, match=r"student.decoder_blocks: 5, but the model has only 4"):
        Student(decoder_blocks=5).layers(teacher)
    with pytest.raises(UserError, match=r"student.decoder_blocks: 4, but the model has blocks 0 to 3"):
        Student(decoder_blocks=(4,)).layers(teacher)
    with pytest.raises(UserError, match="can be given fewer blocks, not other widths"):
        Student(hidden=32).layers(teacher)
    with pytest.raises(ValueError, match="decoder_blocks: 0 leaves none"):
        Student(decoder_blocks=0)
