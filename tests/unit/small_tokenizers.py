"""A tokenizer without merges for tests: one token a byte, plus special tokens."""

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


def byte_tokenizer(
    template: str | None,
    *,
    bos: bool = False,
    eos: str = "</s>",
    markers: Sequence[str] = ("<|im_start|>", "<|im_end|>"),
) -> PreTrainedTokenizerFast:
    """Make a byte-level tokenizer with a chat template.

    Args:
        template: the Jinja text. bos: whether there is a BOS, which is written before every text.
        eos: the stop token. markers: further special tokens of one id each.
    """
    special = list(dict.fromkeys(["<s>", "</s>", "<pad>", *markers, eos]))
    symbols = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>" if bos else None,
        eos_token=eos,
        pad_token="<pad>",
        additional_special_tokens=list(markers),
    )
    tokenizer.chat_template = template
    return tokenizer
