#!/usr/bin/env python3
"""Twin arms in one run: our engine beside llama.cpp, and the service from start to stop.

`./run bench` runs this. Rounds are interleaved (ours, peer, ours, peer …) after a warm-up; figures are
median [least … greatest]. JSON goes to bench/results/, a table to standard output."""
import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import node as nodes  # noqa: E402
import package_reader  # noqa: E402

PASSPHRASE = "bench passphrase"
PEER = r"""
import ctypes, json, sys, time
import llama_cpp as l
model = l.llama_load_model_from_file(sys.argv[1].encode(), l.llama_model_default_params())
params = l.llama_context_default_params()
params.n_ctx, params.n_batch, params.n_ubatch = 1024, 512, 512
params.n_threads = params.n_threads_batch = int(sys.argv[2])
context = l.llama_new_context_with_model(model, params)
def decode(tokens):
    array = (l.llama_token * len(tokens))(*tokens)
    assert l.llama_decode(context, l.llama_batch_get_one(array, len(tokens))) == 0
prompt = [100 + (i * 7919) % 49000 for i in range(512)]
l.llama_memory_clear(l.llama_get_memory(context), True)
start = time.perf_counter(); decode(prompt); prefill = time.perf_counter() - start
l.llama_memory_clear(l.llama_get_memory(context), True)
decode(prompt[:16]); start = time.perf_counter()
for i in range(128): decode([prompt[16 + i]])
print(json.dumps({"prefill_512_tokens_per_s": 512 / prefill,
                  "decode_tokens_per_s": 128 / (time.perf_counter() - start)}))
"""


def spread(values):
    return {"median": statistics.median(values), "least": min(values), "greatest": max(values)}


def machine():
    info = pathlib.Path("/proc/cpuinfo").read_text()
    flags = next(line for line in info.splitlines() if line.startswith("flags")).split()
    name = next(line for line in info.splitlines() if line.startswith("model name"))
    return {"cpu": name.split(":")[1].strip(), "cores": os.cpu_count(),
            "features": [f for f in ("avx2", "avx512_vnni", "avx512_bf16", "amx_int8", "vaes",
                                     "sha_ni") if f in flags],
            "kernel": platform.release(),
            "commit": subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT,
                                     capture_output=True, text=True).stdout.strip()}


def engines(build, folder, model, peer_python, rounds, threads):
    ours, peers = [], []
    for number in range(rounds + 1):
        done = subprocess.run([build / "harness" / "engine", "bench", folder / "m.cmpkg",
                               folder / "key"], capture_output=True, text=True, check=True,
                              env={"CASEMATE_THREADS": str(threads)})
        ours.append(json.loads(done.stdout))
        if peer_python:
            done = subprocess.run([peer_python, "-c", PEER, model, str(threads)],
                                  capture_output=True, text=True, check=True)
            peers.append(json.loads(done.stdout.splitlines()[-1]))
    keys = ("prefill_512_tokens_per_s", "decode_tokens_per_s")
    load = ("load_ms", "read_ms", "verify_ms", "decrypt_ms")
    return ({k: spread([r[k] for r in ours[1:]]) for k in keys + load},
            {k: spread([r[k] for r in peers[1:]]) for k in keys} if peers else None,
            ours[0]["device"])


def service(node, rounds):
    starts, first, rates, resident = [], [], [], {}
    for _ in range(rounds):
        begun = time.monotonic()
        node.start()
        starts.append(1000 * (time.monotonic() - begun))
        key = node.key("bench")
        time.sleep(0.6)
        client = node.client(key)
        for measured in (False, True):
            sent, at, tokens = time.monotonic(), 0.0, 0
            for chunk in client.chat.completions.create(
                    model="bench", stream=True, max_tokens=128, temperature=0,
                    stream_options={"include_usage": True}, extra_body={"ignore_eos": True},
                    messages=[{"role": "user", "content": "Count from one to one hundred."}]):
                if chunk.choices and chunk.choices[0].delta.content:
                    at = at or time.monotonic()
                tokens = chunk.usage.completion_tokens if chunk.usage else tokens
            if measured:
                first.append(1000 * (at - sent))
                rates.append((tokens - 1) / (time.monotonic() - at))
        time.sleep(1.1)
        resident = {role: facts["resident_bytes"] / 1e6
                    for role, facts in node.status()["roles"].items()}
        node.stop()
    return {"start_to_ready_ms": spread(starts), "first_token_ms": spread(first),
            "decode_tokens_per_s": spread(rates), "resident_mb": resident}


def row(name, value, unit=""):
    print(f"| {name} | {value['median']:.1f} [{value['least']:.1f} … {value['greatest']:.1f}] {unit} |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", type=pathlib.Path, default=ROOT / "build")
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--peer-python", help="python with llama-cpp-python; empty: ours alone")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="casemate-bench-"))
    (folder / "pass").write_text(PASSPHRASE)
    node = nodes.Node(options.build / "bin", folder / "node", folder / "owner")
    node.make(options.model, "bench", "--recovery", folder / "r", "--passphrase-file",
              folder / "pass")
    (folder / "m.cmpkg").symlink_to(node.package)
    key = package_reader.recovery_key((folder / "r").read_bytes(), PASSPHRASE)
    (folder / "key").write_bytes(key)
    ours, peer, device = engines(options.build, folder, options.model, options.peer_python,
                                 options.rounds, options.threads)
    result = {"machine": machine(), "device": device, "model": options.model.name, "ours": ours,
              "llama_cpp": peer, "service": service(node, min(options.rounds, 3))}
    print(f"\n{result['machine']}\n\n| what | median [least … greatest] |\n|---|---|")
    for name, unit in (("decode_tokens_per_s", "tok/s"), ("prefill_512_tokens_per_s", "tok/s")):
        row(f"ours: {name}", ours[name], unit)
        if peer:
            row(f"llama.cpp: {name}", peer[name], unit)
            print(f"| ratio | {ours[name]['median'] / peer[name]['median']:.2f} |")
    for name in ("load_ms", "read_ms", "verify_ms", "decrypt_ms"):
        row(name, ours[name], "ms" if name == "load_ms" else "ms, summed over threads")
    for name, unit in (("start_to_ready_ms", "ms"), ("first_token_ms", "ms"),
                       ("decode_tokens_per_s", "tok/s")):
        row(f"service: {name}", result["service"][name], unit)
    for role, megabytes in result["service"]["resident_mb"].items():
        print(f"| resident: {role} | {megabytes:.1f} MB |")
    out = ROOT / "bench" / "results"
    out.mkdir(exist_ok=True)
    path = out / f"{time.strftime('%Y-%m-%d')}-{result['machine']['commit']}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\n{path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
