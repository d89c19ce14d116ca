"""Seeded adapters of the tiny model, sealed to a node; and the base owner's consent to them."""
import json
import pathlib

import peft
import tiny_model

CONFIG = {"model_type": "llama", "hidden_size": tiny_model.WIDTH, "num_hidden_layers": tiny_model.LAYERS,
          "num_attention_heads": tiny_model.HEADS, "num_key_value_heads": tiny_model.KV_HEADS,
          "intermediate_size": tiny_model.FFN, "max_position_embeddings": tiny_model.CONTEXT,
          "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "hidden_act": "silu"}


def pack(node, folder: pathlib.Path, name: str, seed: int, *words, owner=None, base=None, rank=4,
         alpha=None, config=CONFIG):
    """Sealed to this node in its present state, for its package; strong enough that replies differ."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    source = peft.write(folder / f"peft-{name}", peft.adapter_config(rank, alpha or rank),
                        peft.tensors(config, rank, seed=seed, size=2.0))
    out = folder / f"{name}.cmpkg"
    node.run("casemate-pack", "adapter", source, "--config", folder / "config.json", "--name", name, "--out", out,
             "--owner", owner or node.owner, "--node", node.state / "enrolment.bin", "--base",
             base or node.package, "--measurement", node.measure(), *words)
    return out


def allow(node, *owners: pathlib.Path, most: int = 3, size: int = 1 << 20) -> None:
    """The base's owner accepts adapters of these owners; before the package is sealed, or sign again."""
    (node.state / "adapter-owners.pem").write_text("".join(
        (owner / name).read_text() for owner in owners for name in ("owner.pub", "policy.pub")))
    path = node.state / "casemate.yaml"
    lines = [line for line in path.read_text().splitlines() if not line.strip().startswith("adapter")]
    at = lines.index("sealed:") + 1
    lines[at:at] = [f"  adapters_max: {most}", f"  adapter_bytes_max: {size}", "  adapter_owners: adapter-owners.pem"]
    path.write_text("\n".join(lines) + "\n")
