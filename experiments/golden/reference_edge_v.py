"""GLM-Edge-V, which transformers lacks: its GLM and SigLIP with an adapter between them.

The adapter follows the published description, and the names and sizes of its tensors.
"""

from typing import Any

import torch
import transformers

DECODER, TOWER, ADAPTER = "", "model.vision.vit.model.vision_model.", "model.vision.adapter."


class LinearProjection(torch.nn.Module):
    """Linear, norm, GELU and a gated feed-forward network."""

    def __init__(self, width: int, neurons: int):
        super().__init__()
        self.linear_proj = torch.nn.Linear(width, width, bias=False)
        self.norm1 = torch.nn.LayerNorm(width)
        self.gate_proj = torch.nn.Linear(width, neurons, bias=False)
        self.dense_h_to_4h = torch.nn.Linear(width, neurons, bias=False)
        self.dense_4h_to_h = torch.nn.Linear(neurons, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.gelu(self.norm1(self.linear_proj(x)))
        gate = torch.nn.functional.silu(self.gate_proj(x))
        return self.dense_4h_to_h(gate * self.dense_h_to_4h(x))


class Adapter(torch.nn.Module):
    """An adapter that merges two by two patches, projects them, and adds a vector at both ends."""

    def __init__(self, tower: int, width: int, neurons: int):
        super().__init__()
        self.conv = torch.nn.Conv2d(tower, width, 2, 2)
        self.linear_proj = LinearProjection(width, neurons)
        self.boi = torch.nn.Parameter(torch.zeros(1, 1, width))
        self.eoi = torch.nn.Parameter(torch.zeros(1, 1, width))

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        count, length, width = patches.shape
        side = round(length**0.5)
        grid = patches.transpose(1, 2).reshape(count, width, side, side)
        x = self.linear_proj(self.conv(grid).flatten(2).transpose(1, 2))
        return torch.cat([self.boi.expand(count, -1, -1), x, self.eoi.expand(count, -1, -1)], 1)


class GlmEdgeV(torch.nn.Module):
    """The complete model, with the call interface of transformers."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        text = {name: value for name, value in config.items() if name not in _OWN_FIELDS}
        vision = transformers.SiglipVisionConfig(**config["vision_config"])
        self.placeholder = config["boi_token_id"]
        self.config = config
        self.language = transformers.GlmForCausalLM(transformers.GlmConfig(**text))
        self.vit = transformers.SiglipVisionModel(vision)
        self.adapter = Adapter(vision.hidden_size, text["hidden_size"], text["intermediate_size"])

    @property
    def model(self) -> torch.nn.Module:
        """The decoder without its head."""
        return self.language.model

    @property
    def generation_config(self) -> Any:
        """Settings of the decoder's generation."""
        return self.language.generation_config

    def stored(self) -> dict[str, torch.Tensor]:
        """Return tensors by the names in published files."""
        parts = {DECODER: self.language, TOWER: self.vit, ADAPTER: self.adapter}
        tensors = {
            prefix + name: tensor.contiguous()
            for prefix, part in parts.items()
            for name, tensor in part.state_dict().items()
        }
        if self.config["tie_word_embeddings"]:
            del tensors["lm_head.weight"]
        return tensors

    def fields(self) -> dict[str, Any]:
        """Return the config.json of published files."""
        adapter_fields = {name: self.config[name] for name in _OWN_FIELDS}
        adapter_fields["vision_config"] = self.vit.config.to_dict()
        return {
            **self.language.config.to_dict(),
            "architectures": ["GlmForCausalLM"],
            **adapter_fields,
        }

    def embed(self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None) -> torch.Tensor:
        """Return embedded tokens with placeholders replaced by image features."""
        x = self.language.get_input_embeddings()(input_ids)
        if pixel_values is None:
            return x
        features = self.adapter(self.vit(pixel_values).last_hidden_state)
        return x.masked_scatter((input_ids == self.placeholder)[..., None], features)

    def forward(
        self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None = None, **others: Any
    ) -> Any:
        return self.language(inputs_embeds=self.embed(input_ids, pixel_values), **others)

    def generate(
        self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None = None, **others: Any
    ) -> Any:
        """Generate with the decoder's cache."""
        return self.language.generate(inputs_embeds=self.embed(input_ids, pixel_values), **others)


_OWN_FIELDS = ("vision_config", "boi_token_id", "eoi_token_id")
