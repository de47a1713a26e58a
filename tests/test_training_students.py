"""Students: blocks taken from a teacher, and what distillation adds."""

import copy

import pytest
import torch
from training_set import WINDOW, equal, tiny_bundle, tiny_context, weights

from compress.artifact.bundle import Bundle
from compress.errors import UserError
from compress.passes.distill import Distill
from compress.passes.student import Student
from compress.passes.train import Train
from compress.run.recipe import Recipe
from compress.structured.blocks import spread
from compress.structured.slicing import assembled, held


@pytest.mark.parametrize("choose", ["spread", "similarity"])
def test_a_student_has_its_teachers_blocks(choose, tmp_path):
    teacher = tiny_bundle()
    before = weights(teacher)
    student = Student(blocks=2, choose=choose)(teacher, tiny_context(teacher, tmp_path))
    kept = student.notes["blocks"]
    assert len(kept) == 2
    if choose == "spread":
        assert kept == [0, 3]
    for new, old in enumerate(kept):
        taken = teacher.model.model.layers[old].state_dict()
        assert equal(dict(taken), dict(student.model.model.layers[new].state_dict()))
        assert student.model.model.layers[new].self_attn.layer_idx == new
    assert torch.equal(student.model.model.embed_tokens.weight, teacher.model.model.embed_tokens.weight)
    assert equal(before, weights(teacher))
    assert teacher.model.config.num_hidden_layers == 4
    for model, noted in ((teacher.model, "parameters_before"), (student.model, "parameters")):
        assert sum(p.numel() for p in model.parameters()) == student.notes[noted]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_student_loads_with_stock_tools_and_decodes_with_a_cache(family, tmp_path):
    from transformers import AutoModelForCausalLM

    teacher = tiny_bundle(family=family)
    student = Student(blocks=3)(teacher, tiny_context(teacher, tmp_path))
    student.save(tmp_path / "student")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert model.config.num_hidden_layers == 3
    tokens = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(model(tokens).logits, student.model(tokens).logits)
    cached, plain = (
        model.generate(tokens, max_new_tokens=6, do_sample=False, use_cache=use) for use in (True, False)
    )
    assert torch.equal(cached, plain)
    assert Bundle.load(tmp_path / "student").model.config.num_hidden_layers == 3


def test_per_layer_settings_follow_their_layers(tmp_path):
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(
        vocab_size=300, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=64, use_sliding_window=True, sliding_window=8, max_window_layers=2,
    )  # fmt: skip
    assert config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    teacher = tiny_bundle().evolve(model=AutoModelForCausalLM.from_config(config).eval())
    student = Student(blocks=2)(teacher, tiny_context(teacher, tmp_path))
    assert student.model.config.layer_types == ["full_attention", "sliding_attention"]
    assert teacher.model.config.layer_types == config.layer_types
    student.model(torch.tensor([[1, 2, 3]]))


def test_masks_follow_their_layers(tmp_path):
    teacher = tiny_bundle()
    masks = {f"model.layers.{i}.mlp.up_proj": torch.full((64, 32), bool(i % 2)) for i in range(4)}
    masks["lm_head"] = torch.ones(300, 32, dtype=torch.bool)
    student = Student(blocks=2)(teacher.evolve(masks=masks), tiny_context(teacher, tmp_path))
    assert sorted(student.masks) == ["lm_head", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    assert student.masks["model.layers.1.mlp.up_proj"].all()


def test_the_blocks_that_change_most_are_those_that_turn_their_input(tmp_path):
    teacher = tiny_bundle()
    with torch.no_grad():
        for index in (0, 2):  # these write nothing to the stream
            layer = teacher.model.model.layers[index]
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    step = Student(blocks=2, choose="similarity")
    assert step.requires() == {"calibration"}
    assert step(teacher, tiny_context(teacher, tmp_path)).notes["blocks"] == [1, 3]


def test_choosing_needs_a_number_to_choose():
    with pytest.raises(ValueError, match="similarity chooses as many blocks as `blocks` says"):
        Student(blocks=(0, 1), choose="similarity")
    assert Student(blocks=2).requires() == frozenset()


def recipe(step):
    return {"name": "old", "model": {"checkpoint": "m"}, "data": {"text": "t"}, "variants": {"a": [step]}}


def test_the_prune_layers_of_old_recipes_is_this_pass():
    old = Recipe.parse(recipe({"prune_layers": {"keep": 3, "choose": "similarity"}})).variants["a"].passes
    assert old == (Student(blocks=3, choose="similarity"),)
    for fields, message in (
        ({}, "prune_layers.keep: this field is required"),
        ({"keep": 0}, "prune_layers: blocks: 0 leaves none; give 1 or more"),
        ({"keep": 2, "chose": 1}, "prune_layers.chose: unknown field; did you mean 'choose'"),
    ):
        with pytest.raises(UserError, match=message):
            Recipe.parse(recipe({"prune_layers": fields}))


@pytest.mark.parametrize("count", range(1, 13))
def test_spread_keeps_first_and_last_without_repeats(count):
    for keep in range(1, count + 1):
        kept = spread(count, keep)
        assert sorted(set(kept)) == kept
        assert len(kept) == keep
        assert kept[0] == 0
        assert keep == 1 or kept[-1] == count - 1


def test_a_teacher_with_another_vocabulary_is_refused(tmp_path):
    student, teacher = tiny_bundle(), tiny_bundle(vocab_size=290)
    with pytest.raises(UserError, match="another tokenizer"):
        Distill(tokens=100)(student, tiny_context(student, tmp_path, teacher))


def test_rows_beyond_the_tokens_are_no_other_vocabulary(tmp_path):
    """Matrices of one tokenizer are padded differently in models of different sizes."""
    student, teacher = tiny_bundle(), tiny_bundle(seed=3)
    few = Distill(tokens=8 * WINDOW, batch=4)
    expected = weights(few(student, tiny_context(student, tmp_path / "a", teacher)))
    padded = teacher.clone()
    padded.model.resize_token_embeddings(padded.model.config.vocab_size + 20)
    found = weights(few(student, tiny_context(student, tmp_path / "b", padded)))
    # the padding's share of the teacher's probability is dealt out to the tokens
    torch.testing.assert_close(found, expected)
    with pytest.raises(UserError, match=r"'tiny' predicts 300 tokens and the student 'tiny' 320"):
        few(padded, tiny_context(student, tmp_path / "c", teacher))


def test_distillation_beats_training_alone_on_the_same_tokens(tmp_path):
    """A teacher shows the whole distribution of what the text only samples: names and digits at random."""
    base = tiny_bundle()
    settings = {"batch": 4, "schedule": "linear", "learning_rate": 4e-3, "muon_learning_rate": 0.02}
    teacher = Train(tokens=400 * 4 * WINDOW, **settings)(base, tiny_context(base, tmp_path / "teacher"))
    student = Student(blocks=2)(teacher, tiny_context(base, tmp_path))
    context = tiny_context(base, tmp_path / "student", teacher)
    few = {"tokens": 24 * 4 * WINDOW, **settings}
    alone = Student(blocks=2)(base, context)
    scratch = Train(**few)(alone, context).notes["heldout_after"]
    distilled = Distill(**few)(alone, context).notes["heldout_after"]
    initialised = Distill(**few)(student, context).notes["heldout_after"]
    assert distilled < scratch
    assert initialised < distilled
    assert initialised < teacher.notes["heldout_after"] + 0.1


def teacher_of(tmp_path, **changes):
    base = tiny_bundle(**changes)
    step = Train(tokens=100 * 4 * WINDOW, batch=4)
    return step(base, tiny_context(base, tmp_path / "teacher"))


def test_a_student_of_the_same_shape_is_its_teacher(tmp_path):
    teacher = tiny_bundle()
    same = Student()(teacher, tiny_context(teacher, tmp_path))
    assert equal(weights(teacher), weights(same))
    chosen = Student(blocks=(0, 2))(teacher, tiny_context(teacher, tmp_path))
    taken = teacher.model.model.layers[2].state_dict()
    assert equal(dict(taken), dict(chosen.model.model.layers[1].state_dict()))
    assert chosen.notes["blocks"] == [0, 2]


def test_channels_and_neurons_that_carry_nothing_are_cut_without_a_trace(tmp_path):
    """A teacher whose other half is zero computes the same as its student of half the width."""
    teacher = tiny_bundle(hidden=64, heads=4, kv_heads=2, intermediate=64)
    generator = torch.Generator().manual_seed(0)
    dead = torch.randperm(64, generator=generator)[:32]
    with torch.no_grad():
        teacher.model.model.embed_tokens.weight.mul_(30)  # far above the norms' epsilon
        teacher.model.model.embed_tokens.weight[:, dead] = 0
        for layer in teacher.model.model.layers:
            layer.self_attn.o_proj.weight[dead] = 0
            layer.self_attn.o_proj.weight[:, 32:] = 0  # the second key-value group
            layer.mlp.down_proj.weight[dead] = 0
            layer.mlp.down_proj.weight[:, dead] = 0
    step = Student(hidden=32, intermediate=32, heads=2, kv_heads=1)
    student = step(teacher, tiny_context(teacher, tmp_path))
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            student.model(tokens).logits, teacher.model(tokens).logits, atol=1e-3, rtol=1e-4
        )
    assert student.notes["parameters"] < 0.5 * student.notes["parameters_before"]


def test_weights_of_the_teacher_are_a_better_start_than_random_ones(tmp_path):
    from transformers import AutoModelForCausalLM

    teacher = teacher_of(tmp_path)
    losses = {}
    for source in ("teacher", "random"):
        step = Student(blocks=3, hidden=24, intermediate=48, weights=source)
        student = step(teacher, tiny_context(teacher, tmp_path))
        few = Distill(tokens=12 * 4 * WINDOW, batch=4)
        taught = few(student, tiny_context(student, tmp_path / source, teacher))
        losses[source] = taught.notes["heldout_after"]
    assert losses["teacher"] < losses["random"] - 0.1
    taught.save(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert loaded.config.hidden_size == 24
    assert loaded.config.head_dim == 16


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"blocks": 9}, "student.blocks: 9, but the model has only 4; ask for no more"),
        ({"blocks": (0, 7)}, "student.blocks: 7, but the model has blocks 0 to 3"),
        ({"hidden": 64}, "student.hidden: 64, but the model has only 32"),
        ({"heads": 1, "kv_heads": 2}, "student.kv_heads: 2, but the model has only 1"),
        ({"blocks": ()}, "student.blocks: names none"),
        ({"hidden": 31}, "student: model_type 'llama' cannot have a width of 31 and 2 heads"),
    ],
)
def test_what_a_model_does_not_have_is_told_by_its_field(fields, message):
    with pytest.raises(UserError, match=message):
        Student(**fields).layers(tiny_bundle().model)


def test_widths_of_other_families_are_refused_and_their_blocks_taken(tmp_path):
    gpt2 = tiny_bundle(family="gpt2")
    with pytest.raises(UserError, match="GPT2LMHeadModel can be given fewer blocks, not other widths"):
        Student(hidden=16).layers(gpt2.model)
    fewer = Student(blocks=2)(gpt2, tiny_context(gpt2, tmp_path))
    assert fewer.model.config.num_hidden_layers == 2


def test_tensors_that_a_configuration_has_no_place_for_are_refused():
    model = tiny_bundle().model
    fewer, wider = copy.deepcopy(model.config), copy.deepcopy(model.config)
    fewer.num_hidden_layers, wider.intermediate_size = 3, 80
    for config, what in (
        (fewer, "model.layers.3."),
        (wider, r"gate_proj.weight is \(80, 32\), not \(64"),
    ):
        with pytest.raises(UserError, match=f"'llama' makes no model of this shape .*{what}"):
            assembled(model, config, held(model))
