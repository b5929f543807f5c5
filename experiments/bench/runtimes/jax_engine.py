"""glm_edge's model in compiled JAX, with the cache of `glm_edge.generate`.

Forms are those of `random_model`. The weights are made in memory, without a file. Options:
`attended_slots`, as in `ge.export.tflite`: a step then attends to that number of slots.
"""

import functools
import os
from typing import Any

# As in the library's commands: programs of one row run about twice as fast.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_enable_concurrency_optimized_scheduler=false")

import numpy as np

from experiments.bench.runtimes.engine import Engine, Task, serve, timed


class Jax(Engine):
    """A jitted step that donates its cache to the next step."""

    def prepare(self, task: Task) -> dict[str, Any]:
        from experiments.bench.runtimes.random_model import random_model
        from glm_edge import params as boxes

        model, params = random_model(task.config, task.form)
        names = ["decoder", "embed" if model.config.decoder.tie_embeddings else "head"]
        stored = boxes.stored_bytes({name: params[name] for name in names})
        return {"file_bytes": None, "weight_bytes": stored, "notes": ["weights made in memory"]}

    def load(self, task: Task) -> None:
        import jax
        import jax.numpy as jnp

        from experiments.bench.runtimes.random_model import random_model
        from glm_edge.models.glm import init_cache

        self.task, self.jnp, self.rng = task, jnp, np.random.default_rng(0)
        model, self.params = random_model(task.config, task.form)

        def run(module: Any, tokens: Any, cache: Any, attended: int | None) -> Any:
            embedded, _ = module.embed_inputs(tokens)
            slot, count = cache["length"], tokens.shape[1]
            positions = slot + jnp.arange(count)
            attended_cache = cache
            if attended is not None:
                attended_cache = {
                    **cache,
                    "layers": jax.tree.map(lambda x: x[:, :attended], cache["layers"]),
                }
            final, _, after = module.decoder(embedded, positions[None], None, attended_cache)

            def written(full: Any, part: Any) -> Any:
                rows = jax.lax.dynamic_slice_in_dim(part, slot, count, axis=1)
                return jax.lax.dynamic_update_slice_in_dim(full, rows, slot, axis=1)

            if attended is not None:
                after["layers"] = jax.tree.map(written, cache["layers"], after["layers"])
            return module.predict(final[:, -1:]), after

        @functools.partial(jax.jit, donate_argnums=2, static_argnums=3)
        def step(params: Any, tokens: Any, cache: Any, attended: int | None) -> Any:
            return model.apply({"params": params}, tokens, cache, attended, method=run)

        self.step = step
        self.cache = init_cache(model.config.decoder, 1, task.slots)

    def decode(self, context: int, steps: int) -> list[float]:
        self.cache["length"] = self.jnp.int32(context)
        return [timed(lambda i=i: self._run(1, context + i)) for i in range(steps)]

    def prefill(self, length: int) -> float:
        self.cache["length"] = self.jnp.int32(0)
        return timed(lambda: self._run(length, 0))

    def _run(self, count: int, slot: int) -> Any:
        tokens = self.rng.integers(0, self.task.decoder["vocab_size"], (1, count))
        _, attended = self.task.step(count, slot)
        logits, self.cache = self.step(self.params, tokens.astype(np.int32), self.cache, attended)
        return logits.block_until_ready()


if __name__ == "__main__":
    serve(Jax, {"jax": "jax"})
