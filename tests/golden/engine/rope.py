#!/usr/bin/env python3
"""What `transformers` makes of YaRN's and LongRoPE's numbers: inverse frequencies and attention's factor, in
float64.

Its own functions are run, from their source, over numpy in torch's place: torch is 5.6 GB, and the functions
take of it five names. The results are committed. usage: rope.py MODELING_ROPE_UTILS.PY FOLDER"""
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

    def float(self):
        return self


def torch_like():
    made = types.SimpleNamespace(float=numpy.float64, float32=numpy.float64, int64=numpy.float64,
                                 Tensor=numpy.ndarray)
    made.tensor = lambda values, **_: numpy.array(values, numpy.float64)
    made.arange = lambda *a, **_: numpy.arange(*a, dtype=numpy.float64).view(Array)
    made.clamp = numpy.clip
    return made


# hidden size, heads, head_dim (None: not said), base, max_position_embeddings, what scales
YARN = [
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


def factors(count, last):
    """Seeded, rising as those of Phi-3 do."""
    random = numpy.random.default_rng(count)
    return [round(float(v), 4) for v in 1 + (last - 1) * numpy.sort(random.random(count) ** 2)]


def long(count, **more):
    return {"short_factor": factors(count, 2.0), "long_factor": factors(count, 64.0)} | more


LONG = [
    (3072, 32, None, 1e4, 131072, long(48, original_max_position_embeddings=4096)),  # Phi-3-mini-128k
    (5120, 40, None, 1e4, 131072, long(64, original_max_position_embeddings=4096)),  # Phi-3-medium-128k
    (2048, 16, 64, 1e6, 65536, long(32, original_max_position_embeddings=8192, factor=4.0)),
    (2048, 16, 64, 1e4, 65536, long(32, original_max_position_embeddings=8192, attention_factor=1.25)),
    (512, 16, 32, 1e4, 4096, long(16, original_max_position_embeddings=4096)),
]


def computed(function, kind, case, **more):
    width, heads, head, base, context, scaling = case
    rope = {"rope_type": kind, "rope_theta": base, "original_max_position_embeddings": context} | scaling
    config = types.SimpleNamespace(hidden_size=width, num_attention_heads=heads,
                                   max_position_embeddings=context, rope_parameters=rope,
                                   standardize_rope_params=lambda: None)
    if head:
        config.head_dim = head
    turns, attention = function(config, **more)
    return [float(t) for t in turns], float(attention)


def described(case):
    names = ("hidden_size", "num_attention_heads", "head_dim", "rope_theta", "max_position_embeddings",
             "rope_scaling")
    return dict(zip(names, case))


def write(path, cases):
    path.write_text(json.dumps({"of": "transformers 5.24.0", "cases": cases}, indent=0) + "\n")


def main() -> None:
    source, folder = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    wanted = ("_compute_yarn_parameters", "_compute_longrope_parameters")
    found = [node for node in ast.parse(source.read_text()).body if getattr(node, "name", "") in wanted]
    names = {"torch": torch_like(), "math": math, "Optional": typing.Optional}
    exec(compile(ast.Module(found, []), str(source), "exec"), names)
    yarn, longrope = (names[name] for name in wanted)
    made = []
    for case in YARN:
        inverse, attention = computed(yarn, "yarn", case)
        made.append(described(case) | {"inverse": inverse, "attention": attention})
    write(folder / "yarn.json", made)
    made = []
    for case in LONG:
        border = case[-1]["original_max_position_embeddings"]
        short, attention = computed(longrope, "longrope", case, seq_len=border)
        past, _ = computed(longrope, "longrope", case, seq_len=border + 1)
        made.append(described(case) | {"inverse": short, "inverse_long": past, "attention": attention})
    write(folder / "longrope.json", made)


if __name__ == "__main__":
    main()
