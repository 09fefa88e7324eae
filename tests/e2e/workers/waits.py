"""The limit of every process group of two ranks in seconds, with that of ``DEEPSPEED_TIMEOUT``."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from ranks import learner_of, policy_model, sft_steps

from align.core import distributed, groups


def group_limits() -> list[float]:
    """Return the seconds that the members of each process group wait for each other."""
    made = dist.distributed_c10d._world.pg_map
    backends = [group._get_backend(torch.device("cpu")) for group in made]
    return [backend.options._timeout.total_seconds() for backend in backends]


def main() -> None:
    out = Path(sys.argv[1])
    distributed.init_process_group()
    groups.rank_group(2)
    groups.share_rows(2)
    groups.share_rows(1)
    sft_steps(learner_of(policy_model(), 3), range(1))
    store = dist.distributed_c10d._get_default_store()
    found = {"groups": group_limits(), "store": store.timeout.total_seconds()}
    (out / f"rank{distributed.rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
