"""Chats as rows: what is read, where answers stand in what a template writes, and what is refused."""

import json

import numpy as np
import pytest
from chat_models import MARKED, PLAIN, chat_bundle, chats, row
from labelled_files import every, load, write

from compress.errors import UserError
from compress.tasks.base import UNKNOWN
from compress.text.chats import DAY, answered, chat_items
from compress.text.encode import encode
from compress.text.examples import Examples

SYSTEM = {"role": "system", "content": "Be brief."}
ASKED = {"role": "user", "content": "hé 漢?"}
SAID = {"role": "assistant", "content": "wéll 漢"}


def cut(messages, tokenizer, longest=128):
    return encode([row(each) for each in messages], "chat", (), tokenizer, longest, range(len(messages)))


def told(item):
    """Which tokens are answers, (length,): the one after each target."""
    return np.concatenate([[False], item.targets[:-1] != UNKNOWN])


@pytest.mark.parametrize("messages", [[ASKED, SAID], [SYSTEM, ASKED, SAID, ASKED, SAID], chats(1, 3)[0]])
def test_a_template_that_marks_answers_is_believed_as_transformers_does(messages):
    tokenizer = chat_bundle(MARKED).tokenizer
    wanted = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    (item,) = cut([messages], tokenizer).items
    assert item.ids.tolist() == wanted["input_ids"]
    mask = np.array(wanted["assistant_masks"], dtype=bool)
    # of a character in several tokens transformers takes the first alone, where it is an answer's last
    assert not (mask & ~told(item)).any()
    assert tokenizer.decode(item.ids[told(item)]) == "".join(
        m["content"] + tokenizer.eos_token for m in messages if m["role"] == "assistant"
    )
    known = item.targets != UNKNOWN
    assert (item.targets[known] == item.ids[np.flatnonzero(known) + 1]).all()


def test_without_marks_answers_are_found_by_rendering_beginnings():
    some = [[SYSTEM, ASKED, SAID, ASKED, SAID], [ASKED, SAID], *chats(30)]
    plain, marked = (cut(some, chat_bundle(template).tokenizer) for template in (PLAIN, MARKED))
    assert len(plain) == 32
    for one, other in zip(plain.items, marked.items, strict=True):
        assert one.ids.tolist() == other.ids.tolist()
        assert one.targets.tolist() == other.targets.tolist()
    assert plain.kind == "chat"
    assert plain.sha256 == marked.sha256


def test_who_speaks_first_and_what_is_said_after_the_last_answer():
    tokenizer = chat_bundle().tokenizer
    (item,) = cut([[SAID, ASKED, SAID, ASKED]], tokenizer).items
    assert tokenizer.decode(item.ids[told(item)]) == 2 * (SAID["content"] + tokenizer.eos_token)
    assert tokenizer.decode(item.ids).endswith(ASKED["content"] + tokenizer.eos_token + "\n")


def test_what_is_too_long_is_cut_and_what_has_no_answer_left_is_left_out(tmp_path):
    tokenizer = chat_bundle().tokenizer
    long = [{"role": "user", "content": "alpha " * 200}, SAID]
    late = [ASKED, {"role": "assistant", "content": "beta " * 200}]
    whole = cut([[ASKED, SAID], late], tokenizer, 10_000)
    found = cut([[ASKED, SAID], long, late], tokenizer, 64)
    assert (found.cut, len(found), len(found.rows), found.order) == (2, 2, 3, (0, 2))
    assert len(found.items[1].ids) == 64
    assert found.items[1].targets[-1] == UNKNOWN
    assert found.items[1].targets[:63].tolist() == whole.items[1].targets[:63].tolist()
    found.save(tmp_path / "e.npz")
    again = Examples.load(tmp_path / "e.npz")
    assert again.sha256 == found.sha256


def test_a_token_on_an_answers_border_is_the_answers():
    tokenizer = chat_bundle(PLAIN.replace("assistant:\n", "assistant: ").replace(":\n", ": ")).tokenizer
    (item,) = cut([[ASKED, {"role": "assistant", "content": "alpha beta"}]], tokenizer).items
    assert tokenizer.decode(item.ids[told(item)]) == f" alpha beta{tokenizer.eos_token}"
    assert " alpha" in [tokenizer.decode([i]) for i in item.ids[told(item)]]


def test_the_day_is_the_same_on_every_day():
    source = "{{ strftime_now('%Y-%m-%d') }}{% for m in messages %}|{{ m.content }}{% endfor %}"
    (rendered,) = answered([[ASKED, SAID]], source, {})
    assert rendered.text.startswith(DAY)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "the model's tokenizer has no chat template, .+ chat_template.jinja beside"),
        ("{% for m in messages %}{{ loop.length }}{{ m.content }}{% endfor %}",
         r"begins with 'one.+refuses it \(it does not write the beginning of a chat as .+ \(message 2\), "),
        ("{% if messages | length > 2 %}{{ raise_exception('no more') }}{% endif %}"
         "{% for m in messages %}{{ m.content }}{% endfor %}", r"begins with 'two.+refuses it \(no more\)"),
        ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
         "has no answer in what the chat template writes"),
        ("{% for m in messages %}{% generation %}{% generation %}{{ m.content }}{% endgeneration %}"
         "{% endgeneration %}{% endfor %}", "blocks lie in one another"),
        ("{% for m in messages %}{% if m.content == 'two' %}{% for i in range(99999) %}"
         "{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}{{ m.content }}{% endfor %}",
         "begins with 'two'.+ takes more than 2 s"),
        ("{{ 'a' * 10 ** 11 }}", "too much memory"),
        ("{% if %}", "refuses it"),
    ],
)  # fmt: skip
def test_templates_that_do_not_tell(template, words):
    tokenizer = chat_bundle(template).tokenizer
    some = [[{"role": "user", "content": "one"}, SAID], [{"role": "user", "content": "two"}, SAID, ASKED]]
    with pytest.raises(UserError, match=words):
        chat_items([row(each).label for each in some], tokenizer, 64)


class TestReading:
    def lines(self, *some):
        return "\n".join(json.dumps({"id": n, "messages": each}) for n, each in enumerate(some))

    def test_files(self, tmp_path):
        some = chats(20)
        jsonl = write(tmp_path / "r.jsonl", self.lines(*some))
        json_file = write(tmp_path / "r.json", json.dumps([{"messages": each} for each in some]))
        pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pa.table({"prompt": ["x"] * 20, "messages": some}), tmp_path / "r.parquet")
        wanted = {row(each) for each in some}
        for source in (jsonl, json_file, str(tmp_path / "r.parquet")):
            data = load(source)
            assert (data.kind, data.names, set(every(data))) == ("chat", (), wanted)
        assert len(data.evaluation) == 4

    def test_data_sets(self, monkeypatch):
        datasets = pytest.importorskip("datasets")
        found = datasets.Dataset.from_dict({"prompt": ["x"] * 20, "messages": chats(20)})
        monkeypatch.setattr("compress.text.labelled.tables.data_set", lambda *_: found)
        assert set(every(load("datasets:any:train"))) == {row(each) for each in chats(20)}

    def test_another_column_by_name(self, tmp_path):
        lines = "\n".join(json.dumps({"conversations": each}) for each in chats(20))
        file = write(tmp_path / "r.jsonl", lines)
        assert load(file, kind="chat", text="conversations").kind == "chat"
        with pytest.raises(
            UserError, match=r"r.jsonl:1 holds a chat \('conversations'\) in another layout .+"
        ):
            load(file)

    def test_a_column_of_that_name_beside_texts_and_labels_is_none(self, tmp_path):
        lines = [{"text": f"the {n} of them", "label": "ab"[n % 2], "messages": n} for n in range(20)]
        data = load(write(tmp_path / "r.jsonl", "\n".join(map(json.dumps, lines))))
        assert data.kind == "class"

    def test_what_else_a_message_holds_is_counted(self, tmp_path):
        some = [[{**message, "weight": 1, "name": None} for message in each] for each in chats(20)]
        data = load(write(tmp_path / "r.jsonl", self.lines(*some)))
        assert data.notes["left_out"] == {"other keys of messages": sum(map(len, some))}

    @pytest.mark.parametrize(
        ("messages", "words"),
        [
            (None, "r.jsonl:2 has no list of messages"),
            ("hi", "r.jsonl:2 has no list of messages"),
            ([], "r.jsonl:2 has no message of the role 'assistant'"),
            ([ASKED], "r.jsonl:2 has no message of the role 'assistant', so nothing in it is learnt"),
            (["hi"], "r.jsonl:2, message 1 is no object"),
            ([ASKED, {"role": "tool", "content": "x"}], "message 2 has the role 'tool'; known: system, us"),
            ([{"content": "x"}], "r.jsonl:2, message 1 has the role None"),
            ([ASKED, {"role": "assistant", "content": " \n"}], "r.jsonl:2, message 2 has no content"),
            ([ASKED, {"role": "assistant"}], "r.jsonl:2, message 2 has no content"),
            ([ASKED, {"role": "assistant", "content": ["x"]}], "message 2 holds a list, .+ where a text"),
            ([ASKED, {"role": "assistant", "content": "\ud83d"}], "message 2 holds half a character"),
        ],
    )  # fmt: skip
    def test_a_row_that_is_no_chat(self, tmp_path, messages, words):
        file = write(tmp_path / "r.jsonl", self.lines([ASKED, SAID], messages))
        with pytest.raises(UserError, match=rf"^labelled\.source: .*{words}"):
            load(file)
