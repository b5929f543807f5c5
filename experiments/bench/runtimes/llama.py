"""llama.cpp through llama-cpp-python: a GGUF of architecture `llama` with random weights.

Package `gguf` writes it once in float16. `llama_model_quantize` makes the other types from it, like
the stock tool, and stores the tied embedding and head with more bits. Contexts share the weights,
and each has its own cache.

Forms are names of llama.cpp's file types: F16, Q8_0, Q4_0, Q4_K_M, Q2_K, TQ2_0.
"""

import ctypes
import os
from pathlib import Path
from typing import Any

import numpy as np

from experiments.bench.runtimes.engine import Engine, Task, random_matrix, serve, timed


class LlamaCpp(Engine):
    """A GGUF file in llama.cpp."""

    def prepare(self, task: Task) -> dict[str, Any]:
        import gguf
        import llama_cpp as api

        path = Path(task.path)
        source = path.with_name(f"{path.name.removesuffix(f'{task.form}.gguf')}F16.gguf")
        if not source.exists():
            partial = source.with_suffix(".partial")
            write_f16(partial, task)
            os.replace(partial, source)
        if path != source:
            options = api.llama_model_quantize_default_params()
            options.nthread = task.threads
            options.ftype = getattr(api, f"LLAMA_FTYPE_MOSTLY_{task.form}")
            names = str(source).encode(), str(path).encode()
            if api.llama_model_quantize(*names, ctypes.byref(options)):
                raise ValueError(f"llama_model_quantize failed for {task.form}")
        tensors = gguf.GGUFReader(path).tensors
        types: dict[str, int] = {}
        for tensor in tensors:
            kind = tensor.tensor_type.name
            types[kind] = types.get(kind, 0) + int(tensor.n_bytes)
        listed = ", ".join(f"{kind} {size / 1e6:.0f} MB" for kind, size in types.items())
        return {
            "file_bytes": path.stat().st_size,
            "weight_bytes": sum(types.values()),
            "notes": [listed],
        }

    def load(self, task: Task) -> None:
        import llama_cpp as api

        self.task, self.api, self.rng = task, api, np.random.default_rng(0)
        api.llama_backend_init()
        # Log messages go to the standard error of this process.
        self.model = api.llama_model_load_from_file(
            task.path.encode(), api.llama_model_default_params()
        )
        if not self.model:
            raise ValueError(f"llama.cpp cannot load {Path(task.path).name}")
        self.contexts: dict[int, Any] = {}

    def decode(self, context: int, steps: int) -> list[float]:
        handle = self._context(context)
        self._forget(handle, context)
        tokens = enumerate(self._tokens(steps), context)
        return [timed(lambda i=i, t=t: self._run(handle, [t], i)) for i, t in tokens]

    def prefill(self, length: int) -> float:
        handle, tokens = self._context(0), self._tokens(length)
        self._forget(handle, 0)
        return timed(lambda: self._fill(handle, tokens))

    def _context(self, filled: int) -> Any:
        """Make a context with a cache for a number of tokens."""
        if filled not in self.contexts:
            options = self.api.llama_context_default_params()
            options.n_ctx = self.task.slots
            options.n_batch = options.n_ubatch = max(self.task.lengths)
            options.n_threads = options.n_threads_batch = self.task.threads
            handle = self.api.llama_init_from_model(self.model, options)
            if not handle:
                raise ValueError("llama.cpp cannot make a context")
            self.contexts[filled] = handle
            self._fill(handle, self._tokens(filled))
        return self.contexts[filled]

    def _forget(self, handle: Any, cached: int) -> None:
        memory = self.api.llama_get_memory(handle)
        if not self.api.llama_memory_seq_rm(memory, 0, cached, -1):
            raise ValueError("llama.cpp cannot truncate its cache")

    def _fill(self, handle: Any, tokens: list[int]) -> None:
        width = max(self.task.lengths) if self.task.batched else 1
        for start in range(0, len(tokens), width):
            self._run(handle, tokens[start : start + width], start)

    def _run(self, handle: Any, tokens: list[int], slot: int) -> None:
        # Positions continue those of the cache; only the last token has logits.
        array = (self.api.llama_token * len(tokens))(*tokens)
        batch = self.api.llama_batch_get_one(array, len(tokens))
        status = self.api.llama_decode(handle, batch)
        if status:
            raise ValueError(f"llama_decode at slot {slot}: status {status}")
        self.api.llama_get_logits(handle)

    def _tokens(self, count: int) -> list[int]:
        return self.rng.integers(0, self.task.decoder["vocab_size"], count).tolist()


def write_f16(path: Path, task: Task) -> None:
    """Write random weights of the decoder's shape."""
    import gguf

    decoder, rng = task.decoder, np.random.default_rng(0)
    width, head = decoder["hidden_size"], decoder["head_dim"]
    heads, kv_heads = decoder["num_heads"], decoder["num_kv_heads"]
    neurons = decoder["intermediate_size"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_context_length(decoder["max_position_embeddings"])
    writer.add_embedding_length(width)
    writer.add_block_count(decoder["num_layers"])
    writer.add_feed_forward_length(neurons)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(int(head * decoder["partial_rotary_factor"]))
    writer.add_rope_freq_base(decoder["rope_theta"])
    writer.add_layer_norm_rms_eps(decoder["rms_norm_eps"])
    writer.add_vocab_size(decoder["vocab_size"])
    writer.add_tokenizer_model("none")

    def matrix(name: str, rows: int, columns: int) -> None:
        writer.add_tensor(f"{name}.weight", random_matrix(rng, rows, columns).astype(np.float16))

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(width, np.float32))

    matrix("token_embd", decoder["vocab_size"], width)
    for layer in range(decoder["num_layers"]):
        at = f"blk.{layer}"
        norm(f"{at}.attn_norm")
        matrix(f"{at}.attn_q", heads * head, width)
        matrix(f"{at}.attn_k", kv_heads * head, width)
        matrix(f"{at}.attn_v", kv_heads * head, width)
        matrix(f"{at}.attn_output", width, heads * head)
        norm(f"{at}.ffn_norm")
        matrix(f"{at}.ffn_gate", neurons, width)
        matrix(f"{at}.ffn_up", neurons, width)
        matrix(f"{at}.ffn_down", width, neurons)
    norm("output_norm")
    if not decoder["tie_embeddings"]:
        matrix("output", decoder["vocab_size"], width)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    serve(LlamaCpp, {"llama-cpp-python": "llama_cpp", "gguf": "gguf"})
