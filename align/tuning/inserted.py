"""Base of the two custom peft tuners: a layer that runs a module and changes its output.

peft's registration rejects names outside its own enumeration, but its three tables accept any
string. They are private, so peft is pinned and tests/e2e/test_own_tuners.py checks the behavior.
"""

from typing import TYPE_CHECKING, Any

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel


class InsertedLayer(nn.Module, BaseTunerLayer):
    """A wrapped module; each named adapter is a small network that changes its output."""

    adapter_layer_names = ("inserted_net",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.inserted_net = nn.ModuleDict()
        self._disable_adapters = False
        self._active_adapter: Any = []
        self.merged_adapters: list[str] = []

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Models access attributes of their layers other than forward, such as attention_type.
            return getattr(super().__getattr__("base_layer"), name)

    def forward(self, *args: object, **kwargs: object) -> Any:
        """Run the module, then the active networks on its (first) output."""
        out = self.base_layer(*args, **kwargs)
        active = [n for n in self.active_adapters if n in self.inserted_net]
        if self.disable_adapters or not active:
            return out
        hidden: Tensor = out[0] if isinstance(out, tuple) else out
        # Residual: each network returns a change to the states (B, T, H).
        for name in active:
            hidden = hidden + self.inserted_net[name](hidden, kwargs)
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden


class InsertedModel(BaseTuner):
    """A model with inserted networks, which peft freezes, switches, saves and loads."""

    prefix = "inserted_"
    tuner_layer_cls = InsertedLayer
    target_module_mapping: dict[str, Any] = {}

    def build(self, config: object, width: int) -> nn.Module:
        """Return one network for hidden states of a given width."""
        raise NotImplementedError

    def _create_and_replace(
        self,
        peft_config: "PeftConfig",
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        # A second adapter on the same layer joins the first one.
        layer = target if isinstance(target, InsertedLayer) else InsertedLayer(target)
        parameter = next(layer.get_base_layer().parameters())
        net = self.build(peft_config, _width(layer.get_base_layer(), self.model))
        layer.inserted_net[adapter_name] = net.to(parameter.device)
        layer.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)


def _width(module: nn.Module, model: "PreTrainedModel") -> int:
    return int(getattr(module, "out_features", model.config.get_text_config().hidden_size))


def register(name: str, config: type, model: type[InsertedModel]) -> None:
    """Register a tuner with peft under a name."""
    tables: Any = (
        (PEFT_TYPE_TO_CONFIG_MAPPING, config),
        (PEFT_TYPE_TO_TUNER_MAPPING, model),
        (PEFT_TYPE_TO_PREFIX_MAPPING, model.prefix),
    )
    for table, value in tables:
        table[name] = value
