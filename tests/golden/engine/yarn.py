#!/usr/bin/env python3
"""What `transformers` makes of YaRN's numbers: inverse frequencies and attention's factor, in float64.

Its own function is run, from its source, over numpy in torch's place: torch is 5.6 GB, and the function
takes of it three names. The result is committed. usage: yarn.py MODELING_ROPE_UTILS.PY OUT.json"""
import ast
import json
import math
import pathlib
import sys
import types
import typing

import numpy


class Array(numpy.ndarray):
    def to(self, **_):
        return self


def torch_like():
    made = types.SimpleNamespace(float=numpy.float64, float32=numpy.float64, Tensor=numpy.ndarray)
    made.arange = lambda *a, **_: numpy.arange(*a, dtype=numpy.float64).view(Array)
    made.clamp = numpy.clip
    return made


# hidden size, heads, head_dim (None: not said), base, max_position_embeddings, what scales
CASES = [
    (3584, 28, None, 1e6, 32768, {"factor": 4.0, "original_max_position_embeddings": 32768}),  # Qwen 2.5
    (4096, 32, 128, 1e6, 40960, {"factor": 4.0, "original_max_position_embeddings": 32768}),  # Qwen 3
    (4096, 32, 128, 1e4, 4096, {"factor": 16.0}),
    (4096, 32, None, 1e4, 16384, {"factor": 1.0}),
    (2048, 16, 64, 5e5, 131072, {"factor": 32.0, "original_max_position_embeddings": 8192,
                                 "beta_fast": 10.0, "beta_slow": 2.0, "attention_factor": 0.75}),
    (2048, 16, 64, 1e4, 163840, {"factor": 40.0, "original_max_position_embeddings": 4096,
                                 "mscale": 1.0, "mscale_all_dim": 0.7}),
    (2880, 64, 64, 150000.0, 131072, {"factor": 32.0, "original_max_position_embeddings": 4096,
                                      "truncate": False}),
    (512, 16, 32, 1e4, 512, {"factor": 2.0, "original_max_position_embeddings": 64}),
]


def main() -> None:
    source = pathlib.Path(sys.argv[1])
    found = next(node for node in ast.parse(source.read_text()).body
                 if getattr(node, "name", "") == "_compute_yarn_parameters")
    names = {"torch": torch_like(), "math": math, "Optional": typing.Optional}
    exec(compile(ast.Module([found], []), str(source), "exec"), names)
    made = []
    for width, heads, head, base, context, scaling in CASES:
        rope = {"rope_type": "yarn", "rope_theta": base,
                "original_max_position_embeddings": context} | scaling
        config = types.SimpleNamespace(hidden_size=width, num_attention_heads=heads,
                                       max_position_embeddings=context, rope_parameters=rope,
                                       standardize_rope_params=lambda: None)
        if head:
            config.head_dim = head
        turns, attention = found and names["_compute_yarn_parameters"](config)
        made.append({"hidden_size": width, "num_attention_heads": heads, "head_dim": head,
                     "rope_theta": base, "max_position_embeddings": context, "rope_scaling": scaling,
                     "inverse": [float(t) for t in turns], "attention": float(attention)})
    pathlib.Path(sys.argv[2]).write_text(json.dumps({"of": "transformers 5.24.0", "cases": made}, indent=0)
                                         + "\n")


if __name__ == "__main__":
    main()
