"""Virtual tokens before every text: prefix, prompt and p-tuning, with peft's encoders.

Virtual tokens come first and attention is causal, so their keys and values are the same for every
sequence. They are computed once per forward pass and passed to the model as a filled cache. The
same mechanism works for packed rows, padded batches and decoding.
"""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

if TYPE_CHECKING:
    pass


class VirtualTokens(nn.Module):
    """A frozen transformers model with an encoder for its virtual tokens.

    Args:
        model: a causal model, with or without its output head.
        config: one of peft's prompt-learning configurations, with all fields set.
    """

    def __init__(self, model: PreTrainedModel, config: Any) -> None:
        super().__init__()
        self.model: Any = model.requires_grad_(False)
        self.peft_config = {"default": config}
        self.num = config.num_virtual_tokens
        self.gives_cache = config.peft_type == "PREFIX_TUNING"
        self.encoder = _encoder(model, config).to(model.device, model.dtype)
        self._off = False

    @property
    def config(self) -> Any:
        """Return the model's configuration."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Return the device of the model."""
        return self.model.device

    def get_input_embeddings(self) -> Any:
        """Return the model's own embeddings."""
        return self.model.get_input_embeddings()

    def get_base_model(self) -> Any:
        """Return the model without its virtual tokens."""
        return self.model

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Disable the virtual tokens inside the block."""
        before, self._off = self._off, True
        try:
            yield
        finally:
            self._off = before

    def embeddings(self) -> Tensor:
        """Return the encoder's output for the virtual tokens: (tokens, width)."""
        weight = next(self.encoder.parameters())
        return self.encoder(torch.arange(self.num, device=weight.device))

    def virtual_cache(self, rows: int = 1) -> DynamicCache | None:
        """Return a cache with the virtual tokens of each row; None if they are disabled."""
        if self._off:
            return None
        found = self._prefix_cache() if self.gives_cache else self._prompt_cache()
        if rows == 1:
            return found
        wide = DynamicCache()
        layers: Any = found.layers
        for i, layer in enumerate(layers):
            # (1, H_kv, V, D) -> (B, H_kv, V, D) without copying: all rows share the virtual tokens.
            keys, values = (x.expand(rows, -1, -1, -1) for x in (layer.keys, layer.values))
            wide.update(keys, values, i)
        return wide

    def _prefix_cache(self) -> DynamicCache:
        config = self.peft_config["default"]
        heads = config.num_attention_heads
        parts = self.embeddings().view(self.num, 2 * config.num_layers, heads, -1)
        parts = parts.permute(1, 2, 0, 3).unsqueeze(1)  # (2 layers, 1, H_kv, V, D)
        cache = DynamicCache()
        for i in range(config.num_layers):
            cache.update(parts[2 * i], parts[2 * i + 1], i)
        return cache

    def _prompt_cache(self) -> DynamicCache:
        # Prompt and p-tuning: run the embeddings (1, V, H) through the model to get its cache.
        decoder = self.model.get_decoder() if self.model.can_generate() else self.model
        cache = DynamicCache()
        decoder(inputs_embeds=self.embeddings().unsqueeze(0), past_key_values=cache, use_cache=True)
        return cache

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: object,
    ) -> Any:
        """Run the model after the virtual tokens; masks and positions refer only to the text.

        Args:
            input_ids: (B, T).
            attention_mask: (B, T so far).
            position_ids: (B, T).
            past_key_values: the cache returned by an earlier call, which includes the virtual
                tokens.
            kwargs: passed to the model.
        """
        if self._off:
            num = 0
        else:
            num = self.num
            if past_key_values is None:
                past_key_values = self.virtual_cache(input_ids.shape[0])
        # Virtual tokens are always visible and shift the positions of the text.
        if attention_mask is not None and num:
            ones = attention_mask.new_ones(attention_mask.shape[0], num)
            attention_mask = torch.cat([ones, attention_mask], dim=1)
        return self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=None if position_ids is None else position_ids + num,
            past_key_values=past_key_values,
            **kwargs,
        )

    @torch.no_grad()
    def generate(self, input_ids: Tensor, *, attention_mask: Tensor, **kwargs: object) -> Tensor:
        """Generate as transformers does; the response follows ``input_ids`` in the result."""
        cache = self.virtual_cache(input_ids.shape[0])
        if cache is None:
            return self.model.generate(input_ids, attention_mask=attention_mask, **kwargs)
        # transformers skips as many ids as the cache contains; these represent the virtual tokens.
        known = input_ids.new_zeros(input_ids.shape[0], self.num)
        whole = torch.cat([known, input_ids], dim=1)
        mask = torch.cat([torch.ones_like(known), attention_mask], dim=1)
        out = self.model.generate(whole, attention_mask=mask, past_key_values=cache, **kwargs)
        return out[:, self.num :]

    def adapter_state(self) -> dict[str, Tensor]:
        """Return the tensors that peft saves for virtual tokens: the encoder's output."""
        return {"prompt_embeddings": self.embeddings().detach().cpu()}

    @torch.no_grad()
    def load_adapter_state(self, state: dict[str, Tensor]) -> None:
        """Load saved virtual tokens; the configuration must be in inference mode."""
        assert isinstance(self.encoder, nn.Embedding), type(self.encoder)
        self.encoder.weight.copy_(state["prompt_embeddings"])


def _encoder(model: PreTrainedModel, config: Any) -> nn.Module:
    """Return a table or MLP that maps token numbers to embeddings, or to keys and values."""
    from peft.tuners import PrefixEncoder, PromptEmbedding, PromptEncoder

    prefix = config.peft_type == "PREFIX_TUNING"
    if config.inference_mode:
        layers = 2 * config.num_layers if prefix else 1
        return nn.Embedding(config.num_virtual_tokens, layers * config.token_dim)
    if prefix:
        return PrefixEncoder(config)
    if config.peft_type == "P_TUNING":
        return PromptEncoder(config)
    return PromptEmbedding(config, model.get_input_embeddings())
