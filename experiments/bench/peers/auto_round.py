"""auto-round: block-wise signed-gradient rounding of a Hugging Face directory of the decoder.

It calibrates on text only. Codes, scales and zero points are counted as its format stores them.

Options: `bits`, `group_size` (-1 per channel), `iters` (200 by default, 1000 its best recipe) and
`enable_alg_ext`, its extensions for low bits.
"""

import tempfile
from pathlib import Path

import numpy as np

from experiments.bench.peers.exchange import Stored, Task, hugging_face_name, serve


def quantize(task: Task) -> dict[str, Stored]:
    import torch
    from auto_round import AutoRound
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    options, tokens = task.options, torch.from_numpy(task.tokens()).long()
    model = AutoModelForCausalLM.from_pretrained(task.checkpoint, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(task.checkpoint / "tokenizer.json"))
    tool = AutoRound(
        model,
        tokenizer,
        bits=options["bits"],
        group_size=options["group_size"],
        sym=True,
        iters=options["iters"],
        enable_alg_ext=options.get("enable_alg_ext", False),
        dataset=[{"input_ids": row[None]} for row in tokens],
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        device_map="cpu",
        enable_torch_compile=False,
    )
    quantized, _ = tool.quantize()
    dense = {
        path: quantized.get_submodule(hugging_face_name(path)).weight.detach().float().numpy()
        for path in task.weights
    }
    with tempfile.TemporaryDirectory() as folder:
        tool.save_quantized(folder, format="auto_round")
        bits: dict[str, dict[str, int]] = {}
        for file in Path(folder).rglob("*.safetensors"):
            with safe_open(file, framework="np") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    layer, _, field = name.rpartition(".")
                    bits.setdefault(layer, {})[field] = 8 * tensors.get_tensor(name).nbytes
    stored = {}
    for path, weight in dense.items():
        parts = bits[hugging_face_name(path)]
        # Symmetric zero points are one constant.
        packed = parts["qweight"] + parts["scales"]
        stored[path] = Stored(np.array(weight), sum(parts.values()), packed)
    return stored


if __name__ == "__main__":
    serve(quantize, {"torch": "torch", "auto-round": "auto_round"})
