"""Serve a reward model over HTTP: one process, one model."""

import argparse
import logging
import sys
from pathlib import Path
from typing import Any, NoReturn

from align.core.artifacts import MANIFEST, find_model, read_json_object
from align.core.errors import AlignError, ArtifactError
from align.core.log import setup_logging
from align.models.loading import model_folder
from align.tuning.loading import attach_adapter

log = logging.getLogger(__name__)
MAX_CONNECTIONS = 256
"""Maximum concurrent connections; others get 503, so slow requests cannot block the server."""


def main() -> NoReturn:
    """Serve until interrupted, then exit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", help="RUN/STAGE, a folder or a hub id of a reward model")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument(
        "--combine", default="mean", help="how to combine the scores of several heads"
    )
    args = parser.parse_args()
    setup_logging(0)
    try:
        serve(
            find_model(args.artifact, args.runs),
            host=args.host,
            port=args.port,
            combine=args.combine,
        )
    except (AlignError, ValueError) as error:
        log.error("%s", error)
        sys.exit(error.exit_code if isinstance(error, AlignError) else 2)
    sys.exit(0)


def serve(path: Path, *, host: str, port: int, combine: str) -> None:
    """Load and verify the artifact, then serve requests."""
    try:
        import uvicorn

        from reward_models.serving import build_app
    except ImportError as error:
        raise ValueError(
            f"serving needs fastapi and uvicorn ({error}); run: pip install 'align-suite[serve]'"
        ) from error
    from reward_models import build_reward
    from reward_models.scalar import SCORER_FILE

    folder = model_folder(path, "reward_model")
    if not (folder / SCORER_FILE).is_file():
        raise ArtifactError(f"{path}: no {SCORER_FILE} in it; expected a reward model of align")
    reward: Any = build_reward({"kind": "scalar", "model": str(folder), "combine": combine})
    attach_adapter(reward.model, folder)
    about = {
        "artifact": str(path),
        "spec_hash": (read_json_object(path / MANIFEST) or {}).get("spec_hash"),
        "heads": reward.model.num_heads,
    }
    # There is no authentication, so exposing it must be a visible decision.
    if host not in ("127.0.0.1", "localhost", "::1"):
        log.warning(
            "listening on %s without authentication: anyone who can reach it can send requests",
            host,
        )
    log.info("reward model %s at http://%s:%d (POST /score, GET /health)", path, host, port)
    app = build_app(reward, about, takes_ids=reward.model.reads == "last")
    uvicorn.run(
        app,
        host=host,
        port=port,
        workers=1,
        log_level="warning",
        limit_concurrency=MAX_CONNECTIONS,
    )


if __name__ == "__main__":
    main()
