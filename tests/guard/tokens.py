"""The tokens of a GGUF file's byte-level vocabulary, one a line, in hexadecimal: for `guard tokens`."""
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "tokenizer"))
import oracles  # noqa: E402


def lines(path) -> str:
    vocabulary = oracles.vocabulary_of(path)
    undo = {c: b for b, c in enumerate(oracles.byte_alphabet())}
    return "".join(bytes(undo[c] for c in token).hex() + "\n"
                   for token, kind in zip(vocabulary.tokens, vocabulary.kinds) if kind == oracles.NORMAL)


if __name__ == "__main__":
    sys.stdout.write(lines(sys.argv[1]))
