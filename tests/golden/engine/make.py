#!/usr/bin/env python3
"""llama.cpp's own divergence from the float64 pass on the engine test's positions.

`./run golden` runs this in an environment with llama-cpp-python; the result is committed, so that the
test needs no peer. usage: make.py MODEL.gguf OUT.json"""
import hashlib
import json
import pathlib
import sys

import llama_cpp
import numpy

TESTS = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(TESTS / "engine"))
import corpus  # noqa: E402
import reference  # noqa: E402


def main() -> None:
    model, out = sys.argv[1:]
    ours = reference.Decoder(model)
    peer = llama_cpp.Llama(model, n_ctx=1024, n_threads=2, n_batch=512, logits_all=True,
                           verbose=False)
    divergence, agree, positions, digest = 0.0, 0, 0, hashlib.sha256()
    for tokens in corpus.passages(model):
        peer.reset()
        peer.eval(tokens)
        found = numpy.array(peer.scores[:len(tokens)])
        part, same = reference.compare(ours.logits(tokens), found)
        divergence, agree, positions = divergence + part, agree + same, positions + len(tokens)
        digest.update(numpy.array(tokens, "<u4").tobytes())
    pathlib.Path(out).write_text(json.dumps({
        "peer": f"llama-cpp-python {llama_cpp.__version__}", "positions": positions,
        "tokens_sha256": digest.hexdigest(), "mean_kl": divergence / positions,
        "top1_agreement": agree / positions}, indent=2) + "\n")


if __name__ == "__main__":
    main()
