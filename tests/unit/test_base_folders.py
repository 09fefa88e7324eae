"""Model folders as users bring them: whole, damaged, of another kind, hostile."""

import ast
import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp

import peft
import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

sys.path.insert(0, str(Path(__file__).parent))
from test_base_tokens import bring_in, saved_model

from align.core.errors import ArtifactError, RecipeError
from align.recipe.schema import TokenizerSpec
from align.recipe.schema.tuning import FullTuning, TuningSpec
from align.tuning.loading import load_for_training
from align.tuning.rows import trained_rows

ROOT = Path(__file__).resolve().parents[2]
MARKERS = ["<|im_start|>", "<|im_end|>"]
PLAIN = TokenizerSpec(pad_token="<pad>", chat_template="plain")
NORM, Q = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_model(tmp_path_factory.mktemp("models") / "good", tied=False)


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "brought"))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict]) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def set_json(folder: Path, name: str, **values: object) -> None:
    path = folder / name
    found = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(found | values))


def refused(folder: Path, tokenizer: TokenizerSpec = PLAIN) -> str:
    """Return the one line that a folder is refused with."""
    with pytest.raises(ArtifactError) as error:
        bring_in(folder, Path(mkdtemp(dir=folder.parent)), tokenizer)
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_whole_folder_is_brought_in(good: Path, tmp_path: Path) -> None:
    model_dir, _ = bring_in(good, tmp_path, PLAIN)
    assert torch.equal(load_file(model_dir / "model.safetensors")[Q], weights(good)[Q])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("tie_word_embeddings", "true", "tie_word_embeddings: 'true' is text; expected true,"),
        ("rope_theta", "1e4", "rope_theta: '1e4' is text; expected 1e4, without quotes"),
        ("rms_norm_eps", "1e-06", "rms_norm_eps: '1e-06' is text"),
        ("eos_token_id", ["2"], "eos_token_id: '2' is text"),
        ("rope_parameters", {"rope_type": "linear", "factor": "8"}, "rope_parameters: factor: '8'"),
        ("hidden_size", "big", "cannot be read as a model's configuration"),
        ("num_attention_heads", None, "cannot be read as a model's configuration"),
    ],
)
def test_a_value_of_another_type_is_a_fault_of_the_configuration(
    folder: Path, key: str, value: object, told: str
) -> None:
    set_json(folder, "config.json", **{key: value})
    line = refused(folder)
    assert f"{folder}/config.json: {told}" in line
    assert "tokenizer" not in line


def test_texts_of_a_configuration_that_look_like_numbers_are_texts(
    folder: Path, tmp_path: Path
) -> None:
    more = {"id2label": {"0": "1"}, "label2id": {"1": 0}, "model_version": "1.0", "_place": "7"}
    set_json(folder, "config.json", **more)
    bring_in(folder, tmp_path / "out", PLAIN)


@pytest.mark.parametrize("name", [NORM, Q, "lm_head.weight", "model.embed_tokens.weight"])
def test_a_missing_weight_is_named(folder: Path, name: str) -> None:
    rewrite(folder, lambda x: {k: v for k, v in x.items() if k != name})
    assert name in refused(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [NORM, "model.embed_tokens.weight"])
def test_weights_that_are_not_finite_are_named(folder: Path, name: str, value: float) -> None:
    def spoil(x: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        x[name].view(-1)[3] = value
        return x

    rewrite(folder, spoil)
    assert f"NaN or infinity: {name}" in refused(folder)


def test_surplus_and_misshapen_weights_are_named(folder: Path) -> None:
    rewrite(folder, lambda x: x | {"model.layers.7.norm.weight": torch.ones(3)})
    assert "layers.7.norm.weight" in refused(folder)


def test_a_weight_of_another_shape_is_refused(folder: Path) -> None:
    rewrite(folder, lambda x: x | {NORM: torch.ones(31)})
    assert "model.norm.weight" in refused(folder)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_a_known_prefix_is_taken_off_aloud(folder: Path, prefix: str, caplog) -> None:
    before = weights(folder)
    rewrite(folder, lambda x: {prefix + k: v for k, v in x.items()})
    with caplog.at_level(logging.WARNING):
        model_dir, _ = bring_in(folder, folder.parent / "out", PLAIN)
    after = weights(model_dir)
    for name in (NORM, Q, "lm_head.weight"):
        assert torch.equal(after[name][: len(before[name])], before[name])
    assert any("prefix" in r.message for r in caplog.records)


def test_a_doubled_model_prefix_is_read_as_it_is_meant(folder: Path) -> None:
    before = weights(folder)
    rewrite(folder, lambda x: {f"model.{k}": v for k, v in x.items()})
    model_dir, _ = bring_in(folder, folder.parent / "out", PLAIN)
    assert all(torch.equal(weights(model_dir)[n], before[n]) for n in (NORM, Q))


def test_an_unknown_prefix_is_refused(folder: Path) -> None:
    rewrite(folder, lambda x: {f"student.{k}": v for k, v in x.items()})
    assert "student." in refused(folder)


def adapter(good: Path, folder: Path) -> torch.Tensor:
    """Save an adapter on ``good``; return what it adds to ``Q``."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(good), config)
    a, b = (p for n, p in tuned.named_parameters() if "lora_" in n)
    with torch.no_grad():
        b.normal_()
    tuned.save_pretrained(folder)
    return 2.0 * (b @ a).detach()  # alpha / r times B A (arXiv:2106.09685)


def test_an_adapter_is_merged_onto_its_base_aloud(good: Path, tmp_path: Path, caplog) -> None:
    update = adapter(good, tmp_path / "adapter")
    with caplog.at_level(logging.WARNING):
        model_dir, _ = bring_in(tmp_path / "adapter", tmp_path, PLAIN)
    torch.testing.assert_close(weights(model_dir)[Q], weights(good)[Q] + update)
    assert any("merging it into its base model" in r.message for r in caplog.records)


def change_adapter(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict]) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        # Another program's names: peft would only warn, and the model would be its base.
        (
            lambda x: {k.removeprefix("base_model."): v for k, v in x.items()},
            "in its files but not",
        ),
        (lambda x: {k: v for k, v in x.items() if "lora_A" in k}, "missing from its files"),
        # Of a deeper base: the rest would be left out.
        (lambda x: x | {k.replace("s.0.", "s.1."): v + 0 for k, v in x.items()}, "layers.1."),
        (lambda x: {k: v * float("nan") for k, v in x.items()}, "NaN or infinity"),
    ],
)
def test_an_adapter_that_does_not_fit_its_base_is_refused(
    good: Path, tmp_path: Path, change, told: str
) -> None:
    adapter(good, tmp_path / "adapter")
    change_adapter(tmp_path / "adapter", change)
    assert told in refused(tmp_path / "adapter")


@pytest.mark.parametrize("more", ["lm_head", "embed_tokens"])
def test_whole_modules_in_an_adapter_are_taken_over(good: Path, tmp_path: Path, more: str) -> None:
    """modules_to_save: the weights of the adapter replace those of the base."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=[more])
    tuned = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(good), config)
    (new,) = (p for n, p in tuned.named_parameters() if "modules_to_save" in n)
    with torch.no_grad():
        new.add_(1.0)
    tuned.save_pretrained(tmp_path / "adapter")
    model_dir, _ = bring_in(tmp_path / "adapter", tmp_path, PLAIN)
    name = f"{'' if more == 'lm_head' else 'model.'}{more}.weight"
    before = weights(good)[name]
    torch.testing.assert_close(weights(model_dir)[name][: len(before)], before + 1.0)


def test_an_adapter_whose_base_is_gone_names_the_key(good: Path, tmp_path: Path) -> None:
    adapter(good, tmp_path / "adapter")
    gone = "/home/somebody/models/llama"
    set_json(tmp_path / "adapter", "adapter_config.json", base_model_name_or_path=gone)
    told = refused(tmp_path / "adapter")
    assert f"adapter_config.json: base_model_name_or_path is '{gone}'" in told


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_weights_stored_in_8_bits_are_refused_without_a_configuration_too(
    folder: Path, dtype: torch.dtype
) -> None:
    rewrite(folder, lambda x: x | {Q: x[Q].mul(50).to(dtype)})
    told = refused(folder)
    assert f"{Q} is stored as" in told
    assert "quantized" in told


def test_two_sets_of_weights_in_one_folder_are_refused(folder: Path) -> None:
    shard = "model-00001-of-00001.safetensors"
    save_file({k: v * 2 for k, v in weights(folder).items()}, folder / shard)
    index = {"weight_map": dict.fromkeys(weights(folder), shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "two sets of weights" in refused(folder)
    # The index may also name the single file.
    index = {"weight_map": dict.fromkeys(weights(folder), "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / shard).unlink()
    bring_in(folder, folder.parent / "out", PLAIN)


def test_a_head_of_its_own_is_kept_although_the_configuration_ties_it(folder: Path, caplog) -> None:
    """vLLM reads tie_word_embeddings, and would leave the head out."""
    before = weights(folder)
    set_json(folder, "config.json", tie_word_embeddings=True)
    with caplog.at_level(logging.WARNING):
        model_dir, _ = bring_in(folder, folder.parent / "out", PLAIN)
    assert "two different weights" in caplog.text
    assert json.loads((model_dir / "config.json").read_text())["tie_word_embeddings"] is False
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(weights(model_dir)[name][: len(before[name])], before[name])


def test_a_head_that_equals_the_embedding_stays_tied(tmp_path: Path, caplog) -> None:
    folder = saved_model(tmp_path / "in", tied=True)
    rewrite(folder, lambda x: x | {"lm_head.weight": x["model.embed_tokens.weight"].clone()})
    with caplog.at_level(logging.WARNING):
        model_dir, _ = bring_in(folder, tmp_path, PLAIN)
    assert "two different weights" not in caplog.text
    assert json.loads((model_dir / "config.json").read_text())["tie_word_embeddings"] is True


def test_an_adapter_beside_a_model_is_refused(good: Path, folder: Path) -> None:
    adapter(good, folder)
    assert "adapter_config.json" in refused(folder)


def test_an_adapter_without_its_base_is_refused(good: Path, tmp_path: Path) -> None:
    adapter(good, tmp_path / "adapter")
    set_json(tmp_path / "adapter", "adapter_config.json", base_model_name_or_path=None)
    assert "base_model_name_or_path" in refused(tmp_path / "adapter")


def test_a_classifier_is_refused_with_the_stage_for_it(good: Path, folder: Path) -> None:
    AutoModelForSequenceClassification.from_pretrained(good, num_labels=2).save_pretrained(folder)
    assert "kind encoder" in refused(folder)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized (gptq)"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized (fp8)"),
        ({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}, "never run"),
        ({"model_type": "no_such_type"}, "no_such_type"),
        ({"model_type": 7}, "cannot be read"),
        ({"hidden_size": "wide"}, "cannot be read"),
        ({"num_attention_heads": 0}, "cannot be read"),
        ({"num_hidden_layers": 5, "layer_types": None}, "missing from its files"),
        ({"eos_token_id": 10**6}, "eos_token_id 1000000"),
        ({"eos_token_id": [0, -4]}, "eos_token_id -4"),
        ({"pad_token_id": 10**6}, "pad_token_id 1000000; expected a number below"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "the type 't5'"),
        ({"model_type": "clip", "architectures": ["CLIPModel"]}, "the type 'clip'"),
    ],
)
def test_a_configuration_that_does_not_fit_is_one_line(folder: Path, config, told: str) -> None:
    set_json(folder, "config.json", **config)
    (folder / "evil.py").write_text("raise SystemExit('the folder's code ran')\n")
    assert told in refused(folder)


def test_a_stop_token_that_is_text_is_shown_as_such(folder: Path) -> None:
    set_json(folder, "generation_config.json", eos_token_id="4")
    assert "generation_config.json names eos_token_id '4'; expected a number" in refused(folder)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000, "\x00"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
def test_files_that_are_damaged_are_one_line(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    assert str(folder) in refused(folder)


def test_missing_shards_and_paths_out_of_the_folder_are_named(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {NORM: "model-2.safetensors"}}))
    assert "model-2.safetensors" in refused(folder)
    index.write_text(json.dumps({"weight_map": {NORM: "../other.safetensors"}}))
    assert "outside the folder" in refused(folder)


def test_a_folder_without_weights_or_with_cut_ones_is_one_line(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-200])
    assert "cannot be read" in refused(folder)
    file.unlink()
    assert "no weights" in refused(folder)


def test_two_tokens_with_one_id_are_named(folder: Path) -> None:
    """Saving keeps one of the two, in an order that changes from process to process."""
    path = folder / "tokenizer.json"
    found = json.loads(path.read_text())
    vocab = found["model"]["vocab"]
    first, second = list(vocab)[5:7]
    vocab[second] = vocab[first]
    path.write_text(json.dumps(found))
    assert f"{first!r} and {second!r} have one id" in refused(folder)


def test_tokenizer_and_config_must_agree_on_the_stop_token(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    other = next(t for t, i in tokenizer.get_vocab().items() if i == 40)
    set_json(folder, "config.json", eos_token_id=40)
    set_json(folder, "generation_config.json", eos_token_id=40)
    told = refused(folder)
    assert f'tokenizer: {{stop_token: "{other}"}}' in told
    # The line to paste settles it.
    settled = TokenizerSpec(pad_token="<pad>", chat_template="plain", stop_token=other)
    model_dir, _ = bring_in(folder, folder.parent / "again", settled)
    assert AutoTokenizer.from_pretrained(model_dir).eos_token == other


@pytest.mark.parametrize(
    ("settings", "suppresses"),
    [
        ({"suppress_tokens": [7, "STOP"]}, "suppress_tokens"),
        ({"begin_suppress_tokens": ["STOP"]}, "begin_suppress_tokens"),
        ({"bad_words_ids": [[3, 4], ["STOP"]]}, "bad_words_ids"),
        ({"sequence_bias": [[["STOP"], -10.0]]}, "sequence_bias"),
        ({"suppress_tokens": ["STOP"], "bad_words_ids": [["STOP"]]}, "bad_words_ids and suppress_"),
        # Neither another token, nor a longer sequence, nor one that becomes more likely.
        ({"suppress_tokens": [7], "bad_words_ids": [["STOP", 7], [7, "STOP"]]}, ""),
        ({"sequence_bias": [[["STOP"], 10.0]], "temperature": 0.6}, ""),
    ],
)
def test_settings_that_suppress_the_stop_token_are_named_and_not_kept(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, settings: dict, suppresses: str
) -> None:
    stop = AutoTokenizer.from_pretrained(folder).eos_token_id
    given = json.loads(json.dumps(settings).replace('"STOP"', str(stop)))
    set_json(folder, "generation_config.json", **given)
    caplog.set_level(logging.INFO)
    model_dir, _ = bring_in(folder, tmp_path / "out", PLAIN)
    warned = [
        r.getMessage() for r in caplog.records if "suppresses the stop token" in r.getMessage()
    ]
    assert len(warned) == bool(suppresses)
    assert all(f"{folder}: {suppresses}" in line and f"({stop})" in line for line in warned)
    (told,) = [r.getMessage() for r in caplog.records if "not kept of its" in r.getMessage()]
    assert all(name in told for name in given)
    assert not given.keys() & json.loads((model_dir / "generation_config.json").read_text()).keys()


@pytest.mark.parametrize("method", ["ia3", "prompt", "bottleneck"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_frozen_rows_of_new_markers_are_refused(
    good: Path, tmp_path: Path, method: str, dtype: str
) -> None:
    tuning = TypeAdapter(TuningSpec).validate_python({"method": method})
    new, _ = bring_in(good, tmp_path / "new", TokenizerSpec(chat_template="chatml"))
    with pytest.raises(RecipeError, match=r"nothing has trained the rows of .*'<\|im_end\|>'"):
        load_for_training(new, tuning, dtype=dtype)
    load_for_training(new, FullTuning(), dtype=dtype)
    known, _ = bring_in(good, tmp_path / "known", PLAIN)
    load_for_training(known, tuning, dtype=dtype)
    # Once a step of full tuning has moved the rows, they may be frozen.
    model = AutoModelForCausalLM.from_pretrained(new)
    tokens = AutoTokenizer.from_pretrained(new).convert_tokens_to_ids(MARKERS)
    with torch.no_grad():
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            table.weight[tokens] += torch.tensor([[0.01], [0.02]])
    model.save_pretrained(new)
    load_for_training(new, tuning, dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lora_trains_the_rows_of_new_markers(good: Path, tmp_path: Path, dtype: str) -> None:
    tuning = TypeAdapter(TuningSpec).validate_python({"method": "lora"})
    new, _ = bring_in(good, tmp_path / "new", TokenizerSpec(chat_template="chatml"))
    tokens = AutoTokenizer.from_pretrained(new).convert_tokens_to_ids(MARKERS)
    assert trained_rows(load_for_training(new, tuning, dtype=dtype)) == sorted(tokens)
    known, _ = bring_in(good, tmp_path / "known", PLAIN)
    assert trained_rows(load_for_training(known, tuning, dtype=dtype)) == []


def test_code_of_a_folder_is_refused_in_every_call() -> None:
    open_calls = []
    for top in ("align", "reward_models"):
        for path in sorted((ROOT / top).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                    continue
                owner = ast.unparse(node.func.value)
                named = {k.arg: ast.unparse(k.value) for k in node.keywords}
                safe = named.get("trust_remote_code") == "False" or "options" in str(
                    named.get(None)
                )
                loads = owner.startswith("Auto") or owner == "kind"
                if node.func.attr == "from_pretrained" and loads and not safe:
                    open_calls.append(f"{path.name}:{node.lineno}")
    assert not open_calls
