#!/usr/bin/env python3
"""
PyTorch and Liger-Kernel on the lab's problems, timed as the lab times: rows for the same tables.

    build/lab/cuda/rmsnorm_forward-BF16 --json results.jsonl      the lab's rows: sizes, bytes or FLOPs, copies, production
    dev/cuda/peers.py --results results.jsonl --json peers.jsonl        the peers' rows; make -C dev/cuda report does both
    LIGER=folder …                                                      a folder with liger_kernel/ (PyPI's wheel, unpacked)

Problems        those of --results: an op is known by its name, its sizes come from the row, and the rate is over the bytes or
                FLOPs that the row counts, whatever the peer moves. A problem that no peer has is passed over
Protocol        bench.cuh's: before each launch the L2 is filled with lines that are only read; events around what is measured;
                work queued ahead, so that the GPU does not wait for the host; the median of 3 to 50, within 0.3 s
Peers           torch eager      the fused op of PyTorch where there is one, else the formula, op by op
                torch.compile    the formula, compiled for exactly this shape
                Liger            liger_kernel's function of that name
                FlashAttention-2, cuDNN (torch)      scaled_dot_product_attention on that back end
Backward        torch.autograd.grad alone, the graph of the forward pass kept. Losses are timed forward and backward together
Order           for all problems what needs no compiler, then torch.compile, the models' own shapes first; until --time-limit
Checks          outputs are finite, no more: whether PyTorch is right is not the lab's question
"""
import argparse
import json
import os
import re
import statistics
import sys
import time

EPS = 1e-5
DEVICE = "cuda"


class Case:
    """what is timed: functions of the same inputs. mode: forward, backward (of that function), step (a call, as it is)"""

    def __init__(self, mode, inputs, functions, what=None):
        self.mode, self.inputs, self.functions, self.what = mode, inputs, functions, what or {}


class Unlike(Exception):
    """a problem of the lab that has no like among the peers"""


# ---- formulas --------------------------------------------------------------------------------

def rms(x, w):
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS) * w.float()).to(x.dtype)


def residual_rms(x, r, w):
    s = x + r
    return s, rms(s, w)


def rotate(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def random(*shape, dtype, scale=1.0):
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype)


def ids_like_text(N, V):
    """Zipf and Mandelbrot, as in token_ids.cuh"""
    return (2.7 * ((V / 2.7 + 1) ** torch.rand(N, device=DEVICE) - 1)).long().clamp(max=V - 1)


# ---- Liger -----------------------------------------------------------------------------------

def liger(module, name):
    """a function of liger_kernel.ops, or None"""
    try:
        return getattr(__import__(f"liger_kernel.ops.{module}", fromlist=[name]), name)
    except (ImportError, AttributeError) as error:
        if "liger" not in complained:
            complained.add("liger")
            print(f"peers: no Liger rows: {error} (LIGER=folder names one that holds liger_kernel/)", file=sys.stderr)
        return None


complained = set()


def with_liger(functions, module, name, call):
    function = liger(module, name)
    if function is not None:
        functions["Liger"] = lambda *inputs: call(function, *inputs)
    return functions


# ---- the ops: sizes of the lab's row -> Case --------------------------------------------------

def rmsnorm(mode):
    def case(s, dtype, shape):
        F = torch.nn.functional
        x, w = random(s["N"], s["C"], dtype=dtype), random(s["C"], dtype=dtype)
        functions = {"torch eager": lambda x, w: F.rms_norm(x, (s["C"],), w, EPS), "torch.compile": rms}
        with_liger(functions, "rms_norm", "LigerRMSNormFunction", lambda f, x, w: f.apply(x, w, EPS, 0.0, "llama", False))
        return Case(mode, (x, w), functions, {"torch eager": "F.rms_norm"})
    return case


def residual_rmsnorm(mode):
    def case(s, dtype, shape):
        F = torch.nn.functional
        x, r, w = random(s["N"], s["C"], dtype=dtype), random(s["N"], s["C"], dtype=dtype), random(s["C"], dtype=dtype)

        def eager(x, r, w):
            total = x + r
            return total, F.rms_norm(total, (s["C"],), w, EPS)
        functions = {"torch eager": eager, "torch.compile": residual_rms}
        with_liger(functions, "fused_add_rms_norm", "LigerFusedAddRMSNormFunction",
                   lambda f, x, r, w: f.apply(x, r, w, EPS, 0.0, "llama", False))
        return Case(mode, (x, r, w), functions, {"torch eager": "an addition and F.rms_norm"})
    return case


def rope(mode):
    def case(s, dtype, shape):
        B, T, NH, NKV, HD = s["B"], s["T"], s["NH"], s["NKV"], s["HD"]
        q = random(B, T, NH, HD, dtype=dtype).transpose(1, 2)
        k = random(B, T, NKV, HD, dtype=dtype).transpose(1, 2)
        frequency = 500000.0 ** (-torch.arange(0, HD, 2, device=DEVICE).float() / HD)
        angle = torch.outer(torch.arange(T, device=DEVICE).float(), frequency)
        angle = torch.cat((angle, angle), -1)
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)

        def formula(q, k):
            return rotate(q, cos, sin), rotate(k, cos, sin)
        functions = {"torch eager": formula, "torch.compile": formula}
        with_liger(functions, "rope", "LigerRopeFunction", lambda f, q, k: f.apply(q, k, cos[None], sin[None]))
        return Case(mode, (q, k), functions)
    return case


def swiglu(mode):
    def case(s, dtype, shape):
        F = torch.nn.functional
        gate, up = random(s["N"], s["F"], dtype=dtype), random(s["N"], s["F"], dtype=dtype)

        def formula(gate, up):
            return F.silu(gate) * up
        functions = {"torch eager": formula, "torch.compile": formula}
        with_liger(functions, "swiglu", "LigerSiLUMulFunction", lambda f, gate, up: f.apply(gate, up))
        return Case(mode, (gate, up), functions)
    return case


def cross_entropy(s, dtype, shape):
    F = torch.nn.functional
    logits, labels = random(s["N"], s["V"], dtype=dtype, scale=2), torch.randint(0, s["V"], (s["N"],), device=DEVICE)

    def formula(x):
        return F.cross_entropy(x.float(), labels)
    compiled = torch.compile(formula)

    def step(function):
        def run(x):
            x = x.detach().requires_grad_()
            function(x).backward()
            return x.grad
        return run
    functions = {"torch eager": step(lambda x: F.cross_entropy(x, labels)), "torch.compile": step(compiled)}
    function = liger("cross_entropy", "LigerCrossEntropyFunction")
    if function is not None:
        functions["Liger"] = step(lambda x: function.apply(x, labels, None)[0])
    return Case("step", (logits,), functions, {"torch eager": "F.cross_entropy in the logits' type"})


def lm_head_loss(s, dtype, shape):
    F = torch.nn.functional
    x, w = random(s["N"], s["C"], dtype=dtype), random(s["V"], s["C"], dtype=dtype, scale=0.02)
    labels = torch.randint(0, s["V"], (s["N"],), device=DEVICE)

    def formula(x, w):
        return F.cross_entropy((x @ w.t()).float(), labels)
    compiled = torch.compile(formula)

    def step(function):
        def run(x, w):
            x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
            function(x, w).backward()
            return x.grad, w.grad
        return run
    functions = {"torch eager": step(formula), "torch.compile": step(compiled)}
    function = liger("fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction")
    if function is not None:
        functions["Liger"] = step(lambda x, w: function.apply(x, w, labels)[0])
    return Case("step", (x, w), functions, {"Liger": "fused: no logits in memory"})


def adamw(s, dtype, shape):
    layers = re.match(r"(\d+) layers", shape)
    if not layers or "," in shape:
        raise Unlike(f"{shape}: PyTorch keeps fp32 weights and fp32 moments")
    C, heads, kv_heads = s["C"], s["NH"] * s["HD"], s["NKV"] * s["HD"]
    n = int(layers.group(1)) * (C * (heads + 2 * kv_heads) + heads * C + 3 * C * s["F"] + 2 * C)
    w = torch.randn(n, device=DEVICE)
    w.grad = torch.randn_like(w)
    fused = torch.optim.AdamW([w], lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=DEVICE == "cuda")
    return Case("step", (), {"torch eager": lambda: fused.step()},
                {"torch eager": "AdamW(fused=True), weights and gradients in fp32"})


def global_norm(s, dtype, shape):
    g = random(s["N"], dtype=dtype)
    return Case("forward", (g,), {"torch eager": lambda g: torch.linalg.vector_norm(g, dtype=torch.float32),
                                  "torch.compile": lambda g: g.float().pow(2).sum().sqrt()},
                {"torch eager": "linalg.vector_norm"})


def reduce(s, dtype, shape):
    x = random(s["N"], dtype=dtype)
    return Case("forward", (x,), {"torch eager": lambda x: x.sum(dtype=torch.float32),
                                  "torch.compile": lambda x: x.float().sum()})


def softmax(s, dtype, shape):
    x = random(s["N"], s.get("V") or s.get("C") or s.get("T"), dtype=dtype)
    return Case("forward", (x,), {"torch eager": lambda x: torch.softmax(x, -1),
                                  "torch.compile": lambda x: torch.softmax(x.float(), -1).to(x.dtype)})


def transpose(s, dtype, shape):
    x = random(s["N"], s["C"], dtype=dtype)
    return Case("forward", (x,), {"torch eager": lambda x: x.t().contiguous(), "torch.compile": lambda x: x.t().contiguous()})


def permute(s, dtype, shape):
    B, T, NH, NKV, HD = s["B"], s["T"], s["NH"], s["NKV"], s["HD"]
    qkv, out = random(B, T, NH + 2 * NKV, HD, dtype=dtype), random(B, NH, T, HD, dtype=dtype)

    def formula(qkv, out):
        return [x.transpose(1, 2).contiguous() for x in (*qkv.split([NH, NKV, NKV], 2), out)]
    return Case("forward", (qkv, out), {"torch eager": formula, "torch.compile": formula})


def repeat_kv(mode):
    def case(s, dtype, shape):
        rows, NH, NKV, HD = s.get("N") or s["B"] * s["T"], s["NH"], s["NKV"], s["HD"]
        x = random(rows, NKV, HD, dtype=dtype)

        def formula(x):
            return x[:, :, None, :].expand(rows, NKV, NH // NKV, HD).reshape(rows, NH, HD)
        return Case(mode, (x,), {"torch eager": formula, "torch.compile": formula})
    return case


def addition(s, dtype, shape):
    a, b = random(s["N"], s["C"], dtype=dtype), random(s["N"], s["C"], dtype=dtype)
    return Case("forward", (a, b), {"torch eager": lambda a, b: a + b, "torch.compile": lambda a, b: a + b})


def ids_of(s, shape):
    if "text" in shape:
        return ids_like_text(s["N"], s["V"])
    return torch.randint(0, s["V"], (s["N"],), device=DEVICE)


def embedding_forward(s, dtype, shape):
    w, ids = random(s["V"], s["C"], dtype=dtype), ids_of(s, shape)

    def formula(w):
        return torch.nn.functional.embedding(ids, w)
    return Case("forward", (w,), {"torch eager": formula, "torch.compile": formula})


def embedding_backward(s, dtype, shape):
    dx, ids = random(s["N"], s["C"], dtype=dtype), ids_of(s, shape)
    dw = torch.zeros(s["V"], s["C"], dtype=dtype, device=DEVICE)
    return Case("step", (), {"torch eager": lambda: torch.ops.aten.embedding_dense_backward(dx, ids, s["V"], -1, False),
                             "torch index_add_": lambda: dw.index_add_(0, ids, dx)},
                {"torch eager": "embedding_dense_backward: zeroes all V rows, sorts, sums",
                 "torch index_add_": "atomic, adds to dw"})


def attention(mode):
    def case(s, dtype, shape):
        from torch.nn.attention import SDPBackend, sdpa_kernel
        B, T, NH, NKV, HD = s["B"], s["T"], s["NH"], s["NKV"], s["HD"]
        q, k, v = (random(B, T, heads, HD, dtype=dtype).transpose(1, 2) for heads in (NH, NKV, NKV))

        def on(backend):
            def call(q, k, v):
                with sdpa_kernel(backend):
                    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return call
        if dtype == torch.float32:
            return Case(mode, (q, k, v), {"torch eager": on(SDPBackend.EFFICIENT_ATTENTION)})
        return Case(mode, (q, k, v), {"FlashAttention-2": on(SDPBackend.FLASH_ATTENTION),
                                      "cuDNN (torch)": on(SDPBackend.CUDNN_ATTENTION)})
    return case


def attention_decode(s, dtype, shape):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    B, NH, NKV, HD = s["B"], s["NH"], s["NKV"], s["HD"]
    T = max(1, round(s["work"] / (B * 2 * NKV * HD * dtype.itemsize)))  # the lab's sequences differ in length: their mean
    q = random(B, NH, 1, HD, dtype=dtype)
    k, v = random(B, NKV, T, HD, dtype=dtype), random(B, NKV, T, HD, dtype=dtype)

    def on(backend):
        def call(q, k, v):
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return call
    return Case("forward", (q, k, v), {"FlashAttention-2": on(SDPBackend.FLASH_ATTENTION),
                                       "cuDNN (torch)": on(SDPBackend.CUDNN_ATTENTION)})


def matmul(s, dtype, shape):
    x, w = random(s["N"], s["C"], dtype=dtype), random(s["F"], s["C"], dtype=dtype)
    return Case("forward", (x, w), {"torch eager": lambda x, w: x @ w.t()}, {"torch eager": "x @ w.t(): cuBLAS"})


OPS = {
    "rmsnorm_forward": rmsnorm("forward"), "rmsnorm_backward": rmsnorm("backward"),
    "residual_rmsnorm_forward": residual_rmsnorm("forward"), "residual_rmsnorm_backward": residual_rmsnorm("backward"),
    "rope_forward": rope("forward"), "rope_backward": rope("backward"),
    "swiglu_forward": swiglu("forward"), "swiglu_backward": swiglu("backward"),
    "cross_entropy": cross_entropy, "lm_head_loss": lm_head_loss,
    "attention_forward": attention("forward"), "attention_backward": attention("backward"),
    "attention_decode": attention_decode,
    "matmul": matmul, "matmul_fp32": matmul, "adamw": adamw, "global_norm": global_norm,
    "embedding_forward": embedding_forward, "embedding_backward": embedding_backward,
    "softmax": softmax, "transpose": transpose, "permute": permute, "residual": addition, "vecadd": addition, "reduce": reduce,
    "repeat_kv_forward": repeat_kv("forward"), "repeat_kv_backward": repeat_kv("backward"),
}
NOT_COMPILED = {"attention_forward", "attention_backward", "attention_decode", "matmul", "matmul_fp32", "adamw",
                "embedding_backward"}


# ---- timing ----------------------------------------------------------------------------------

class Timer:
    def __init__(self):
        level2 = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0)
        self.flushed = torch.zeros(max(1 << 27, 3 * level2) // 4, dtype=torch.int32, device=DEVICE)
        self.sum = torch.zeros((), dtype=torch.int64, device=DEVICE)
        torch.cuda._sleep(1000)
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(), torch.cuda._sleep(10_000_000), stop.record()
        torch.cuda.synchronize()
        self.cycles_per_us = 10_000_000 / (1000 * start.elapsed_time(stop))

    def launches(self, call, n, host_us):
        pairs = []
        for _ in range(n):
            torch.sum(self.flushed, 0, dtype=torch.int64, out=self.sum)
            torch.cuda._sleep(int(self.cycles_per_us * min(1.5 * host_us + 20, 20000)))
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            stop.record()
            pairs.append((start, stop))
        torch.cuda.synchronize()
        return [1000 * start.elapsed_time(stop) for start, stop in pairs]

    def measure(self, call):
        """(median in us, spread in percent)"""
        for _ in range(2):
            call()
        torch.cuda.synchronize()
        host = []
        for _ in range(3):
            begin = time.perf_counter()
            call()
            host.append(1e6 * (time.perf_counter() - begin))
            torch.cuda.synchronize()
        host_us = statistics.median(host)
        once = self.launches(call, 2, host_us)[1]
        n = int(min(50, max(3, 3e5 / (once + 2 * host_us + 100))))
        us = sorted(self.launches(call, n, host_us))
        at = lambda q: us[int(q * (n - 1) + 0.5)]
        return at(0.5), 100 * (at(0.9) - at(0.1)) / at(0.5)


def tensors(out):
    return [t for t in (out if isinstance(out, (tuple, list)) else (out,)) if torch.is_tensor(t)]


def finite(out):
    return all(bool(torch.isfinite(t).all()) for t in tensors(out) if t.is_floating_point())


def callable_of(case, name):
    """what is timed, and whether the first result was finite"""
    function = case.functions[name]
    if name == "torch.compile" and case.mode != "step":
        function = torch.compile(function)
    if case.mode == "backward":
        leaves = [x.detach().requires_grad_() for x in case.inputs]
        outs = [out for out in tensors(function(*leaves)) if out.requires_grad]
        gradients = [torch.randn_like(out) for out in outs]
        call = lambda: torch.autograd.grad(outs, leaves, gradients, retain_graph=True)
        return call, finite(call())
    if case.mode == "forward":
        def call():
            with torch.no_grad():
                return function(*case.inputs)
        return call, finite(call())
    call = lambda: function(*case.inputs)
    return call, finite(call())


# ---- the run ---------------------------------------------------------------------------------

class Problem:
    """an op on a shape, as the lab's rows have it"""

    def __init__(self, rows):
        row = rows[0]
        self.op, self.shape, self.sizes, self.dtype = row["op"], row["shape"], row["sizes"], row["dtype"]
        self.work = row["work"]
        self.flops = any("TFLOPs" in r for r in rows)
        self.copy = next((r["copy_GBps"] for r in rows if "copy_GBps" in r), 0)
        us = {kind: next((r["median_us"] for r in rows if r.get("kind") == kind and "median_us" in r), 0)
              for kind in ("production", "yardstick")}
        self.reference_us, self.yardstick_us = us["production"] or us["yardstick"], us["yardstick"]
        self.model = bool(re.match(r"(1B|8B)\b", self.shape))

    def row(self, variant, what, gpu):
        return {"op": self.op, "shape": self.shape, "sizes": self.sizes, "dtype": self.dtype, "variant": variant,
                "kind": "peer", "check": "ok", "block": 0, "work": self.work, "what": what, "gpu": gpu}

    def timed_row(self, variant, what, gpu, us, spread):
        row = self.row(variant, what, gpu)
        row.update(median_us=round(us, 3), spread_percent=round(spread, 2))
        if self.flops:
            row["TFLOPs"] = round(self.work / us * 1e-6, 2)
            if self.yardstick_us:
                row["percent_of_peak"] = round(100 * self.yardstick_us / us, 2)
        else:
            row["GBps"] = round(self.work / us * 1e-3, 2)
            if self.copy:
                row["percent_of_peak"] = round(100 * row["GBps"] / self.copy, 2)
        if self.reference_us:
            row["times_production"] = round(self.reference_us / us, 4)
        return row


def read_problems(path, ops):
    problems = {}
    try:
        with open(path, errors="replace") as lines:
            for line in lines:
                try:
                    row = json.loads(line)
                except ValueError:
                    continue
                if row.get("kind") in ("variant", "production", "yardstick") and row.get("work") and row["op"] in OPS:
                    problems.setdefault((row["op"], row["dtype"], row["shape"]), []).append(row)
    except OSError as error:
        sys.exit(f"error: --results {path}: {error.strerror}; a program of the lab writes one with --json FILE")
    chosen = [Problem(rows) for (op, _, _), rows in problems.items() if not ops or op in ops]
    if not chosen:
        sys.exit(f"error: --results {path}: no row of {', '.join(ops) if ops else 'an op that a peer has'}")
    return chosen


def jobs_of(problems, variants):
    """[(problem, variant or None)]: None stands for all that need no compiler"""
    wanted = lambda name: not variants or name in variants
    order = sorted(problems, key=lambda p: not p.model)
    return [(p, None) for p in order] + \
        [(p, "torch.compile") for p in order if p.op not in NOT_COMPILED and wanted("torch.compile")]


def run_job(problem, compiled, variants, timer, gpu, emit):
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[problem.dtype]
    try:
        case = OPS[problem.op]({**problem.sizes, "work": problem.work}, dtype, problem.shape)
    except Unlike:
        return
    for name in case.functions:
        if (name == "torch.compile") != compiled or (variants and name not in variants):
            continue
        try:
            call, ok = callable_of(case, name)
            us, spread = timer.measure(call)
            row = problem.timed_row(name, case.what.get(name, ""), gpu, us, spread)
            if not ok:
                row["check"] = "WRONG not finite"
        except Exception as error:  # a peer that cannot is no reason to end
            text = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
            row = problem.row(name, "", gpu)
            row["check"] = f"not here: {text}"
        emit(row)


def print_row(row):
    figure = f"{row['TFLOPs']:9.1f} TFLOP/s" if "TFLOPs" in row else f"{row['GBps']:9.0f} GB/s   " if "GBps" in row else ""
    times = f"  {row['times_production']:5.2f} x production" if "times_production" in row else ""
    rest = f"{row['median_us']:10.1f} us {row['spread_percent']:5.1f} % {figure}{times}" if "median_us" in row else row["check"]
    print(f"  {row['op']:26s} {row['dtype']} {row['shape']:18.18s} {row['variant']:17s} {rest}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", required=True, help="the lab's rows, as its programs write them with --json")
    parser.add_argument("--json", help="append the rows to this file")
    parser.add_argument("--ops", help="these alone, separated by commas", default="")
    parser.add_argument("--variants", help="these alone, separated by commas: 'torch.compile,Liger'", default="")
    parser.add_argument("--time-limit", type=float, default=0, metavar="S", help="begin nothing after S seconds")
    options = parser.parse_args()
    ops = [op for op in options.ops.split(",") if op]
    variants = [name for name in options.variants.split(",") if name]
    unknown = [op for op in ops if op not in OPS]
    if unknown:
        sys.exit(f"error: --ops {','.join(unknown)}: no such op; there are {', '.join(OPS)}")
    problems = read_problems(options.results, ops)

    begin = time.monotonic()
    sys.path.insert(0, os.environ.get("LIGER", "."))
    global torch
    try:
        import torch
        import torch._dynamo
        import torch._functorch.config
    except ImportError as error:
        sys.exit(f"error: {error}: the peers need PyTorch")
    if not torch.cuda.is_available():
        sys.exit("error: no GPU that PyTorch can use")
    torch._functorch.config.donated_buffer = False  # the backward alone is timed, with the graph kept
    torch._dynamo.config.automatic_dynamic_shapes = False  # each shape is compiled for itself
    for limit in ("recompile_limit", "cache_size_limit"):
        if hasattr(torch._dynamo.config, limit):
            setattr(torch._dynamo.config, limit, 256)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(1)

    gpu, timer = torch.cuda.get_device_name(), Timer()
    out = open(options.json, "a") if options.json else None
    print(f"peers   {gpu}   torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}", flush=True)

    def emit(row):
        row["torch"] = torch.__version__
        print_row(row)
        if out:
            out.write(json.dumps(row) + "\n")
            out.flush()

    jobs, done = jobs_of(problems, variants), 0
    for problem, compiled in jobs:
        if options.time_limit and time.monotonic() - begin > options.time_limit:
            print(f"peers: {len(jobs) - done} of {len(jobs)} problems left out: the time limit of {options.time_limit:.0f} s")
            break
        try:
            run_job(problem, compiled is not None, variants, timer, gpu, emit)
        except Exception as error:
            print(f"peers: {problem.op}, {problem.shape}: {str(error).strip().splitlines()[:1]}", file=sys.stderr)
        torch.cuda.empty_cache()
        if compiled:
            torch._dynamo.reset()
        done += 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
