"""Stage base: import a pretrained model, or build a small one and pretrain it on a corpus.

In both cases the artifact contains everything later stages need: weights, a tokenizer with pad
token, stop token and chat template, and a generation configuration with the same stop tokens.
"""

import logging
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2TokenizerFast,  # pyright: ignore[reportAttributeAccessIssue]  # made at import
)

from align.core import distributed
from align.core.errors import ArtifactError
from align.core.model_folder import is_adapter
from align.core.types import Example
from align.data.fit import fit_rows
from align.data.load import fingerprints, load_examples
from align.data.render.chat import ChatFormat, apply_tokenizer_spec
from align.data.render.templates import family_of
from align.models.attention import PACKED
from align.models.bringing import (
    check_encodes,
    check_folder,
    check_saved_tokenizer,
    check_stops,
    load_whole,
    one_line,
    refuse_not_finite,
    settle_ties,
    tell_generation,
)
from align.models.links import save_model
from align.models.loading import add_embeddings, bringing_in, load_tokenizer
from align.models.logprobs import LogprobModel
from align.preflight.checks import Check, Finding, keep_card, run_checks
from align.recipe.schema import BaseStage, BuildSpec, ZeroSpec
from align.stages.base import Prepared, StageContext, StageResult
from align.stages.preflight import base_checks, corpus_checks
from align.stages.sft import collate, length_of, sft_loss
from align.training.learner import Learner
from align.training.offline import OfflineSchedule, OfflineTask, train_offline
from align.tuning.files import base_of_adapter, merged_onto, rows_of_adapter

log = logging.getLogger(__name__)

TOKENIZER = "tokenizer_config.json"


def prepare(spec: BaseStage, context: StageContext) -> Prepared:
    """Import the model of ``spec.path``, or prepare to build and pretrain a new one."""
    out = context.out / "model"
    if spec.path is None:
        checks = corpus_checks(spec, context)
        return Prepared(train=partial(build_and_pretrain, spec, context), checks=checks)
    model, tokenizer = _import_model(spec)
    told = _save_once(model, tokenizer, out, source=Path(spec.path))
    weights: Check = ("weights", lambda: Finding(told))
    return Prepared(train=partial(_result, spec, model, {}), checks=[weights, *base_checks(out)])


def build_and_pretrain(spec: BaseStage, context: StageContext) -> StageResult:
    """Pretrain a new model, save it, and run the checks of an imported model on it."""
    out = context.out / "model"
    model, tokenizer, metrics = _build_and_pretrain(spec, context)
    _save_once(model, tokenizer, out)
    checks = [*corpus_checks(spec, context), *base_checks(out)]
    keep_card(run_checks(context.name, spec.kind, checks), context.out)
    return _result(spec, model, metrics)


def _result(spec: BaseStage, model: nn.Module, metrics: dict[str, float]) -> StageResult:
    total = float(sum(p.numel() for p in model.parameters()))
    return StageResult(metrics | {"model/parameters": total}, fingerprints(spec.data))


def _import_model(spec: BaseStage) -> tuple[PreTrainedModel, Any]:
    path = source = str(spec.path)
    if is_adapter(path):
        source = base_of_adapter(path)
        log.warning("%s is an adapter: merging it into its base model %s", path, source)
    check_folder(source)
    with one_line(source, "a tokenizer") if Path(source).exists() else bringing_in(source):
        tokenizer = load_tokenizer(path if (Path(path) / TOKENIZER).is_file() else source)
    # A stop token of the recipe, or of its template, settles contradictions in the model's files.
    chosen = spec.tokenizer.stop_token or family_of(spec.tokenizer.chat_template).stop
    check_encodes(source, tokenizer)
    check_stops(source, tokenizer, chosen=chosen is not None)
    # Tokens first, then the model, whose embeddings must have a row for each of them.
    added = apply_tokenizer_spec(tokenizer, spec.tokenizer)
    # The sum of weights and update would be rounded in a base model of bfloat16.
    merged = source != path
    model = load_whole(source, dtype=spec.dtype or ("float32" if merged else None))
    tell_generation(source, model, tokenizer)
    if merged:
        _add_rows_of_adapter(model, path)
        model = merged_onto(model, path)
        refuse_not_finite(path, model)
        settle_ties(path, model)
    _check_rows(path, model, tokenizer, added=added)
    add_embeddings(model, len(tokenizer), tokenizer.convert_tokens_to_ids(added))
    return model, tokenizer


def _check_rows(
    path: str, model: PreTrainedModel, tokenizer: Any, *, added: Collection[str]
) -> None:
    """Name the tokens of the folder's own tokenizer for which its model has no embedding.

    Raises:
        ArtifactError: there are words among them, so the tokenizer is that of another model.
    """
    rows = cast("nn.Embedding", model.get_input_embeddings()).num_embeddings
    beyond = {t: i for t, i in tokenizer.get_vocab().items() if i >= rows and t not in added}
    extra = tokenizer.get_added_vocab()
    words = sorted((i, token) for token, i in beyond.items() if token not in extra)
    if words:
        number, word = words[0]
        raise ArtifactError(
            f"{path}: the tokenizer has {len(words)} tokens without an embedding in the model, "
            f"which has {rows}; the first is {word!r} ({number}). Copy the tokenizer that the "
            "model was trained with into the folder."
        )
    if beyond:
        log.warning(
            "%s: the model has %d embeddings, none for %s of its tokenizer; new ones begin as the "
            "mean of the others",
            path,
            rows,
            ", ".join(f"{token} ({number})" for token, number in beyond.items()),
        )


def _add_rows_of_adapter(model: PreTrainedModel, path: str) -> None:
    """Enlarge the embeddings of an adapter's base for the tokens that its training added.

    Raises:
        ArtifactError: the adapter lacks a part of their rows, or the tokenizer that names them.
    """
    found = rows_of_adapter(path)
    needed = max(found.values())
    rows = cast("nn.Embedding", model.get_input_embeddings()).num_embeddings
    if needed <= rows:
        return
    lacking = [table for table, number in found.items() if number < needed]
    if lacking and not (model.config.get_text_config().tie_word_embeddings and len(lacking) == 1):
        raise ArtifactError(
            f"{path}: the adapter adds {needed - rows} tokens to its base, but has no rows for "
            f"them in the {lacking[0]}, so they are lost. Train it with modules_to_save: "
            "[embed_tokens, lm_head], or trainable_token_indices of both."
        )
    if not (Path(path) / TOKENIZER).is_file():
        raise ArtifactError(
            f"{path}: the adapter has rows for {needed} tokens, and its base for {rows}, but "
            f"the folder has no tokenizer that names the new ones. Copy {TOKENIZER} and "
            "tokenizer.json from its training beside it."
        )
    log.warning("%s adds tokens: its base gets %d embeddings instead of %d", path, needed, rows)
    add_embeddings(model, needed, [])


def _build_and_pretrain(
    spec: BaseStage, context: StageContext
) -> tuple[PreTrainedModel, Any, dict[str, float]]:
    assert spec.build is not None
    corpus = load_examples(spec.data, kind="corpus", seed=context.seed)
    # Trained on rank 0 alone and broadcast, so that all ranks have the same tokens.
    build = spec.build
    tokenizer = distributed.on_first_rank(
        lambda: train_tokenizer(corpus, build, context.out / "model")
    )
    apply_tokenizer_spec(tokenizer, spec.tokenizer)
    chat = ChatFormat(tokenizer)
    rows, _ = fit_rows(
        [chat.sft_row(e) for e in corpus],
        max_length=spec.max_length,
        max_lost_frac=0.01,
        what=f"{context.name}: corpus rows",
        ledger=context.ledger,
    )
    # The same seed on every rank, so that all start from the same weights.
    torch.manual_seed(distributed.derive_seed(context.seed, "weights"))
    module = LogprobModel(Qwen2ForCausalLM(_qwen2_config(spec.build, tokenizer)))
    learner = Learner(
        module,
        optim=spec.optim,
        zero=ZeroSpec(),
        dtype=spec.dtype or "float32",
        total_steps=spec.steps,
    )
    schedule = OfflineSchedule(
        total_steps=spec.steps,
        batch_size=spec.batch_size,
        micro_tokens=spec.micro_tokens,
        eval_every=0,
        checkpoint_every=0,
        keep_checkpoints=1,
        seed=distributed.derive_seed(context.seed, "batches"),
    )
    metrics = context.metrics(spec.steps)
    final = train_offline(
        learner,
        OfflineTask(rows, [], length_of, collate, sft_loss),
        schedule,
        metrics=metrics,
        checkpoints=context.out / "checkpoints",
    )
    metrics.close()
    return module.model, tokenizer, final


def train_tokenizer(corpus: Sequence[Example], build: BuildSpec, directory: Path) -> Any:
    """Train a byte-level BPE tokenizer on the corpus and on the text of the plain template.

    The tokenizer is saved and loaded again before it is used, because transformers selects the
    tokenizer class by the model configuration in the folder, as every later stage will.

    Args:
        corpus: plain text examples. build: vocabulary size. directory: where to save it.
    """

    def texts() -> Iterator[str]:
        yield from (str(example.completion) for example in corpus)
        # Repeated, so that the words of the plain template become few tokens.
        yield from ["User: \nAssistant: \nSystem: \n"] * 8

    blank = Qwen2TokenizerFast(model_max_length=build.max_positions)
    trained = blank.train_new_from_iterator(
        texts(), vocab_size=build.vocab_size - 1, show_progress=False
    )
    trained.add_special_tokens({"pad_token": "<pad>"})
    trained.save_pretrained(str(directory))
    _qwen2_config(build, trained).save_pretrained(str(directory))
    loaded = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
    sample = str(corpus[0].completion)
    assert loaded(sample)["input_ids"] == trained(sample)["input_ids"], "tokenizer changed on disk"
    return loaded


def _qwen2_config(build: BuildSpec, tokenizer: PreTrainedTokenizerBase) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=max(build.vocab_size, len(tokenizer)),
        hidden_size=build.hidden_size,
        num_hidden_layers=build.num_layers,
        num_attention_heads=build.num_heads,
        num_key_value_heads=build.num_kv_heads,
        intermediate_size=build.intermediate_size,
        max_position_embeddings=build.max_positions,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        initializer_range=build.init_std,
        attn_implementation=PACKED,  # pyright: ignore[reportCallIssue]  # of the base class
    )


def _save_once(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    *,
    source: Path | None = None,
) -> str:
    """Write the model and its tokenizer, and return how; every rank must call this.

    Args:
        model: to save. tokenizer: to save. out: the folder.
        source: folder that the model was loaded from; its weight files are linked if unchanged.
    """
    return distributed.on_first_rank(lambda: _save(model, tokenizer, out, source=source))


def _save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    *,
    source: Path | None = None,
) -> str:
    stops = model.generation_config.eos_token_id if model.generation_config else None
    stops = stops if isinstance(stops, list) else [stops]
    # The tokenizer's own stop token first, then the model's, without repetition.
    eos = list(dict.fromkeys(t for t in [tokenizer.eos_token_id, *stops] if t is not None))
    model.config.pad_token_id = tokenizer.pad_token_id
    model.generation_config = GenerationConfig(
        eos_token_id=eos, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id
    )
    # Packed attention exists only in this suite; the saved model must load anywhere.
    model.config._attn_implementation = "sdpa"
    told = save_model(model, out, state=model.state_dict(), source=source)
    tokenizer.save_pretrained(str(out))
    check_saved_tokenizer(tokenizer, out)
    return told
