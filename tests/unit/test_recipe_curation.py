import pytest

from align.core.errors import RecipeError
from align.recipe.load import load_recipe

BASE = """\
name: r
stages:
  base: {kind: base, path: somewhere}
"""
GROW = "  grow: {kind: self_instruct, init: base, seeds: [{path: s.jsonl}], target: 9}\n"


def load(tmp_path, text):
    path = tmp_path / "r.yaml"
    path.write_text(BASE + text)
    return load_recipe(path)


def test_a_stage_reads_the_data_of_an_earlier_one(tmp_path):
    recipe = load(
        tmp_path,
        GROW
        + (
            "  clean: {kind: curate, data: [{stage: grow}]}\n"
            "  sft: {kind: sft, init: base, data: [{path: a.jsonl}, {stage: clean}]}\n"
        ),
    )
    assert recipe.inputs("clean") == {"data.0.stage": "grow"}
    assert recipe.inputs("sft") == {"init": "base", "data.1.stage": "clean"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "  s: {kind: sft, init: base, data: [{stage: base}]}\n",
            r"stages.s.data.0.stage: stage 'base' \(base\) writes a policy; expected an earlier "
            "stage that writes a data",
        ),
        (GROW + "  s: {kind: sft, init: grow, data: [{path: a}]}\n", "writes a data; expected"),
        ("  s: {kind: sft, init: base, data: [{path: a}], mix_cap: 5}\n", "on a single dataset"),
        (
            "  s: {kind: sft, init: base, data: [{path: a, phrasing: all}]}\n",
            "phrasing: has no effect without 'templates'",
        ),
        ("  s: {kind: curate, ranks: 2, data: [{path: a}]}\n", "runs as one process"),
        ("  s: {kind: curate, data: [{path: a}], keep_frac: 0.5}\n", "no effect without 'quality'"),
        (
            "  s: {kind: curate, data: [{path: a}], near_duplicates: null}\n",
            "no row would be dropped",
        ),
        (
            "  s: {kind: weak_label, of: sft, data: [{path: a}], functions: [{by: {kind: length, "
            "target: 2, limit: 4}, good_from: 1.0}]}\n",
            "1 voters",
        ),
        (
            "  s: {kind: weak_label, of: preference, data: [{path: a}], functions: [{by: {kind: "
            "repetition}, good_from: 1.0}]}\n",
            "are for of: sft only",
        ),
        (
            "  g: {kind: self_instruct, init: base, seeds: [{path: s}], target: 9, examples: 2}\n",
            "at least one of the examples must be a seed",
        ),
        (
            "  g: {kind: self_instruct, init: base, seeds: [{path: s}], target: 9, wording: {item: "
            "'Task {number}: {instruction}'}}\n",
            "something after it that ends it",
        ),
        (
            "  t: {kind: trl, trainer: KTO, init: base, rows: unpaired, data: [{path: a}], "
            "steps: 1, args: {learning_rate: 0.1}}\n",
            "learning_rate are set by the stage's own keys",
        ),
        (
            "  t: {kind: trl, trainer: KTO, init: base, rows: unpaired, data: [{path: a}], "
            "steps: 1, batch_size: 6, micro_batch_size: 4}\n",
            "multiple of micro_batch_size x ranks",
        ),
    ],
)
def test_what_has_no_effect_or_cannot_work_is_refused(tmp_path, text, said):
    with pytest.raises(RecipeError, match=said):
        load(tmp_path, text)
