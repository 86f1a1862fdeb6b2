"""
How fast does our tokenizer encode, beside tiktoken, on one thread?

    python dev/reference/bench_tokenizer.py [DATA]      DATA: folder of test data, default $LLAMA3_DATA, ../shared/data

The 19 MB of books with Llama 3's tokenizer, five runs of each in turn; processor time of the thread, so that other work on
the machine disturbs little. dev/cpu/tokenizer.c measures ours.
"""
import gzip
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tiktoken
from tiktoken.load import load_tiktoken_bpe

from parity_tokenizer import ROOT, SPLIT, build

ROUNDS = 5


def ours(program, tokenizer, path):
    """one encoding: MB/s, number of tokens"""
    line = subprocess.check_output([program, tokenizer, path, "1"], text=True)
    tokens, rate = re.search(r"tokens (\d+)  median ([\d.]+) MB/s", line).groups()
    return float(rate), int(tokens)


def main():
    data = Path(sys.argv[1] if len(sys.argv) > 1 else os.environ.get("LLAMA3_DATA", ROOT / "../shared/data"))
    program = build(ROOT / "dev/cpu/tokenizer.c")
    model = data / "llama3/tokenizer.model"
    text = gzip.decompress((data / "books_public_domain.txt.gz").read_bytes())
    tik = tiktoken.Encoding("llama3", pat_str=SPLIT, mergeable_ranks=load_tiktoken_bpe(str(model)), special_tokens={})
    rates, tik_rates = [], []
    with tempfile.NamedTemporaryFile() as file:
        file.write(text)
        file.flush()
        for _ in range(ROUNDS):
            rate, tokens = ours(program, model, file.name)
            start = time.thread_time()
            ids = tik.encode_ordinary(text.decode())
            tik_rates.append(len(text) / 1e6 / (time.thread_time() - start))
            rates.append(rate)
            assert len(ids) == tokens
    rate, tik_rate = statistics.median(rates), statistics.median(tik_rates)
    print(f"books, {len(text) / 1e6:.1f} MB, {tokens} tokens: ours {rate:.1f} MB/s, tiktoken {tik_rate:.1f} MB/s, "
          f"{rate / tik_rate:.1f} x")
    for unit in ("a", " "):
        with tempfile.NamedTemporaryFile() as file:
            file.write(unit.encode() * 10_000_000)
            file.flush()
            rate, tokens = ours(program, model, file.name)
            print(f"10 MB of {unit!r}: {tokens} tokens, {10 / rate:.1f} s")


if __name__ == "__main__":
    main()
