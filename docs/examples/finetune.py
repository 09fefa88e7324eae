"""Fine-tune the quickstart's base by the three methods with the openai client, and chat with it.

The server is started by:

    align run recipes/quickstart.yaml --until base
    align serve --new-token demo
    align serve --model base=runs/quickstart/base \\
        --set 'supervised.tuning={method: full}' --set 'dpo.tuning={method: full}' \\
        --set 'reinforcement.tuning={method: full}' --set dpo.nll_coef=1 \\
        --set reinforcement.sampling.max_new_tokens=32

Usage: python docs/examples/finetune.py sk-align-...
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Iterable
from typing import Any

from openai import OpenAI

from align.data.toy import ANSWER_PATTERN, POLITE_PATTERN, generate

GRADER = {
    "type": "string_check",
    "name": "correct",
    "operation": "like",
    "input": "{{ sample.output_text }}",
    "reference": "answer is {{ item.answer }}.",
}
"""1 if the response states the right answer."""


def main() -> None:
    """Train three models, each from the one that it improves, and print what they can do."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("key", help="token of align serve --new-token")
    parser.add_argument("--url", default="http://127.0.0.1:7860/v1")
    parser.add_argument("--rows", type=int, default=28800, help="rows of the supervised job")
    parser.add_argument("--questions", type=int, default=400, help="held-out questions")
    args = parser.parse_args()
    # The questions may be more than a token's requests per minute; the client then waits.
    client = OpenAI(base_url=args.url, api_key=args.key, max_retries=10)
    models = train(client, args.rows)
    questions = [
        (row.prompt[0]["content"], row.columns["answer"])
        for row in generate("prompts", rows=args.questions, seed=0, split="heldout")
    ]
    sys.stdout.write("| model | correct | polite |\n|---|---|---|\n")
    for name, model in models.items():
        replies = [
            ask(client, model, question, seed=i) for i, (question, _) in enumerate(questions)
        ]
        answers = [answer for _, answer in questions]
        right = [is_right(reply, answer) for reply, answer in zip(replies, answers, strict=True)]
        polite = [re.fullmatch(POLITE_PATTERN, reply) is not None for reply in replies]
        sys.stdout.write(f"| {name} | {share(right)} | {share(polite)} |\n")
        sys.stdout.flush()


def is_right(reply: str, answer: str) -> bool:
    """Return whether a reply states the right answer."""
    stated = re.search(ANSWER_PATTERN, reply)
    return stated is not None and stated[1] == answer


def share(found: list[bool]) -> str:
    """Return a fraction with its 95 % interval (Wilson, 1927)."""
    n, p, z2 = len(found), sum(found) / len(found), 1.96**2
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    reach = (z2 * (p * (1 - p) / n + z2 / (4 * n * n))) ** 0.5 / (1 + z2 / n)
    return f"{p:.2f} [{middle - reach:.2f}, {middle + reach:.2f}]"


def train(client: OpenAI, rows: int) -> dict[str, str]:
    """Return the models' names: the base, and one of each method."""
    taught = [
        {"messages": [*row.prompt, *row.completion]}
        for row in generate("sft", rows=rows, seed=0, split="train")
    ]
    pairs = [
        {
            "input": {"messages": row.prompt},
            "preferred_output": row.completion,
            "non_preferred_output": row.rejected,
        }
        for row in generate("preference", rows=rows // 15, seed=0, split="train")
    ]
    prompts = [
        {"messages": row.prompt, "answer": row.columns["answer"]}
        for row in generate("prompts", rows=rows // 9, seed=0, split="train")
    ]
    # Such a small model learns at rates that would ruin a large one.
    fast = {"batch_size": 32, "n_epochs": 1}
    sft = job(client, "base", "supervised", taught, {**fast, "learning_rate_multiplier": 15})
    settings = {**fast, "learning_rate_multiplier": 30}
    dpo = job(client, sft, "dpo", pairs, {**settings, "beta": 0.3})
    rl = job(client, sft, "reinforcement", prompts, settings, grader=GRADER)
    return {"base": "base", "supervised": sft, "dpo": dpo, "reinforcement": rl}


def job(
    client: OpenAI,
    model: str,
    method: str,
    rows: Iterable[Any],
    hyperparameters: dict[str, Any],
    **settings: Any,
) -> str:
    """Run one job to its end and return the name of its model."""
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    file = client.files.create(file=("rows.jsonl", content), purpose="fine-tune")
    how: Any = {"type": method, method: {"hyperparameters": hyperparameters, **settings}}
    made = client.fine_tuning.jobs.create(
        model=model, training_file=file.id, method=how, suffix=method, seed=0
    )
    while made.finished_at is None:
        time.sleep(2)
        made = client.fine_tuning.jobs.retrieve(made.id)
    if made.fine_tuned_model is None:
        sys.exit(f"{method}: {made.error}")
    seconds = made.finished_at - made.created_at
    sys.stdout.write(f"{method}: {made.trained_tokens} tokens, {seconds} s\n")
    sys.stdout.flush()
    return made.fine_tuned_model


def ask(client: OpenAI, model: str, question: str, *, seed: int) -> str:
    """Return a reply, sampled as in training."""
    reply = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        temperature=1,
        seed=seed,
        max_completion_tokens=32,
    )
    return reply.choices[0].message.content or ""


if __name__ == "__main__":
    main()
