"""peft and transformers without what takes a third of a stage's start.

peft imports bitsandbytes wherever it is installed, and bitsandbytes imports torch's compiler: 2.6
CPU seconds, which only quantized models need. transformers imports SciPy's optimization for the
losses of object detectors: 0.4 CPU seconds.
"""

import sys
from types import ModuleType

from align.core.extras import as_if_absent, called_later

_QUANTIZER = "bitsandbytes"


def import_peft() -> None:
    """Import peft as if bitsandbytes were not installed, unless one of them is loaded already.

    For processes that are ours: peft then answers "not installed" until ``peft_for`` is called.
    """
    if "peft" in sys.modules or _QUANTIZER in sys.modules:
        return
    with as_if_absent(_QUANTIZER), called_later("scipy.optimize", "linear_sum_assignment"):
        from peft.import_utils import is_bnb_4bit_available, is_bnb_available

        _ = is_bnb_available(), is_bnb_4bit_available()  # peft remembers the answers


def peft_for(model: object) -> ModuleType:
    """Return peft, which knows the layers of bitsandbytes if ``model`` has any."""
    import peft
    from peft import import_utils

    if getattr(model, "is_quantized", False):
        import_utils.is_bnb_available.cache_clear()
        import_utils.is_bnb_4bit_available.cache_clear()
    return peft
