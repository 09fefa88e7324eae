from pathlib import Path

import pytest
import yaml

from align.core.errors import DataError
from align.data.load import load_examples
from align.data.wordings import word_row
from align.recipe.schema import DataSpec

TEMPLATES = """
- name: ask
  prompt: "Question: {{ question }}"
  completion: "{{ answer | trim }}"
- name: turned
  prompt: "Ask something whose answer is {{ answer }}."
  completion: "{{ question }}"
"""


@pytest.fixture
def templates(tmp_path):
    path = tmp_path / "templates.yaml"
    path.write_text(TEMPLATES)
    return str(path)


def rows_file(tmp_path, name, count):
    path = tmp_path / f"{name}.jsonl"
    lines = [
        f'{{"question": "{name}{i}?", "answer": " {i} ", "topic": "t"}}\n' for i in range(count)
    ]
    path.write_text("".join(lines))
    return str(path)


def test_every_wording_of_a_row(templates):
    row = {"question": "1+1?", "answer": " 2 ", "topic": "sums"}
    found = word_row(row, "a:1", templates=templates, phrasing="all", seed=0)
    assert [r["prompt"][0]["content"] for r in found] == [
        "Question: 1+1?",
        "Ask something whose answer is  2 .",
    ]
    assert [r["completion"][0]["content"] for r in found] == ["2", "1+1?"]
    assert found[0]["topic"] == "sums"
    assert [r["template"] for r in found] == ["ask", "turned"]


def test_one_wording_is_drawn_by_seed_and_place_and_both_occur(tmp_path, templates):
    spec = DataSpec(path=rows_file(tmp_path, "a", 40), templates=templates)
    first = load_examples([spec], kind="sft", seed=1)
    names = [example.columns["template"] for example in first]
    assert names == [e.columns["template"] for e in load_examples([spec], kind="sft", seed=1)]
    assert names != [e.columns["template"] for e in load_examples([spec], kind="sft", seed=2)]
    # 40 fair draws: fewer than 8 of either has probability 5e-5.
    assert 8 <= names.count("ask") <= 32


def test_a_missing_field_names_the_row_the_template_and_what_there_is(tmp_path, templates):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"question": "q?", "reply": "r"}\n')
    with pytest.raises(DataError, match=r"bad.jsonl:1: template .*'answer' is undefined.*reply"):
        load_examples(
            [DataSpec(path=str(path), templates=templates, phrasing="all")], kind="sft", seed=0
        )


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ rows.append(1) }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ text|attr('__class__') }}",
        "{{ '{0.__class__}'.format(text) }}",
        "{{ '{x.__class__}'.format_map({'x': text}) }}",
        "{% include '/etc/passwd' %}",
        "{{ range(10**9)|list }}",
        "{{ 1 / 0 }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{{ nothing }}",
    ],
)
def test_templates_run_sandboxed_and_end_in_an_error_of_the_row(tmp_path, attack):
    path = tmp_path / "evil.yaml"
    path.write_text(yaml.safe_dump([{"name": "evil", "prompt": attack}]))
    row = {"rows": [], "text": "hi", "nothing": None}
    with pytest.raises(DataError, match=r"a:1: template 'evil', prompt: .*; the row has"):
        word_row(row, "a:1", templates=str(path), phrasing="all", seed=0)
    assert row == {"rows": [], "text": "hi", "nothing": None}


def test_all_wordings_of_a_row_stay_on_one_side_of_the_split(tmp_path, templates):
    path = rows_file(tmp_path, "a", 60)
    asked = {}
    for split in ("train", "heldout"):
        spec = DataSpec(
            path=path, templates=templates, phrasing="all", split=split, heldout_frac=0.3
        )
        found = [e.columns["question"] for e in load_examples([spec], kind="sft", seed=0)]
        assert sorted(found) == sorted([*set(found)] * 2)  # both wordings of each
        one = spec.model_copy(update={"phrasing": "one"})
        assert {e.columns["question"] for e in load_examples([one], kind="sft", seed=5)} == {*found}
        asked[split] = set(found)
    assert not asked["train"] & asked["heldout"]
    assert len(asked["train"] | asked["heldout"]) == 60
    assert 5 < len(asked["heldout"]) < 35


def test_all_mistakes_of_a_file_at_once(tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text("- name: a\n  answer: x\n- prompt: y\n- name: b\n  prompt: '{{ open'\n")
    with pytest.raises(DataError) as caught:
        word_row({}, "a:1", templates=str(path), phrasing="all", seed=0)
    assert [f"entry {i}" in str(caught.value) for i in (1, 2, 3)] == [True] * 3


def test_mixing_is_proportional_up_to_the_cap(tmp_path):
    # 40, 10 and 2 rows with cap 20: weights 20, 10, 2. The largest n / w is 40 / 20 = 2, so each
    # row of the big set stands there once and the others come to 2 * 10 = 20 and 2 * 2 = 4.
    specs = [
        DataSpec(
            path=rows_file(tmp_path, name, count),
            rename={"question": "prompt", "answer": "completion"},
        )
        for name, count in (("a", 40), ("b", 10), ("c", 2))
    ]
    mixed = load_examples(specs, kind="sft", seed=0, mix_cap=20)
    names = [str(example.prompt)[0] for example in mixed]
    assert [names.count(n) for n in "abc"] == [40, 20, 4]
    assert len({example.prompt for example in mixed}) == 52


def test_an_edited_template_file_is_read_again(templates):
    row = {"question": "1+1?", "answer": "2"}
    one = {"source": "a:1", "templates": templates, "phrasing": "all", "seed": 0}
    assert len(word_row(row, **one)) == 2
    Path(templates).write_text("- {name: only, prompt: 'Say {{ answer }}'}")
    (found,) = word_row(row, **one)
    assert found["prompt"] == [{"role": "user", "content": "Say 2"}]
