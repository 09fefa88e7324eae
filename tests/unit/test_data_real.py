"""Every file of the real data folder through the importers: the count of rows, or which fail."""

import os
from pathlib import Path

import pytest

from align.core.errors import DataError
from align.data.load import load_examples
from align.data.reading.sources import read_rows
from align.recipe.schema import DataSpec

pytestmark = pytest.mark.real

ROOT = Path(os.environ.get("ALIGN_REAL_DATA", "/nonexistent")) / "data"
CHAT = {"Question": "prompt", "Best Answer": "chosen", "Best Incorrect Answer": "rejected"}
PERSONA = {
    "question": "prompt",
    "answer_matching_behavior": "chosen",
    "answer_not_matching_behavior": "rejected",
}
GSM8K = {"question": "prompt", "answer": "completion"}
V1_DPO = {"chosen_messages": "chosen", "rejected_messages": "rejected"}

# file, kind, rename, number of examples. The counts of math/, preference/, prompts/, sft/ and
# unpaired/ are those of the data's own description; the others are the rows of the file unless
# a comment says how the examples come about.
GOOD = [
    ("math/gsm8k_test.jsonl", "prompts", {}, 965),
    ("math/gsm8k_train.jsonl", "prompts", {}, 5223),
    ("math/gsm8k_train_sft.jsonl", "sft", {}, 5223),
    ("preference/gsm8k_model_solutions.jsonl", "preference", {}, 1058),
    ("preference/llamafactory_dpo_en.jsonl", "preference", {}, 208),
    ("preference/oasst_en_ranked.jsonl", "preference", {}, 274),
    ("preference/persona_yes_no.jsonl", "preference", {}, 2790),
    ("preference/persona_yes_no.jsonl", "prompts", {}, 2790),
    ("preference/truthfulqa.jsonl", "preference", {}, 551),
    ("prompts/arena_hard.jsonl", "prompts", {}, 357),
    ("prompts/bbq_mc.jsonl", "prompts", {}, 855),
    ("prompts/mt_bench.jsonl", "prompts", {}, 56),
    ("prompts/story_openings_SYNTHETIC.jsonl", "prompts", {}, 403),
    ("prompts/user_oriented.jsonl", "prompts", {}, 187),
    ("prompts/vicuna_bench.jsonl", "prompts", {}, 59),
    ("prompts/xstest.jsonl", "prompts", {}, 320),
    ("sft/gpteacher_codegen.jsonl", "sft", {}, 3216),
    ("sft/gpteacher_roleplay.jsonl", "sft", {}, 1388),
    ("sft/oasst_en.jsonl", "sft", {}, 46),
    ("sft/seed_tasks.jsonl", "sft", {}, 128),
    ("sft/t0_short.jsonl", "sft", {}, 299),
    ("sft/ultrafeedback_1k.jsonl", "sft", {}, 699),
    ("unpaired/llamafactory_kto_en.jsonl", "prompts", {}, 209),
    ("unpaired/xstest_overrefusal.jsonl", "prompts", {}, 1368),
    ("raw/TruthfulQA.csv", "preference", CHAT, 551),
    ("raw/anthropic_evals_persona_agreeableness.jsonl", "preference", PERSONA, 711),
    # 965 questions, four models each: every distinct wrong solution against the first right one.
    ("raw/gsm8k_example_model_solutions.jsonl", "preference", {}, 1123),
    ("raw/gsm8k_test.jsonl", "sft", GSM8K, 965),
    ("raw/gsm8k_train.jsonl", "sft", GSM8K, 5223),
    ("raw/llamafactory_dpo_en_demo_sharegpt.json", "preference", {}, 211),
    ("raw/llamafactory_kto_en_demo.json", "prompts", {}, 209),
    ("raw/mt_bench_question.jsonl", "prompts", {}, 56),
    # 72 trees: the best branch of each; best against worst wherever two replies are ranked.
    ("raw/oasst_en_100_tree.jsonl", "sft", {}, 72),
    ("raw/oasst_en_100_tree.jsonl", "preference", {}, 160),
    ("raw/seed_tasks.jsonl", "sft", {}, 128),
    ("raw/t0_prompt_completion_eot.jsonl", "sft", {}, 299),
    ("raw/ultrafeedback_1k.json", "sft", {}, 699),
    ("raw/xstest_prompts.csv", "prompts", {}, 320),
    ("raw/whole/axolotl_conversation.jsonl_in_json.json", "sft", {}, 1),
    ("raw/whole/llamafactory_identity.json", "sft", {}, 91),
    ("raw/whole/llamafactory_reason_tool_use_demo_50.jsonl", "sft", {}, 50),
    ("raw/whole/llamafactory_v1_dpo_demo.jsonl", "preference", V1_DPO, 10),
    ("raw/whole/llamafactory_v1_dpo_demo.jsonl", "preference", {}, 10),
    ("raw/whole/llamafactory_v1_sft_demo.jsonl", "sft", {}, 500),
    ("raw/whole/sharegpt_fastchat_dummy_conversation.json", "sft", {}, 500),
    ("raw/whole/sharegpt_toolcall_glaive_en_demo.json", "sft", {}, 300),
    ("raw/whole/tinyshakespeare.txt", "corpus", {}, 7222),
    ("raw/whole/tinystories_sample_5_stories.txt", "corpus", {}, 5),
    ("raw/whole/torchtune_chat_tiny.json", "sft", {}, 1),
    ("raw/whole/torchtune_hh_rlhf_tiny.json", "preference", {}, 1),
    ("raw/whole/torchtune_instruct_tiny.json", "sft", {}, 2),
]

# file, kind, what the message must say about which row.
BAD = [
    (
        "raw/whole/axolotl_conversation.missingturns.json",
        "sft",
        "missingturns.json:1: completion[1]: the content of the assistant is empty",
    ),
    (
        "raw/whole/openai_chat_toy_first4.jsonl",
        "sft",
        "first4.jsonl:4: an assistant turn before any user turn",
    ),
    ("raw/TruthfulQA.csv", "preference", "TruthfulQA.csv:2: no known format has the fields"),
    ("preference/truthfulqa.jsonl", "sft", "preference data, but the stage needs sft"),
    ("unpaired/xstest_overrefusal.jsonl", "sft", "unpaired data, but the stage needs sft"),
]


@pytest.fixture(autouse=True)
def real_data() -> None:
    if not ROOT.is_dir():
        pytest.skip("the environment variable ALIGN_REAL_DATA names no folder with data/")


@pytest.mark.parametrize(("name", "kind", "rename", "count"), GOOD)
def test_real_file_gives_its_rows(name: str, kind: str, rename: dict, count: int) -> None:
    spec = DataSpec(path=str(ROOT / name), rename=rename)
    assert len(load_examples([spec], kind=kind, seed=0)) == count


@pytest.mark.parametrize(("name", "kind", "message"), BAD)
def test_real_file_with_a_blemish_names_the_row(name: str, kind: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        load_examples([DataSpec(path=str(ROOT / name))], kind=kind, seed=0)
    assert message in str(caught.value)


def test_no_real_file_is_left_out() -> None:
    files = {p.relative_to(ROOT).as_posix() for p in ROOT.rglob("*") if p.suffix in SUFFIXES}
    assert files == {row[0] for row in GOOD} | {row[0] for row in BAD}


SUFFIXES = (".jsonl", ".json", ".csv", ".txt")


def test_sharegpt_array_rows_have_the_line_they_start_on() -> None:
    path = ROOT / "raw/llamafactory_dpo_en_demo_sharegpt.json"
    lines = path.read_text(encoding="utf-8").split("\n")
    for _, source in read_rows(str(path)):
        assert lines[int(source.rpartition(":")[2]) - 1] == "  {"
