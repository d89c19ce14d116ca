#!/usr/bin/env python3
"""One start, moment by moment: from the exec of `casemate serve` to the first token, by the service's
own log. `./run bench --parts start` has it; by hand: bench/start.py --build build --model FILE.gguf

Each start finds the package and the programs in the page cache, and memory that this machine's host has
handed out before: as many bytes as the arena takes are touched and given back first. What a host does for a
page's first use is its own matter, and took up to 700 ms for one arena where this was measured."""
import argparse
import datetime
import json
import mmap
import pathlib
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "bench")]
import arms  # noqa: E402
import node as nodes  # noqa: E402
import swtpm as tpms  # noqa: E402

ARENA_BYTES = 512 << 20
SKIPPED = ("tpm_command", "loading", "key_page", "keys")
FIRST_TOKEN, TPM = "first token", "TPM commands"
PROMPT = json.dumps({"model": "bench", "stream": True, "max_tokens": 1, "temperature": 0, "prompt": "Hello"})
TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
TLS.check_hostname, TLS.verify_mode = False, ssl.CERT_NONE  # whose certificate it is does not matter here


def memory_warm() -> None:
    with mmap.mmap(-1, ARENA_BYTES) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        for at in range(0, ARENA_BYTES, 4096):
            memory[at] = 1


def first_token(address: str, key: str) -> None:
    """Returns when the first piece of the reply is there."""
    host, port = address.removeprefix("https://").rsplit(":", 1)
    plain = socket.create_connection((host, int(port)), timeout=10)
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as HTTP clients do: else 40 ms of delayed ACK
    with TLS.wrap_socket(plain) as connection:
        connection.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer {key}\r\n"
                           f"Content-Type: application/json\r\nContent-Length: {len(PROMPT)}\r\n\r\n{PROMPT}"
                           .encode())
        got = b""
        while b'"text":"' not in got:
            piece = connection.recv(65536)
            if not piece:
                raise RuntimeError(f"no token: {got.decode(errors='replace')}")
            got += piece


def moment(line: dict) -> str:
    return " ".join(filter(None, (line["role"], line.get("name"), line["event"])))


def one(node: nodes.Node, key: str) -> dict[str, float]:
    """Moments in ms from the exec; sums under their own names."""
    memory_warm()
    words = [node.programs / "casemate", "serve", "--state", node.state, "--listen", "127.0.0.1:0"]
    begun = time.time()
    service = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    found: dict[str, float] = {}
    tail = []
    try:
        for text in service.stdout:
            tail.append(text)
            if text.startswith("casemate: ready:"):
                found["ready"] = 1000 * (time.time() - begun)
                first_token(text.split("https://")[1].split(",")[0], key)
                found[FIRST_TOKEN] = 1000 * (time.time() - begun)
                break
            if not text.startswith("{"):
                continue
            line = json.loads(text)
            at = datetime.datetime.fromisoformat(line["time"]).timestamp()
            if line["event"] not in SKIPPED:
                found.setdefault(moment(line), 1000 * (at - begun))
            if line["event"] == "unsealed":
                found[TPM] = line["tpm_us"] / 1000
        if FIRST_TOKEN not in found:
            raise RuntimeError("the service ended:\n" + "".join(tail[-5:]))
    finally:
        service.send_signal(signal.SIGTERM)
        service.stdout.read()
        service.wait(30)
    return found


def summary(every: list[dict[str, float]]) -> dict:
    shared = [name for name in every[0] if all(name in found for found in every)]
    moments = {name: arms.spread([found[name] for found in every]) for name in shared}
    moments["first token, without the TPM"] = arms.spread([f[FIRST_TOKEN] - f[TPM] for f in every])
    return moments


def measure(programs: pathlib.Path, model: pathlib.Path, folder: pathlib.Path, rounds: int) -> dict:
    """In turns: a node that starts the development TPM with itself, and one whose TPM runs already, as a
    machine's does. The first start of each warms up."""
    tpm = tpms.Swtpm(folder / "swtpm").start()
    try:
        arms_made = {}
        for arm, where in (("moments_ms", "development"), ("moments_swtpm_ms", tpm.path)):
            node = nodes.Node(programs, folder / arm, folder / "owner")
            node.make(model, "bench", tpm=where)
            arms_made[arm] = node, node.key("bench"), []
        for _ in range(rounds + 1):
            for node, key, every in arms_made.values():
                every.append(one(node, key))
    finally:
        tpm.stop()
    return {arm: summary(every[1:]) for arm, (_, _, every) in arms_made.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", type=pathlib.Path, default=ROOT / "build")
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="casemate-start-") as name:
        arms_found = measure(options.build / "bin", options.model, pathlib.Path(name), options.rounds)
    for arm, found in arms_found.items():
        print(arm)
        for what, ms in sorted(found.items(), key=lambda item: item[1]["median"]):
            print(f"{ms['median']:8.1f}  [{ms['least']:.1f} … {ms['greatest']:.1f}]  {what}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
