"""Check the jaxtyping signatures of the pure mathematics while the numeric tests run."""

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
