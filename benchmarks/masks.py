"""Compare token ids and training masks with the tools whose configurations are imported.

    python -m benchmarks.masks trl|llamafactory|axolotl [--rows 120] [--template chatml ...]

The tool must be installed in this environment. One line per template: rows with equal ids, rows
with an equal mask, and how often each text is masked differently. No model is needed: a byte-level
tokenizer gets the template and its special tokens.
"""

import argparse
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, TypeAlias

from align.core.types import Example
from align.data.render.chat import ChatFormat, apply_tokenizer_spec
from align.recipe.foreign.llamafactory import TEMPLATES
from align.recipe.schema import TokenizerSpec
from tests.unit.small_tokenizers import byte_tokenizer

Masked: TypeAlias = tuple[list[int], list[bool]]
PIECES = ("yes", " Why?", "3 < 4", "\n", "  two", "naïve", "漢字", "`x = 1`", "\n\n", "don't", "🙂")
LIMIT = 10**6


def conversations(count: int, *, seed: int = 0) -> list[list[dict[str, str]]]:
    """Return conversations of one to four rounds, half of them with a system turn."""
    draw = random.Random(seed)

    def text() -> str:
        return "a" + "".join(draw.choices(PIECES, k=draw.randint(1, 8))) + "z"

    found = []
    for _ in range(count):
        turns = [{"role": "system", "content": text()}] if draw.random() < 0.5 else []
        for _ in range(draw.randint(1, 4)):
            turns += [{"role": role, "content": text()} for role in ("user", "assistant")]
        found.append(turns)
    return found


def tokenizer_of(template: str) -> Any:
    """Return a byte-level tokenizer with a template of the suite, as a base stage makes it."""
    tokenizer = byte_tokenizer(None, bos=template in ("llama3", "gemma3"), markers=())
    apply_tokenizer_spec(tokenizer, TokenizerSpec(chat_template=template))
    return tokenizer


def by_align(template: str, rows: Sequence[list[dict[str, str]]]) -> list[Masked]:
    """Return the rows as an sft stage renders them."""
    chat = ChatFormat(tokenizer_of(template))
    made = [chat.sft_row(Example(prompt=[], completion=turns)) for turns in rows]
    return [(list(row.input_ids), list(row.trained)) for row in made]


def by_trl(template: str, rows: Sequence[list[dict[str, str]]]) -> list[Masked]:
    """Return the rows as TRL's SFTTrainer collates them with ``assistant_only_loss``."""
    import tempfile

    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = tokenizer_of(template)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    config = LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=1, **sizes)
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            folder, assistant_only_loss=True, max_length=None, report_to="none", use_cpu=True
        )
        trainer = SFTTrainer(
            LlamaForCausalLM(config),
            args=args,
            train_dataset=Dataset.from_list([{"messages": turns} for turns in rows]),
            processing_class=tokenizer,
        )
        made = [trainer.data_collator([row]) for row in trainer.train_dataset]
    return [_masked(row["input_ids"][0].tolist(), row["labels"][0].tolist()) for row in made]


def by_llamafactory(template: str, rows: Sequence[list[dict[str, str]]]) -> list[Masked]:
    """Return the rows as LLaMA-Factory's processor of supervised rows encodes them."""
    from llamafactory.data.processor.supervised import SupervisedDatasetProcessor
    from llamafactory.data.template import TEMPLATES as THEIRS

    name = next(name for name, ours in TEMPLATES.items() if ours == template)
    settings = SimpleNamespace(mask_history=False, cutoff_len=LIMIT, train_on_prompt=False)
    tokenizer = tokenizer_of(template)
    processor = SupervisedDatasetProcessor(THEIRS[name], tokenizer, None, settings)
    own = [turns[turns[0]["role"] == "system" :] for turns in rows]
    nothing = [None] * len(rows)
    made = processor.preprocess_dataset(
        {
            "_prompt": [turns[:-1] for turns in own],
            "_response": [turns[-1:] for turns in own],
            "_system": [t[0]["content"] if t[0]["role"] == "system" else "" for t in rows],
            **dict.fromkeys(("_tools", "_images", "_videos", "_audios"), nothing),
        }
    )
    return [_masked(*pair) for pair in zip(made["input_ids"], made["labels"], strict=True)]


def by_axolotl(template: str, rows: Sequence[list[dict[str, str]]]) -> list[Masked]:
    """Return the rows as axolotl's strategy ``chat_template`` tokenizes them, by its defaults."""
    from axolotl.prompt_strategies.chat_template import ChatTemplatePrompter, ChatTemplateStrategy

    tokenizer = tokenizer_of(template)
    prompter = ChatTemplatePrompter(tokenizer, tokenizer.chat_template, max_length=LIMIT)
    strategy = ChatTemplateStrategy(
        prompter, tokenizer, False, LIMIT, roles_to_train=["assistant"], train_on_eos="turn"
    )
    made = [strategy.tokenize_prompt({"messages": turns}) for turns in rows]
    return [_masked(row["input_ids"], row["labels"]) for row in made]


def _masked(ids: Iterable[int], labels: Iterable[int]) -> Masked:
    return list(ids), [label != -100 for label in labels]


TOOLS: dict[str, Callable[[str, Sequence[list[dict[str, str]]]], list[Masked]]] = {
    "trl": by_trl,
    "llamafactory": by_llamafactory,
    "axolotl": by_axolotl,
}


@dataclass(slots=True)
class Compared:
    """Rows of which the ids, and the mask too, are the same in both tools."""

    same_ids: int = 0
    same_masks: int = 0
    only_theirs: Counter[str] = field(default_factory=Counter)
    """Tokens that the other tool trains and the suite does not."""
    only_ours: Counter[str] = field(default_factory=Counter)


def compare(tool: str, template: str, rows: Sequence[list[dict[str, str]]]) -> Compared:
    """Return how the ids and masks of rows agree."""
    found, tokenizer = Compared(), tokenizer_of(template)
    pairs = zip(by_align(template, rows), TOOLS[tool](template, rows), strict=True)
    for (ids, ours), (their_ids, theirs) in pairs:
        if ids != their_ids:
            continue
        found.same_ids += 1
        found.same_masks += ours == theirs
        for token, own, other in zip(ids, ours, theirs, strict=True):
            if own != other:
                side = found.only_ours if own else found.only_theirs
                side[tokenizer.decode([token])] += 1
    return found


def main() -> None:
    """Print one line per template."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tool", choices=list(TOOLS))
    parser.add_argument("--rows", type=int, default=120)
    parser.add_argument("--template", action="append")
    args = parser.parse_args()
    rows = conversations(args.rows)
    # TRL trains on assistant turns only with a template that marks them.
    fitting = [t for t in TEMPLATES.values() if args.tool != "trl" or t != "chatml"]
    for template in args.template or fitting:
        found = compare(args.tool, template, rows)
        print(  # noqa: T201
            f"{args.tool} {template}: {len(rows)} rows, {found.same_ids} with equal ids, "
            f"{found.same_masks} with an equal mask; only theirs: {dict(found.only_theirs)}, "
            f"only ours: {dict(found.only_ours)}"
        )


if __name__ == "__main__":
    main()
