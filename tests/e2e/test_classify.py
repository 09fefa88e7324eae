"""Stages encoder and classify: decoders and BERT, read back by transformers and peft alone."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForPreTraining,
    BertModel,
    PreTrainedTokenizerFast,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "numeric"))
sys.path.insert(0, str(Path(__file__).parent))
import alone
import stage_runs as runs
from tuned_stages import TUNINGS, make_base

from align.core.artifacts import Artifact, read_artifact, write_manifest
from align.core.errors import ArtifactError, DataError
from align.recipe.schema import Recipe
from align.recipe.schema.tuning import METHODS as CLASSES
from align.stages.base import StageContext, _manifest_head, prepare_and_train
from align.stages.tools.deep_check import check_recipe

WORDS = {
    "colour": ["red", "blue", "green"],
    "animal": ["cat", "dog", "cow"],
    "number": ["one", "two"],
}
HELD_OUT = "now the {}"
USER_TURN = {"role": "user", "content": "a"}
FRAMES = ["{}", "the {}", "this is {} here", "I said {} and {} again", "a {} in the middle of all"]
CASES = [
    *(("base", m) for m in ("full", "head", "lora", "qlora", "bottleneck", "prefix", "loreft")),
    *(("bert", m) for m in ("full", "head", "lora", "qlora", "bottleneck", "ia3")),
]
ALL: dict[str, Any] = {
    "base": {"kind": "base", "path": "x"},
    "bert": {"kind": "encoder", "path": "x"},
    "poolerless": {"kind": "encoder", "path": "x"},
}


def write_rows(path: Path, frames: list[str]) -> Path:
    rows = [
        {"text": frame.replace("{}", word), "label": label}
        for label, words in WORDS.items()
        for word in words
        for frame in frames
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def save_bert(folder: Path, *, pooler: bool = True) -> str:
    words = " ".join(
        [HELD_OUT, *FRAMES, *(word for group in WORDS.values() for word in group)]
    ).split()
    vocabulary = {"[PAD]", "[UNK]", "[CLS]", "[SEP]", *words}
    ids = {word: i for i, word in enumerate(sorted(vocabulary))}
    plain = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    plain.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(t, ids[t]) for t in ("[CLS]", "[SEP]")]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(ids),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        pad_token_id=ids["[PAD]"],
        initializer_range=0.1,
    )
    model = BertForPreTraining(config) if pooler else BertModel(config, add_pooling_layer=False)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Hold a decoder, two encoders and rows of three classes."""
    with alone.world_of_one():
        place = make_base(tmp_path_factory.mktemp("classify"))
        write_rows(place / "train.jsonl", FRAMES)
        write_rows(place / "heldout.jsonl", [HELD_OUT])
        for name in ("bert", "poolerless"):
            path = save_bert(place / f"{name}_files", pooler=name == "bert")
            run_stage(place, name, {"kind": "encoder", "path": path})
        yield place


def run_stage(folder: Path, name: str, plain: dict[str, Any]) -> Artifact:
    """Run a stage in this process as the launcher's would."""
    recipe = Recipe.model_validate({"name": "t", "stages": {**ALL, name: plain}})
    context = StageContext(recipe, name, folder, 0)
    context.out.mkdir(parents=True, exist_ok=True)
    spec = recipe.stages[name]
    result = prepare_and_train(spec, context)
    head = _manifest_head(context, spec)
    write_manifest(context.out, head | dict(result.notes) | {"metrics": dict(result.metrics)})
    return read_artifact(context.out, head["kind"])


def classify(folder: Path, name: str, init: str, method: str, **more: Any) -> Artifact:
    tuning = {k: v for k, v in TUNINGS.get(method, {}).items() if k != "last"}
    plain = {
        "kind": "classify",
        "init": init,
        "steps": 4,
        "batch_size": 8,
        "micro_tokens": 64,
        "data": [{"path": str(folder / "train.jsonl")}],
        "heldout": [{"path": str(folder / "heldout.jsonl")}],
        "optim": {"learning_rate": 1e-2, "schedule": "constant", "warmup_frac": 0.0},
        "tuning": {"method": method, **tuning},
        **more,
    }
    return run_stage(folder, name, plain)


_DONE: dict[tuple[str, str], Artifact] = {}


def artifact(folder: Path, init: str, method: str) -> Artifact:
    """Train a classifier once."""
    if (init, method) not in _DONE:
        _DONE[init, method] = classify(folder, f"{init}_{method}", init, method)
    return _DONE[init, method]


def predictions(found: Artifact) -> list[dict[str, Any]]:
    text = (found.path / "predictions.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def by_transformers(found: Artifact, texts: list[str]) -> list[dict[str, float]]:
    """Give the probabilities of each text by itself, without padding or code of this suite."""
    model = AutoModelForSequenceClassification.from_pretrained(found.model_dir)
    method = found.manifest["spec"]["tuning"]["method"]
    if (found.path / "adapter").is_dir() and not CLASSES[method].merges:
        name = model.base_model_prefix
        tuned = PeftModel.from_pretrained(getattr(model, name), str(found.path / "adapter"))
        setattr(model, name, tuned)
    tokenizer = AutoTokenizer.from_pretrained(found.model_dir)
    model.eval()
    said = []
    for text in texts:
        with torch.no_grad():
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0].double()
        names = (model.config.id2label[i] for i in range(len(logits)))
        said.append(dict(zip(names, logits.softmax(-1).tolist(), strict=True)))
    return said


@pytest.mark.parametrize(("init", "method"), CASES)
def test_held_out_predictions_are_those_of_transformers(folder, init, method):
    found = artifact(folder, init, method)
    texts = [HELD_OUT.format(word) for words in WORDS.values() for word in words]
    lines, plain = predictions(found), by_transformers(found, texts)
    for line, expected in zip(lines, plain, strict=True):
        assert line["probs"] == pytest.approx(expected, abs=2e-5)
        assert line["predicted"] == max(expected, key=expected.get)
    right = [line["predicted"] == line["label"] for line in lines]
    assert found.manifest["metrics"]["eval/accuracy"] == pytest.approx(sum(right) / len(right))
    assert found.manifest["classes"] == sorted(WORDS)
    if method == "qlora":
        losses = [-math.log(p[line["label"]]) for line, p in zip(lines, plain, strict=True)]
        said = found.manifest["metrics"]["eval/loss_saved"]
        assert said == pytest.approx(sum(losses) / len(losses), abs=2e-5)
        assert said != found.manifest["metrics"]["eval/loss"]


@pytest.mark.parametrize("init", ["base", "bert"])
def test_a_head_alone_leaves_the_model_below_it_as_it_was(folder, init):
    kept = load_file(artifact(folder, init, "head").model_dir / "model.safetensors")
    before = load_file(folder / init / "model" / "model.safetensors")
    heads = {name for name in kept if name.split(".")[0] in ("score", "classifier")}
    assert heads
    for name in kept.keys() - heads:
        assert torch.equal(kept[name], before[name]), name
    moved = load_file(artifact(folder, init, "full").model_dir / "model.safetensors")
    assert not any(torch.equal(moved[name], kept[name]) for name in heads)


@pytest.mark.parametrize(("init", "method"), [("base", "full"), ("bert", "lora")])
def test_classes_are_learnt_that_one_word_tells(folder, init, method):
    optim = {"learning_rate": 3e-3, "warmup_frac": 0.1}
    found = classify(folder, f"learnt_{init}", init, method, steps=80, optim=optim)
    metrics = found.manifest["metrics"]
    assert metrics["train/accuracy"] == 1.0
    assert metrics["eval/accuracy"] > 0.6  # 3 of 8 by chance
    confusion = torch.tensor(found.manifest["heldout"]["confusion"])
    assert confusion.sum(1).tolist() == [3, 3, 2]
    assert int(confusion.trace()) == round(8 * metrics["eval/accuracy"])


def test_a_stage_resumed_from_a_checkpoint_ends_with_the_same_bytes(folder):
    options = {"checkpoint_every": 2, "steps": 6, "label_smoothing": 0.1, "keep": {"dropout": 0.2}}
    found = classify(folder, "resumed", "bert", "full", **options)
    weights = found.model_dir / "model.safetensors"
    whole = weights.read_bytes()
    newest = max((found.path / "checkpoints").iterdir())
    shutil.rmtree(newest)
    weights.unlink()
    again = classify(folder, "resumed", "bert", "full", **options)
    assert weights.read_bytes() == whole
    assert again.manifest["metrics"]["eval/loss"] == found.manifest["metrics"]["eval/loss"]


def test_early_stopping_keeps_and_judges_the_best_weights(folder):
    keep = {"early_stopping": {"metric": "eval/accuracy", "patience": 2, "min_delta": 2.0}}
    found = classify(folder, "stopped", "bert", "full", steps=9, eval_every=1, keep=keep)
    assert found.manifest["early_stopping"]["best_step"] == 1
    texts = [HELD_OUT.format(word) for words in WORDS.values() for word in words]
    for line, expected in zip(predictions(found), by_transformers(found, texts), strict=True):
        assert line["probs"] == pytest.approx(expected, abs=2e-5)


def test_weights_that_would_stay_random_are_refused(folder):
    with pytest.raises(ArtifactError, match=r"no weights for bert\.pooler.*stay random.*Use full"):
        classify(folder, "refused", "poolerless", "head")
    found = classify(folder, "poolerless_full", "poolerless", "full")
    assert found.manifest["metrics"]["eval/loss"] > 0.0


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"text": "a", "label": "x"}], r"a\.jsonl:1: every training row has class 'x'"),
        (
            [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}],
            r"heldout\.jsonl:1: class 'colour' is in no training row; known classes are x, y",
        ),
        ([{"text": "a", "label": None}], r"a\.jsonl:1: label: expected the name .* found None"),
        ([{"text": "a"}], r"a\.jsonl:1: no known format has the fields \['text'\].*text, label"),
        (
            [{"messages": [{"role": "system", "content": "s"}, USER_TURN], "label": "x"}],
            r"a\.jsonl:1: a conversation, but the tokenizer has no chat template",
        ),
    ],
)
def test_rows_that_cannot_be_classes_are_named(folder, tmp_path, rows, said):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(DataError, match=said):
        classify(folder, "bad", "bert", "full", data=[{"path": str(path)}])


def test_one_user_turn_is_plain_text_to_an_encoder(folder, tmp_path):
    losses = []
    for name in ("text", "messages", "prompt"):
        rows = [
            {name: text if name == "text" else [{**USER_TURN, "content": text}], "label": label}
            for text, label in (("red", "x"), ("two", "y"))
        ]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        found = classify(
            folder, f"one_{name}", "bert", "full", data=[{"path": str(path)}], heldout=[]
        )
        losses.append(found.manifest["metrics"]["train/loss"])
    assert losses == [losses[0]] * 3


def test_conversations_and_numbered_classes_go_through_the_chat_template(folder, tmp_path):
    path = tmp_path / "turns.jsonl"
    said = [({"role": "user", "content": text}, n) for text, n in (("red", 10), ("two", 9))]
    rows = [{"messages": [turn], "label": n} for turn, n in said for _ in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = classify(folder, "turns", "base", "full", data=[{"path": str(path)}], heldout=[])
    assert found.manifest["classes"] == ["9", "10"]
    assert "eval/accuracy" not in found.manifest["metrics"]


FRESH = """
import json, sys
from transformers import pipeline
ask = pipeline("text-classification", model=sys.argv[1], top_k=None)
print(json.dumps([{x["label"]: x["score"] for x in said} for said in ask(json.loads(sys.argv[2]))]))
"""


@pytest.mark.slow
def test_a_fresh_process_reads_the_same_probabilities(folder):
    found = artifact(folder, "bert", "lora")
    texts = [HELD_OUT.format(word) for words in WORDS.values() for word in words]
    command = [sys.executable, "-c", FRESH, str(found.model_dir), json.dumps(texts)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=1200)
    for line, said in zip(predictions(found), json.loads(out.stdout), strict=True):
        assert line["probs"] == pytest.approx(said, abs=2e-5)


def test_deep_check_brings_the_encoder_in_and_checks_what_is_trained_on_it(folder):
    classify = {
        "kind": "classify",
        "init": "bert",
        "steps": 4,
        "batch_size": 8,
        "data": [{"path": str(folder / "train.jsonl")}],
    }
    bert = {"kind": "encoder", "path": str(folder / "bert_files")}
    recipe = Recipe.model_validate({"name": "t", "stages": {"bert": bert, "it": classify}})
    gone = Recipe.model_validate({"name": "t", "stages": {"bert": {**bert, "path": "some/bert"}}})
    (card,) = check_recipe(gone, {})
    assert (
        "some/bert: no such folder, and it cannot be loaded from the hub" in card.failed[0].remedy
    )
    for done in ({}, {"bert": folder / "bert"}):
        cards = list(check_recipe(recipe, done))
        assert [card.stage for card in cards] == ["bert", "it"]
        assert {line.verdict for card in cards for line in card.lines} <= {"ok", "warn"}, cards


RANKS = """\
name: ranks
stages:
  base: {{kind: base, path: x}}
  bert: {{kind: encoder, path: x}}
  encoder_lora_{zero}: &it
    kind: classify
    init: {folder}/bert
    data: [{{path: {folder}/train.jsonl}}]
    heldout: [{{path: {folder}/heldout.jsonl}}]
    steps: 3
    batch_size: 8
    micro_tokens: 32
    optim: {{learning_rate: 1.0e-2, max_grad_norm: 0.05, eps: 1.0e-4}}
    tuning: {{method: lora, rank: 4}}
    zero: {{stage: {zero}}}
    ranks: {ranks}
  decoder_full_{zero}: {{<<: *it, init: {folder}/base, tuning: {{method: full}}}}
"""


@pytest.mark.slow
def test_zero_on_two_ranks_equals_one_process(folder, tmp_path):
    metrics = ("train/loss", "train/accuracy", "eval/loss", "eval/macro_f1")
    runs.two_ranks_equal_one(
        RANKS, folder, tmp_path, stages=("encoder_lora", "decoder_full"), metrics=metrics
    )
