"""
Training speed and peak memory: llama3.c against PyTorch, the same model, shapes, threads, machine and minutes.

    python dev/reference/bench_train.py [--model FOLDER] [--batch 8] [--seq 256] [--threads 2] [--rounds 3] [--steps 8]

in the folder of the Makefile, after `make llama3`. Without a folder: the 15M preset's config with V 32000, random weights.
The data are random tokens. PyTorch runs eager, in fp32, with SDPA and a fused AdamW, clipping at 1, in two ways, and the
faster one is who we compare with:

    transformers    LlamaForCausalLM
    plain           the same model in sixty lines of torch: q, k, v and gate, up as one product each

Each run is a process of its own; they take turns. The table shows, over all rounds without their first --warmup steps, the
median step, the fastest step, and the largest peak of resident memory (wait4). This process loads no torch, as a child's
peak starts at its parent's.
"""
import argparse
import json
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

OPTIONS = {"model": "", "batch": 8, "seq": 256, "threads": 2, "rounds": 3, "steps": 8, "warmup": 2}


# ---- the PyTorch side: runs in a child -----------------------------------------------------------

def write_model(folder):
    from transformers import LlamaConfig, LlamaForCausalLM
    config = LlamaConfig(hidden_size=288, intermediate_size=768, num_hidden_layers=6, num_attention_heads=6,
                         num_key_value_heads=2, head_dim=48, vocab_size=32000, tie_word_embeddings=True,
                         rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, rms_norm_eps=1e-5,
                         max_position_embeddings=256, bos_token_id=1, eos_token_id=2)
    LlamaForCausalLM(config).save_pretrained(folder)


def plain_model(config):
    """the model that the config names, random weights, as plain torch"""
    import torch
    from torch import nn
    from torch.nn import functional as F
    C, NH, NKV, HD = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
    linear = lambda inputs, outputs: nn.Linear(inputs, outputs, bias=False)

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn_norm, self.ffn_norm = (nn.RMSNorm(C, eps=config.rms_norm_eps) for _ in range(2))
            self.qkv, self.o = linear(C, (NH + 2 * NKV) * HD), linear(NH * HD, C)
            self.gate_up, self.down = linear(C, 2 * config.intermediate_size), linear(config.intermediate_size, C)

        def forward(self, x, cos, sin):
            B, T, _ = x.shape
            heads = self.qkv(self.attn_norm(x)).view(B, T, -1, HD).transpose(1, 2)
            rotated, v = heads[:, :NH + NKV], heads[:, NH + NKV:]
            left, right = rotated.chunk(2, -1)
            rotated = torch.cat((left * cos - right * sin, right * cos + left * sin), -1)
            q, k = rotated[:, :NH], rotated[:, NH:]
            k, v = (t.repeat_interleave(NH // NKV, 1) for t in (k, v))
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.o(a.transpose(1, 2).reshape(B, T, -1))
            gate, up = self.gate_up(self.ffn_norm(x)).chunk(2, -1)
            return x + self.down(F.silu(gate) * up)

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(config.vocab_size, C)
            self.layers = nn.ModuleList(Layer() for _ in range(config.num_hidden_layers))
            self.norm = nn.RMSNorm(C, eps=config.rms_norm_eps)
            self.lm_head = linear(C, config.vocab_size)
            if config.tie_word_embeddings:
                self.lm_head.weight = self.embed.weight
            frequency = config.rope_parameters["rope_theta"] ** (-torch.arange(0, HD, 2) / HD)
            angle = torch.arange(config.max_position_embeddings)[:, None] * frequency
            self.register_buffer("cos", angle.cos(), False)
            self.register_buffer("sin", angle.sin(), False)

        def forward(self, ids):
            x, T = self.embed(ids), ids.shape[1]
            for layer in self.layers:
                x = layer(x, self.cos[:T], self.sin[:T])
            return self.lm_head(self.norm(x))

    model = Plain()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)
    return model


def torch_run(how, folder, data, options):
    """trains for some steps, prints each one's milliseconds"""
    import torch
    torch.set_num_threads(options["threads"])
    from transformers import AutoConfig, LlamaForCausalLM
    if how == "transformers":
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
        forward = lambda ids: model(ids, use_cache=False).logits
    else:
        model = forward = plain_model(AutoConfig.from_pretrained(folder))
    groups = [{"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
              {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)
    B, T = options["batch"], options["seq"]
    tokens = torch.frombuffer(bytearray(Path(data).read_bytes()[1024:]), dtype=torch.uint16).long()
    for step in range(options["warmup"] + options["steps"]):
        start = time.perf_counter()
        batch = tokens[step * B * T:(step + 1) * B * T + 1]
        ids, labels = batch[:-1].view(B, T), batch[1:]
        loss = torch.nn.functional.cross_entropy(forward(ids).flatten(0, 1), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        print(f"{1000 * (time.perf_counter() - start):.3f}")


# ---- the driver: no torch here -------------------------------------------------------------------

def run(command, options):
    """stdout and the peak of resident memory, in MB"""
    environment = {**os.environ, "OMP_NUM_THREADS": str(options["threads"])}
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(list(map(str, command)), stdout=out, stderr=subprocess.DEVNULL, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            sys.exit(f"error: exit {process.returncode}: {' '.join(map(str, command))}")
        out.seek(0)
        return out.read().decode(), usage.ru_maxrss / 1024


def ours(folder, data, out, options):
    """milliseconds of each step, from our log, and the peak"""
    _, peak = run(["./llama3", "train", "--model", folder, "--data", data, "--out", out, "--batch", options["batch"],
                   "--seq", options["seq"], "--steps", options["warmup"] + options["steps"], "--eval-every", 0,
                   "--sample-every", 0, "--checkpoint-every", 0], options)
    entries = map(json.loads, (Path(out) / "log.jsonl").read_text().splitlines())
    return [entry["ms"] for entry in entries if "train_loss" in entry], peak


def theirs(how, folder, data, options):
    text, peak = run([sys.executable, __file__, "--child", json.dumps([how, str(folder), str(data), options])], options)
    return list(map(float, text.split())), peak


def write_data(path, V, n):
    """n random tokens: llm.c's header, then uint16"""
    import random
    tokens = random.Random(0).choices(range(min(V, 65536)), k=n)
    path.write_bytes(struct.pack("256i", 20240520, 1, n, *[0] * 253) + struct.pack(f"{n}H", *tokens))


def main():
    if sys.argv[1:2] == ["--child"]:
        arguments = json.loads(sys.argv[2])
        return write_model(arguments[0]) if len(arguments) == 1 else torch_run(*arguments)
    parser = argparse.ArgumentParser(description="Training speed and peak memory: llama3.c against PyTorch.")
    for name, default in OPTIONS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    options = vars(parser.parse_args())
    with tempfile.TemporaryDirectory(prefix="llama3-bench-") as scratch:
        scratch = Path(scratch)
        folder, data = Path(options["model"] or scratch / "model"), scratch / "random.bin"
        if not options["model"]:
            run([sys.executable, __file__, "--child", json.dumps([str(folder)])], options)
        V = json.loads((folder / "config.json").read_text())["vocab_size"]
        N = options["batch"] * options["seq"]
        write_data(data, V, 2 * N * (options["warmup"] + options["steps"] + 1))
        ms, peaks = {}, {}
        for i in range(options["rounds"]):
            for name, measure in (("llama3.c", lambda: ours(folder, data, scratch / f"out{i}", options)),
                                  ("transformers", lambda: theirs("transformers", folder, data, options)),
                                  ("plain", lambda: theirs("plain", folder, data, options))):
                steps, peak = measure()
                ms.setdefault(name, []).extend(steps[options["warmup"]:])
                peaks.setdefault(name, []).append(peak)
                print(f"round {i + 1} {name}: {statistics.median(steps[options['warmup']:]):.0f} ms", file=sys.stderr)
        median = {name: statistics.median(values) for name, values in ms.items()}
        best = min((name for name in median if name != "llama3.c"), key=median.get)
        print(f"B {options['batch']}  T {options['seq']}  V {V}  {options['threads']} threads  fp32  "
              f"{options['rounds']} rounds of {options['steps']} steps")
        print(f"{'':14}{'ms/step':>10}{'fastest':>10}{'tokens/s':>10}{'speed':>8}{'peak MB':>10}{'memory':>8}")
        for name in sorted(median, key=median.get):
            print(f"{name:14}{median[name]:10.1f}{min(ms[name]):10.1f}{1000 * N / median[name]:10.0f}{median[best] / median[name]:8.2f}"
                  f"{max(peaks[name]):10.0f}{max(peaks[name]) / max(peaks[best]):8.2f}")
        print(f"speed and memory are in units of {best}, the faster of the two on PyTorch")


if __name__ == "__main__":
    main()
