"""
llama3.c against transformers, live: `make test-parity`, or

    python dev/reference/parity.py          in the folder of the Makefile, after `make llama3 build/libllama3_cpu.so`

    models      folders that transformers writes (several shapes, shards, BF16, F16): our logits and gradients
    programs    the same folders through `llama3 eval` and `llama3 generate`
    folders     what `llama3 train` saves, loaded by AutoModelForCausalLM and AutoTokenizer
    tokenizer   parity_tokenizer.py

Everything runs in fp32 on the CPU; whatever is close is within 1e-4 of the reference's scale. Test data (the Llama 3
tokenizer) is looked for in $LLAMA3_DATA, else ../shared/data. One line per check; exit 1 when one failed.
"""
import ctypes
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import parity_tokenizer
from golden import randomise, scaling

TOLERANCE = 1e-4
DATA = Path(os.environ.get("LLAMA3_DATA", "../shared/data"))
passed = failed = 0


def check(name, ok, figure=""):
    global passed, failed
    passed, failed = passed + bool(ok), failed + (not ok)
    print(f"{'ok    ' if ok else 'FAILED'} {name:58} {figure}", flush=True)


def distance(got, want):
    """the largest difference in units of want's scale; infinite when either is not finite"""
    got, want = torch.as_tensor(got), torch.as_tensor(want)
    if got.shape != want.shape or not (got.isfinite().all() and want.isfinite().all()):
        return float("inf")
    return ((got - want).abs().max() / want.abs().max().clamp(min=1e-30)).item()


def llama3(*arguments):
    """stdout of ./llama3; a failure ends with its message"""
    done = subprocess.run(["./llama3", *map(str, arguments)], capture_output=True)
    if done.returncode != 0:
        raise RuntimeError(f"./llama3 {' '.join(map(str, arguments))}: exit {done.returncode}: {done.stderr.decode()}")
    return done.stdout.decode()


# ---- our model, through the library --------------------------------------------------------------

class Ours:
    lib = None

    def __init__(self, folder):
        if Ours.lib is None:
            lib = Ours.lib = ctypes.CDLL("build/libllama3_cpu.so")
            lib.cpu_model_load.restype = ctypes.c_void_p
            lib.cpu_gradient.restype = ctypes.POINTER(ctypes.c_float)
            lib.cpu_forward.restype = lib.cpu_backward.restype = ctypes.c_float
        self.model = ctypes.c_void_p(self.lib.cpu_model_load(str(folder).encode()))

    def forward(self, ids, V, labels=None):
        ids, labels = ids.int(), labels.int() if labels is not None else None
        logits = torch.empty(*ids.shape, V)
        pointer = ctypes.c_void_p(labels.data_ptr()) if labels is not None else None
        loss = self.lib.cpu_forward(self.model, ctypes.c_void_p(ids.data_ptr()), pointer, *ids.shape,
                                    ctypes.c_void_p(logits.data_ptr()))
        return logits, loss

    def backward(self, ids, labels):
        ids, labels = ids.int(), labels.int()
        return self.lib.cpu_backward(self.model, ctypes.c_void_p(ids.data_ptr()), ctypes.c_void_p(labels.data_ptr()),
                                     *ids.shape)

    def gradient(self, name, shape):
        n = ctypes.c_size_t()
        pointer = self.lib.cpu_gradient(self.model, name.encode(), ctypes.byref(n))
        return torch.from_numpy(np.ctypeslib.as_array(pointer, (n.value,)).copy()).reshape(shape) if pointer else None

    def close(self):
        self.lib.cpu_model_free(self.model)


# ---- models --------------------------------------------------------------------------------------

#                 C    L  NH NKV  HD    F     V   tied   theta  scaling              B    T   saved as
SHAPES = {
    "llama 2":  (128,  2,  8,  8, 16, 344,  500, False,   1e4, None,                 2,  64, {}),
    "llama 3":  (192,  3, 12,  4, 16, 512, 1000, False,   5e5, None,                 1, 130, {}),
    "3.1":      (256,  2,  8,  2, 32, 896,  777, False,   5e5, scaling(8.0, 64),     2,  77, {}),
    "3.2":      (128,  4,  4,  1, 64, 512, 1501, True,    5e5, scaling(32.0, 32),    3,  51, {}),
    "sharded":  (128,  3,  4,  2, 32, 384,  600, True,    5e5, None,                 2,  40, {"max_shard_size": "300KB"}),
    "BF16":     (128,  2,  4,  2, 32, 384,  600, False,   5e5, None,                 2,  40, {"dtype": torch.bfloat16}),
    "F16":      (96,   2,  6,  3, 20, 288,  601, True,    5e5, None,                 2,  40, {"dtype": torch.float16}),
    "BF16 sharded": (96, 2, 6, 2, 16, 288,  601, False,   5e5, None,                 1,  33,
                     {"dtype": torch.bfloat16, "max_shard_size": "100KB"}),
}


def write_model(folder, C, L, NH, NKV, HD, F, V, tied, theta, rope, dtype=torch.float32, **how):
    rope = {"rope_theta": float(theta), **(rope or {"rope_type": "default"})}
    config = LlamaConfig(hidden_size=C, intermediate_size=F, num_hidden_layers=L, num_attention_heads=NH,
                         num_key_value_heads=NKV, head_dim=HD, vocab_size=V, tie_word_embeddings=tied,
                         rope_parameters=rope, max_position_embeddings=512, rms_norm_eps=1e-5,
                         bos_token_id=1, eos_token_id=2)
    model = LlamaForCausalLM(config)
    randomise(model)
    model.to(dtype).save_pretrained(folder, **how)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def cross_entropy(logits, labels):
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def check_model(name, folder, B, T):
    model, ours = load(folder), Ours(folder)
    V = model.config.vocab_size
    tokens = torch.randint(V, (B, T + 1))
    ids, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    logits = model(ids).logits
    loss = cross_entropy(logits, labels)
    loss.backward()
    got_logits, got_loss = ours.forward(ids, V, labels)
    d = distance(got_logits, logits.detach())
    check(f"{name}: logits", d < TOLERANCE, f"{d:.1e}")
    check(f"{name}: loss", abs(got_loss - loss.item()) < 1e-5 * loss.item(), f"{got_loss:.6f}")
    ours.backward(ids, labels)
    worst, worst_name, n = 0, "", 0
    for parameter_name, p in model.named_parameters():
        got = ours.gradient(parameter_name, p.shape)
        d = distance(got, p.grad) if got is not None else float("inf")
        worst, worst_name, n = max(worst, d), parameter_name if d >= worst else worst_name, n + 1
    check(f"{name}: {n} gradients", worst < TOLERANCE, f"{worst:.1e} at {worst_name}")
    ours.close()


# ---- programs ------------------------------------------------------------------------------------

def write_bin(path, tokens):
    """llm.c's token file: magic, version, count in 256 int32, then uint16"""
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + np.asarray(tokens, np.uint16).tobytes())


def check_eval(name, folder, scratch, T=50, n=333):
    """n tokens make n - 1 predictions; n - 1 is no multiple of T, so that the last window is shorter"""
    model = load(folder)
    tokens = torch.randint(model.config.vocab_size, (n,))
    write_bin(scratch / "eval.bin", tokens)
    total = 0.0
    for start in range(0, n - 1, T):
        ids, labels = tokens[start:min(start + T, n - 1)], tokens[start + 1:start + T + 1]
        with torch.no_grad():
            total += cross_entropy(model(ids[None]).logits, labels[None]).item() * len(ids)
    words = llama3("eval", "--model", folder, "--data", scratch / "eval.bin", "--seq", T).splitlines()[-1].split()
    want = total / (n - 1)
    check(f"{name}: eval", words[::2] == ["loss", "perplexity", "predictions"] and int(words[5]) == n - 1
          and abs(float(words[1]) - want) < 1e-5 * want and abs(float(words[3]) / np.exp(want) - 1) < 1e-3,
          f"{' '.join(words)}, expected {want:.6f}")


def check_generate(name, folder):
    model = load(folder)
    model.generation_config.eos_token_id = None
    prompt = [1, 2, 3]
    want = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=32)[0].tolist()
    got = llama3("generate", "--model", folder, "--ids", "1 2 3", "--tokens", 32, "--temperature", 0, "--print-ids",
                 "--ignore-eos")
    equal = list(map(int, got.split())) == want
    check(f"{name}: generate", equal, f"{len(want)} ids, {len(set(want))} different" if equal else f"{got}{want}")


# ---- folders that we save ------------------------------------------------------------------------

TEXT = "int main(void) { return 0; }\n\tplain, naïve, 東京, Ω ≈ 3.14159, 👩‍🚀!  don't   stop\n\n\n  12345678 \r\n end "


def check_logits(name, folder, stored, B=2, T=64):
    """loads as it comes, in the type it was saved in; the logits are compared in fp32"""
    dtype = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype
    check(f"{name}: loads as it comes", dtype == stored, str(dtype))
    model, ours = load(folder), Ours(folder)
    ids = torch.randint(model.config.vocab_size, (B, T))
    with torch.no_grad():
        d = distance(ours.forward(ids, model.config.vocab_size)[0], model(ids).logits)
    check(f"{name}: logits of the saved folder", d < TOLERANCE, f"{d:.1e}")
    ours.close()


def check_tokenizer(name, folder, scratch):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (scratch / "text").write_bytes(TEXT.encode())
    got = list(map(int, llama3("tokenize", "--tokenizer", folder, "--data", scratch / "text", "--print-ids").split()))
    want = tokenizer.encode(TEXT, add_special_tokens=False)
    check(f"{name}: AutoTokenizer encodes as we do", got == want, f"{len(want)} ids" if got == want else f"{got} {want}")
    back = llama3("detokenize", "--tokenizer", folder, "--ids", " ".join(map(str, got)))
    check(f"{name}: both decode to the text", tokenizer.decode(want) == TEXT and back == TEXT + "\n", f"{len(TEXT)} characters")
    special = "<|begin_of_text|>a<|eot_id|>"
    (scratch / "text").write_bytes(special.encode())
    got = llama3("tokenize", "--tokenizer", folder, "--data", scratch / "text", "--print-ids", "--special").split()
    want = tokenizer.encode(special, add_special_tokens=False)
    check(f"{name}: special tokens", list(map(int, got)) == want and len(want) == 3, f"{want}")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": " hello "}], tokenize=False,
                                         add_generation_prompt=True)
    check(f"{name}: chat template", chat == "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhello<|eot_id|>"
          "<|start_header_id|>assistant<|end_header_id|>\n\n", repr(chat))
    check(f"{name}: bos and eos", tokenizer.bos_token == "<|begin_of_text|>" and tokenizer.eos_token is not None,
          f"{tokenizer.bos_token} {tokenizer.eos_token}")


def check_folders(scratch):
    runs = {"initialised": ["--steps", 0], "initialised BF16": ["--steps", 0, "--dtype", "BF16"],
            "trained": ["--steps", 5], "trained BF16": ["--steps", 5, "--dtype", "BF16"]}
    for tokenizer in ("tokenizer.json", "tokenizer.model"):
        if (DATA / "llama3" / tokenizer).exists():
            runs[f"Llama 3 {tokenizer}"] = ["--steps", 0, "--tokenizer", DATA / "llama3" / tokenizer]
        else:
            print(f"skipped: no {DATA}/llama3/{tokenizer}")
    for name, options in runs.items():
        out = scratch / name.replace(" ", "-")
        llama3("train", "--model", "tiny", "--out", out, *options)
        folder = max(out.glob("step-*"))
        check_logits(name, folder, torch.bfloat16 if "BF16" in options else torch.float32)
        check_tokenizer(name, folder, scratch)


def guarded(name, function, *arguments):
    """an exception is a failed check, not the end"""
    try:
        function(*arguments)
    except Exception as error:  # whatever it was, the line says it
        check(name, False, f"{type(error).__name__}: {error}")


def main():
    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="llama3-parity-") as scratch:
        scratch = Path(scratch)
        for name, (*sizes, B, T, how) in SHAPES.items():
            folder = scratch / name
            write_model(folder, *sizes, **how)
            guarded(name, check_model, name, folder, B, T)
            guarded(name, check_eval, name, folder, scratch)
            guarded(name, check_generate, name, folder)
        guarded("folders", check_folders, scratch)
    try:
        parity_tokenizer.main()
    except SystemExit as end:
        check("tokenizer parity", not end.code)
    print(f"{passed} passed, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
