"""The same generation in llama.cpp, by way of llama-cpp-python: random weights, written as a GGUF file and loaded."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tools.benchmarks.train import Size


def matrices(size: Size) -> Iterator[tuple[str, tuple[int, int]]]:
    """The matrices of a GPT-2 by GGUF's names, each (outputs, inputs)."""
    width = size.width
    yield "token_embd", (size.vocabulary, width)
    if not size.tied:
        yield "output", (size.vocabulary, width)
    for i in range(size.layers):
        for name, shape in (("attn_qkv", (3 * width, width)), ("attn_output", (width, width)),
                            ("ffn_up", (4 * width, width)), ("ffn_down", (width, 4 * width))):
            yield f"blk.{i}.{name}", shape


def write_model(gguf: Any, path: Path, size: Size, form: str) -> None:
    """A GPT-2 whose matrices have the type of `form`; what is not a matrix is float32."""
    rng, kind = np.random.default_rng(0), gguf.GGMLQuantizationType["F32" if form == "packed" else form.upper()]
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_context_length(size.time)
    writer.add_embedding_length(size.width)
    writer.add_feed_forward_length(4 * size.width)
    writer.add_block_count(size.layers)
    writer.add_head_count(size.heads)
    writer.add_layer_norm_eps(1e-5)
    writer.add_vocab_size(size.vocabulary)
    writer.add_tokenizer_model("none")

    for name, shape in matrices(size):
        weight = rng.standard_normal(shape, np.float32) * np.float32(0.02)
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(weight, kind), raw_dtype=kind)
        if "." in name:
            writer.add_tensor(f"{name}.bias", np.zeros(shape[0], np.float32))
    writer.add_tensor("position_embd.weight", rng.standard_normal((size.time, size.width), np.float32) * 0.02)
    for norm in ("output_norm", *(f"blk.{i}.{name}" for i in range(size.layers) for name in ("attn_norm", "ffn_norm"))):
        writer.add_tensor(f"{norm}.weight", np.ones(size.width, np.float32))
        writer.add_tensor(f"{norm}.bias", np.zeros(size.width, np.float32))

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_runs(llama_cpp: Any, gguf: Any, size: Size, prompt: np.ndarray, new: int, form: str,
               threads: int) -> dict[str, Callable[[], object]]:
    """Greedy, and with keys and values of float32, as the others have them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_model(gguf, path, size, form)
        model = llama_cpp.Llama(str(path), n_ctx=size.time, n_batch=prompt.shape[1], n_threads=threads,
                                n_threads_batch=threads, flash_attn=True, use_mmap=False, verbose=False,
                                type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32)
    tokens = prompt[0].tolist()

    def step(tokens: list[int]) -> int:
        """The most probable token after these."""
        model.eval(tokens)
        logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
        return int(np.ctypeslib.as_array(logits, (size.vocabulary,)).argmax())

    def prefill() -> object:
        model.n_tokens = 0
        return step(tokens)

    def decode() -> object:
        model.n_tokens = len(tokens)
        token = tokens[0]
        for _ in range(new):
            token = step([token])
        return token

    prefill()
    return {"prefill": prefill, "decode": decode}
