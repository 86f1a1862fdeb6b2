"""
Writes the golden ids that dev/test/test_tokenizer.c compares: what HuggingFace's `tokenizers` and OpenAI's `tiktoken`
make of a few texts.

    python dev/reference/golden_tokenizer.py [DATA]     rewrites dev/test/golden/tokenizer; the same bytes every time

    tiny.json       a small byte-level BPE with Llama 3's split, trained here on the prose below; ignore_merges false
    tiny.ids        its ids
    tiny_ignore.*   the same without the last merges, so that some tokens are reached only by ignore_merges true;
                    tiny_cut.ids: its ids with ignore_merges false
    llama3.ids      Llama 3's own, from DATA/llama3 (default $LLAMA3_DATA, ../shared/data), where both libraries agree;
                    the tokenizer itself is not kept here

A line of an .ids file is a text in hex (- when empty), "plain" or "special" (its special tokens are recognised), and the ids.
"""
import json
import os
import sys
from pathlib import Path

import tiktoken
from tiktoken.load import load_tiktoken_bpe
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

ROOT = Path(__file__).resolve().parent.parent.parent
GOLDEN = ROOT / "dev/test/golden/tokenizer"
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]

PROSE = [
    "A model is a long list of numbers. Training changes each of them a little, again and again, so that the next "
    "token of the text becomes less of a surprise. Nothing else happens; the rest is bookkeeping.",
    "The forward pass reads the weights from memory, multiplies, adds, and keeps what the backward pass will need. "
    "The backward pass walks the same road the other way and leaves a gradient beside every weight it passes.",
    "What's measured can be improved; what isn't, won't be. We'll run it 1000 times, and 1234567 more if they're needed.",
    "for (int i = 0; i < n; i++) {\n    sum += x[i] * y[i];\n}\n\nreturn sum;\n",
    "Größe, naïveté, Ελληνικά, русский язык, 日本語のテキスト, 한국어, العربية, and 🙂 are text as well.",
]

TEXTS = [
    "", " ", "a", "This is a test sentence.", "This is a response.", "user", "system", "assistant", "\n\n",
    *PROSE,
    "the weights, the gradients, the tokens", " the the  the   the    the", "Training training TRAINING tRaInInG",
    "It's I'LL we'Re they'd 'S x'ſ ſ's ''s 's", "1 12 123 1234 12345678 1.5e-3 ٣٤٥ Ⅻ ½",
    "a\nb\r\nc\r\n\r\n  d\t\te \n \n f   ", "   leading and trailing   ", "\t\tif (x)\n\t\t\treturn;\n",
    "!!! ??? -- ... ,,, (a) [b] {c} <d> \"e\" 'f' `g`\n\n\n", "x_y-z.w/v\\u|t~s^r&q%p$o#n@m",
    "\u00a0\u1680\u180e\u2003\u2028\u3000 white\u00a0space\u2003\u2003here\u180ethere", "e\u0301 cafe\u0301 café \u200dx\u200by\ufeffz",
    "👍🏽👩‍👩‍👧‍👦🇪🇺 🙂🙂", "中文，没有空格的句子。", "\0nul\0 and \x1c\x1d control \x7f\u0085",
    "a" * 63, "a" * 64, "a" * 65, "ab" * 100, " " * 100, "=" * 200, "\n" * 90, "the" * 50, "é" * 70, "🙂" * 40, "0" * 100,
]
SPECIAL_TEXTS = [
    "<|begin_of_text|>The model<|end_of_text|>", "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>",
    "<|eot_id|><|eot_id|> <|eot_id <|eot_id|", "a<|eot_id|>b <|eot_id|> \n<|eot_id|>\n", "no special tokens", "<|nonsense|>",
]


def train_tiny():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
                                  show_progress=False)
    tokenizer.train_from_iterator(PROSE, trainer)
    tokenizer.add_special_tokens([AddedToken(s, special=True) for s in SPECIALS])
    bos = SPECIALS[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.token_to_id(bos))])
    return tokenizer.to_str(pretty=True)


def without_last_merges(text, ignore_merges):
    tree = json.loads(text)
    tree["model"]["ignore_merges"] = ignore_merges
    tree["model"]["merges"] = [" ".join(pair) for pair in tree["model"]["merges"][:150]]  # as older files spell them
    return json.dumps(tree, ensure_ascii=False)


def encode(tokenizer, text, special):
    tokenizer.encode_special_tokens = not special
    return tokenizer.encode(text, add_special_tokens=False).ids


def write(name, lines):
    (GOLDEN / name).write_text("".join(f"{text.encode().hex() or '-'} {kind} {' '.join(map(str, ids))}".rstrip() + "\n"
                                       for text, kind, ids in lines))


def golden_lines(encode_text):
    for text in TEXTS + SPECIAL_TEXTS:
        yield text, "plain", encode_text(text, False)
    for text in SPECIAL_TEXTS:
        yield text, "special", encode_text(text, True)


def main():
    data = Path(sys.argv[1] if len(sys.argv) > 1 else os.environ.get("LLAMA3_DATA", ROOT / "../shared/data"))
    GOLDEN.mkdir(parents=True, exist_ok=True)
    tiny = train_tiny()
    (GOLDEN / "tiny.json").write_text(tiny)
    tokenizer = Tokenizer.from_str(tiny)
    write("tiny.ids", golden_lines(lambda text, special: encode(tokenizer, text, special)))

    for name, ignore_merges in ("tiny_ignore", True), ("tiny_cut", False):
        cut = Tokenizer.from_str(without_last_merges(tiny, ignore_merges))
        write(f"{name}.ids", golden_lines(lambda text, special: encode(cut, text, special)))
    (GOLDEN / "tiny_ignore.json").write_text(without_last_merges(tiny, True))

    llama3 = Tokenizer.from_file(str(data / "llama3/tokenizer.json"))
    ranks = load_tiktoken_bpe(str(data / "llama3/tokenizer.model"))
    added = {token.content: i for i, token in llama3.get_added_tokens_decoder().items()}
    tik = tiktoken.Encoding("llama3", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens=added)

    def both(text, special):
        ids = encode(llama3, text, special)
        assert ids == tik.encode(text, allowed_special="all" if special else set(), disallowed_special=()), text
        return ids

    write("llama3.ids", golden_lines(both))


if __name__ == "__main__":
    main()
