"""glm_edge's MNN graphs in MNN's Python interpreter.

Writing them needs glm_edge with its extra `mnn` in the same environment. The interpreter cannot
write outputs to the buffers that the next step reads, so the cache is copied between steps; this
copy is not timed. Forms are those of `glm_edge.params.Format`.
"""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.bench.runtimes.engine import CACHE, HIDDEN, Engine, Task, serve, timed


class Mnn(Engine):
    """Graphs of one directory."""

    def prepare(self, task: Task) -> dict[str, Any]:
        import glm_edge as ge
        from experiments.bench.runtimes import random_model

        package = random_model.exported(task, ge.export.mnn)
        stored = (package.path / "weights.bin").stat().st_size
        return {"file_bytes": package.file_bytes, "weight_bytes": stored, "notes": []}

    def load(self, task: Task) -> None:
        import MNN

        self.task, self.mnn = task, MNN
        self.rng = np.random.default_rng(0)
        self.graphs = {name: self._open(name) for name in ("embed", "decode")}

    def decode(self, context: int, steps: int) -> list[float]:
        tokens = self.rng.integers(0, self.task.decoder["vocab_size"], steps)
        return [self._step(int(token), slot) for slot, token in enumerate(tokens, context)]

    def _open(self, name: str) -> tuple[Any, Any]:
        path = Path(self.task.path)
        interpreter = self.mnn.Interpreter(str(path / f"{name}.mnn"))
        interpreter.setExternalFile(str(path / "weights.bin"))
        # With `low` memory, products use the integers; otherwise loading converts them to float
        # weights.
        session = interpreter.createSession(
            {"backend": "CPU", "numThread": self.task.threads, "memory": "low"}
        )
        return interpreter, session

    def _step(self, token: int, slot: int) -> float:
        positions = np.array([slot], np.int32)
        visible = np.arange(self.task.slots) <= slot
        mask = np.where(visible, 0.0, HIDDEN).astype(np.float32)[None, None, None]
        rows = np.zeros((1, 1, self.task.decoder["hidden_size"]), np.float32)
        scores = np.zeros((1, 1, self.task.decoder["vocab_size"]), np.float32)

        def run() -> None:
            self._run("embed", {"tokens": np.array([[token]], np.int32)}, "embeddings", rows)
            inputs = {"embeddings": rows, "input_pos": positions, "mask": mask}
            self._run("decode", inputs, "logits", scores)

        seconds = timed(run)
        interpreter, session = self.graphs["decode"]
        outputs = interpreter.getSessionOutputAll(session)
        for name in interpreter.getSessionInputAll(session):
            if name.startswith(CACHE):
                interpreter.getSessionInput(session, name).copyFrom(outputs[f"{name}_out"])
        return seconds

    def _run(self, graph: str, inputs: dict[str, np.ndarray], output: str, into: Any) -> None:
        interpreter, session = self.graphs[graph]
        for name, array in inputs.items():
            interpreter.getSessionInput(session, name).copyFrom(self._tensor(array))
        interpreter.runSession(session)
        interpreter.getSessionOutput(session, output).copyToHostTensor(self._tensor(into))

    def _tensor(self, array: np.ndarray) -> Any:
        is_integer = array.dtype == np.int32
        kind = self.mnn.Halide_Type_Int if is_integer else self.mnn.Halide_Type_Float
        return self.mnn.Tensor(array.shape, kind, array, self.mnn.Tensor_DimensionType_Caffe)


if __name__ == "__main__":
    serve(Mnn, {"mnn": "MNN"})
