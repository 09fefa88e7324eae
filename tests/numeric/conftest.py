"""Check the jaxtyping signatures of the pure mathematics while the numeric tests run."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

# PEP 484's tower: an int is a float, as everywhere in Python and in YAML.
install_import_hook(
    ["align.losses", "align.online.advantages"],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)

# The same examples in every run, and no time limit that a busy machine could break.
settings.register_profile("numeric", deadline=None, derandomize=True)
settings.load_profile("numeric")

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Save a tiny policy and join a world of one."""
    import alone
    from engine_models import save_tiny, tiny_model

    with alone.world_of_one():
        yield save_tiny(tiny_model(1, tied=True), tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def other_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save another one, the reference."""
    from engine_models import save_tiny, tiny_model

    return save_tiny(tiny_model(2, tied=True), tmp_path_factory.mktemp("other"))
