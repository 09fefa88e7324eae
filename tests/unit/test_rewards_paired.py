"""Scorers that are encoders: their texts, token types, padding, positions, files and readers."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModel,
    BertModel,
    Olmo2Config,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

sys.path.insert(0, str(Path(__file__).parent))
from small_encoders import bert_config, wordpiece

from align.core.errors import ArtifactError, DataError
from align.core.types import Example
from align.data.fit import fit_rows
from align.data.render.encoder_pairs import PairedFormat
from align.models.heads import TextValues, scorer_on_encoder
from align.models.padded import right_padded
from align.preflight.paired import tokens, whole_texts
from align.stages.reward.tasks import final_scores
from align.training.batch import pack_pairs, pair_length
from reward_models import build_reward
from reward_models.base import plain_text
from reward_models.paired import pair_ids, separator_of, token_types
from reward_models.scalar import RewardModel, drop_pooler, score_token_ids, token_values
from reward_models.serving import build_app

TEXTS = [
    ("which colour", "red"),
    ("which colour", "the blue is good"),
    ("a", ""),
    ("", "bad"),
    ("the red is a colour is it", "blue? no."),
]


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def scorer(*, num_heads: int = 1, positions: int = 64) -> RewardModel:
    torch.manual_seed(0)
    tokenizer = wordpiece()
    encoder = BertModel(bert_config(tokenizer, positions=positions), add_pooling_layer=False)
    separator = tokenizer.sep_token_id
    model = RewardModel(encoder, 32, num_heads=num_heads, reads="first", separator=separator)
    return model.eval()


def by_hand(model: RewardModel, prompt: str, answer: str) -> list[float]:
    """Score one text in float64, as transformers' own documentation has it."""
    encoder = BertModel(model.config, add_pooling_layer=False).double().eval()
    encoder.load_state_dict(model.backbone.state_dict())
    given = wordpiece()([prompt], [answer], return_tensors="pt")
    with torch.no_grad():
        first = encoder(**given).last_hidden_state[0, 0]
    return (model.head.weight.detach().double() @ first).tolist()


def rows_of(texts: list[tuple[str, str]]) -> list[list[int]]:
    return [pair_ids(wordpiece(), *text)[0] for text in texts]


def test_ids_and_types_are_those_of_the_tokenizer_itself():
    tokenizer = wordpiece()
    for prompt, answer in TEXTS:
        given = tokenizer([prompt], [answer])
        ids, start = pair_ids(tokenizer, prompt, answer)
        assert ids == given["input_ids"][0]
        types = token_types(torch.tensor([ids]), tokenizer.sep_token_id)[0].tolist()
        assert types == given["token_type_ids"][0]
        assert types[:start] == [0] * start
        assert all(types[start:])
    assert separator_of(tokenizer) == tokenizer.sep_token_id


def test_one_turn_is_its_content_and_several_are_lines_with_their_roles():
    alone = [turn("user", "which colour")]
    several = [turn("system", "a"), *alone]
    assert plain_text("which colour") == plain_text(alone) == "which colour"
    assert plain_text(several) == "system: a\nuser: which colour"
    said = [turn("assistant", "red")]
    assert pair_ids(wordpiece(), alone, said) == pair_ids(wordpiece(), "which colour", "red")


def test_no_text_can_write_a_separator():
    tokenizer = wordpiece()
    ids, start = pair_ids(tokenizer, "a [SEP] bad", "good [SEP] [CLS]")
    assert ids.count(tokenizer.sep_token_id) == 2
    assert ids.index(tokenizer.sep_token_id) == start - 1
    assert ids.count(tokenizer.cls_token_id) == 1


def word_tokenizer(pair: str | None) -> PreTrainedTokenizerFast:
    ids = {name: i for i, name in enumerate(["<s>", "<pad>", "</s>", "<unk>", "a", "b", "c"])}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair=pair, special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def test_token_types_of_another_layout_are_refused():
    assert separator_of(word_tokenizer("<s> $A </s> </s> $B </s>")) is None
    with pytest.raises(ValueError, match="puts no token between the two texts"):
        separator_of(word_tokenizer(None))
    with pytest.raises(ValueError, match="expected 0 up to the first separator"):
        separator_of(word_tokenizer("$A </s> $B:1 </s>:1 <s>:2"))


@pytest.mark.parametrize("micro_tokens", [1, 40, 10_000])
def test_score_is_the_head_on_the_first_state_whatever_the_batch(micro_tokens: int):
    model = scorer(num_heads=2)
    rows = rows_of(TEXTS)
    found = [v.tolist() for v in token_values(model, rows, micro_tokens=micro_tokens)]
    for values, row, text in zip(found, rows, TEXTS, strict=True):
        assert len(values) == len(row)
        for value in values:  # every token has the score of its text
            assert value == pytest.approx(by_hand(model, *text), abs=1e-5)


def test_scores_would_be_others_without_the_token_types():
    model = scorer()
    with_types = score_token_ids(model, rows_of(TEXTS[:2]))
    model.separator = None
    assert score_token_ids(model, rows_of(TEXTS[:2])) != pytest.approx(with_types, abs=1e-2)


def examples() -> list[Example]:
    return [
        Example(
            [turn("user", "which colour")],
            [turn("assistant", "red")],
            [turn("assistant", "the blue is bad")],
            source="a:1",
        ),
        Example("a", "good", "bad", margin=0.5, label_prob=0.8, source="a:2"),
    ]


def test_packed_pairs_score_as_each_text_alone():
    model = scorer(num_heads=2)
    pairs = [PairedFormat(wordpiece()).pair_row(e) for e in examples()]
    batch = pack_pairs(pairs)
    with torch.no_grad():
        values = TextValues(model)(batch.input_ids, batch.position_ids)
    assert values.shape == (1, batch.input_ids.shape[1], 2)
    texts = [
        ("which colour", "red"),
        ("which colour", "the blue is bad"),
        ("a", "good"),
        ("a", "bad"),
    ]
    expected = torch.tensor([by_hand(model, *text) for text in texts])
    torch.testing.assert_close(final_scores(values, batch), expected.float(), atol=1e-5, rtol=0)


def test_padding_holds_each_sequence_from_the_first_column():
    laid = right_padded(torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([[0, 1, 0, 1, 2]]), fill=4)
    assert laid.input_ids.tolist() == [[5, 6, 4], [7, 8, 9]]
    assert laid.mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert laid.input_ids[laid.number, laid.at].tolist() == [5, 6, 7, 8, 9]


def test_training_and_scoring_read_the_same_ids(tmp_path: Path):
    model = scorer()
    model.save(tmp_path, tokenizer=wordpiece())
    reward = build_reward({"kind": "scalar", "model": str(tmp_path)})
    for example in examples():
        pair = PairedFormat(wordpiece()).pair_row(example)
        for side, said in ((pair.chosen, example.completion), (pair.rejected, example.rejected)):
            (row,) = reward.rows([example.prompt], [said], {"prompt_ids": [[1]]})
            assert tuple(row) == side.input_ids
        assert pair.chosen.trained == tuple(
            i >= pair.num_prompt_tokens for i in range(len(pair.chosen.input_ids))
        )
        assert pair.margin == (example.margin or 0.0)
        assert pair.label_prob == example.label_prob


def test_pairs_are_never_cut_and_their_length_counts_the_padding(tmp_path: Path):
    pairs = [PairedFormat(wordpiece()).pair_row(e) for e in examples()]
    # [CLS] which colour [SEP] red [SEP] and four words in the other answer: 6 and 9 tokens.
    assert pair_length(pairs[0]) == 18
    ledger = tmp_path / "ledger.jsonl"
    kept, lost = fit_rows(pairs, max_length=8, max_lost_frac=1.0, what="pairs", ledger=ledger)
    assert (kept, lost) == ([pairs[1]], 1)
    assert '"source": "a:1", "reason": "too long", "tokens": 9' in ledger.read_text()


def test_rows_without_two_answers_are_refused():
    form = PairedFormat(wordpiece())
    with pytest.raises(DataError, match="a:1: chosen and rejected have the same tokens"):
        form.pair_row(Example("a", "good", "GOOD", source="a:1"))
    with pytest.raises(DataError, match="a:1: there is no completion to score"):
        form.sft_row(Example("a", "", source="a:1"))


def test_saved_scorer_scores_the_same_and_too_long_texts_are_invalid(tmp_path: Path):
    model = scorer(positions=8)
    model.set_normalization(mean=0.25, std=2.0)
    model.save(tmp_path, tokenizer=wordpiece())
    again = RewardModel.load(tmp_path)
    assert (again.reads, again.separator, again.max_tokens) == ("first", model.separator, 8)
    assert again.extra == {}
    assert score_token_ids(again, rows_of(TEXTS[:1])) == score_token_ids(model, rows_of(TEXTS[:1]))
    reward = build_reward({"kind": "scalar", "model": str(tmp_path)})
    # Eight tokens fit: [CLS] a [SEP] good good good good [SEP].
    answers = ["good " * 5, "good " * 4]
    scores = reward(
        prompts=["a", "a"], completions=answers, prompt_ids=[[1], [1]], completion_ids=[[2], [2]]
    )
    assert scores[0] is None
    assert scores[1] == pytest.approx((by_hand(model, "a", answers[1])[0] - 0.25) / 2.0, abs=1e-5)
    assert reward.invalid == {"longer than the 8 positions of the scorer": 1}


def roberta(folder: Path) -> Any:
    tokenizer = word_tokenizer("<s> $A </s> </s> $B </s>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=7,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=12,
        type_vocab_size=1,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        initializer_range=0.2,
    )
    model = RobertaModel(config).eval()
    model.save_pretrained(folder)
    return model


def test_positions_that_begin_behind_the_pad_id_are_counted(tmp_path: Path):
    whole = roberta(tmp_path)
    model, lacking = scorer_on_encoder(tmp_path, dtype="float32")
    assert (model.max_tokens, model.separator, lacking) == (10, None, [])
    row = [0, 4, 2, 2, *[5] * 5, 2]
    short = [0, 4, 2, 2, 5, 2]
    for ids, score in zip((row, short), score_token_ids(model, [row, short]), strict=True):
        with torch.no_grad():
            first = whole(input_ids=torch.tensor([ids])).last_hidden_state[0, 0]
        assert score == pytest.approx(float(model.head.weight.detach() @ first), abs=1e-5)
    with pytest.raises((IndexError, RuntimeError)):  # no position is made up
        score_token_ids(model, [[*row, 2]])


def test_a_model_that_is_no_encoder_is_refused(tmp_path: Path):
    from transformers import T5Config, T5Model

    word_tokenizer(None).save_pretrained(tmp_path)
    T5Model(T5Config(vocab_size=7, d_model=8, d_ff=8, num_layers=1, num_heads=1)).save_pretrained(
        tmp_path
    )
    with pytest.raises(ArtifactError, match="T5Model is an encoder-decoder"):
        scorer_on_encoder(tmp_path, dtype="float32")


def test_pooler_is_left_out(tmp_path: Path):
    torch.manual_seed(0)
    model = AutoModel.from_config(bert_config(wordpiece()))
    assert any(name.startswith("pooler.") for name in model.state_dict())
    drop_pooler(model)
    assert not any(name.startswith("pooler.") for name in model.state_dict())
    assert model(torch.tensor([[2, 3]])).pooler_output is None


KINDS = {
    "albert": {"embedding_size": 16, "num_hidden_groups": 1},
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "type_vocab_size": 0,
    },
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 2},
    "electra": {"embedding_size": 16},
    "modernbert": {"global_attn_every_n_layers": 2, "local_attention": 8},
}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_encoders_score_a_text_alike_alone_and_in_a_padded_batch(kind: str, tmp_path: Path):
    tokenizer = wordpiece()
    common = {} if kind == "distilbert" else SIZES
    special = {
        "pad_token_id": 0,
        "cls_token_id": 2,
        "sep_token_id": 3,
        "bos_token_id": 2,
        "eos_token_id": 3,
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, vocab_size=len(tokenizer), initializer_range=0.2, **common, **KINDS[kind], **special
    )
    encoder = AutoModel.from_config(config).eval()
    encoder.save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    model, lacking = scorer_on_encoder(tmp_path / "encoder", dtype="float32")
    typed = kind in ("albert", "electra")
    assert (lacking, model.separator) == ([], tokenizer.sep_token_id if typed else None)
    assert model.max_tokens == {"distilbert": 512}.get(kind, 64)
    model.save(tmp_path / "scorer", tokenizer=tokenizer)
    again = RewardModel.load(tmp_path / "scorer")
    scores = score_token_ids(again, rows_of(TEXTS))
    for (prompt, answer), score in zip(TEXTS, scores, strict=True):
        given = tokenizer([prompt], [answer], return_tensors="pt", return_token_type_ids=typed)
        with torch.no_grad():
            first = encoder(**given).last_hidden_state[0, 0]
        assert score == pytest.approx(float(model.head.weight.detach() @ first), abs=1e-4)
    half = build_reward({"kind": "scalar", "model": str(tmp_path / "scorer"), "dtype": "bfloat16"})
    said = half(prompts=[p for p, _ in TEXTS], completions=[a for _, a in TEXTS])
    assert said == pytest.approx(scores, abs=0.3)


def test_a_model_whose_first_token_sees_nothing_fails_its_preflight(tmp_path: Path):
    backend = word_tokenizer("<s> $A </s> </s> $B </s>")
    backend.save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = Olmo2Config(
        vocab_size=7,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    AutoModel.from_config(config).save_pretrained(tmp_path)
    model, _ = scorer_on_encoder(tmp_path, dtype="float32")
    rows = [PairedFormat(backend).sft_row(Example("a", text)) for text in ("b", "c", "b c")]
    found = whole_texts(model, rows)
    assert (found.verdict, found.value) == ("fail", "3 texts have 1 different scores")


def test_tokens_without_an_embedding_or_a_position_fail_the_preflight():
    model, form = scorer(positions=8), PairedFormat(wordpiece())
    short = form.sft_row(Example("a", "good"))
    assert tokens(form, model, [short]).verdict == "ok"
    assert tokens(form, model, [form.sft_row(Example("a", "\u2603"))]).verdict == "warn"
    long = tokens(form, model, [short, form.sft_row(Example("a", "good " * 5))])
    assert (long.verdict, long.remedy) == ("fail", "set max_length: 8 to drop such rows")
    strange = replace(short, input_ids=(*short.input_ids[:-1], len(form.tokenizer)))
    assert tokens(form, model, [strange]).verdict == "fail"


def test_a_server_of_texts_refuses_token_ids(tmp_path: Path):
    from fastapi.testclient import TestClient

    scorer().save(tmp_path, tokenizer=wordpiece())
    reward = build_reward({"kind": "scalar", "model": str(tmp_path)})
    client = TestClient(build_app(reward, {}, takes_ids=False))
    body: dict[str, Any] = {"prompts": ["a"], "completions": ["good"]}
    scores = client.post("/score", json=body).json()["scores"]
    assert scores == reward(prompts=["a"], completions=["good"])
    refused = client.post("/score", json={**body, "prompt_ids": [[1]], "completion_ids": [[2]]})
    assert refused.status_code == 422
    assert "an encoder and reads texts" in refused.json()["error"]
