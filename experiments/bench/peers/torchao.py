"""torchao: `quantize_` with weight-only configurations on linear layers, on CPU.

Three methods are not rows: its GPTQ does not run on CPU, int4 in torch's packing needs GPU kernels,
and SmoothQuant exists for integer activations only.

Options: `config` int8, intx (`bits`, `mapping`, `hqq` = "scale") or hqq (`bits`: scale and float
zero point by half-quadratic splitting); `group_size`, None per channel; `scale_dtype`; `awq`.
"""

import numpy as np

from experiments.bench.peers.exchange import Stored, Task, serve

ROWS = 4096


def quantize(task: Task) -> dict[str, Stored]:
    choose = _hqq if task.options["config"] == "hqq" else _linear
    return {path: choose(task, path, weight) for path, weight in task.weights.items()}


def _linear(task: Task, path: str, weight: np.ndarray) -> Stored:
    import torch
    from torchao.quantization import quantize_

    options, config = task.options, _config(task.options)
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = torch.nn.Parameter(torch.from_numpy(weight.copy()), requires_grad=False)
    # AWQ replaces a module in its parent.
    parent = torch.nn.Sequential(layer)
    equalization = None
    with torch.no_grad():
        if options.get("awq"):
            from torchao.prototype.awq import AWQConfig

            quantize_(parent, AWQConfig(config, step="prepare"))
            parent(torch.from_numpy(task.rows(path, ROWS)))
            quantize_(parent, AWQConfig(config, step="convert"))
            equalization = parent[0].weight.act_pre_scale
        else:
            quantize_(parent, config)
        boxed = parent[0].weight
        dense = boxed.dequantize().float()
    bits = options.get("bits", 8)
    names = [name for name in ("scale", "zero_point") if getattr(boxed, name, None) is not None]
    scales = sum(_bits(getattr(boxed, name)) for name in names)
    if equalization is not None:
        dense, scales = dense * equalization, scales + _bits(equalization)
    codes = boxed.qdata
    return Stored(dense.numpy(), _bits(codes) + scales, bits * weight.size + scales)


def _config(options: dict):
    import torch
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerAxis, PerGroup
    from torchao.quantization.granularity import PerRow
    from torchao.quantization.quant_primitives import MappingType
    from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm

    group = options.get("group_size")
    if options["config"] == "int8":
        granularity = PerGroup(group) if group else PerRow()
        return Int8WeightOnlyConfig(granularity=granularity, set_inductor_config=False)
    algorithm = "HQQ_SCALE_ONLY" if options.get("hqq") == "scale" else "AFFINE"
    scale_dtype = options.get("scale_dtype")
    return IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{options['bits']}"),
        granularity=PerGroup(group) if group else PerAxis(0),
        mapping_type=MappingType[options.get("mapping", "SYMMETRIC")],
        scale_dtype=getattr(torch, scale_dtype) if scale_dtype else None,
        intx_choose_qparams_algorithm=IntxChooseQParamsAlgorithm[algorithm],
    )


def _hqq(task: Task, path: str, weight: np.ndarray) -> Stored:
    import torch
    from torchao.quantization.quant_primitives import _choose_qparams_and_quantize_affine_hqq

    bits = task.options["bits"]
    codes, scale, zero, _ = _choose_qparams_and_quantize_affine_hqq(
        torch.from_numpy(weight.copy()),
        nbits=bits,
        group_size=task.options["group_size"],
        axis=1,
        compute_dtype=torch.float32,
        device="cpu",
        raw_output=True,
    )
    if task.options.get("scale_dtype"):
        dtype = getattr(torch, task.options["scale_dtype"])
        scale, zero = scale.to(dtype), zero.to(dtype)
    group = task.options["group_size"]
    dense = (
        codes.reshape(-1, group).float() - zero.float().reshape(-1, 1)
    ) * scale.float().reshape(-1, 1)
    scales = _bits(scale) + _bits(zero)
    stored = _bits(codes) + scales
    return Stored(dense.reshape(weight.shape).numpy(), stored, bits * weight.size + scales)


def _bits(tensor) -> int:
    return 8 * tensor.element_size() * tensor.numel()


if __name__ == "__main__":
    serve(quantize, {"torch": "torch", "torchao": "torchao.quantization"})
