"""Trains the small tokenizers beside this file and writes what the Hugging Face library makes of some texts.

    python3 -m venv venv && venv/bin/pip install tokenizers && venv/bin/python make_cases.py

Each NAME.json is a tokenizer.json, each NAME.cases.json holds for it
  cases:   text, ids (with the template), text of the ids without and with special tokens
  decodes: random ids and their text (byte-level tokenizers only: elsewhere the library joins bytes by another rule)
The texts of the stories come from examples/models/stories260K.
"""
import json
import pathlib
import random

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

HERE = pathlib.Path(__file__).parent
STORIES = HERE.parent.parent.parent / "examples/models/stories260K/golden"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

PROSE = """Trireme answers requests: it reads a prompt, splits it into tokens, and writes tokens until the text ends.
for (int i = 0; i < 128; ++i) { sum += values[i] * weights[i]; }\n\tif (sum > 0.5) return "positive";
In 1969 people walked on the Moon; in 2024 there were 8,118,835,999 of us. It's what we'd call progress, isn't it?
Le café est à côté de l'hôtel. Die Straße ist übermäßig lang. El niño pequeño comió piñas. Żółta łódź płynie.
Привет, мир! Как дела? Сегодня хорошая погода. Γειά σου Κόσμε. שלום עולם. مرحبا بالعالم. नमस्ते दुनिया।
你好,世界!今天天气很好。こんにちは世界。안녕하세요 세계. 😀 😀😃 👍🏽 👩‍👩‍👧‍👦 ❤️ → ← ∑ ∞ ≤ ≥ €100 £5 ½ ¼ m² H₂O
"""

FIXED = [
    "", " ", "  ", "     ", "\n", "\n\n\n", "\r\n", "\r\n\r\n", "\t", "\t\tx", " \n ", "a", "A", ".", " a", "a ", "  a  ",
    "Hello", "Hello, world!", "Hello , world !", "HELLO WORLD", "it's we'll I'd you're they've I'm can't",
    "IT'S WE'LL I'D YOU'RE THEY'VE I'M CAN'T", "'s's's", "don''t", "''''", "rock'n'roll", "'\u017f", "x'\u212a",
    "1", "12", "123", "1234", "12345678901234567890", "3.14159", "1,000,000", "1e-9", "0x1F", "v1.2.3", "²³¼½", "٣٤٥", "Ⅷ",
    "one two  three   four    five", "trailing   ", "   leading", "tab\tseparated\tvalues", "line\nbreak", "line\r\nbreak",
    "line \n break", "para\n\n\nbreak", "end\n", "end \n", "end\r", "\n start", "!\n\n", "!!!\r\n??", " !\n x", "a\u00a0b",
    "a\u2003b", "a\u3000b", "a\u2028b", "a\u0085b", "\u200b", "a\u200db", "\ufeffbom", "café", "cafe\u0301", "Å", "A\u030a", "\u212b",
    "n\u0303o", "q\u0307\u0323", "q\u0323\u0307", "e\u0301\u0301", "\u0301alone", "\u0344", "\u0958", "\u0915\u093c", "가", "\u1100\u1161",
    "\u1100\u1161\u11a8", "각\u11a8", "한국어 텍스트", "你好,世界", "中文和English混合", "日本語のテキスト、カタカナ", "ひらがな", "ﾊﾝｶｸ",
    "Привет, мир!", "Γειά σου", "שלום עולם", "مرحبا", "नमस्ते", "ไทย", "😀", "😀😃😄", "👍🏽", "👩‍👩‍👧‍👦", "❤️", "🇩🇪🇫🇷", "a😀b", " 😀",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "𠮷野家", "\U0010ffff", "\uffff", "\ue000", "\x00", "a\x00b", "\x01\x02\x1f", "\x7f", "\x1b[0m", "\x0b\x0c",
    "<s>", "</s>", "<unk>", "<|endoftext|>", "a<|endoftext|>b", "<|endoftext|><|endoftext|>", " <|endoftext|> ", "<|endoftext|",
    "<|begin_of_text|>Hi<|eot_id|>", "<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>",
    "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n", "<tool_call>{\"a\": 1}</tool_call>", "<|im_start|im_end|>",
    "x <mask> y", "x<mask>y", "x  <mask>\n y", "<mask><mask>", "foo", "foo bar", "foobar", "a foo.", "_foo", "foo_", "éfoo", "foo é",
    "left  <l> right", "left <r>   right", "<l><r>", " <r> <l> ", "A B", "a▁b", "▁", "▁▁x", " ▁ ", "The NORM word", "the Norm  word",
    "#include <vector>\nint main() {\n  return 0;\n}\n", "def f(x):\n    return x**2  # square\n", "{\"key\": [1, 2.5, null]}",
    "https://example.org/a/b?c=d&e=%20f#g", "user@example.com", "C:\\path\\to\\file", "$x_1 = \\frac{a}{b}$", "snake_case camelCase",
    "----------", "==========", "..........", "!@#$%^&*()", "(((())))", "a-b-c", "a--b", "…", "“quoted”", "‘single’", "—dash–dash", "«x»",
    "a" * 70, "ab" * 40, " " * 70, "\n" * 40, "9" * 50, "é" * 30, "你" * 30, "😀" * 20, "aA1 " * 20,
    "Once upon a time, there was a little girl named Lily.", "Lily likes cats and dogs.\nTom said, \"I am 5 years old!\"",
]


def stories():
    golden = json.loads((STORIES / "tokenizer_cases.json").read_text())
    return [case["text"] for case in golden["cases"] if len(case["text"]) > 30]


def random_texts(rng, count):
    alphabet = list("abcdefghijklmnopqrstuvwxyzABC0123456789") + [" "] * 12 + list("\n\t\r.,'!?<>|_-") + list("éüßñя你世界가😀👍\u0301\u00a0½")
    return ["".join(rng.choice(alphabet) for _ in range(rng.randint(1, 60))) for _ in range(count)]


def train(tokenizer, specials, size, alphabet):
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([PROSE] * 4 + stories(), trainer)
    return tokenizer


def byte_level(pre_tokenizer, specials, size=700, **options):
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    return train(tokenizer, specials, size, pre_tokenizers.ByteLevel.alphabet())


def gpt2():
    tokenizer = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), ["<|endoftext|>"])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def starcoder2():
    """GPT-2's bytes with every digit a word of its own."""
    steps = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                     pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return byte_level(steps, ["<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>"])


def split_then_bytes(pattern):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"),
                                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def llama3():
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer = byte_level(split_then_bytes(LLAMA3), specials, ignore_merges=True)
    template = processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return tokenizer


def qwen():
    tokenizer = byte_level(split_then_bytes(QWEN), [])
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False), AddedToken("</tool_call>", normalized=False)])
    return tokenizer


def sentence_piece(steps):
    """A vocabulary with <0xNN> pieces, as converted SentencePiece models have."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    train(tokenizer, ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)], 800, [])
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = data["added_tokens"][:3]
    data.update(steps)
    return Tokenizer.from_str(json.dumps(data))


def mistral():
    tokenizer = sentence_piece({
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}})
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, rstrip=True, normalized=False)])
    tokenizer.add_tokens([AddedToken("foo", single_word=True, normalized=False), AddedToken("<l>", lstrip=True, normalized=False),
                          AddedToken("<r>", rstrip=True, normalized=False), AddedToken("A B", normalized=False)])
    return tokenizer


def metaspace():
    tokenizer = sentence_piece({
        "normalizer": {"type": "Replace", "pattern": {"Regex": "[ \\t]{2,}"}, "content": " "},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
            {"type": "Digits", "individual_digits": True}]},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]}})
    tokenizer.add_tokens([AddedToken("foo", single_word=True, normalized=True), AddedToken("A  B", normalized=True)])
    return tokenizer


def splits():
    """Every split behaviour, and a normaliser of its own."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    split = pre_tokenizers.Split
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("#"), normalizers.Replace("NORM", "norm")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        split(Regex(r"\s+"), "removed"), split("'", "merged_with_previous"), split("(", "merged_with_next"),
        split(Regex(r"[.!?]"), "contiguous"), split(Regex(r"[\p{L}\p{N}]+"), "isolated", invert=True),
        pre_tokenizers.Digits(individual_digits=False)])
    tokenizer.decoder = decoders.Fuse()
    return train(tokenizer, ["<unk>"], 500, [])


def cases_of(tokenizer, rng, with_random_ids):
    texts = FIXED + random_texts(rng, 40)
    cases = []
    for text in texts:
        ids = tokenizer.encode(text).ids
        cases.append({"text": text, "ids": ids, "decoded": tokenizer.decode(ids, skip_special_tokens=True),
                      "decoded_all": tokenizer.decode(ids, skip_special_tokens=False)})
    decodes = []
    for _ in range(60 if with_random_ids else 0):
        ids = [rng.randrange(tokenizer.get_vocab_size()) for _ in range(rng.randint(1, 24))]
        decodes.append({"ids": ids, "decoded": tokenizer.decode(ids, skip_special_tokens=True)})
    return {"cases": cases, "decodes": decodes}


def main():
    for build in (gpt2, starcoder2, llama3, qwen, mistral, metaspace, splits):
        name, tokenizer = build.__name__, build()
        tokenizer.save(str(HERE / f"{name}.json"), pretty=False)
        tokenizer = Tokenizer.from_file(str(HERE / f"{name}.json"))
        cases = cases_of(tokenizer, random.Random(7), name in ("gpt2", "starcoder2", "llama3", "qwen"))
        lines = {key: [json.dumps(case) for case in value] for key, value in cases.items()}
        body = ",\n".join('"%s": [\n%s\n]' % (key, ",\n".join(value)) for key, value in lines.items())
        (HERE / f"{name}.cases.json").write_text("{%s}\n" % body)
        print(name, tokenizer.get_vocab_size(), len(cases["cases"]), len(cases["decodes"]))


if __name__ == "__main__":
    main()
