"""Examples for the help of each command, and for the page of commands."""

EXAMPLES = {
    "init": (
        "align init --model Qwen/Qwen2.5-0.5B-Instruct --data pairs.jsonl",
        "align init --model models/mine --data rows.jsonl --data pairs.jsonl --tuning full",
    ),
    "import": (
        "align import axolotl config.yaml",
        "align import trl dpo_config.yaml --method dpo --out dpo.yaml",
    ),
    "recipes": ("align recipes",),
    "doctor": ("align doctor", "align doctor --report"),
    "check": (
        "align check my.yaml",
        "align check my.yaml --deep --set dpo.beta=0.05",
        "align check my.yaml --only dpo",
    ),
    "show": ("align show my.yaml --set dpo.beta=0.05", "align show runs/my"),
    "plan": ("align plan my.yaml --gpus 8 --memory 80", "align plan my.yaml --only dpo --json"),
    "run": (
        "align run quickstart",
        "align run my.yaml --set sft.ranks=8 --set sft.zero.stage=2",
        "align run my.yaml --force --from dpo",
        "align run my.yaml --dry-run",
    ),
    "verify": ("align verify runs/my",),
    "runs": ("align runs", "align runs /shared/runs"),
    "logs": ("align logs -f runs/my", "align logs runs/my/dpo"),
    "report": ("align report runs/my", "align report runs/my runs/other runs/third"),
    "open": ("align open runs/my",),
    "eval": (
        "align eval my/sft my/dpo --tasks gsm8k --baseline my/sft",
        "align eval my/reward --pairs pairs.jsonl",
    ),
    "calibrate": ("align calibrate my/reward --pairs human_pairs.jsonl",),
    "reward test": (
        "align reward test my_reward.py:score --data rows.jsonl",
        "align reward test math --data rows.jsonl",
    ),
    "data check": (
        "align data check pairs.jsonl",
        "align data check rows.jsonl --heldout questions.jsonl",
    ),
    "data show": ("align data show rows.jsonl --model my/base",),
    "data convert": (
        "align data convert in.csv out.jsonl --to messages --rename q=prompt --rename a=completion",
        "align data convert pairs.jsonl train.jsonl --heldout heldout.jsonl --to preference",
    ),
    "labels list": ("align labels list",),
    "labels import": (
        "align labels import helpful pairs.jsonl",
        "align labels import helpful --samples my/evaluate:sft --samples my/evaluate:dpo",
    ),
    "labels votes": ("align labels votes helpful votes.csv",),
    "labels export": ("align labels export helpful",),
    "cache": ("align cache",),
    "chat": ("align chat runs/my/dpo", "align chat my/dpo --temperature 0"),
    "export": (
        "align export my/dpo exports/my",
        "align export my/dpo exports/my-gguf --format gguf --dtype q8_0",
    ),
    "push": ("align push my/dpo my-org/my-dpo --private", "align push exports/my my-org/my-dpo"),
    "serve-reward": ("align serve-reward my/reward --port 8765",),
    "serve": ("align serve --runs runs", "align serve --new-token maria --annotator"),
    "explain": ("align explain D057", "align explain kl/reference"),
    "schema": ("align schema", "align schema --markdown"),
}
"""Command lines by command, at least one for each."""
