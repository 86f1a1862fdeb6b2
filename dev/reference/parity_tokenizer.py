"""
Our tokenizer beside HuggingFace's `tokenizers`, `transformers` and OpenAI's `tiktoken`: the same ids or exit 1.

    python dev/reference/parity_tokenizer.py [DATA]         DATA: folder of test data, default $LLAMA3_DATA, ../shared/data.
                                                            Without it only the bytes and a tiny tokenizer.json are compared

For Llama 3's tokenizer, from tokenizer.json and from tokenizer.model:
    every text file of DATA, whole (chunks of it in tiktoken, which wants str); 10,000 random strings of code points
    assigned in Unicode 14; strings made to be hard (white space, contractions, runs of one character, digits, invalid UTF-8)
    special tokens recognised, and left as text; decoding as a stream against Python's replacement of invalid bytes
Then the folders that we write (for bytes, a tokenizer.model, a tokenizer.json), loaded by transformers' AutoTokenizer:
    the same ids, the text back, the same ids from its chat template as from our chat functions
"""
import gzip
import os
import random
import struct
import subprocess
import sys
import tempfile
import unicodedata
from pathlib import Path

import tiktoken
from tiktoken.load import load_tiktoken_bpe
from tokenizers import Tokenizer
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent.parent
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
mismatches = checks = 0


def check(what, ours, theirs):
    """counts a comparison; prints the first few that differ"""
    global mismatches, checks
    checks += 1
    if ours == theirs:
        return
    mismatches += 1
    if mismatches <= 20:
        at = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
        print(f"MISMATCH {what[:200]!r} at {at}: ours {ours[at:at + 8]}, theirs {theirs[at:at + 8]}")


class Ours:
    """a tokenizer_pipe process"""

    def __init__(self, path):
        self.process = subprocess.Popen([build(ROOT / "dev/reference/tokenizer_pipe.c"), str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(self, kind, request):
        self.process.stdin.write(kind + struct.pack("<I", len(request)) + request)
        self.process.stdin.flush()
        header = self.process.stdout.read(4)
        if len(header) < 4:
            sys.exit(f"tokenizer_pipe ended at {kind} {request[:100]!r}")
        return self.process.stdout.read(struct.unpack("<I", header)[0])

    def ids(self, kind, request):
        answer = self.ask(kind, request)
        return list(struct.unpack(f"<{len(answer) // 4}i", answer))

    def encode(self, text, special=False):
        return self.ids(b"s" if special else b"t", text if isinstance(text, bytes) else text.encode())

    def decode(self, ids):
        return self.ask(b"d", struct.pack(f"<{len(ids)}i", *ids)).decode()

    def chat(self, messages, generation):
        ids = []
        for message in messages:
            ids += self.ids(b"m", message["role"].encode() + b"\0" + message["content"].encode())
        return ids + (self.ids(b"h", b"assistant") if generation else [])

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def build(source):
    """the program of a .c file, compiled anew when it is older than its sources"""
    program = ROOT / "build" / "reference" / source.stem
    sources = [source, *(ROOT / "llmc").glob("*.h")]
    if not program.exists() or any(s.stat().st_mtime > program.stat().st_mtime for s in sources):
        program.parent.mkdir(parents=True, exist_ok=True)
        libs = subprocess.check_output(["pkg-config", "--cflags", "--libs", "libpcre2-8", "libcjson"], text=True).split()
        subprocess.check_call(["cc", "-std=gnu11", "-O3", "-march=native", f"-I{ROOT}", "-o", program, source, *libs, "-lm"])
    return program


# ---- texts -----------------------------------------------------------------------------------


def data_files(data):
    for path in sorted(data.rglob("*")):
        if path.suffix in (".txt", ".md"):
            yield path.name, path.read_bytes().decode()
        elif path.name.endswith(".txt.gz"):
            yield path.name, gzip.decompress(path.read_bytes()).decode()


def random_strings(n):
    """half of them of any assigned code points, half of few, so that runs and mixtures of classes occur"""
    assert unicodedata.unidata_version == "14.0.0", "run with a Python whose Unicode is 14 (3.11)"
    rng = random.Random(1)
    assigned = [chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cn", "Cs")]
    few = list(" \t\n\r\v\f\u0085\u00a0\u1680\u180e\u2003\u2028\u202f\u3000\u200b\u200d\x1c\x1f'’aAzZéßſK0127²Ⅻ٣½_-.,!?<|>#"
               "中あ한🙂👍🏽e\u0301\ufeff\u00ad") + ["'s", "'RE", "'ſ", "'ll ", "don't", " the", "  ", "\r\n", "<|eot_id|>"]
    for i in range(n):
        length = rng.randrange(1, 40)
        yield "".join(rng.choice(assigned if i % 2 else few) for _ in range(length))


def hard_strings():
    yield from ["", " ", "\n", "a", "\0", "\0\0a\0", "'s", "'S", "x'ſ", "ſ's", "I'LL'D'VE", "\u180e \u180e", "\ufeffBOM"]
    for unit in [" ", "a", "=", "-", "\n", "\t", "\r\n", "0", "ab", "é", "中", "🙂", " a", "A", "_", ".", "\u00a0", "\u200b"]:
        for n in [*range(1, 140), 255, 256, 257, 1000, 3333]:
            yield unit * n
        for n in (1, 2, 3, 7, 64, 81):
            yield "x" + unit * n + "y"
            yield unit * n + " z"


def invalid_bytes(rng):
    for _ in range(2000):
        parts = [rng.choice([b"\xff", b"\x80", b"\xe4\xb8", b"\xf0\x9f\x98", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf5\x80",
                             " the café ".encode(), "🙂".encode(), b"\n", bytes([rng.randrange(256)])]) for _ in range(6)]
        yield b"".join(parts)


# ---- comparisons -----------------------------------------------------------------------------


def compare_encoding(data, folder):
    hf = Tokenizer.from_file(str(folder / "tokenizer.json"))
    hf.encode_special_tokens = True
    ranks = load_tiktoken_bpe(str(folder / "tokenizer.model"))
    hf_special = Tokenizer.from_file(str(folder / "tokenizer.json"))
    special = {t.content: i for i, t in hf_special.get_added_tokens_decoder().items()}
    tik = tiktoken.Encoding("llama3", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens=special)
    for name in ("tokenizer.json", "tokenizer.model"):
        ours = Ours(folder / name)

        def compare(what, text):
            ids = ours.encode(text)
            check(f"{name} {what} tokenizers", ids, hf.encode(text, add_special_tokens=False).ids)
            check(f"{name} {what} tiktoken", ids, tik.encode_ordinary(text))
            return ids

        for what, text in data_files(data):
            ids = compare(what, text)
            check(f"{name} {what} decoded", ours.decode(ids), text)
        for text in random_strings(10_000):
            ids = compare(text, text)
            check(f"{name} {text} decoded", ours.decode(ids), text)
            check(f"{name} {text} special", ours.encode(text, True), hf_special.encode(text, add_special_tokens=False).ids)
        for text in hard_strings():
            compare(text[:50], text)
        for text in invalid_bytes(random.Random(2)):
            ids = ours.encode(text)
            check(f"{name} {text} bytes kept", tik.decode_bytes(ids), text)
            check(f"{name} {text} replaced", ours.decode(ids), text.decode(errors="replace"))
        rng = random.Random(3)
        for _ in range(2000):
            ids = [rng.randrange(128000) for _ in range(20)]
            check(f"{name} {ids} streamed", ours.decode(ids), tik.decode(ids))
        text = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|> <|eot_id <|python_tag|>"
        check("special", ours.encode(text, True), tik.encode(text, allowed_special="all"))
        check("not special", ours.encode(text), tik.encode_ordinary(text))
        ours.close()


def conversations():
    yield [{"role": "user", "content": "Hello"}]
    yield [{"role": "system", "content": "  Be brief.\n"}, {"role": "user", "content": "\n\n\tWhat is 2+2?\u00a0"},
           {"role": "assistant", "content": "4"}, {"role": "user", "content": ""}]
    yield [{"role": "user", "content": "\x1c\u2003\u3000 é 中 \x1f\u0085"}, {"role": "assistant", "content": "\r\n x\r\n\r\n"}]
    rng = random.Random(4)
    for text in random_strings(500):
        if "<|" not in text:  # transformers would recognise special tokens there; we leave text as text
            yield [{"role": rng.choice(["user", "assistant", "tool"]), "content": text}]


def compare_written(source, texts):
    """the folder that we write for source, beside what transformers makes of it"""
    with tempfile.TemporaryDirectory() as folder:
        ours = Ours(source)
        ours.ask(b"w", folder.encode())
        theirs = AutoTokenizer.from_pretrained(folder)
        check(f"{source} class", [theirs.is_fast], [True])
        again = Ours(folder)
        for text in texts:
            ids = ours.encode(text, True)
            check(f"{source} {text[:50]} AutoTokenizer", ids, theirs.encode(text, add_special_tokens=False))
            check(f"{source} {text[:50]} read again", ids, again.encode(text, True))
            check(f"{source} {text[:50]} back", theirs.decode(ids), text)
        bos = [theirs.bos_token_id]
        check(f"{source} bos", theirs.encode("a"), bos + ours.encode("a"))
        check(f"{source} eos", [theirs.eos_token], ["<|end_of_text|>"])
        for messages in conversations():
            for generation in (False, True):
                want = theirs.apply_chat_template(messages, add_generation_prompt=generation, return_dict=False)
                check(f"{source} chat {messages}", bos + ours.chat(messages, generation), list(want))
        ours.close()
        again.close()


def main():
    data = Path(sys.argv[1] if len(sys.argv) > 1 else os.environ.get("LLAMA3_DATA", ROOT / "../shared/data")).resolve()
    llama3, shakespeare = data / "llama3", data / "tinyshakespeare.txt"
    texts = [*random_strings(2000), *hard_strings()]
    sources = ["bytes", ROOT / "dev/test/golden/tokenizer/tiny.json"]
    missing = [path for path in (llama3 / "tokenizer.model", llama3 / "tokenizer.json", shakespeare) if not path.exists()]
    for path in missing:
        print(f"skipped: no {path}")
    if not missing:
        compare_encoding(data, llama3)
        texts.append(shakespeare.read_text()[:100_000])
        sources += [llama3 / "tokenizer.model", llama3 / "tokenizer.json"]
    for source in sources:
        compare_written(source, texts)
    print(f"tokenizer parity: {checks} comparisons, {mismatches} mismatches")
    sys.exit(mismatches != 0)


if __name__ == "__main__":
    main()
