"""Vocabularies of GGUF files: for tests/tokenizer/tokenize.c, and for the libraries that it is compared
with. Shares nothing with the packer."""
import functools
import hashlib
import pathlib
import random
import struct
import unicodedata

import gguf
import sentencepiece
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

NORMAL, CONTROL, USER, BYTE = 1, 3, 4, 6
LINES = 24000
QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|"
         r"\s*[\r\n]+|\s+(?!\S)|\s+")


FIRST, LAST, ENDING = (r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]",
                       r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?")
# As tokenizer.json of Mistral-Nemo-Instruct-2407 and tiktoken's o200k_base have them.
CAPITALS = (r"[^\r\n\p{L}\p{N}]?" + FIRST + "*" + LAST + r"+%s|[^\r\n\p{L}\p{N}]?" + FIRST + "+" + LAST +
            r"*%s|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
PATTERNS = {3: QWEN2 % "", 4: QWEN2 % "{1,3}", 8: QWEN2 % "", 9: CAPITALS % ("", "", ""),
            10: CAPITALS % (ENDING, ENDING, "{1,3}")}  # by our numbers of splits


def byte_alphabet() -> list[str]:
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = iter(range(256, 324))
    return [chr(b) if b in plain else chr(next(other)) for b in range(256)]


@functools.cache
def vocabulary_of(path):
    return Vocabulary(path)


class Vocabulary:
    def __init__(self, path):
        self.fields = gguf.GGUFReader(path).fields
        self.tokens = self.texts("tokenizer.ggml.tokens")
        self.kinds = [int(k) for k in self.numbers("tokenizer.ggml.token_type")]

    def texts(self, key):
        field = self.fields[key]
        return [bytes(field.parts[i]).decode() for i in field.data]

    def numbers(self, key):
        field = self.fields[key]
        return [field.parts[i][0] for i in field.data]

    def merges(self):
        return [tuple(m.split(" ")) for m in self.texts("tokenizer.ggml.merges")]


def dump(out, kind, split, chat, system, raw, kinds, merges=(), ranks=(), whole=False):
    offsets = [0]
    for token in raw:
        offsets.append(offsets[-1] + len(token))
    out.write_bytes(struct.pack("<7I", kind, split, chat, len(raw), len(merges) // 2, len(system), whole) +
                    system.encode() + struct.pack(f"<{len(offsets)}I", *offsets) + b"".join(raw) +
                    bytes(kinds) + struct.pack(f"<{len(merges)}I", *merges) +
                    struct.pack(f"<{len(ranks)}I", *ranks))
    return out


def dump_bytes(path, out, split, chat, system="", kept=None, whole=False):
    """Byte-level BPE, of the first `kept` merges."""
    vocabulary = vocabulary_of(path)
    undo = {c: b for b, c in enumerate(byte_alphabet())}
    raw = [bytes(undo[c] for c in t) if k == NORMAL else t.encode()
           for t, k in zip(vocabulary.tokens, vocabulary.kinds)]
    ids = {t: i for i, t in enumerate(vocabulary.tokens)}
    merges = [ids[part] for merge in vocabulary.merges()[:kept] for part in merge]
    return dump(out, 1, split, chat, system, raw, vocabulary.kinds, merges, whole=whole)


def dump_pieces(path, out, split, chat, system=""):
    """SentencePiece: ranks by descending score."""
    vocabulary = vocabulary_of(path)
    scores = vocabulary.numbers("tokenizer.ggml.scores")
    raw, best = [], sorted({-s for s, k in zip(scores, vocabulary.kinds) if k == NORMAL})
    order = {score: rank for rank, score in enumerate(best)}
    for text, kind in zip(vocabulary.tokens, vocabulary.kinds):
        spaced = text.replace("\u2581", " ") if kind == NORMAL else text
        raw.append(bytes([int(text[3:5], 16)]) if kind == BYTE else spaced.encode())
    ranks = [order[-s] if k == NORMAL else 0xFFFFFFFF for s, k in zip(scores, vocabulary.kinds)]
    return dump(out, 2, split, chat, system, raw, vocabulary.kinds, ranks=ranks)


def _field(number, wire, value):
    """One field of a protocol buffer."""
    def varint(n):
        out = b""
        while n > 127:
            out, n = out + bytes([n & 127 | 128]), n >> 7
        return out + bytes([n])
    if wire == 2:
        return varint(number << 3 | 2) + varint(len(value)) + value
    return varint(number << 3 | wire) + (varint(value) if wire == 0 else struct.pack("<f", value))


def sentencepiece_of(path):
    """The library itself, with a model file made of the vocabulary (sentencepiece_model.proto)."""
    vocabulary = vocabulary_of(path)
    model = []
    for text, score, kind in zip(vocabulary.tokens, vocabulary.numbers("tokenizer.ggml.scores"),
                                 vocabulary.kinds):
        kind = 2 if text == "<unk>" else kind
        text = text.replace(" ", "\u2581") if kind == USER else text
        model.append(_field(1, 2, _field(1, 2, text.encode()) + _field(2, 5, float(score)) +
                            _field(3, 0, kind)))
    trainer = _field(3, 0, 2) + _field(35, 0, 1)  # BPE, byte fallback
    normalizer = (_field(1, 2, b"identity") + _field(3, 0, 0) + _field(4, 0, 0) +
                  _field(5, 0, 1))  # no space before, none removed, spaces escaped
    model += [_field(2, 2, trainer), _field(3, 2, normalizer)]
    return sentencepiece.SentencePieceProcessor(model_proto=b"".join(model))


def later_split_of(tokens, merges, split, whole=False):
    """`tokenizers` with one of PATTERNS. whole: a piece that is a token is not merged."""
    made = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges, ignore_merges=whole))
    made.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERNS[split]), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return made


def lines():
    """Prose, code, every script, emoji sequences, random code points; the same on each run."""
    source = random.Random(20)
    out = []
    for path in sorted(pathlib.Path(random.__file__).parent.glob("*.py")):
        out += path.read_text(errors="ignore").splitlines()
    out = [line for line in out if line.strip()][:9000]
    scripts: dict[str, list[str]] = {}
    for point in range(0x20, 0x20000):
        name = unicodedata.name(chr(point), "")
        if name:
            scripts.setdefault(name.split(" ")[0], []).append(chr(point))
    for letters in scripts.values():
        for _ in range(4):
            words = ["".join(source.choices(letters, k=source.randint(1, 9))) for _ in range(6)]
            out.append(source.choice([" ", "  ", "\n", "\t ", ", "]).join(words))
    emoji = [chr(c) for c in range(0x1F300, 0x1F6FF)] + ["\u200d", "\ufe0f", "\U0001F3FD", "\u20e3"]
    out += ["".join(source.choices(emoji, k=source.randint(1, 12))) for _ in range(2000)]
    pieces = ["'s", "'ll", "'re", "'", "\n", "\r\n", "\t", " ", "   ", "\u00a0", "\u3000", "\u2028",
              "1", "23", "٣", "Ⅷ", "½", "²", "don't", "I'VE", "naïve", "東京", "Ω", "<|im_end|>", "{}",
              "==", "...", "é", "e\u0301", "\u200b", "\x1c", "\x85", "_a", "A1b2"]
    while len(out) < LINES - 4000:
        out.append("".join(source.choices(pieces, k=source.randint(1, 14))))
    while len(out) < LINES:
        points = (source.choice([source.randrange(1, 0x300), source.randrange(1, 0xD800),
                                 source.randrange(0xE000, 0x110000)])
                  for _ in range(source.randint(1, 30)))
        out.append("".join(map(chr, points)))
    return [line.replace("\0", "") for line in out]


def words():
    """Of letters in each case and in none, marks, and what stands around words; the same on each run."""
    source = random.Random(21)
    kinds: dict[str, list[str]] = {}
    for point in range(0x20, 0x20000):
        kinds.setdefault(unicodedata.category(chr(point)), []).append(chr(point))
    pieces = ["'s", "'LL", "'\u017f", "'RE", "'", "/", "//\r\n", "\n", " ", "  ", "\t", "1", "1234", "-", "a", "Z",
              "aB", "HTTPServer", "\u01c5", "\u02b0", "\u4e2d", "\u0301", "\u0903", "\u20dd", "\u03a3\u03c2", "\u00df"]
    letters = [kinds[k] for k in ("Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me")]
    return ["".join(source.choice(source.choice(letters) if source.random() < 0.5 else pieces)
                    for _ in range(source.randint(1, 20))) for _ in range(20000)]


def code_points():
    """Each code point, alone and between others that it may compose with."""
    points = [c for c in range(1, 0x110000) if not 0xD800 <= c < 0xE000]
    return ["\n".join(f"{c} a{c}\u0301\u0327{c}" for c in map(chr, points[i:i + 512]))
            for i in range(0, len(points), 512)]


def digest(ids):
    """SHA-256 over lists of ids: the length of each, then its ids, as u32."""
    total = hashlib.sha256()
    for line in ids:
        total.update(struct.pack(f"<{len(line) + 1}I", len(line), *line))
    return total.hexdigest()
