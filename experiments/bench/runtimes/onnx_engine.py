"""glm_edge's ONNX graphs in onnxruntime, with the cache in two alternating sets of buffers.

Writing them needs glm_edge with its extra `onnx` in the same environment; running them does not. A
prompt is one call of its prefill graph and one step for the last token, as in `litert`. Products
may round their inputs (`accuracy_level` 4), the fastest setting of onnxruntime.

Forms are those of `glm_edge.params.Format` or float32. Options: `attended_slots`, as in
`ge.export.onnx`.
"""

import collections
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from experiments.bench.runtimes.engine import CACHE, HIDDEN, Engine, Task, serve, timed

PRODUCTS = ("MatMulNBits", "MatMul", "Gemm", "FusedMatMul", "MatMulIntegerToFloat")
SETTINGS = {"session.qdq_matmulnbits_accuracy_level": "4"}


class OnnxRuntime(Engine):
    """Graphs of one directory, each opened at its first run."""

    def prepare(self, task: Task) -> dict[str, Any]:
        import glm_edge as ge
        from experiments.bench.runtimes import random_model

        attended = task.option("attended_slots", [])
        package = random_model.exported(task, ge.export.onnx, attended_slots=attended)
        # A tied embedding is stored once, in the layout of the product.
        stored = (package.path / "weights.bin").stat().st_size
        operators = optimized_operators(Path(task.path) / "decode.onnx", task.threads)
        counts = {name: operators[name] for name in (*PRODUCTS, "DequantizeLinear")}
        shown = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
        notes = [f"operators of the optimized decode graph: {shown}"]
        return {"file_bytes": package.file_bytes, "weight_bytes": stored, "notes": notes}

    def load(self, task: Task) -> None:
        import onnxruntime

        self.task, self.runtime = task, onnxruntime
        self.rng = np.random.default_rng(0)
        self.sessions: dict[str, Any] = {}
        decoder, slots = task.decoder, task.slots
        heads, width = decoder["num_kv_heads"], decoder["head_dim"]
        shapes = {"k": (1, heads, slots, width), "v": (1, heads, width, slots)}
        self.caches = [
            {
                f"{CACHE}{kind}_{layer}": onnxruntime.OrtValue.ortvalue_from_numpy(
                    np.zeros(shape, np.float32)
                )
                for kind, shape in shapes.items()
                for layer in range(decoder["num_layers"])
            }
            for _ in range(2)
        ]
        self._session("embed")
        self._session(task.step(1, task.contexts[0])[0])

    def decode(self, context: int, steps: int) -> list[float]:
        tokens = self._tokens(steps)
        return [timed(lambda i=i: self._run(tokens[i : i + 1], context + i)) for i in range(steps)]

    def prefill(self, length: int) -> float:
        tokens = self._tokens(length)

        def run() -> None:
            self._run(tokens, 0)
            self._run(tokens[-1:], length - 1)

        return timed(run)

    def _session(self, name: str) -> Any:
        if name not in self.sessions:
            path = Path(self.task.path) / f"{name}.onnx"
            options = session_options(self.runtime, self.task.threads)
            self.sessions[name] = self.runtime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        return self.sessions[name]

    def _run(self, tokens: np.ndarray, slot: int) -> Any:
        count = len(tokens)
        embed = "embed" if count == 1 else f"embed_{count}"
        rows = self._session(embed).run(None, {"tokens": tokens[None]})[0]
        name, attended = self.task.step(count, slot)
        session = self._session(name)
        positions = np.arange(slot, slot + count, dtype=np.int32)
        visible = np.arange(attended or self.task.slots) <= positions[:, None]
        inputs = {
            "embeddings": rows,
            "input_pos": positions,
            "mask": np.where(visible, 0.0, HIDDEN).astype(np.float32)[None, None],
        }
        if self.task.decoder["mrope_section"]:
            inputs["positions"] = np.broadcast_to(positions, (3, count)).copy()
        binding, (before, after) = session.io_binding(), self.caches
        used = {node.name for node in session.get_inputs()}
        for name, array in inputs.items():
            if name in used:
                binding.bind_cpu_input(name, array)
        for name, value in before.items():
            if name in used:
                binding.bind_ortvalue_input(name, value)
        for output in session.get_outputs():
            if output.name.startswith(CACHE):
                binding.bind_ortvalue_output(output.name, after[output.name.removesuffix("_out")])
            else:
                binding.bind_output(output.name)
        session.run_with_iobinding(binding)
        self.caches.reverse()
        return binding

    def _tokens(self, count: int) -> np.ndarray:
        return self.rng.integers(0, self.task.decoder["vocab_size"], count).astype(np.int32)


def session_options(library: Any, threads: int) -> Any:
    """Return the options of every session."""
    options = library.SessionOptions()
    options.intra_op_num_threads = threads
    for name, value in SETTINGS.items():
        options.add_session_config_entry(name, value)
    return options


def optimized_operators(path: Path, threads: int) -> collections.Counter[str]:
    """Count the operators of onnxruntime's optimized graph of a file."""
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory() as directory:
        options = session_options(onnxruntime, threads)
        options.optimized_model_filepath = str(Path(directory) / "optimized.onnx")
        name = "session.optimized_model_external_initializers_file_name"
        options.add_session_config_entry(name, "weights")
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        graph = onnx.load(options.optimized_model_filepath, load_external_data=False).graph
        return collections.Counter(node.op_type for node in graph.node)


if __name__ == "__main__":
    serve(OnnxRuntime, {"onnxruntime": "onnxruntime"})
