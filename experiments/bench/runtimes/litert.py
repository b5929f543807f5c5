"""glm_edge's `.tflite` file in LiteRT, driven like a phone's runtime does.

The cache stays in one set of buffers that is both input and output, so that LiteRT writes new rows
in place. Two alternating sets would make it copy the cache in every step. A step embeds its token,
runs the layers and writes the logits to a buffer. A prompt is one call of its prefill signature and
one step for the last token, since prefill does not return logits.

Forms are those of `glm_edge.params.Format`, or float32 and float16. Options: `weight_cache`, a
folder of packed XNNPACK weights that all signatures share; `attended_slots`, as in
`ge.export.tflite`; `forced_lengths`, as there, default none; `prefix`, tokens before the image in
`action`.
"""

import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.bench.runtimes.engine import CACHE, HIDDEN, Engine, Task, serve, timed


class LiteRT(Engine):
    """A file in `CompiledModel`."""

    def prepare(self, task: Task) -> dict[str, Any]:
        import glm_edge as ge
        from experiments.bench.runtimes import random_model

        options = {name: task.option(name, []) for name in ("attended_slots", "forced_lengths")}
        exported = random_model.exported(task, ge.export.tflite, **options)
        notes = sorted({conversion.rule for conversion in exported.conversions})
        packed = packed_path(task)
        if packed is not None:
            # A stale packed copy of other weights would be used.
            packed.unlink(missing_ok=True)
            seconds = timed(lambda: (self.load(task), self.decode(task.contexts[0], 1)))
            notes.append(f"first load, with packing: {seconds:.2f} s")
        return {
            "file_bytes": exported.file_bytes,
            "weight_bytes": weight_bytes(task.path, exported.model.config),
            "notes": notes,
        }

    def load(self, task: Task) -> None:
        from ai_edge_litert.compiled_model import CompiledModel
        from ai_edge_litert.cpu_options import CpuOptions
        from ai_edge_litert.options import Options

        self.task, self.rng = task, np.random.default_rng(0)
        cpu = CpuOptions(num_threads=task.threads)
        packed = packed_path(task)
        if packed is not None:
            packed.parent.mkdir(parents=True, exist_ok=True)
            cpu.xnnpack_weight_cache_path = str(packed)
        self.model = CompiledModel.from_file(task.path, options=Options(cpu_options=cpu))
        self.inputs, self.outputs = {}, {}
        self.cache = {
            name: self.model.create_input_buffer_by_name("decode", name)
            for name in self._signature("decode")["inputs"]
            if name.startswith(CACHE)
        }
        self._clear()

    def decode(self, context: int, steps: int) -> list[float]:
        tokens = self._tokens(steps)
        return [timed(lambda i=i: self._step(tokens[i], context + i)) for i in range(steps)]

    def prefill(self, length: int) -> float:
        tokens = self._tokens(length)

        def run() -> None:
            rows = self._embed(tokens)
            self._run(rows, 0, length)
            self._step(tokens[-1], length - 1)

        return timed(run)

    def action(self, tokens: int, steps: int) -> dict[str, float]:
        ids, pixels = self._tokens(tokens), self._buffers("vision")[0]["images"]
        shape = self.model.get_input_tensor_details("vision")["images"]["shape"]
        image = self.rng.random(tuple(shape), np.float32)
        marks = [time.perf_counter()]
        pixels.write(image)
        features = self._call("vision")["features"]
        count, width = self.model.get_output_tensor_details("vision")["features"]["shape"][1:]
        features = np.asarray(features.read(count * width, np.float32)).reshape(count, width)
        marks.append(time.perf_counter())
        rows, start = self._embed(ids), self.task.option("prefix", 0)
        rows[start : start + count] = features
        self._run(rows, 0, tokens)
        scores = self._step(ids[-1], tokens - 1)
        marks.append(time.perf_counter())
        vocabulary = self.task.decoder["vocab_size"]
        for slot in range(tokens, tokens + steps - 1):
            token = int(np.argmax(scores.read(vocabulary, np.float32)))
            scores = self._step(token, slot)
        np.argmax(scores.read(vocabulary, np.float32))
        marks.append(time.perf_counter())
        parts = [after - before for before, after in itertools.pairwise(marks)]
        return dict(zip(("image", "prefill", "decode"), parts, strict=True))

    def passes(self, context: int, counts: Sequence[int]) -> float:
        lengths = [1, *sorted(self.task.option("forced_lengths", []))]
        tokens, vocabulary = self._tokens(sum(counts)), self.task.decoder["vocab_size"]

        def run() -> None:
            start = 0
            for count in counts:
                length = next(length for length in lengths if length >= count)
                # As the runner pads: the last row of the signature is that of the last token.
                ids = np.pad(tokens[start : start + count], (0, length - count), mode="edge")
                outputs = self._run(self._embed(ids), context + start, length, count)
                np.argmax(outputs["logits"].read(vocabulary, np.float32))
                start += count

        return timed(run)

    def _signature(self, name: str) -> dict[str, Any]:
        return self.model.get_signature_by_index(self.model.get_signature_index(name))

    def _buffers(self, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the buffers of a signature except the cache, made once."""
        if name not in self.inputs:
            names = self._signature(name)
            self.inputs[name] = {
                n: self.model.create_input_buffer_by_name(name, n)
                for n in names["inputs"]
                if not n.startswith(CACHE)
            }
            self.outputs[name] = {
                n: self.model.create_output_buffer_by_name(name, n)
                for n in names["outputs"]
                if not n.startswith(CACHE)
            }
        return self.inputs[name], self.outputs[name]

    def _call(self, name: str, cached: bool = False) -> dict[str, Any]:
        inputs, outputs = self._buffers(name)
        if not cached:
            self.model.run_by_name(name, inputs, outputs)
            return outputs
        self.model.run_by_name(name, inputs | self.cache, outputs | self.cache)
        return outputs

    def _clear(self) -> None:
        decoder = self.task.decoder
        numbers = decoder["num_kv_heads"] * self.task.slots * decoder["head_dim"]
        for buffer in self.cache.values():
            buffer.write(np.zeros(numbers, np.float32))

    def _tokens(self, count: int) -> np.ndarray:
        return self.rng.integers(0, self.task.decoder["vocab_size"], count).astype(np.int32)

    def _embed(self, tokens: np.ndarray) -> np.ndarray:
        name = "embed" if len(tokens) == 1 else f"embed_{len(tokens)}"
        self._buffers(name)[0]["tokens"].write(np.ascontiguousarray(tokens))
        width = self.task.decoder["hidden_size"]
        rows = self._call(name)["embeddings"].read(len(tokens) * width, np.float32)
        return np.array(rows, np.float32).reshape(len(tokens), width)

    def _run(
        self, rows: np.ndarray, slot: int, length: int, count: int | None = None
    ) -> dict[str, Any]:
        """Run a signature on rows, of which the last repeat that of token `count`."""
        name, attended = self.task.step(length, slot)
        inputs = self._buffers(name)[0]
        positions = np.arange(slot, slot + length, dtype=np.int32)
        positions = np.minimum(positions, slot + (length if count is None else count) - 1)
        visible = np.arange(attended or self.task.slots) <= positions[:, None]
        inputs["embeddings"].write(rows)
        inputs["input_pos"].write(positions)
        inputs["mask"].write(np.where(visible, 0.0, HIDDEN).astype(np.float32))
        if "positions" in inputs:
            inputs["positions"].write(np.broadcast_to(positions, (3, length)).copy())
        return self._call(name, cached=True)

    def _step(self, token: int, slot: int) -> Any:
        return self._run(self._embed(np.array([token], np.int32)), slot, 1)["logits"]


def timed_signatures(task: Task, phase: str, steps: int) -> list[str]:
    """List the signatures that run in one burst of a phase, except those that embed tokens.

    Args:
      task: task with the file.
      phase: `decode 128`, `prefill 512` and so on.
      steps: decoding steps per burst.

    Returns:
      Their names, in the order of their first run.
    """
    kind, count = phase.split()
    start = int(count)
    if kind == "decode":
        calls = [(1, slot) for slot in range(start, start + steps)]
    else:
        calls = [(start, 0), (1, start - 1)]
    return list(dict.fromkeys(task.step(*call)[0] for call in calls))


def packed_path(task: Task) -> Path | None:
    """Return the file in which XNNPACK stores packed weights between loads, or None."""
    folder = task.option("weight_cache")
    return Path(folder) / f"{Path(task.path).stem}.xnnpack" if folder else None


def weight_bytes(path: str, config: Any) -> int:
    """Return the bytes of weights and scales that one decoding step reads."""
    import glm_edge as ge

    return sum(
        constant.data.nbytes + (0 if constant.scale is None else constant.scale.nbytes)
        for name, constant in ge.export.read_constants(path).items()
        if name.split("/")[0] in ("decoder", "head")
        or (name == "embed/weight" and config.decoder.tie_embeddings)
    )


if __name__ == "__main__":
    serve(LiteRT, {"ai-edge-litert": "ai_edge_litert.compiled_model"})
