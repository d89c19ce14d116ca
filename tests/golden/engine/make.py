#!/usr/bin/env python3
"""llama.cpp's own divergence from the float64 pass on the engine test's positions, and a digest of
what its tokenizer makes of the tokenizer test's lines.

`./run golden` runs this in an environment with llama-cpp-python; the result is committed, so that the
test needs no peer. usage: make.py SMOLLM.gguf GEMMA.gguf"""
import hashlib
import json
import pathlib
import sys

import llama_cpp
import numpy

PEER = f"llama-cpp-python {llama_cpp.__version__}"
TESTS = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(TESTS / "engine"), str(TESTS / "tokenizer")]
import corpus  # noqa: E402
import oracles  # noqa: E402
import reference  # noqa: E402


def peer_of(model, context):
    return llama_cpp.Llama(model, n_ctx=context, n_threads=2, n_batch=512, logits_all=True,
                           verbose=False)


def measure(model, passages, context):
    ours, peer = reference.Decoder(model), peer_of(model, context)
    divergence, agree, positions, digest = 0.0, 0, 0, hashlib.sha256()
    for tokens in passages:
        peer.reset()
        peer.eval(tokens)
        found = numpy.array(peer.scores[:len(tokens)])
        part, same = reference.compare(ours.logits(tokens), found)
        divergence, agree = divergence + part, agree + same
        positions += len(tokens)
        digest.update(numpy.array(tokens, "<u4").tobytes())
    return {"peer": PEER, "positions": positions, "tokens_sha256": digest.hexdigest(),
            "mean_kl": divergence / positions, "top1_agreement": agree / positions}


def write(path, facts):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(facts, indent=2) + "\n")


def main() -> None:
    smollm, gemma = sys.argv[1:]
    golden = TESTS / "golden"
    vocabulary = llama_cpp.Llama(gemma, vocab_only=True, verbose=False)
    texts = oracles.lines()
    ids = [vocabulary.tokenize(text.encode(), add_bos=False, special=False) for text in texts]
    write(golden / "tokenizer" / "llama_cpp.json",
          {"peer": PEER, "lines": len(texts), "tokens": sum(map(len, ids)),
           "ids_sha256": oracles.digest(ids)})
    write(golden / "engine" / "llama_cpp_gemma.json",
          measure(gemma, [corpus.gemma_passage(gemma)], 640))
    write(golden / "engine" / "llama_cpp.json",
          measure(smollm, corpus.passages(smollm), 1024))


if __name__ == "__main__":
    main()
