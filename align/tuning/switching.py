"""One loaded model with many LoRA adapters, of which one or none is active."""

from typing import TYPE_CHECKING, Any

from align.tuning.light_peft import peft_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_ADAPTERS = 8
"""Adapters that stay loaded."""


class AdapterSwitch:
    """The adapters of a model, loaded when they are chosen; the longest unused ones leave.

    Args:
        model: a transformers model, which gets the adapters' layers.
    """

    def __init__(self, model: "PreTrainedModel") -> None:
        self._model = model
        self._tuned: Any = None
        self._loaded: list[str] = []

    def choose(self, folder: str | None) -> None:
        """Activate the adapter in a folder, or none."""
        if folder is None:
            if self._tuned is not None:
                self._tuned.base_model.disable_adapter_layers()
            return
        if self._tuned is None:
            peft = peft_for(self._model)
            self._tuned = peft.PeftModel.from_pretrained(
                self._model, folder, adapter_name=_named(folder)
            ).eval()
        elif folder not in self._loaded:
            self._tuned.load_adapter(folder, adapter_name=_named(folder))
        if folder in self._loaded:
            # The list is in the order of use: the adapter that was used longest ago is dropped.
            self._loaded.remove(folder)
        self._loaded.append(folder)
        if len(self._loaded) > MAX_ADAPTERS:
            self._tuned.delete_adapter(_named(self._loaded.pop(0)))
        self._tuned.base_model.enable_adapter_layers()
        self._tuned.set_adapter(_named(folder), inference_mode=True)


def _named(folder: str) -> str:
    # peft makes it a part of module names, which have no dots.
    return "adapter_" + folder.encode().hex()
