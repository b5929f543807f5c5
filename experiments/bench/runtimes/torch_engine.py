"""transformers' GLM of the same shape in eager torch, with linear layers through torchao.

It is called directly, without `generate`; the cache grows and is then truncated. Weights are made
in memory, without a file. Forms: float32, bfloat16, int8-weight-only and int8-dynamic (torchao on
float32).
"""

from typing import Any

import numpy as np

from experiments.bench.runtimes.engine import Engine, Task, serve, timed


class Torch(Engine):
    """A `GlmForCausalLM` with random weights."""

    def prepare(self, task: Task) -> dict[str, Any]:
        import torch

        with torch.device("meta"):
            model = make(task)
        bits = {"float32": 32, "bfloat16": 16}.get(task.form, 8)
        count = sum(parameter.numel() for parameter in model.parameters())
        notes = ["weights made in memory", "eager"]
        return {"file_bytes": None, "weight_bytes": count * bits // 8, "notes": notes}

    def load(self, task: Task) -> None:
        import torch

        self.task, self.torch, self.rng = task, torch, np.random.default_rng(0)
        torch.set_num_threads(task.threads)
        torch.manual_seed(0)
        self.model = make(task).eval()
        if task.form.startswith("int8"):
            quantize(self.model, task.form)
        self.caches: dict[int, Any] = {}

    def decode(self, context: int, steps: int) -> list[float]:
        if context not in self.caches:
            self.caches[context] = self._run(self._tokens(context), None)
        cache = self.caches[context]
        tokens = [self._tokens(1) for _ in range(steps)]
        seconds = [timed(lambda t=token: self._run(t, cache)) for token in tokens]
        cache.crop(-steps)
        return seconds

    def prefill(self, length: int) -> float:
        tokens = self._tokens(length)
        return timed(lambda: self._run(tokens, None))

    def _run(self, tokens: Any, cache: Any) -> Any:
        with self.torch.inference_mode():
            return self.model(
                input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1
            ).past_key_values

    def _tokens(self, count: int) -> Any:
        tokens = self.rng.integers(0, self.task.decoder["vocab_size"], (1, count))
        return self.torch.as_tensor(tokens)


def make(task: Task) -> Any:
    """Return the model with transformers' initial weights."""
    import torch
    import transformers

    decoder = task.decoder
    config = transformers.GlmConfig(
        vocab_size=decoder["vocab_size"],
        hidden_size=decoder["hidden_size"],
        intermediate_size=decoder["intermediate_size"],
        num_hidden_layers=decoder["num_layers"],
        num_attention_heads=decoder["num_heads"],
        num_key_value_heads=decoder["num_kv_heads"],
        head_dim=decoder["head_dim"],
        rms_norm_eps=decoder["rms_norm_eps"],
        attention_bias=decoder["attention_bias"],
        tie_word_embeddings=decoder["tie_embeddings"],
        max_position_embeddings=decoder["max_position_embeddings"],
        rope_parameters={
            "rope_type": "default",
            "rope_theta": decoder["rope_theta"],
            "partial_rotary_factor": decoder["partial_rotary_factor"],
        },
        pad_token_id=None,
        eos_token_id=None,
    )
    dtype = torch.bfloat16 if task.form == "bfloat16" else torch.float32
    return transformers.GlmForCausalLM._from_config(config, dtype=dtype)


def quantize(model: Any, form: str) -> None:
    """Quantize every linear layer with torchao's int8; the head gets a separate copy."""
    import torch
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        quantize_,
    )

    # A tied head would convert the embedding to a tensor without lookups.
    model.lm_head.weight = torch.nn.Parameter(
        model.lm_head.weight.detach().clone(), requires_grad=False
    )
    kind = Int8WeightOnlyConfig if form == "int8-weight-only" else None
    kind = kind or Int8DynamicActivationInt8WeightConfig
    quantize_(model, kind(set_inductor_config=False))


if __name__ == "__main__":
    serve(Torch, {"torch": "torch", "transformers": "transformers", "torchao": "torchao"})
