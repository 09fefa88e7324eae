"""The chat loop: commands, the conversation it builds, greedy answers against transformers."""

import io
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from align.stages.tools.chat import Chat, talk

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% if m['role'] == 'assistant' %}"
    "<eos> {% endif %}{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)
WORDS = ["<eos>", "<unk>", "user", "assistant", *"abcdefgh"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("model")
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    # Not Qwen2: transformers would load its own tokenizer class for that architecture.
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        eos_token_id=0,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def say(model_dir: Path, *lines: str) -> tuple[Chat, str]:
    chat, out = Chat(model_dir, temperature=0.0, max_new_tokens=4), io.StringIO()
    talk(chat, iter(lines), out)
    return chat, out.getvalue()


def test_chat_answers_greedily_what_a_plain_loop_over_the_model_gives(model_dir: Path):
    chat, shown = say(model_dir, "a b\n")
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    ids = [WORDS.index(w) for w in ("user", "a", "b", "assistant")]
    for _ in range(4):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == 0:
            break
    # Words 0 and 1, <eos> and <unk>, are special and not shown.
    expected = " ".join(WORDS[i] for i in ids[4:] if i > 1)
    assert chat.turns == [
        {"role": "user", "content": "a b"},
        {"role": "assistant", "content": expected},
    ]
    assert shown.split() == expected.split()


def test_chat_commands_reset_set_the_temperature_and_quit(model_dir: Path):
    chat, shown = say(
        model_dir,
        "a\n",
        "/reset\n",
        "/temperature 0.5\n",
        "/temperature x\n",
        "/nope\n",
        "\n",
        "/quit\n",
        "b\n",
    )
    assert chat.turns == []
    assert chat.temperature == 0.5
    assert "found 'x'; expected a number >= 0" in shown
    assert "unknown command /nope" in shown


def test_chat_says_when_the_context_is_full(model_dir: Path):
    _, shown = say(model_dir, "a " * 40)
    # 40 words, "user" and "assistant".
    assert "the conversation has 42 tokens, but the context has 32. Use /reset" in shown
