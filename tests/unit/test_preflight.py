"""The preflight's checks: each fault is made on purpose and must fail its own line."""

import json
import math
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn
from transformers import (
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaModel,
)

sys.path.insert(0, str(Path(__file__).parent))
from small_tokenizers import byte_tokenizer

from align.core.artifacts import Artifact
from align.core.card import Card, Line, read_card, table
from align.core.errors import DataError, PreflightError
from align.core.types import Example, PromptRow, TokenRow
from align.data.render.chat import ChatFormat
from align.data.render.templates import TEMPLATES
from align.models.loading import load_policy, num_positions
from align.models.logprobs import LogprobModel
from align.preflight import classes, offline, tokens
from align.preflight.checks import MAX_SEEN, Check, Finding, examine, spread
from align.preflight.rewards import reward_checks
from align.recipe.schema import DpoStage, Recipe, RewardSpec, SftStage, Spec
from align.report.markup import Markup
from align.report.read import RunRecord, StageRecord
from align.report.sections import preflight
from align.stages import dpo, sft
from align.stages.base import Prepared, StageContext, StageResult, prepare_and_train
from align.stages.reward.tasks import WeightedPair, collate_pairs
from align.stages.tools.deep_check import check_stage
from align.training.task import OfflineTask
from reward_models import build_reward

DPO = DpoStage(kind="dpo", init="x", data=[{"path": "x"}])
SFT = SftStage(kind="sft", init="x", data=[{"path": "x"}])


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def chat_of(template: str = TEMPLATES["plain"], *, bos: bool = False) -> ChatFormat:
    return ChatFormat(byte_tokenizer(template, bos=bos))


EXAMPLES = [
    Example(
        prompt=[turn("user", f"what comes after {i}")],
        completion=[turn("assistant", f"it is {i + 1}")],
        rejected=[turn("assistant", "no idea")],
        source=f"a.jsonl:{i}",
    )
    for i in range(6)
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Save a random model as an artifact."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = byte_tokenizer(TEMPLATES["plain"])
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    files = {"model/model.safetensors": {"sha256": "ab" * 32}}
    return Artifact(folder, {"kind": "policy", "files": files})


def policy(source: Artifact) -> LogprobModel:
    return LogprobModel(load_policy(source.model_dir, dtype="float32"))


def sft_task() -> OfflineTask:
    rows = [chat_of().sft_row(e) for e in EXAMPLES]
    return OfflineTask(rows, [], sft.length_of, sft.collate, sft.sft_loss)


def dpo_task(spec: DpoStage, module: LogprobModel) -> OfflineTask:
    pairs = dpo.reference_pairs(
        module, [chat_of().pair_row(e) for e in EXAMPLES], micro_tokens=4096
    )
    return OfflineTask(
        pairs,
        [],
        lambda r: dpo.pair_length(r.pair),
        dpo.collate,
        partial(dpo.preference_loss, spec),
    )


def test_good_rows_pass_every_check(source: Artifact) -> None:
    chat = chat_of()
    rows = [chat.sft_row(e) for e in EXAMPLES]
    checks = tokens.row_checks(chat, rows, EXAMPLES, model_dir=source.model_dir)
    module = policy(source)
    checks += offline.start_checks(SFT, module.model, source)
    checks += offline.loss_checks(SFT, module, sft_task(), vocab_size=1000)
    lines = examine(checks)
    assert {line.verdict for line in lines} == {"ok"}, lines
    # "it is 1" and the stop are 8 tokens of one byte each; of each row as many.
    assert lines[0].value.startswith("48 of ")


def test_row_without_a_trained_token_is_named() -> None:
    good = chat_of().sft_row(EXAMPLES[0])
    blind = replace(good, trained=(False,) * len(good.trained), source="a.jsonl:9")
    found = tokens.trained_tokens([good, blind])
    assert found.verdict == "fail"
    assert "a.jsonl:9" in found.remedy


def test_turn_that_ends_without_a_stop_of_the_saved_model_is_named(source: Artifact) -> None:
    chat, stops = chat_of(), tokens.saved_stops(source.model_dir)
    row = chat.sft_row(EXAMPLES[2])
    assert tokens.stop_tokens(chat, [row], stops).verdict == "ok"
    # The last trained token is the stop: without it the turn ends in a letter.
    last = max(t for t, trained in enumerate(row.trained) if trained)
    trained = tuple(k and t != last for t, k in enumerate(row.trained))
    found = tokens.stop_tokens(chat, [TokenRow(row.input_ids, trained, row.source)], stops)
    assert found.verdict == "fail"
    assert "a.jsonl:2" in found.remedy


def test_sampler_that_stops_elsewhere_than_the_saved_model_fails(source: Artifact) -> None:
    stops = tokens.saved_stops(source.model_dir)
    assert tokens.generation_stops(chat_of(), stops).verdict == "ok"
    other = ChatFormat(byte_tokenizer(TEMPLATES["chatml"], eos="<|im_end|>"))
    assert tokens.generation_stops(other, stops).verdict == "fail"


# Appends turn by turn, but ends a conversation of three turns with a word of its own.
TWO_FACED = (
    "{% if messages | length == 3 and not add_generation_prompt %}{{ 'HELLO ' }}{% endif %}"
    "{% for m in messages %}{{ m['role'] + ':' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def test_template_that_writes_more_at_once_than_by_turns_fails() -> None:
    chat = chat_of(TWO_FACED)
    ends_with_user = [turn("user", "a"), turn("assistant", "b"), turn("user", "c")]
    found = tokens.template(chat, [ends_with_user])
    assert found.verdict == "fail"
    assert found.value == "token 0: whole 'HELLO us', as trained 'user:aas'"
    # What follows the last answer is no fault of a template that only appends.
    assert tokens.template(chat_of(), [ends_with_user]).verdict == "ok"


def test_template_that_rewrites_is_a_failed_line_with_the_place() -> None:
    rewrites = (
        "{% for m in messages %}{{ m['role'] + ':' }}{{ m['content'] if loop.last or m['role'] != "
        "'assistant' else m['content'][:1] }}{{ '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    turns = [
        turn("user", "q"),
        turn("assistant", "one"),
        turn("user", "r"),
        turn("assistant", "two"),
    ]
    (line,) = examine([("template", partial(tokens.template, chat_of(rewrites), [turns]))])
    assert line.verdict == "fail"
    assert "first difference at character" in line.remedy


def test_template_with_todays_date_is_a_warning() -> None:
    dated = "{{ '' if strftime_now is defined else '' }}" + TEMPLATES["plain"]
    turns = [turn("user", "q"), turn("assistant", "a")]
    assert tokens.template(chat_of(dated), [turns]).verdict == "warn"


UNPROMPTED = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}"
)
INST = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template_text", "header"),
    [
        (UNPROMPTED, "<|im_start|>assistant"),
        (UNPROMPTED.replace("m.role", "(m.role | upper)"), "<|im_start|>ASSISTANT"),
        # Nothing stands before the response, as in Llama 2 and Mistral.
        (INST, ""),
        (UNPROMPTED + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}", ""),
    ],
)
def test_template_without_a_generation_prompt_is_a_warning(template_text: str, header: str) -> None:
    chat = ChatFormat(byte_tokenizer(template_text, eos="<|im_end|>"))
    found = tokens.template(chat, [[turn("user", "Hi"), turn("assistant", "Hello.")]])
    assert (found.verdict == "warn") is bool(header)
    if header:
        assert repr(header) in found.remedy


def test_double_and_missing_bos_are_told_apart() -> None:
    chat = chat_of(bos=True)
    bos = chat.tokenizer.bos_token_id
    assert tokens.first_token(chat, [(bos, 9, 9)]).verdict == "ok"
    assert tokens.first_token(chat, [(bos, bos, 9)]).verdict == "fail"
    assert tokens.first_token(chat, [(bos, 9), (9, 9)]).verdict == "warn"
    assert tokens.first_token(chat_of(), [(9, 9)]).verdict == "ok"


def test_token_without_an_embedding_fails(source: Artifact) -> None:
    chat = chat_of()
    assert tokens.vocabulary(chat, [(1, 2)], source.model_dir).verdict == "ok"
    assert tokens.vocabulary(chat, [(1, len(chat.tokenizer))], source.model_dir).verdict == "fail"
    assert tokens.vocabulary(chat, [(1,) * 257], source.model_dir).verdict == "warn"


def test_positions_are_read_under_every_name(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    GPT2Config(n_positions=77).save_pretrained(tmp_path)
    assert num_positions(tmp_path) == 77
    LlamaConfig(max_position_embeddings=33).save_pretrained(tmp_path)
    assert num_positions(tmp_path) == 33
    config.write_text(json.dumps({"text_config": {"max_position_embeddings": 9}, "n_ctx": 4}))
    assert num_positions(tmp_path) == 9
    config.write_text("{}")
    assert num_positions(tmp_path) is None
    config.unlink()
    assert num_positions(tmp_path) is None


def test_row_of_a_classifier_needs_the_positions_of_its_model() -> None:
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
    sizes |= {"num_hidden_layers": 1, "vocab_size": 30, "max_position_embeddings": 20}
    # RoBERTa's 20 positions are enough for 18 tokens: it counts from 2.
    model = RobertaModel(RobertaConfig(**sizes, pad_token_id=1)).eval()
    for length, verdict in ((18, "ok"), (19, "fail")):
        rows = [TokenRow((5,) * length, (False,) * length)]
        task: Any = SimpleNamespace(rows=rows, heldout=[])
        assert classes.tokens(task, model).verdict == verdict
        with nullcontext() if verdict == "ok" else pytest.raises((IndexError, RuntimeError)):
            model(torch.tensor([rows[0].input_ids]))


def test_model_that_is_not_the_artifact_fails(source: Artifact) -> None:
    module = policy(source)
    (check,) = offline.start_checks(SFT, module.model, source)
    assert check[1]().verdict == "ok"
    with torch.no_grad():
        module.model.model.layers[1].mlp.down_proj.weight[0, 0] += 1e-4
    found = check[1]()
    assert found.verdict == "fail"
    assert "layers.1.mlp.down_proj" in found.remedy


@pytest.mark.parametrize(
    ("loss", "options", "value"),
    [
        ("sigmoid", {}, math.log(2)),
        ("sigmoid", {"label_smoothing": 0.2}, math.log(2)),
        ("robust", {"label_smoothing": 0.2}, math.log(2)),
        ("hinge", {}, 1.0),
        # (0 - 1 / (2 * 0.25))^2 = 2^2
        ("ipo", {"beta": 0.25}, 4.0),
    ],
)
def test_first_dpo_loss_is_that_of_equal_models(
    source: Artifact, loss: str, options: dict, value: float
) -> None:
    spec = DpoStage(kind="dpo", init="x", data=[{"path": "x"}], loss=loss, **options)
    module = policy(source)
    task = dpo_task(spec, module)
    rows = offline.few_rows(spec, task)
    assert offline.loss_of(module, task, [rows]) == pytest.approx(value, abs=1e-5)
    checks = offline.loss_checks(spec, module, task, vocab_size=1000)
    assert {line.verdict for line in examine(checks)} == {"ok"}


def test_reference_that_is_another_model_fails(source: Artifact) -> None:
    module = policy(source)
    task = dpo_task(DPO, module)
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(10.0)
    verdicts = {
        line.name: line.verdict
        for line in examine(offline.loss_checks(DPO, module, task, vocab_size=1000))
    }
    assert verdicts == {
        "first loss": "fail",
        "packing": "ok",
        "own forward": "ok",
        "reference": "fail",
    }


@pytest.mark.parametrize(("moved", "verdict"), [(0.0, "ok"), (0.3, "fail")])
def test_reference_in_bfloat16_is_held_to_the_rounding_of_the_model(source, moved, verdict) -> None:
    spec = DPO.model_copy(update={"dtype": "bfloat16"})
    module = LogprobModel(load_policy(source.model_dir, dtype="bfloat16"))
    task = dpo_task(spec, module)
    # Some nats a token away from the start: 0.35 were once called rounding.
    pairs = [
        replace(pair, ref_chosen=pair.ref_chosen - moved * sum(pair.pair.chosen.trained))
        for pair in task.rows
    ]
    found = offline.reference(spec, module, replace(task, rows=pairs), rows=pairs)
    assert found.verdict == verdict


def test_rows_that_see_each_other_fail(source: Artifact) -> None:
    class Leaky(nn.Module):
        """Forget where sequences begin, as attention over a pack without a mask does."""

        def __init__(self, inner: LogprobModel) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, input_ids, position_ids, **options):
            return self.inner(input_ids, torch.arange(input_ids.shape[1])[None], **options)

    task, inner = sft_task(), policy(source)
    # Random weights of 0.02 hardly attend; these do.
    with torch.no_grad():
        for p in inner.parameters():
            p.mul_(10.0)
    rows = offline.few_rows(SFT, task)
    assert offline.packing(SFT, inner, task, rows=rows).verdict == "ok"
    assert offline.packing(SFT, Leaky(inner), task, rows=rows).verdict == "fail"


def test_margins_that_no_pair_has_fail() -> None:
    pairs = [WeightedPair(chat_of().pair_row(e), (1.0,)) for e in EXAMPLES]
    task = OfflineTask(pairs, [], len, collate_pairs, sft.sft_loss)
    assert offline.margins(task).verdict == "fail"
    first = WeightedPair(replace(pairs[0].pair, margin=0.5), (1.0,))
    some = replace(task, rows=[first, *pairs[1:]])
    assert offline.margins(some).value.startswith("1 of 6")


def test_model_worse_than_chance_is_a_warning(source: Artifact) -> None:
    task, module = sft_task(), policy(source)
    rows = offline.few_rows(SFT, task)
    size = module.model.config.vocab_size
    # A model of 261 tokens near uniform has ln 261 = 5.56 nats.
    assert offline.first_loss(SFT, module, task, rows=rows, vocab_size=300).verdict == "ok"
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(10.0)
    found = offline.first_loss(SFT, module, task, rows=rows, vocab_size=size)
    assert found.verdict == "warn"


def test_a_confident_model_warns_only_with_the_tokenizer_of_another(source: Artifact) -> None:
    """The form of the responses is new: worse than chance, but better than other tokens."""
    module, learned = policy(source), sft_task()
    size = module.model.config.vocab_size
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    module.train()
    for _ in range(60):
        batch = learned.collate(learned.rows, learned.rows)
        optimizer.zero_grad()
        learned.loss_fn(module, batch)[0].backward()
        optimizer.step()
    with torch.no_grad():
        module.model.model.norm.weight.mul_(12.0)

    def found(shift: int) -> Finding:
        new = [turn("assistant", "it is two, what comes then")]
        rows = [chat_of().sft_row(replace(e, completion=new)) for e in EXAMPLES]
        # As of another tokenizer: each token has the id of another one.
        rows = [replace(r, input_ids=tuple((i + shift) % size for i in r.input_ids)) for r in rows]
        task = replace(learned, rows=rows)
        return offline.first_loss(SFT, module, task, rows=rows[:4], vocab_size=size)

    assert float(found(0).value.split()[0]) > math.log(size)
    assert found(0).verdict == "ok"
    assert found(101).verdict == "warn"


def test_spread_takes_examples_evenly_over_all() -> None:
    kept = spread(range(1000), MAX_SEEN)
    assert len(kept) == MAX_SEEN
    assert kept[-1] > 900
    assert {b - a for a, b in pairwise(kept)} == {31, 32}
    assert spread([1, 2, 3], MAX_SEEN) == [1, 2, 3]
    assert spread(range(7), 4) == [0, 1, 3, 5]
    assert spread([], MAX_SEEN) == []


def test_error_of_a_check_becomes_a_failed_line() -> None:
    def broken() -> Finding:
        raise DataError("b.jsonl:4: no turns")

    (line,) = examine([("rows", broken)])
    assert (line.verdict, line.remedy) == ("fail", "b.jsonl:4: no turns")


def fake_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checks: list[Check]
) -> tuple[StageContext, list[str]]:
    """Put a stage of two checks in the place of sft; return its context and what happens in it."""
    happened: list[str] = []
    recipe = Recipe(name="r", stages={"sft": SFT})
    (tmp_path / "sft").mkdir()
    context = StageContext(recipe, "sft", tmp_path, 0)

    def train() -> StageResult:
        happened.append("trained")
        return StageResult({}, notes={"late": 2})

    def prepare(spec: Spec, context: StageContext) -> Prepared:
        context.resources.callback(happened.append, "closed")
        return Prepared(train=train, checks=checks, notes={"early": 1})

    monkeypatch.setattr(sft, "prepare", prepare)
    return context, happened


BAD = ("bos", lambda: Finding("3 rows with two", "never", "fail", "take one out"))
FINE = ("fine", lambda: Finding("1"))


def test_failed_line_stops_the_stage_and_the_card_is_kept(tmp_path, monkeypatch) -> None:
    context, happened = fake_stage(tmp_path, monkeypatch, [FINE, BAD])
    with pytest.raises(PreflightError, match="bos: 3 rows with two: take one out") as caught:
        prepare_and_train(SFT, context)
    assert caught.value.exit_code == 2
    assert happened == ["closed"]
    card = read_card(json.loads((tmp_path / "sft" / "preflight.json").read_text()))
    assert [(line.name, line.verdict) for line in card.lines] == [("fine", "ok"), ("bos", "fail")]


def test_a_stage_trains_after_its_checks_and_then_gives_back_what_it_holds(
    tmp_path, monkeypatch
) -> None:
    context, happened = fake_stage(tmp_path, monkeypatch, [FINE])
    assert prepare_and_train(SFT, context).notes == {"early": 1, "late": 2}
    assert happened == ["trained", "closed"]


def test_deep_check_ends_with_the_card_and_writes_nothing(tmp_path, monkeypatch) -> None:
    context, happened = fake_stage(tmp_path, monkeypatch, [BAD])
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    card = check_stage(context.recipe, "sft", inputs=tmp_path, scratch=scratch)
    assert [line.verdict for line in card.lines] == ["fail"]
    assert happened == ["closed"]
    assert not list(scratch.iterdir())
    assert not (tmp_path / "sft" / "preflight.json").exists()


CARD = Card(
    "sft", "sft", [Line("bos", "<2>", "1", "warn", "cut it", 0.25), Line("x", "1", "", "ok")]
)


def test_table_shows_remedies_of_what_is_not_ok() -> None:
    assert table(CARD) == [
        "sft (sft): 1 ok, 1 warn, 0.2 s",
        "  warn     bos  <2>  (1)",
        "                -> cut it",
        "  ok       x    1",
    ]


def test_report_shows_the_card_escaped(tmp_path: Path) -> None:
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "preflight.json").write_text(json.dumps(CARD.plain()))
    stage = StageRecord("sft", "sft", "done", ())
    run = RunRecord(tmp_path, Recipe(name="r", stages={"sft": SFT}), [stage], {}, [])
    shown = preflight(run)
    assert isinstance(shown, Markup)
    assert "&lt;2&gt;" in shown
    assert "cut it" in shown
    (tmp_path / "sft" / "preflight.json").write_text("{}")
    assert preflight(run) is None


def test_rows_without_the_column_of_a_reward_are_counted() -> None:
    """They cannot be scored; the known answers come from the other rows."""
    plain = {"kind": "exact_match", "column": "answer"}
    values = ["4", None, "6", None, None]
    rows = [PromptRow((5,), "say", {"answer": v}, source=f"a:{i}") for i, v in enumerate(values)]
    spec = TypeAdapter(RewardSpec).validate_python(plain)

    def line(prompts: list[PromptRow]) -> Line:
        rewards = [build_reward(plain)]
        (found,) = examine(reward_checks("reward", [spec], rewards, prompts=prompts, answers=None))
        return found

    assert line(rows).verdict == "warn"
    assert "right above wrong in 2 of 2, 3 of 5 rows have no 'answer'" in line(rows).value
    assert "cannot be scored, and are left out" in line(rows).remedy
    assert line([rows[0], rows[2]]).verdict == "ok"
    assert line(rows[3:]).verdict == "fail"
    assert "a:3: no column 'answer', as in all rows" in line(rows[3:]).remedy


def test_reward_is_held_to_known_answers() -> None:
    rows = [
        PromptRow(
            (5,),
            f"say {i}",
            {"answer": str(i), "label": ("safe", "unsafe")[i % 2]},
            source=f"a.jsonl:{i}",
        )
        for i in range(4)
    ]

    def verdict(**plain) -> str:
        spec = TypeAdapter(RewardSpec).validate_python(plain)
        (line,) = examine(
            reward_checks("reward", [spec], [build_reward(plain)], prompts=rows, answers=None)
        )
        return line.verdict

    assert verdict(kind="math") == "ok"
    assert verdict(kind="exact_match", pattern=r"so (\d+)\.") == "ok"
    assert verdict(kind="length", target=3, limit=9) == "ok"
    assert verdict(kind="refusal", declines=["unsafe"]) == "ok"
    assert verdict(kind="refusal", declines=["unsafe"], column="risk") == "fail"
    # No text can satisfy a pattern that wants letters where the column holds numbers.
    assert verdict(kind="exact_match", pattern="so ([a-z]+)") == "fail"
    assert verdict(kind="math", column="solution") == "fail"
    # What nothing is known of has no line, rather than one that cannot fail.
    spec = TypeAdapter(RewardSpec).validate_python({"kind": "regex", "pattern": "x"})
    assert not reward_checks(
        "score", [spec], [build_reward(spec.model_dump())], prompts=rows, answers=None
    )
