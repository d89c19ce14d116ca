"""Positions to measure on: prose, code and chat. texts/ is frozen: the golden figures belong to it."""
import pathlib

import gguf
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

TEXTS = pathlib.Path(__file__).resolve().parent / "texts"

CHAT = [
    ("What is the capital of France, and why is it famous?",
     "The capital of France is Paris. It is known for the Eiffel Tower, the Louvre, and its food."),
    ("Write a short poem about the sea in winter.",
     "The grey waves roll upon the shore,\nThe gulls have flown to come no more,\nThe wind is cold, "
     "the sky is low,\nAnd on the sand there lies the snow."),
    ("How do I sort a list of numbers in Python?",
     "You can use the built-in function `sorted`, which returns a new list:\n\n```python\nnumbers = "
     "[3, 1, 2]\nprint(sorted(numbers))\n```\n\nTo sort in place, call `numbers.sort()`."),
    ("Explain photosynthesis to a child.",
     "Plants make their own food. They take light from the sun, water from the ground and air, and "
     "turn them into sugar that helps them grow. While they do it, they give us oxygen to breathe."),
    ("If a train travels 60 miles in one and a half hours, how fast does it go?",
     "Speed is distance divided by time. 60 miles divided by 1.5 hours is 40 miles per hour."),
]
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def tokenizer(path, special=True, tokens=None):
    """The oracle tokenizer, from a GGUF file's vocabulary (or this one in its place) and merges."""
    reader = gguf.GGUFReader(path)

    def texts(key):
        field = reader.fields[key]
        return [bytes(field.parts[i]).decode() for i in field.data]
    tokens = tokens or texts("tokenizer.ggml.tokens")
    merges = [tuple(m.split(" ")) for m in texts("tokenizer.ggml.merges")]
    kinds = reader.fields["tokenizer.ggml.token_type"]
    kinds = [int(kinds.parts[i][0]) for i in kinds.data]
    made = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    made.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    made.add_special_tokens([AddedToken(t, special=True, normalized=False)
                             for t, kind in zip(tokens, kinds) if special and kind == 3])
    return made


def gemma_passage(path, size=600):
    """One, longer than Gemma's window of 512."""
    import oracles  # of tests/tokenizer
    text = (TEXTS / "prose.txt").read_text()
    return [2] + oracles.sentencepiece_of(path).encode(text)[:size - 1]


def passages(path, size=512):
    """Lists of token ids: two of prose, two of code, the chats."""
    made = tokenizer(path)

    def ids(text):
        return made.encode(text, add_special_tokens=False).ids
    prose, code = ((TEXTS / name).read_text() for name in ("prose.txt", "code.txt"))
    chat = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n" + "".join(
        f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n{a}<|im_end|>\n" for q, a in CHAT)
    prose, code = ids(prose), ids(code)
    return [prose[:size], prose[2000:2000 + size], code[:size], code[2000:2000 + size],
            ids(chat)[:size]]
