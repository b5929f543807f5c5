"""GPTQModel: layer-wise GPTQ of a Hugging Face directory of the decoder, calibrated on text only.

Options: `bits`, `group_size` (-1 per channel), and further fields of its configuration, such as
`desc_act` and `mse`.
"""

import os
import tempfile

import numpy as np

from experiments.bench.peers.exchange import Stored, Task, hugging_face_name, serve

# On two cores it starts one worker but then requests two.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")


def quantize(task: Task) -> dict[str, Stored]:
    import torch
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    tokens = torch.from_numpy(task.tokens()).long()
    batch = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens]
    config = QuantizeConfig(**task.options, offload_to_disk=False, device="cpu")
    model = GPTQModel.load(str(task.checkpoint), config, dtype=torch.float32)
    model.quantize(batch, batch_size=8)
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        loaded = GPTQModel.load(folder, backend=BACKEND.TORCH, device="cpu")
        return {path: _read(loaded.model, path) for path in task.weights}


def _read(model, path: str) -> Stored:
    name = hugging_face_name(path)
    # It splits the fused projection of gate and up.
    names = [name.replace("gate_up", part) for part in ("gate", "up")]
    parts = [_layer(model.get_submodule(part)) for part in dict.fromkeys(names)]
    return Stored(
        np.concatenate([part.dense for part in parts]),
        sum(part.stored_bits for part in parts),
        sum(part.packed_bits for part in parts),
    )


def _layer(layer) -> Stored:
    sizes = {
        name: 8 * tensor.numel() * tensor.element_size()
        for name, tensor in (*layer.named_buffers(), *layer.named_parameters())
        if name in ("qweight", "qzeros", "scales", "g_idx")
    }
    dense = layer.dequantize_weight().detach().float().numpy().T
    # Symmetric zero points are one constant, and groups in order need no index.
    packed = sizes["qweight"] + sizes["scales"]
    if np.any(np.diff(layer.g_idx.numpy()) < 0):
        packed += 16 * len(layer.g_idx)
    return Stored(np.ascontiguousarray(dense), sum(sizes.values()), packed)


if __name__ == "__main__":
    serve(quantize, {"torch": "torch", "gptqmodel": "gptqmodel"})
