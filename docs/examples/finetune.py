"""Fine-tune the quickstart's base by the three methods with the openai client, and chat with it.

The server is started by:

    align run recipes/quickstart.yaml --until base
    align serve --new-token demo
    align serve --model base=runs/quickstart/base \\
        --set reinforcement.sampling.max_new_tokens=32

Usage: python docs/examples/finetune.py sk-align-... [--rows 3200]
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable
from typing import Any

from openai import OpenAI

from align.data.toy import generate

POLITE = ("Sure", "Of course", "Gladly")
"""How the responses begin that the preferences prefer."""
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
    parser.add_argument("--rows", type=int, default=3200, help="rows of the supervised job")
    parser.add_argument("--questions", type=int, default=60, help="held-out questions")
    args = parser.parse_args()
    client = OpenAI(base_url=args.url, api_key=args.key)
    models = train(client, args.rows)
    questions = [
        (row.prompt[0]["content"], row.columns["answer"])
        for row in generate("prompts", rows=args.questions, seed=0, split="heldout")
    ]
    sys.stdout.write("| model | correct | polite |\n|---|---|---|\n")
    for name, model in models.items():
        replies = [ask(client, model, question) for question, _ in questions]
        answers = [answer for _, answer in questions]
        right = [f"answer is {a}." in r for a, r in zip(answers, replies, strict=True)]
        polite = [r.startswith(POLITE) for r in replies]
        shares = [sum(x) / len(questions) for x in (right, polite)]
        sys.stdout.write(f"| {name} | {shares[0]:.2f} | {shares[1]:.2f} |\n")


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
        for row in generate("preference", rows=rows // 2, seed=0, split="train")
    ]
    prompts = [
        {"messages": row.prompt, "answer": row.columns["answer"]}
        for row in generate("prompts", rows=rows // 5, seed=0, split="train")
    ]
    batch = min(32, rows // 10)
    settings = {"batch_size": batch, "n_epochs": 2, "learning_rate_multiplier": 15}
    sft = job(client, "base", "supervised", taught, settings)
    settings = {"batch_size": batch, "n_epochs": 1, "learning_rate_multiplier": 30}
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


def ask(client: OpenAI, model: str, question: str) -> str:
    """Return a model's most likely reply."""
    reply = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_completion_tokens=32,
    )
    return reply.choices[0].message.content or ""


if __name__ == "__main__":
    main()
