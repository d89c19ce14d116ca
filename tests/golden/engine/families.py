#!/usr/bin/env python3
"""What `transformers` computes in float64 of the tiny models of tests/tiny_family.py: the last rows of
logits of each. `./run golden` runs this in an environment with transformers and torch (5.6 GB, so not in
CI); the result is committed. usage: families.py OUT.npz"""
import pathlib
import sys
import tempfile

import numpy
import torch
import transformers

TESTS = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(TESTS))
import tiny_family  # noqa: E402

ROWS = 12


def main() -> None:
    made = {"version": numpy.array(f"transformers {transformers.__version__}")}
    for family in tiny_family.FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            tiny_family.write_directory(folder, family)
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float64, attn_implementation="eager").eval()
        with torch.no_grad():
            logits = model(torch.tensor([tiny_family.tokens(family)])).logits[0, -ROWS:]
        assert logits.dtype == torch.float64
        made[family] = logits.numpy().astype(numpy.float32)
        print(family, model.config.model_type, float(logits.std()))
    numpy.savez_compressed(sys.argv[1], **made)


if __name__ == "__main__":
    main()
