"""One engine as a subprocess that answers short measurements, so that engines with clashing dependencies alternate
within one run: a JSON request a line on stdin, a JSON answer a line on stdout. ``bench.peers`` asks.

    python -m bench.rivals ours|transformers|llama

Requests, all of them of one sequence with the same ids for every engine:
    {"do": "open", ...}                           load a model; what else it says is the engine's own
    {"do": "fill", "contexts", "chunk", "threads", "limit_s"}    compute a prompt, keep the state at each context
    {"do": "decode", "context", "steps", "threads"}     -> seconds of each step, from the state of that context
    {"do": "prefill", "length", "chunk", "threads"}     -> seconds, from nothing
    {"do": "greedy", "length", "count"}           -> the logits after a prompt, and so many greedy tokens
"""

import copy
import ctypes
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from bench import experts_rivals


def prompt(vocab_size: int, length: int) -> torch.Tensor:
    """The first ids of one fixed sequence."""
    return torch.randint(2, vocab_size - 2, (65536,), generator=torch.Generator().manual_seed(0))[:length]


class OverTime(Exception):
    """A prompt took longer than its limit."""


class Ours:
    """``NativeGLM`` in one format."""

    def open(self, model: str, fmt: str) -> dict[str, Any]:
        from glm52.load import load_for_inference
        from glm52.native import NativeGLM

        loaded = load_for_inference(Path(model), fmt)  # type: ignore[arg-type]
        assert isinstance(loaded, NativeGLM)
        self.model, self.vocab_size = loaded, loaded.config.vocab_size
        return {}

    def _run(self, cache: Any, begin: int, end: int) -> torch.Tensor:
        from glm52.cache import Spans

        return self.model(self.ids[begin:end], Spans.of_sequence(begin, end), cache)

    def _threads(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self.model.threads = threads

    def fill(self, contexts: list[int], chunk: int, threads: int, limit_s: float) -> dict[str, Any]:
        self._threads(threads)
        longest = max(contexts)
        self.cache = self.model.new_cache(-(-(longest + 128) // 64) * 64)
        self.ids = prompt(self.vocab_size, longest + 128)
        began = time.perf_counter()
        for begin in range(0, longest, chunk):
            self._run(self.cache, begin, min(begin + chunk, longest))
        return {"seconds": time.perf_counter() - began}

    def decode(self, context: int, steps: int, threads: int) -> dict[str, Any]:
        self._threads(threads)
        seconds = []
        for at in range(context, context + steps + 1):
            began = time.perf_counter()
            self.model.logits(self._run(self.cache, at, at + 1)).argmax()
            seconds.append(time.perf_counter() - began)
        return {"seconds": seconds[1:]}

    def prefill(self, length: int, chunk: int, threads: int) -> dict[str, Any]:
        self._threads(threads)
        self.ids, cache = prompt(self.vocab_size, length), self.model.new_cache(-(-length // 64) * 64)
        began = time.perf_counter()
        for begin in range(0, length, chunk):
            h = self._run(cache, begin, min(begin + chunk, length))
        self.model.logits(h[-1:])
        return {"seconds": time.perf_counter() - began}

    def greedy(self, length: int, count: int) -> dict[str, Any]:
        self.ids, cache = prompt(self.vocab_size, length), self.model.new_cache(-(-(length + count) // 64) * 64)
        logits = [self.model.logits(self._run(cache, 0, length)[-1:])[0]]
        while len(logits) < count:
            self.ids = torch.cat((self.ids, logits[-1].argmax()[None]))
            logits.append(self.model.logits(self._run(cache, len(self.ids) - 1, len(self.ids)))[0])
        return {"logits": logits[0].tolist(), "tokens": [int(row.argmax()) for row in logits]}


class Transformers:
    """``GlmMoeDsaForCausalLM`` with sdpa, in bf16 or f32."""

    def open(self, model: str, fmt: str) -> dict[str, Any]:
        from transformers import AutoModelForCausalLM

        dtype = torch.float32 if fmt == "f32" else torch.bfloat16
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="sdpa").eval()
        self.vocab_size = self.model.config.vocab_size
        return {}

    def _run(self, ids: torch.Tensor, cache: Any = None) -> Any:
        return self.model(ids[None], past_key_values=cache, use_cache=True, logits_to_keep=1)

    def fill(self, contexts: list[int], chunk: int, threads: int, limit_s: float) -> dict[str, Any]:
        torch.set_num_threads(threads)
        self.ids, cache, at = prompt(self.vocab_size, max(contexts) + 128), None, 0
        self.caches, seconds = {}, 0.0
        for context in sorted(contexts):
            while at < context:
                end, began = min(at + chunk, context), time.perf_counter()
                cache = self._run(self.ids[at:end], cache).past_key_values
                seconds, at = seconds + time.perf_counter() - began, end
                if seconds > limit_s:
                    raise OverTime(f"{at} tokens of a prompt took {seconds:.0f} s, more than its limit")
            self.caches[context] = copy.deepcopy(cache)
        return {"seconds": seconds}

    def decode(self, context: int, steps: int, threads: int) -> dict[str, Any]:
        torch.set_num_threads(threads)
        cache, seconds = copy.deepcopy(self.caches[context]), []
        for at in range(context, context + steps + 1):
            began = time.perf_counter()
            self._run(self.ids[at : at + 1], cache).logits[0, -1].argmax()
            seconds.append(time.perf_counter() - began)
        return {"seconds": seconds[1:]}

    def prefill(self, length: int, chunk: int, threads: int) -> dict[str, Any]:
        """The whole prompt at once, which is how it is fastest here; chunk says nothing."""
        torch.set_num_threads(threads)
        began = time.perf_counter()
        self._run(prompt(self.vocab_size, length))
        return {"seconds": time.perf_counter() - began}

    def greedy(self, length: int, count: int) -> dict[str, Any]:
        out = self._run(prompt(self.vocab_size, length))
        logits = [out.logits[0, -1].float()]
        while len(logits) < count:
            out = self._run(logits[-1].argmax()[None], out.past_key_values)
            logits.append(out.logits[0, -1].float())
        return {"logits": logits[0].tolist(), "tokens": [int(row.argmax()) for row in logits]}


class Llama:
    """llama.cpp through the low-level calls of llama-cpp-python; fmt f32, bf16, q8_0 or q4_0."""

    def open(self, model: str, fmt: str, files: str, flash: bool, float_cache: bool = False) -> dict[str, Any]:
        import llama_cpp

        self.lib = llama_cpp
        self.quiet = llama_cpp.llama_log_callback(
            lambda level, text, data: sys.stderr.write(text.decode(errors="replace")) if level == 4 else None
        )
        llama_cpp.llama_log_set(self.quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        path = self._file(Path(model), fmt, Path(files))
        params = llama_cpp.llama_model_default_params()
        # On a CPU with AMX its repacked q8_0 and q4_0 abort with this architecture.
        params.use_extra_bufts = not (fmt.startswith("q") and "amx_int8" in Path("/proc/cpuinfo").read_text())
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise RuntimeError(f"{path}: llama.cpp does not load it")
        vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(vocab)
        self.flash, self.float_cache = flash, float_cache
        return {"megabytes": path.stat().st_size / 1e6}

    def _file(self, model: Path, fmt: str, files: Path) -> Path:
        """The GGUF of a folder, written once."""
        from bench.gguf import write_gguf

        path = files / f"{model.name}-{fmt}.gguf"
        if path.exists():
            return path
        files.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        if fmt in ("f32", "bf16"):
            write_gguf(model, part, bf16=fmt == "bf16")
        else:
            params = self.lib.llama_model_quantize_default_params()
            params.ftype = {"q8_0": self.lib.LLAMA_FTYPE_MOSTLY_Q8_0, "q4_0": self.lib.LLAMA_FTYPE_MOSTLY_Q4_0}[fmt]
            params.nthread = 2
            source = self._file(model, "bf16", files)
            if self.lib.llama_model_quantize(str(source).encode(), str(part).encode(), ctypes.byref(params)):
                raise RuntimeError(f"{source}: llama.cpp does not quantise it to {fmt}")
        part.rename(path)
        return path

    def _context(self, length: int, threads: int) -> Any:
        params = self.lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = -(-length // 256) * 256, 512, 512
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = int(self.flash)
        if self.float_cache:
            params.type_k = params.type_v = 0  # GGML_TYPE_F32
        context = self.lib.llama_init_from_model(self.model, params)
        if not context:
            raise RuntimeError("llama.cpp makes no context with these settings")
        return context

    def _run(self, context: Any, ids: torch.Tensor) -> Any:
        """The logits of the last token, as a pointer."""
        tokens = (ctypes.c_int32 * len(ids))(*ids.tolist())
        if self.lib.llama_decode(context, self.lib.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError("llama_decode failed")
        return self.lib.llama_get_logits_ith(context, -1)

    def _row(self, logits: Any) -> torch.Tensor:
        array = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float * self.vocab_size)).contents
        return torch.frombuffer(array, dtype=torch.float32)

    def fill(self, contexts: list[int], chunk: int, threads: int, limit_s: float, states: str = "") -> dict[str, Any]:
        """states: a folder that keeps the state at each context, so that other formats and settings of the same model
        start from it. The values of a cache do not change how long a step takes."""
        for old in getattr(self, "contexts", {}).values():
            self.lib.llama_free(old)
        self.ids, at, seconds = prompt(self.vocab_size, max(contexts) + 128), 0, 0.0
        self.contexts: dict[int, Any] = {context: self._context(context + 128, threads) for context in contexts}
        files = {context: Path(states) / f"{context}.state" for context in contexts} if states else {}
        if files and all(file.exists() for file in files.values()):
            for context, file in files.items():
                self._restore(context, file.read_bytes())
            return {"seconds": None}
        work = self._context(max(contexts) + 128, threads)
        for context in sorted(contexts):
            while at < context:
                end, began = min(at + chunk, context), time.perf_counter()
                self._run(work, self.ids[at:end])
                seconds, at = seconds + time.perf_counter() - began, end
                if seconds > limit_s:
                    raise OverTime(f"{at} tokens of a prompt took {seconds:.0f} s, more than its limit")
            size = self.lib.llama_state_seq_get_size(work, 0)
            state = (ctypes.c_uint8 * size)()
            self.lib.llama_state_seq_get_data(work, state, size, 0)
            self._restore(context, bytes(state))
            if files:
                files[context].write_bytes(bytes(state))
        self.lib.llama_free(work)
        return {"seconds": seconds}

    def _restore(self, context: int, data: bytes) -> None:
        state = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
        if not self.lib.llama_state_seq_set_data(self.contexts[context], state, len(data), 0):
            raise RuntimeError("llama.cpp does not restore a state of its own")

    def decode(self, context: int, steps: int, threads: int) -> dict[str, Any]:
        work, seconds = self.contexts[context], []
        self.lib.llama_set_n_threads(work, threads, threads)
        for at in range(context, context + steps + 1):
            began = time.perf_counter()
            self._row(self._run(work, self.ids[at : at + 1])).argmax()
            seconds.append(time.perf_counter() - began)
        if not self.lib.llama_memory_seq_rm(self.lib.llama_get_memory(work), 0, context, -1):
            raise RuntimeError("llama.cpp does not take tokens back")
        return {"seconds": seconds[1:]}

    def prefill(self, length: int, chunk: int, threads: int) -> dict[str, Any]:
        work, ids = self._context(length, threads), prompt(self.vocab_size, length)
        began = time.perf_counter()
        for begin in range(0, length, chunk):
            self._run(work, ids[begin : begin + chunk])
        seconds = time.perf_counter() - began
        self.lib.llama_free(work)
        return {"seconds": seconds}

    def greedy(self, length: int, count: int) -> dict[str, Any]:
        work = self._context(length + count, 2)
        logits = [self._row(self._run(work, prompt(self.vocab_size, length))).clone()]
        while len(logits) < count:
            logits.append(self._row(self._run(work, logits[-1].argmax()[None])).clone())
        self.lib.llama_free(work)
        return {"logits": logits[0].tolist(), "tokens": [int(row.argmax()) for row in logits]}


ENGINES = {
    "ours": Ours, "transformers": Transformers, "llama": Llama, "our_experts": experts_rivals.Ours,
    "kt_experts": experts_rivals.KTKernel, "torch_experts": experts_rivals.Torch,
}  # fmt: skip


@torch.inference_mode()
def main() -> None:
    engine: Any = ENGINES[sys.argv[1]]()
    answers = os.fdopen(os.dup(1), "w")  # engines print to stdout as they please: that goes to stderr
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(engine, request.pop("do"))(**request)
        except Exception as error:  # whatever a rival raises is its answer, and the run goes on
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
