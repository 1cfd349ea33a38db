"""Our speed next to that of others on the same weights, ids and threads, in one run, request by request in turn.

    python -m bench.peers --small S --small-f32 S32 --large M [--env ~/.cache/glm52/peers] [--only check,decode,...]

Rivals: transformers (sdpa; bf16 and f32), llama.cpp (flash attention on and off; the GGUF is made from the same weights
and checked against our logits), kt-kernel's and torch's quantised experts at GLM-5.2's width. What a rival cannot do is
listed with its reason. llama.cpp and kt-kernel are installed into folders of their own under --env, which takes some
minutes the first time. Tables show each rival's best setting; the JSON line holds every one.
"""

import argparse
import json
import os
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.common import finish, matmul_peak, read_bandwidth
from bench.decode import bytes_per_token
from bench.experts_rivals import D, E, F, K, error, oracle
from bench.prefill import prompt_flops
from glm52.config import GLMConfig

PACKAGES = {
    "llama": ("llama_cpp", ["llama-cpp-python==0.3.36", "diskcache==5.6.3"]),
    "kt": ("kt_kernel", ["kt-kernel==0.7.2"]),
    "gguf": ("gguf", ["gguf==0.19.0", "pyyaml==6.0.4"]),
}
PARTS = ("check", "decode", "prefill", "experts", "curve")
PAUSE_S = 0.06  # workers of the engine asked before may still spin
CURVE = (128, 512, 1024, 2048, 4096, 8192)
ALIKE = {"bf16": "bf16", "int8": "q8_0", "int4": "q4_0"}  # our formats and llama.cpp's nearest
KT_ALIKE = {"bf16": ["bf16"], "fp8": ["fp8"], "int8": ["int8"], "int4": ["int4_32", "int4"]}
TORCH_ALIKE = {"bf16": ["bf16"], "fp8": [], "int8": ["int8", "int8_dynamic"], "int4": ["int4"]}


def install(env: Path) -> dict[str, str]:
    """Install what is missing; the rivals that could not be, with the reason."""
    failed = {}
    for name, (module, packages) in PACKAGES.items():
        if (env / name / module).is_dir():
            continue
        print(f"installing {', '.join(packages)} into {env / name}", file=sys.stderr, flush=True)
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            str(env / name),
            *packages,
        ]
        flags = {"CMAKE_ARGS": "-DGGML_NATIVE=ON", "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1)}
        done = subprocess.run(command, env=os.environ | flags, capture_output=True, text=True)
        if done.returncode:
            failed[name] = (done.stderr.strip().splitlines() or ["pip failed"])[-1][:200]
    return failed


@dataclass
class Rival:
    """An engine in a process of its own. A request that fails or takes too long ends it, with the reason kept."""

    name: str
    engine: str
    env: Path
    limit_s: float
    fmt: str = ""
    setting: str = ""
    failure: str = ""
    times: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        folders = [str(self.env / name) for name in PACKAGES] if self.engine in ("llama", "kt_experts") else []
        path = os.pathsep.join([*folders, *filter(None, sys.path), os.getcwd()])
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process
        self.process = subprocess.Popen([sys.executable, "-m", "bench.rivals", self.engine], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self._log, text=True, env=os.environ | {"PYTHONPATH": path})  # fmt: skip

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """The answer, or an empty one; ``failure`` then says why."""
        if self.failure:
            return {}
        assert self.process.stdin and self.process.stdout
        time.sleep(PAUSE_S)
        try:
            self.process.stdin.write(json.dumps({"do": do} | request) + "\n")
            self.process.stdin.flush()
            if not select.select([self.process.stdout], [], [], self.limit_s)[0]:
                raise TimeoutError(f"no answer within {self.limit_s:.0f} s")
            line = self.process.stdout.readline()
            answer: dict[str, Any] = json.loads(line) if line else {"error": f"ended: {self._last_words()}"}
        except (OSError, TimeoutError) as problem:
            answer = {"error": str(problem)}
        if "error" in answer:
            self.failure = f"{do}: {answer['error']}"
            print(f"    {self}: {self.failure}", flush=True)
            self.close()
            return {}
        return answer

    def _last_words(self) -> str:
        self._log.seek(0)
        return (self._log.read().strip().splitlines() or ["without a word"])[-1][:200]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def __str__(self) -> str:
        return " ".join(filter(None, (self.name, self.fmt, self.setting)))

    def add(self, key: str, seconds: Iterable[float]) -> None:
        self.times.setdefault(key, []).extend(seconds)

    def median(self, key: str) -> float | None:
        return statistics.median(self.times[key]) if self.times.get(key) else None

    def report(self) -> dict[str, Any]:
        rows = {key: {"seconds": statistics.median(t), "min": min(t), "max": max(t), "count": len(t)}
                for key, t in self.times.items()}  # fmt: skip
        return {"name": self.name, "format": self.fmt, "setting": self.setting, "failure": self.failure, "rows": rows}


@dataclass(frozen=True, kw_only=True)
class Run:
    """What every part needs."""

    env: Path
    missing: dict[str, str]
    threads: list[int]
    rounds: int
    seconds: float
    limit_s: float

    def start(self, name: str, engine: str, fmt: str = "", setting: str = "", **opening: Any) -> Rival:
        rival = Rival(name, engine, self.env, self.limit_s, fmt, setting)
        needs = {"llama": ["llama", "gguf"], "kt_experts": ["kt", "gguf"]}.get(engine, [])
        if lacking := [f"{n} is not installed: {self.missing[n]}" for n in needs if n in self.missing]:
            rival.failure = "; ".join(lacking)
            rival.close()
        if opening:
            rival.ask("open", fmt=fmt, **opening)
        return rival

    def models(self, model: Path, formats: list[str], dtypes: list[str], flash: list[bool]) -> list[Rival]:
        """Every engine with a model open; all of them stay, so that they can alternate."""
        out = [self.start("ours", "ours", fmt, model=str(model)) for fmt in formats]
        out += [self.start("transformers", "transformers", dtype, model=str(model)) for dtype in dtypes]
        for fmt in formats:
            for on in flash:
                out.append(self.start("llama.cpp", "llama", ALIKE[fmt], f"flash {'on' if on else 'off'}",
                                      model=str(model), files=str(self.env / "files"), flash=on))  # fmt: skip
        return out


def best(rivals: list[Rival], key: str) -> tuple[Rival, float] | None:
    timed = [(r, s) for r in rivals if (s := r.median(key)) is not None]
    return min(timed, key=lambda pair: pair[1]) if timed else None


def beside(rivals: list[Rival], key: str, ours_s: float) -> str:
    """The fastest of several settings of one rival, and how often it fits into ours."""
    found = best(rivals, key)
    if found is None:
        return "-"
    rival, seconds = found
    return f"{rival} {seconds * 1e3:.2f} ms ({seconds / ours_s:.2f}x ours)"


def check(run: Run, model: Path) -> dict[str, Any]:
    """Do all compute one function? f32 weights, rows and products, below and beyond ``index_topk``."""
    config, out = GLMConfig.read(model), {}
    rivals = [run.start("ours", "ours", "f32", model=str(model)),
              run.start("transformers", "transformers", "f32", model=str(model)),
              run.start("llama.cpp", "llama", "f32", "flash off", model=str(model), files=str(run.env / "files"),
                        flash=False, float_cache=True)]  # fmt: skip
    print("f32 logits after a prompt, and 24 greedy tokens, against ours")
    for length in (config.index_topk - 28, 4 * config.index_topk):
        answers = [r.ask("greedy", length=length, count=24) for r in rivals]
        for rival, answer in zip(rivals[1:], answers[1:], strict=True):
            if answer and answers[0]:
                pairs = zip(answer["logits"], answers[0]["logits"], strict=True)
                apart = max(abs(a - b) for a, b in pairs)
                equal = sum(a == b for a, b in zip(answer["tokens"], answers[0]["tokens"], strict=True))
                print(f"    {rival!s:<28} prompt {length:>5}: logits differ by {apart:.1e} at most, "
                      f"{equal} of 24 tokens equal", flush=True)  # fmt: skip
                out[f"{rival} {length}"] = {"logits": apart, "equal": equal}
    for r in rivals:
        r.close()
    return out


def fill(rivals: list[Rival], contexts: list[int], run: Run) -> None:
    states = Path(tempfile.mkdtemp())
    for r in rivals:
        folder = states / r.setting.replace(" ", "-")  # a state with flash attention is laid out otherwise
        folder.mkdir(exist_ok=True)
        more = {"states": str(folder)} if r.engine == "llama" else {}
        r.ask("fill", contexts=contexts, chunk=512, threads=max(run.threads), limit_s=run.limit_s / 2, **more)
    shutil.rmtree(states)


def decode(rivals: list[Rival], contexts: list[int], threads: list[int], run: Run) -> None:
    """Rounds of a few steps each; a round takes every engine about equally long."""
    steps: dict[tuple[int, str], int] = {}
    for turn in range(run.rounds + 1):
        for context in contexts:
            for count in threads:
                key = f"decode {context} {count}"
                for r in rivals:
                    wanted = steps.get((id(r), key), 1)
                    seconds = r.ask("decode", context=context, steps=wanted, threads=count).get("seconds", [])
                    if seconds and turn == 0:  # only to learn how long a step is
                        steps[id(r), key] = max(1, min(100, int(run.seconds / statistics.median(seconds))))
                    elif seconds:
                        r.add(key, seconds)


def print_decode(label: str, rivals: list[Rival], config: GLMConfig, contexts: list[int], bandwidth: dict[int, float],
                 threads: list[int]) -> None:  # fmt: skip
    for ours in (r for r in rivals if r.name == "ours"):
        for context in contexts:
            for count in threads:
                key = f"decode {context} {count}"
                if (seconds := ours.median(key)) is None:
                    continue
                bound = bytes_per_token(config, ours.fmt, context) / bandwidth[count]
                theirs = [r for r in rivals if r.name == "llama.cpp" and r.fmt == ALIKE[ours.fmt]]
                line = [beside(theirs, key, seconds)]
                line += [beside([r for r in rivals if r.name == "transformers"], key, seconds)] * (ours.fmt == "bf16")
                print(f"{label} decode at {context:>5}, {count} threads: ours {ours.fmt:<4} {seconds * 1e3:7.2f} ms, "
                      f"{bound / seconds:.0%} of the bound   {'   '.join(line)}", flush=True)  # fmt: skip


def prefill(rivals: list[Rival], config: GLMConfig, lengths: list[int], run: Run) -> None:
    threads = max(run.threads)
    kept = [r for r in rivals if r.fmt in ("bf16", "f32")]
    peak = matmul_peak(threads)
    for length in lengths:
        key = f"prefill {length} {threads}"
        for _ in range(3 if length <= 1024 else 1):
            for r in kept:
                if seconds := r.ask("prefill", length=length, chunk=512, threads=threads).get("seconds"):
                    r.add(key, [seconds])
        found = best([r for r in kept if r.name == "ours"], key)
        if found is not None:
            share = prompt_flops(config, length) / found[1] / peak
            rest = [
                beside([r for r in kept if r.name == name], key, found[1]) for name in ("llama.cpp", "transformers")
            ]
            print(f"prefill {length:>5}, {threads} threads: {found[0]} {found[1] * 1e3:.0f} ms, {share:.0%} of the "
                  f"matmul peak   {'   '.join(rest)}", flush=True)  # fmt: skip


def experts(run: Run, formats: list[str], token_counts: list[int]) -> list[dict[str, Any]]:
    """Errors are against fp32 on the bf16 weights, so they hold what a format loses."""
    exact, out = oracle(token_counts), []
    rivals = [run.start("ours", "our_experts"), run.start("kt-kernel", "kt_experts"),
              run.start("torch", "torch_experts")]  # fmt: skip
    print(f"{K} of {E} experts of {D} x {F}")
    for fmt in formats:
        pairs = (
            [(rivals[0], fmt)] + [(rivals[1], f) for f in KT_ALIKE[fmt]] + [(rivals[2], f) for f in TORCH_ALIKE[fmt]]
        )
        # An engine holds one format: its second one is measured against ours after its first.
        firsts = [pair for i, pair in enumerate(pairs) if pair[0] not in [r for r, _ in pairs[:i]]]
        groups = [firsts, *[[pairs[0], pair] for pair in pairs if pair not in firsts]]
        for group in groups:
            for threads in run.threads:
                out += _experts_rows(group, fmt, threads, token_counts, run, exact)
    for r in rivals:
        r.close()
    return out + [{"rival": r.name, "failure": r.failure} for r in rivals if r.failure]


def _experts_rows(group: list[tuple[Rival, str]], like: str, threads: int, token_counts: list[int], run: Run,
                  exact: dict[int, Any]) -> list[dict[str, Any]]:  # fmt: skip
    """Engines in one format each, in turn; the first is ours."""
    rows: list[dict[str, Any]] = []
    for r, f in group:
        r.ask("open", fmt=f, threads=threads)
    for tokens in token_counts:
        times: dict[str, list[float]] = {}
        for _ in range(run.rounds):
            for r, f in group:
                times.setdefault(f"{r.name} {f}", []).extend(r.ask("run", tokens=tokens, repeats=2).get("seconds", []))
        ours = statistics.median(times[f"ours {like}"] or [float("nan")])
        for r, f in group:
            if not (seconds := times[f"{r.name} {f}"]):
                continue
            row: dict[str, Any] = {"rival": r.name, "format": f, "like": like, "tokens": tokens, "threads": threads,
                                   "seconds": statistics.median(seconds), "min": min(seconds), "max": max(seconds),
                                   "ours": ours}  # fmt: skip
            if answer := r.ask("output", tokens=tokens):
                row["error"] = error(answer["y"], exact[tokens])
            print(f"    like {like:<4} {tokens:>3} tokens {threads} threads: {r.name:<9} {f:<12} "
                  f"{row['seconds'] * 1e3:8.2f} ms ({row['seconds'] / ours:.2f}x ours), error "
                  f"{row.get('error', float('nan')):.4f}", flush=True)  # fmt: skip
            rows.append(row)
    return rows


def curve(rivals: list[Rival], contexts: list[int], run: Run, path: Path) -> None:
    """Decode time against context, every engine's bf16 or best."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    threads = max(run.threads)
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for name in ("ours", "llama.cpp", "transformers"):
        points = {c: found[1] * 1e3 for c in contexts
                  if (found := best([r for r in rivals if r.name == name], f"decode {c} {threads}"))}  # fmt: skip
        label = {"ours": "glm52 bf16", "llama.cpp": "llama.cpp bf16", "transformers": "transformers sdpa"}[name]
        axes.plot(list(points), list(points.values()), marker="o", label=label)
        print(f"decode by context, {label}: {', '.join(f'{c}: {ms:.2f} ms' for c, ms in points.items())}", flush=True)
    axes.set(xscale="log", yscale="log", xlabel="tokens in the context", ylabel=f"ms a token, {threads} threads")
    axes.set_xticks(contexts, [str(c) for c in contexts])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", type=Path, help="a bf16 model folder: decode, prefill, curve")
    parser.add_argument("--small-f32", type=Path, help="the same in f32: check")
    parser.add_argument("--large", type=Path, help="a larger bf16 model folder: decode")
    parser.add_argument("--env", type=Path, default=Path("~/.cache/glm52/peers").expanduser())
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--models", default="small,large")
    parser.add_argument("--formats", default="bf16,int8,int4")
    parser.add_argument("--contexts", default="128,4096")
    parser.add_argument("--curve-contexts", default=",".join(map(str, CURVE)))
    parser.add_argument("--prefill", default="512,4096")
    parser.add_argument("--expert-formats", default="bf16,fp8,int8,int4")
    parser.add_argument("--tokens", default="1,8,32")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=0.15, help="of one engine in one round of decoding")
    parser.add_argument("--limit", type=float, default=180, help="seconds after which a request counts as failed")
    parser.add_argument("--plot", type=Path, default=Path("docs/decode-context.png"))
    return parser.parse_args()


def numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def measure_model(run: Run, args: argparse.Namespace, size: str, bandwidth: dict[int, float]) -> list[dict[str, Any]]:
    """Decode of one model, and for the small one prefill and the curve with the same processes."""
    model, parts, small = getattr(args, size), args.only.split(","), size == "small"
    contexts, config = numbers(args.contexts), GLMConfig.read(model)
    label, formats = "S" if small else "M", args.formats.split(",")
    reports: list[dict[str, Any]] = []
    if "decode" in parts or ("prefill" in parts and small):
        rivals = run.models(model, formats, ["bf16", "f32"] if small else ["bf16"], [True, False])
        if "decode" in parts:
            fill(rivals, contexts, run)
            decode(rivals, contexts, run.threads, run)
            print_decode(label, rivals, config, contexts, bandwidth, run.threads)
        if "prefill" in parts and small:
            prefill(rivals, config, numbers(args.prefill), run)
        reports += [{"model": model.name, "part": "models"} | r.report() for r in rivals]
        for r in rivals:
            r.close()
    if "curve" in parts and small:
        rivals = run.models(model, ["bf16"], ["f32"], [True])
        fill(rivals, numbers(args.curve_contexts), run)
        decode(rivals, numbers(args.curve_contexts), [max(run.threads)], run)
        curve(rivals, numbers(args.curve_contexts), run, args.plot)
        reports += [{"model": model.name, "part": "curve"} | r.report() for r in rivals]
        for r in rivals:
            r.close()
    return reports


def main() -> None:
    args = arguments()
    parts, threads, began = args.only.split(","), numbers(args.threads), time.perf_counter()
    if unknown := set(parts) - set(PARTS):
        raise SystemExit(f"--only: expected some of {', '.join(PARTS)}, found {', '.join(sorted(unknown))}")
    missing = install(args.env)
    run = Run(env=args.env, missing=missing, threads=threads, rounds=args.rounds, seconds=args.seconds,
              limit_s=args.limit)  # fmt: skip
    results: dict[str, Any] = {"not installed": missing, "rounds": args.rounds}
    bandwidth = results["bandwidth"] = {count: read_bandwidth(count) for count in threads}
    print("; ".join(f"read bandwidth with {c} threads {b / 1e9:.1f} GB/s" for c, b in bandwidth.items()), flush=True)
    if "check" in parts and args.small_f32:
        results["check"] = check(run, args.small_f32)
    results["models"] = [row for size in args.models.split(",") if getattr(args, size, None)
                         for row in measure_model(run, args, size, bandwidth)]  # fmt: skip
    if "experts" in parts:
        results["experts"] = experts(run, args.expert_formats.split(","), numbers(args.tokens))
    failures = [(r["name"], r["format"], r["setting"], r["failure"]) for r in results["models"] if r["failure"]]
    failures += [(r["rival"], r["failure"]) for r in results.get("experts", []) if "failure" in r]
    print(f"could not run: {failures or 'none'}; the whole took {time.perf_counter() - began:.0f} s")
    finish(results)


if __name__ == "__main__":
    main()
