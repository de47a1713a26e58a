"""What people expect of generated text: stop strings, several prompts at once, chats."""

import itertools
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import transformers
from cli_helpers import invoke, refused
from export_models import CONTEXT, exported, tiny_bundle, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, processors

import compress
from compress.artifact.bundle import Bundle
from compress.errors import UserError
from compress.generation.chat import render
from compress.generation.counts import Counts
from compress.generation.generator import TextGenerator
from compress.generation.sampling import Chooser, Sampling
from compress.generation.text import Decoded, Stops, Writing, end_tokens, pieces
from compress.generation.together import continue_together
from compress.records.manifest import Lineage
from compress.runtimes import open_text_runtime

TEMPLATE = """{{ bos_token }}{% for message in messages %}
{% if message['role'] not in ['system', 'user', 'assistant'] %}
{{ raise_exception('Unknown role') }}{% endif %}
<{{ message['role'] }}> {% generation %}{{ message['content'] | trim }}{% endgeneration %}{{ eos_token }}
{% if loop.index > 9 %}{% break %}{% endif %}
{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"""


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """Name -> a folder in torch, with its graph in `onnx` inside; w0 and w1 begin and end a text."""
    found = {}
    for name in ("llama", "mistral_window", "gpt2"):
        bundle = tiny_bundle(name)
        bundle.tokenizer.chat_template = TEMPLATE
        bundle.save(found.setdefault(name, tmp_path_factory.mktemp("models") / name))
        exported(bundle, found[name] / "onnx")
    return found


def place(artifacts, name, kind):
    return artifacts[name] / ("onnx" if kind == "onnxruntime" else ".")


@given(
    text=st.text("abx", max_size=30),
    cuts=st.lists(st.integers(0, 30), max_size=8),
    stop=st.text("ab", min_size=1, max_size=4),
)
def test_a_stop_string_ends_a_text_however_it_is_cut_into_pieces(text, cuts, stop):
    stops, shown = Stops([stop, "never" * 3]), ""
    edges = sorted({0, len(text), *(c for c in cuts if c <= len(text))})
    for left, right in itertools.pairwise(edges):
        if not stops.stopped:
            shown += stops.add(text[left:right])
            assert text.split(stop)[0].startswith(shown), "nothing is shown that may be taken back"
    assert stops.stopped == (stop in text)
    shown += stops.close()
    assert shown == text.split(stop)[0]


def test_only_what_may_become_a_stop_string_is_held_back():
    stops = Stops(["</s>", "\n\n"])
    assert [stops.add(p) for p in ("a", "b<", "/", "c\n", "d\n", "\n!")] == ["a", "b", "", "</c", "\nd", ""]
    assert stops.stopped
    assert stops.close() == ""


class Letters:
    """Each token is two letters."""

    def decode(self, ids):
        return "".join(chr(i // 100) + chr(i % 100) for i in ids)

    @staticmethod
    def ids(text):
        return [ord(a) * 100 + ord(b) for a, b in zip(text[::2], text[1::2], strict=True)]


def test_a_stop_string_may_begin_inside_a_token_and_no_token_is_taken_after_it():
    tokens = iter(Letters.ids("ABCDEFGHIJKL"))
    assert "".join(pieces(Writing(Letters(), [], ["DEFG"]), tokens)) == "ABC"
    assert Letters().decode(tokens) == "IJKL"


def test_decoding_in_a_window_gives_the_text_of_the_whole():
    # a decoder that drops the space before the first word, and needs bytes to make characters
    words = {w: i for i, w in enumerate(["▁a", "▁be", "c", "<0xE2>", "<0x82>", "<0xAC>", "<s>", "<unk>"])}
    tokenizer = Tokenizer(models.BPE(words, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    random = np.random.default_rng(0)
    for length in range(2, 60):
        ids = random.choice([0, 1, 2, 6, 3], size=length).tolist()
        ids = [i for token in ids for i in ([3, 4, 5] if token == 3 else [token])]
        whole = tokenizer.decode(ids)
        decoded = Decoded(tokenizer, ids[:1])
        found = "".join([decoded.add(i) for i in ids[1:]]) + decoded.close()
        if ids[0] in (0, 1, 2):
            assert tokenizer.decode(ids[:1]) + found == whole


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.5, top_p=0.9)])
@pytest.mark.parametrize("kind", ["torch", "onnxruntime"])
@pytest.mark.parametrize("name", ["llama", "mistral_window", "gpt2"])
def test_texts_written_together_are_what_each_is_alone(artifacts, name, kind, sampling):
    generator = TextGenerator(place(artifacts, name, kind), threads=1)
    assert generator.runtime.joins
    random = np.random.default_rng(1)
    # longer and shorter than the window of 7; one that leaves room for two tokens only; two that are alike
    prompts = [
        " ".join(f"w{i}" for i in random.integers(20, 97, n)) for n in (3, 30, 1, 12, CONTEXT - 2, 5, 5)
    ]
    prompts[-1] = prompts[-2]
    alone = [
        "".join(generator.stream(prompt, 24, Sampling(**{**vars(sampling), "seed": sampling.seed + i})))
        for i, prompt in enumerate(prompts)
    ]
    assert len({len(text.split()) for text in alone}) > 1, "some texts must end before others"
    for batch in (3, 8) if sampling.temperature == 0 else (3,):
        assert generator.generate(prompts, 24, sampling, batch=batch) == alone
        assert generator.counts.tokens_per_call > batch / 2 - 1
    # sampled texts of one prompt differ
    assert (alone[-1] == alone[-2]) == (sampling.temperature == 0)


@pytest.mark.parametrize("kind", ["torch", "onnxruntime"])
def test_joined_rows_give_their_own_logits(artifacts, kind):
    runtime = open_text_runtime(place(artifacts, "mistral_window", kind), 1)
    random = np.random.default_rng(2)
    rows = [random.integers(0, 97, (1, n)).astype(np.int32) for n in (3, 17, 6, 40)]
    tail = random.integers(0, 97, (4, 9)).astype(np.int32)
    expected = [
        runtime.logits(np.concatenate((r, t[None]), axis=1))[0] for r, t in zip(rows, tail, strict=True)
    ]
    parts = [(runtime.prefill(row), 0) for row in rows]
    state = runtime.join(parts[:3])
    order = [0, 1, 2]
    for step in range(9):
        if step == 4:  # one leaves, one comes
            late = runtime.prefill(np.concatenate((rows[3], tail[3:, :4]), axis=1))
            state, order = runtime.join([(state, 2), (late, 0), (state, 0)]), [2, 3, 0]
        state = runtime.decode(state, tail[order, step])
        for i, row in enumerate(order):
            wanted = expected[row][rows[row].shape[1] + step]
            assert np.abs(state.logits[i] - wanted).max() < 2e-5 * np.abs(wanted).max()
    assert state.length == 49


def test_a_text_that_ends_makes_room_for_the_next(artifacts):
    runtime = open_text_runtime(place(artifacts, "llama", "onnxruntime"), 1)
    counts, written = Counts(), dict.fromkeys(range(4), 0)

    def take(row, token):
        written[row] += 1
        return written[row] < (20 if row == 0 else 5)

    choosers = [Chooser(Sampling(), row) for row in range(4)]
    continue_together(runtime, [[5, 6], [7], [8, 9], [10]], choosers, take, batch=2, counts=counts)
    assert written == {0: 20, 1: 5, 2: 5, 3: 5}
    assert counts.calls == 19, "as many as the longest text needs: the others passed by its side"
    assert counts.decoded == 19 + 3 * 4


def test_a_chat_is_what_transformers_makes_of_it(artifacts):
    folder = place(artifacts, "llama", "onnxruntime")
    messages = [
        {"role": "system", "content": "w5 "},
        {"role": "user", "content": "w3 <b> é w4"},
        {"role": "assistant", "content": "w9"},
        {"role": "user", "content": "w7"},
    ]
    fast = transformers.AutoTokenizer.from_pretrained(folder)
    expected = fast.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert render(folder, messages) == expected
    assert expected.count("w1") == 4
    generator = TextGenerator(folder, threads=1)
    assert generator.encode(messages) == fast(expected, add_special_tokens=False)["input_ids"]
    assert compress.generate(folder, messages, tokens=6, threads=1) == "".join(generator.stream(messages, 6))


def test_templates_and_special_tokens_are_found_where_older_versions_put_them(artifacts, tmp_path):
    messages = [{"role": "user", "content": "w3"}]
    expected = render(artifacts["llama"], messages)
    config = {
        "chat_template": [{"name": "tool_use", "template": "x"}, {"name": "default", "template": TEMPLATE}]
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": {"content": "w0", "lstrip": False}, "eos_token": "w1", "pad_token": None})
    )
    assert render(tmp_path, messages) == expected


@pytest.mark.parametrize(
    ("template", "messages", "words"),
    [
        (TEMPLATE, [{"role": "tool", "content": "x"}], "refuses the messages .Unknown role."),
        (TEMPLATE, [], "messages: there are none"),
        (TEMPLATE, [{"content": "x"}], r"messages\[0\]: .* has no 'role'"),
        (TEMPLATE, [{"role": "user"}], r"messages\[0\]: has no 'content'"),
        (TEMPLATE, ["hello"], r"messages\[0\]: 'hello'"),
        ("{% if %}", [{"role": "user", "content": "x"}], "refuses the messages"),
        ("{{ messages.append(1) }}", [{"role": "user", "content": "x"}], "refuses the messages"),
        ("{{ 1 / 0 }}", [{"role": "user", "content": "x"}], "refuses the messages .division"),
        (TEMPLATE, [{"role": "user", "content": {1, 2}}], "hold more than text, numbers and lists"),
        ("{{ ''.__class__.__mro__ }}", [{"role": "user", "content": "x"}], "refuses the messages"),
        (None, [{"role": "user", "content": "x"}], "has no chat template"),
    ],
)
def test_what_cannot_be_rendered_is_refused(tmp_path, template, messages, words):
    if template is not None:
        (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match=words):
        render(tmp_path, messages)


def test_text_gets_what_its_tokenizer_puts_before_it_and_not_what_it_puts_after(tmp_path):
    bundle = tiny_bundle("llama")
    backend = bundle.tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single="w0 $A w1", special_tokens=[("w0", 0), ("w1", 1)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="w0", eos_token="w1")
    Bundle(tiny_model("llama"), tokenizer, Lineage(source="tiny")).save(tmp_path / "model")
    generator = TextGenerator(tmp_path / "model", threads=1)
    assert generator.encode("w5 w6") == [0, 5, 6]
    assert generator.encode("") == [0]
    assert generator.ends == {1}


def test_an_export_ends_texts_where_its_model_does(tmp_path):
    bundle = tiny_bundle("llama")
    bundle.model.generation_config.eos_token_id = [5, 9]  # as chat models have it; their config tells one
    bundle.save(tmp_path / "model")
    exported(bundle, tmp_path / "onnx")
    assert end_tokens(tmp_path / "onnx") == end_tokens(tmp_path / "model") == [5, 9]


def test_a_stop_string_that_is_a_special_token_ends_the_text(artifacts, tmp_path):
    """Decoding drops special tokens, so no text ever holds one."""
    folder = shutil.copytree(artifacts["llama"], tmp_path / "model")
    generator = TextGenerator(folder, threads=1)
    whole = next(generator.generate([p], tokens=12)[0].split() for p in ["w3 w34 w55"])
    stop = next(word for i, word in enumerate(whole) if i > 2 and word not in whole[:i])
    generator.tokenizer.add_special_tokens([stop])
    before = " ".join(whole[: whole.index(stop)])
    assert generator.generate(["w3 w34 w55"], tokens=12, stop=[stop])[0].strip() == before
    assert "".join(generator.stream("w3 w34 w55", tokens=12, stop=[stop])).strip() == before


@pytest.mark.parametrize("value", ["abc", ["x"], [None], {"a": 1}, True])
def test_an_end_that_is_no_token_is_refused(artifacts, tmp_path, value):
    folder = shutil.copytree(artifacts["llama"], tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id is "):
        end_tokens(folder)


def test_what_cannot_be_read_or_run_is_refused(artifacts, tmp_path):
    folder = shutil.copytree(artifacts["llama"], tmp_path / "model")
    with pytest.raises(UserError, match="threads: -1 is not valid"):
        TextGenerator(folder, threads=-1)
    with pytest.raises(UserError, match="prompt: .* is not UTF-8"):
        TextGenerator(folder, threads=1).encode("w3 \udcff")
    (folder / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(UserError, match=r"tokenizer\.json: cannot be read"):
        TextGenerator(folder, threads=1)


def test_the_repetition_penalty_divides_and_multiplies_what_was_there():
    logits = np.array([2.0, -1.0, 1.5, 0.5], dtype=np.float32)
    sampling = Sampling(temperature=1.0, repetition_penalty=2.0)
    found = sampling.distribution(logits, [0, 1, 1])
    wanted = np.exp([1.0, -2.0, 1.5, 0.5])
    assert np.allclose(found, wanted / wanted.sum())
    assert sampling.greedy(logits, [0, 1]) == 2
    assert sampling.greedy(logits, []) == 0


@given(
    logits=st.lists(st.floats(-10, 10), min_size=1, max_size=20),
    min_p=st.floats(0, 1),
    temperature=st.floats(0.1, 3),
)
def test_min_p_keeps_what_is_likely_enough_beside_the_likeliest(logits, min_p, temperature):
    scores = np.array(logits, dtype=np.float32)
    plain = Sampling(temperature).distribution(scores)
    found = Sampling(temperature, min_p=min_p).distribution(scores)
    share = plain / plain.max()
    clear = np.abs(share - min_p) > 1e-9  # at the threshold itself rounding decides
    assert ((found > 0) == (share >= min_p))[clear & (plain > 0)].all()
    assert found.sum() == pytest.approx(1)
    kept = found > 0
    assert np.allclose(found[kept], plain[kept] / plain[kept].sum())


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("temperature", -0.1, "temperature: -0.1 is not valid; it must be at least 0"),
        ("top_k", -1, "top_k: -1 is not valid"),
        ("top_p", 0.0, "top_p: 0.0 is not valid; it must be more than 0 and at most 1"),
        ("min_p", 1.5, "min_p: 1.5 is not valid; it must be at least 0 and at most 1"),
        ("repetition_penalty", 0.0, "repetition_penalty: 0.0 is not valid; it must be more than 0"),
        ("temperature", float("nan"), "temperature: nan is not valid"),
        ("seed", -1, "seed: -1 is not valid"),
    ],
)
def test_values_out_of_bounds_are_refused(field, value, words):
    with pytest.raises(UserError, match=words):
        Sampling(**{field: value})


def test_one_call_from_python(artifacts):
    folder = place(artifacts, "llama", "onnxruntime")
    text = compress.generate(folder, "w3 w4", tokens=8, threads=1)
    assert isinstance(text, str)
    assert len(text.split()) == 8
    both = compress.generate(str(folder), ["w3 w4", "w9"], tokens=8, threads=1)
    assert both[0] == text
    third = text.split()[2]
    assert compress.generate(folder, "w3 w4", tokens=8, stop=third, threads=1) == text.split(third)[0]
    chats = [[{"role": "user", "content": word}] for word in ("w5", "w6")]
    assert compress.generate(folder, chats, tokens=4, threads=1) == [
        compress.generate(folder, chat, tokens=4, threads=1) for chat in chats
    ]
    drafted = compress.generate(folder, ["w3 w4", "w9"], tokens=8, draft=folder, threads=1)
    assert drafted == both
    sampled = compress.Sampling(temperature=2.0, seed=3)
    assert compress.generate(folder, "w3", sampling=sampled, threads=1, tokens=9) != text
    for wrong, words in (
        ({"tokens": 0}, "tokens: 0"),
        ({"batch": 0}, "batch: 0"),
        ({"stop": [""]}, "stop: an"),
    ):
        with pytest.raises(UserError, match=words):
            compress.generate(folder, "w3", threads=1, **wrong)


def test_the_command_chats_stops_and_takes_several_prompts(artifacts, tmp_path):
    folder = place(artifacts, "llama", "onnxruntime")
    common = ("generate", folder, "--threads", 1, "--tokens", 6)
    one = invoke(*common, "-p", "w3 w4")
    two = invoke(*common, "-p", "w9")
    both = invoke(*common, "-p", "w3 w4", "-p", "w9", "--stats")
    assert both.out == one.out + "\n" + two.out
    assert "prompt 3 tokens" in both.err
    assert "12 new tokens" in both.err
    word = one.out.split()[4]
    assert invoke(*common, "-p", "w3 w4", "--stop", word).out.split() == one.out.split()[:4]
    reply = invoke(*common, "-p", "w3", "--chat", "--system", "w8")
    messages = [{"role": "system", "content": "w8"}, {"role": "user", "content": "w3"}]
    assert reply.out == compress.generate(folder, messages, tokens=6, threads=1) + "\n"
    assert "add --chat" in refused(*common, "-p", "w3", "--system", "w8")
    tiny_bundle("llama").save(tmp_path / "plain")
    assert "has no chat template" in refused("generate", tmp_path / "plain", "-p", "w3", "--chat")


def test_an_onnx_folder_needs_neither_torch_nor_transformers(artifacts):
    code = (
        "import sys, compress;"
        f"compress.generate({str(place(artifacts, 'llama', 'onnxruntime'))!r}, ['w3', 'w4 w5'], tokens=3);"
        "print([m for m in ('torch', 'transformers', 'onnx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_encoder_continues_nothing(tmp_path):
    config = transformers.BertConfig(
        vocab_size=97, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    tokenizer = tiny_bundle("llama").tokenizer
    model = transformers.BertForMaskedLM(config).eval()
    Bundle(model, tokenizer, Lineage(source="tiny")).save(tmp_path / "bert")
    assert "is an encoder" in refused("generate", tmp_path / "bert", "-p", "w3")
