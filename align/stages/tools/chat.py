"""Chat with a policy in the terminal, or respond to the lines of standard input."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from align.core.artifacts import find_model
from align.core.errors import EXIT_OK, AlignError, DataError
from align.core.text import VisibleStream, visible
from align.core.types import Text, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELP = "/reset clears the conversation, /temperature 0.5 sets it, /quit ends"


class Chat:
    """A conversation with one model, rendered as in training.

    Args:
        model_dir: weights, tokenizer and generation configuration of a policy.
        temperature: 0 is greedy.
        max_new_tokens: length limit of one response.
    """

    def __init__(self, model_dir: Path, *, temperature: float, max_new_tokens: int) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        from align.models.loading import num_positions
        from align.stages.base import chat_format
        from align.tuning.files import with_adapter
        from reward_models.scalar import exact_attention

        self.format = chat_format(model_dir)
        self.positions = num_positions(model_dir)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        config = AutoConfig.from_pretrained(str(model_dir), trust_remote_code=False)
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(model_dir),
            dtype="auto",
            attn_implementation=exact_attention(config),
            trust_remote_code=False,
        )
        self.model = with_adapter(model.to(device), model_dir).eval()
        self.temperature = temperature
        self.max_new_tokens = max_new_tokens
        self.turns: list[Turn] = []

    @property
    def has_template(self) -> bool:
        """Whether the model has a chat template; without one, each line is text to continue."""
        return self.format.tokenizer.chat_template is not None

    def answer(self, line: str, out: TextIO) -> str:
        """Respond to one line, streaming the response to ``out``.

        Raises:
            DataError: the conversation does not fit the model's context.
        """
        import torch

        turns: list[Turn] = [*self.turns, {"role": "user", "content": line}]
        prompt: Text = turns if self.has_template else line
        ids = self.format.prompt_ids(prompt)
        # A shorter response is better than none when the context is nearly full.
        context = self.positions
        room = self.max_new_tokens if context is None else context - len(ids)
        if room < 1:
            raise DataError(
                f"the conversation has {len(ids)} tokens, but the context has {context}. Use /reset"
            )
        tokens = torch.tensor([ids], device=self.model.device)
        with torch.inference_mode():
            output = self.model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=min(room, self.max_new_tokens),
                streamer=_streamer(self.format.tokenizer, out),
                eos_token_id=list(self.format.stop_token_ids),
                pad_token_id=self.format.stop_token_ids[0],
                **self._sampling(),
            )
        text = self.format.decode(output[0, len(ids) :].tolist()).strip()
        self.turns = [*turns, {"role": "assistant", "content": text}]
        return text

    def _sampling(self) -> dict[str, Any]:
        # The saved generation configuration must not add a limit of its own, such as top_k.
        if self.temperature == 0:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {"do_sample": True, "temperature": self.temperature, "top_p": 1.0, "top_k": 0}


def _streamer(tokenizer: "PreTrainedTokenizerBase", out: TextIO) -> Any:
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            out.write(text + ("\n" if stream_end else ""))
            out.flush()

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def talk(chat: Chat, lines: Iterator[str], out: TextIO) -> None:
    """Respond to lines until they end or one is /quit."""
    for line in lines:
        command, _, rest = line.strip().partition(" ")
        if command in ("/quit", "/exit"):
            return
        if command == "/reset":
            chat.turns = []
            out.write("conversation cleared\n")
        elif command == "/temperature":
            out.write(_set_temperature(chat, rest) + "\n")
        elif command.startswith("/"):
            out.write(f"unknown command {command}: {HELP}\n")
        elif command:
            try:
                chat.answer(line.strip(), out)
            except DataError as e:
                out.write(f"{e}\n")
        out.flush()


def _set_temperature(chat: Chat, text: str) -> str:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if value < 0:
        return f"found '{text}'; expected a number >= 0, such as /temperature 0.5"
    chat.temperature = value
    return f"temperature {value:g}"


def _typed_lines() -> Iterator[str]:
    import readline  # noqa: F401  editing and history of input()

    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            return


def main() -> None:
    """Chat with the artifact named on the command line."""
    parser = argparse.ArgumentParser(description="Chat with a model.")
    parser.add_argument("artifact", help="RUN/STAGE, a folder or a hub id")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        from transformers import set_seed
        from transformers.utils import logging

        from align.models.bringing import check_folder, one_line
        from align.models.loading import model_folder

        folder = model_folder(find_model(args.artifact, args.runs), "policy")

        check_folder(str(folder))
        logging.disable_progress_bar()
        set_seed(args.seed)
        with one_line(str(folder), "a causal language model"):
            chat = Chat(folder, temperature=args.temperature, max_new_tokens=args.max_new_tokens)
    except AlignError as e:
        sys.stderr.write(visible(f"{e}\n"))
        sys.exit(e.exit_code)
    typed = sys.stdin.isatty()
    if typed:
        kind = "" if chat.has_template else "; no chat template: each line is text to continue"
        sys.stdout.write(f"{args.artifact}: {HELP}{kind}\n")
    out = cast(TextIO, VisibleStream(sys.stdout))
    talk(chat, _typed_lines() if typed else iter(sys.stdin), out)
    sys.exit(EXIT_OK)


if __name__ == "__main__":
    main()
