"""
Do the programs learn what PyTorch learns? The same initial weights, the same batches, the same AdamW, side by side.

    python dev/reference/converge.py --data TEXT [--model 15M] [--steps 300] [--out build/converge] PROGRAM …

PROGRAM is llama3, train_llama3cu or NAME=PATH. The first one makes the initial weights (train --steps 0) and the tokens; each
one trains from them, and so does transformers' LlamaForCausalLM in fp32 (TF32 off), on the GPU when there is one. The last
tenth of the tokens is held out, and the first program evaluates all the trained models on it. The table shows the first loss,
the mean of the last 20 training losses and the held-out loss, with their distance from PyTorch's; the exit status is 1 when one is
farther than --tolerance. OUT/<name>/log.jsonl are drawn with scripts/plot_log.py where matplotlib is there.
"""
import argparse
import json
import math
import re
import struct
import subprocess
import sys
from pathlib import Path

BETAS, EPS, WEIGHT_DECAY, CLIP, LR_FINAL = (0.9, 0.95), 1e-8, 0.1, 1.0, 0.1


# ---- the order of the data: llmc/random.h and data_batch of llmc/data.h --------------------------

MASK64 = (1 << 64) - 1


def mix(z):
    z = (z + 0x9e3779b97f4a7c15) & MASK64
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9 & MASK64
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb & MASK64
    return z ^ (z >> 31)


def permute(seed, stream, n, i):
    half = 1
    while (1 << 2 * half) < n:
        half += 1
    mask = (1 << half) - 1
    while True:
        left, right = i >> half, i & mask
        for turn in range(4):
            bits = mix(mix(mix(seed) ^ stream ^ turn << 56) ^ right)
            left, right = right, left ^ (bits & mask)
        i = left << half | right
        if i < n:
            return i


def windows_of(tokens, T, seed, first, count):
    """rows first … first+count-1 of the endless sequence: where each starts"""
    n = (len(tokens) - 1) // T
    return [permute(seed, row // n, n, row % n) * T for row in range(first, first + count)]


# ---- files ---------------------------------------------------------------------------------------

def read_bin(path):
    import numpy as np
    magic, version, n = struct.unpack("<3i", path.read_bytes()[:12])
    width = {20240520: np.uint16, 20240801: np.uint32}[magic]
    return np.fromfile(path, width, n, offset=1024)


def write_bin(path, tokens):
    import numpy as np
    header = struct.pack("<3i", 20240801, 7, len(tokens)).ljust(1024, b"\0")
    path.write_bytes(header + tokens.astype(np.uint32).tobytes())


def run(command):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {' '.join(map(str, command))}\n{done.stderr}")
    return done.stdout


# ---- PyTorch -------------------------------------------------------------------------------------

def learning_rate(options, step):
    if step < options.warmup:
        return options.lr * (step + 1) / options.warmup
    t = (step - options.warmup) / (options.steps - 1 - options.warmup)
    return options.lr * (1 - (0.5 - 0.5 * math.cos(math.pi * t)) * (1 - LR_FINAL))


def train_torch(options, initial, tokens, out):
    import torch
    from transformers import LlamaForCausalLM
    torch.backends.cuda.matmul.allow_tf32 = False
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = LlamaForCausalLM.from_pretrained(initial, dtype=torch.float32, attn_implementation="sdpa").to(device).train()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() != 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}],
                                  lr=options.lr, betas=BETAS, eps=EPS)
    stream = torch.from_numpy(tokens.astype("int64")).to(device)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "log.jsonl", "w") as log:
        for step in range(options.steps):
            starts = windows_of(tokens, options.seq, options.seed, step * options.batch, options.batch)
            ids = torch.stack([stream[s:s + options.seq] for s in starts])
            labels = torch.stack([stream[s + 1:s + 1 + options.seq] for s in starts])
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(options, step)
            loss = torch.nn.functional.cross_entropy(model(ids).logits.flatten(0, 1), labels.flatten())
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
            entry = {"step": step + 1, "train_loss": loss.item(), "grad_norm": norm.item(), "lr": learning_rate(options, step), "ms": 0, "tok_s": 0}
            log.write(json.dumps(entry) + "\n")
    model.save_pretrained(out / "model")
    return out / "model"


# ---- the comparison ------------------------------------------------------------------------------

def losses(out):
    return [entry["train_loss"] for entry in map(json.loads, open(out / "log.jsonl")) if "train_loss" in entry]


def main():
    parser = argparse.ArgumentParser(description="Trains the same model on the same batches by the programs and by PyTorch.")
    parser.add_argument("programs", nargs="+", metavar="PROGRAM", help="a program, or NAME=PATH")
    parser.add_argument("--data", type=Path, required=True, help="a text")
    parser.add_argument("--model", default="15M", help="a preset with the byte tokenizer")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=30)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--tolerance", type=float, default=0.01, help="of the loss, relative")
    parser.add_argument("--out", type=Path, default=Path("build/converge"))
    options = parser.parse_args()
    if options.steps <= options.warmup + 1:
        sys.exit(f"error: --steps {options.steps}: expected more than --warmup + 1 = {options.warmup + 1}")
    programs = {}
    for word in options.programs:
        name, _, path = word.rpartition("=")
        programs[name or Path(path).name] = Path(path).resolve()
    first = next(iter(programs.values()))
    if options.out.exists() and any(options.out.iterdir()):
        sys.exit(f"error: --out {options.out}: expected a new or empty folder")
    options.out.mkdir(parents=True, exist_ok=True)

    run([first, "train", "--model", options.model, "--steps", 0, "--seed", options.seed, "--data", options.data, "--out", options.out / "initial"])
    initial = max((options.out / "initial").glob("step-*"))
    whole, train, held_out = (options.out / f"{name}.bin" for name in ("all", "train", "held_out"))
    run([first, "tokenize", "--tokenizer", initial, "--data", options.data, "--out", whole])
    tokens = read_bin(whole)
    cut = len(tokens) * 9 // 10
    write_bin(train, tokens[:cut])
    write_bin(held_out, tokens[cut:])

    models = {}
    for name, program in programs.items():
        out = options.out / name
        run([program, "train", "--model", initial, "--data", train, "--val", held_out, "--steps", options.steps, "--batch", options.batch,
             "--seq", options.seq, "--lr", options.lr, "--warmup", options.warmup, "--schedule", "cosine", "--lr-final", LR_FINAL,
             "--weight-decay", WEIGHT_DECAY, "--beta1", BETAS[0], "--beta2", BETAS[1], "--clip", CLIP, "--seed", options.seed,
             "--eval-every", 0, "--sample-every", 0, "--checkpoint-every", options.steps, "--out", out])
        models[name] = max(out.glob("step-*"))
    models["PyTorch fp32"] = train_torch(options, initial, tokens[:cut], options.out / "PyTorch fp32")

    print(f"{options.model}, {options.steps} steps of {options.batch} x {options.seq} tokens of {options.data.name}")
    print(f"  {'':16} {'first':>9} {'last 20':>9} {'held out':>9}   distance from PyTorch's, %")
    rows = {}
    for name, model in models.items():
        loss = losses(options.out / name)
        result = run([first, "eval", "--model", model, "--data", held_out, "--seq", options.seq])
        rows[name] = [loss[0], sum(loss[-20:]) / 20, float(re.search(r"loss ([\d.]+)", result)[1])]
    worst = 0
    for name, row in rows.items():
        away = [abs(a / b - 1) for a, b in zip(row, rows["PyTorch fp32"])]
        worst = max(worst, *away)
        print(f"  {name:16} {row[0]:9.5f} {row[1]:9.5f} {row[2]:9.5f}   " + "  ".join(f"{100 * x:.3f}" for x in away))
    try:
        subprocess.run([sys.executable, "scripts/plot_log.py", *(options.out / name for name in rows), "--out", options.out / "converge.png",
                        "--title", f"{options.model} on {options.data.name}"], check=True)
    except subprocess.CalledProcessError:
        print("no picture: matplotlib is not there")
    sys.exit(worst > options.tolerance)


if __name__ == "__main__":
    main()
