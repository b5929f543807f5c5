"""A GLM decoder in float64 numpy, written from its definition, to compare pruning with."""

import numpy as np
import pytest

from glm_edge import params as boxes


class Decoder64:
    """Losses of a text-only, tied GLM and the inputs of its matrices, in float64.

    Attributes:
      weights: float64 arrays by path, which a test may change.
      gates: factor on a unit, `{(layer, "heads" or "neurons"): [units]}`.
      inputs: of each matrix at the last run, `{path: [rows, in]}`.
    """

    def __init__(self, config, params):
        self.config, self.gates, self.inputs = config, {}, {}
        dense = {path: boxes.dense(leaf) for path, leaf in boxes.path_items(params)}
        self.weights = {path: np.asarray(value, np.float64) for path, value in dense.items()}

    def row_losses(self, tokens, pad):
        logits = self.logits(tokens)[:, :-1]
        logits = logits - logits.max(-1, keepdims=True)
        logged = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        targets = tokens[:, 1:]
        losses = -np.take_along_axis(logged, targets[..., None], -1)[..., 0]
        taught = targets != pad
        return (losses * taught).sum(1) / np.maximum(taught.sum(1), 1)

    def logits(self, tokens):
        x = self.weights["embed/weight"][tokens]
        for index in range(self.config.num_layers):
            x = self._layer(index, x)
        return self._norm("decoder/norm", x) @ self.weights["embed/weight"].T

    def _layer(self, index, x):
        config, root = self.config, f"decoder/layers/{index}"
        heads, kv_heads, width = config.heads(index), config.kv_heads(index), config.head_dim
        rows, length, _ = x.shape
        normed = self._norm(f"{root}/input_norm", x)

        def project(name, count):
            result = self._linear(f"{root}/attention/{name}/weight", normed)
            return result.reshape(rows, length, count, width)

        query = self._turn(project("q_proj", heads))
        key, value = self._turn(project("k_proj", kv_heads)), project("v_proj", kv_heads)
        mixed = np.zeros_like(query)
        for head in range(heads):
            shared = head // (heads // kv_heads)
            scores = query[:, :, head] @ key[:, :, shared].transpose(0, 2, 1) / np.sqrt(width)
            scores[:, np.triu_indices(length, 1)[0], np.triu_indices(length, 1)[1]] = -np.inf
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            mixed[:, :, head] = scores / scores.sum(-1, keepdims=True) @ value[:, :, shared]
        mixed = mixed * self.gates.get((index, "heads"), np.ones(heads))[:, None]
        x = x + self._linear(f"{root}/attention/o_proj/weight", mixed.reshape(rows, length, -1))
        normed = self._norm(f"{root}/post_attention_norm", x)
        fused = self._linear(f"{root}/mlp/gate_up_proj/weight", normed)
        gate, up = np.split(fused, 2, -1)
        hidden = up * gate / (1 + np.exp(-gate))
        hidden = hidden * self.gates.get((index, "neurons"), 1.0)
        return x + self._linear(f"{root}/mlp/down_proj/weight", hidden)

    def _linear(self, path, x):
        self.inputs[path] = x.reshape(-1, x.shape[-1])
        return x @ self.weights[path].T

    def _norm(self, path, x):
        scale = np.sqrt((x * x).mean(-1, keepdims=True) + self.config.rms_norm_eps)
        return x / scale * self.weights[f"{path}/weight"]

    def _turn(self, x):
        width, theta = self.config.head_dim, self.config.rope_theta
        turns = np.float32(theta ** (-np.arange(0, width, 2) / width)).astype(np.float64)
        angle = (np.arange(x.shape[1])[:, None] * turns)[:, None]
        even, odd = x[..., ::2], x[..., 1::2]
        turned = np.stack(
            [
                even * np.cos(angle) - odd * np.sin(angle),
                odd * np.cos(angle) + even * np.sin(angle),
            ],
            axis=-1,
        )
        return turned.reshape(x.shape)


@pytest.fixture
def decoder64(small):
    """The small model of these tests in float64."""
    model, params = small
    return Decoder64(model.config.decoder, params)
