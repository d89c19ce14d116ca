#!/usr/bin/env python3
"""Twin arms in one run: our engine beside llama.cpp, the machine's own limits, and the service.

`./run bench` runs this. Each part loads its arms once and asks them in turn (ours, peer, ours, …) after a
warm-up. Figures are medians [least … greatest] over the undisturbed rounds: an arm's two threads compute
or spin all the time, so a round with less than 1.9 CPU seconds a second shared its cores with others.
JSON and an SVG go to bench/results/, the table to standard output."""
import argparse
import itertools
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "bench")]
import arms  # noqa: E402
import node as nodes  # noqa: E402
import package_reader  # noqa: E402
import peft  # noqa: E402
import report  # noqa: E402
import seeded  # noqa: E402
import start  # noqa: E402

PASSPHRASE = "bench passphrase"


class Bench:
    def __init__(self, options):
        self.options = options
        self.harness = options.build / "harness"
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="casemate-bench-"))
        self.threads = options.threads
        self.notes: list[str] = []

    def seal(self, model: pathlib.Path, name: str) -> tuple[pathlib.Path, pathlib.Path]:
        """A sealed package and its key, for arms without roles."""
        pack, folder = self.options.build / "bin" / "casemate-pack", self.options.cache / name
        package, key = folder / "m.cmpkg", folder / "key"
        if not key.exists():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "pass").write_text(PASSPHRASE)
            for words in (["keygen", "--owner", folder / "owner"],
                          ["pack", model, "--out", package, "--owner", folder / "owner", "--recovery",
                           folder / "r", "--passphrase-file", folder / "pass"]):
                subprocess.run([pack, *words], check=True, capture_output=True)
            key.write_bytes(package_reader.recovery_key((folder / "r").read_bytes(), PASSPHRASE))
        return package, key

    def ours(self, name: str, model: pathlib.Path, path: str = "", kv: str = "fp16",
             prompts: str = "exact") -> arms.Arm:
        environment = {"CASEMATE_THREADS": str(self.threads), "CASEMATE_KV": kv, "CASEMATE_PROMPTS": prompts,
                       **({"CASEMATE_CPU": path} if path else {})}
        return arms.Arm(self.harness / "bench_ours", *self.seal(model, name), **environment)

    def probe(self) -> arms.Arm:
        return arms.Arm(self.harness / "bench_probe", self.threads, greets=False)

    def peer(self, model: pathlib.Path) -> arms.Arm | None:
        """The faster of the peer's builds that runs: both decode a few tokens first."""
        best, rate = None, 0.0
        for name in ("native", "named") if self.options.peers else ():
            program = self.options.peers / name / "peer"
            arm = None
            try:
                arm = arms.Arm(program, model, self.threads)
                arm.ask("prefill 64")
                found = max(arm.rate("decode 16 16")["rate"] for _ in range(3))
            except (RuntimeError, BrokenPipeError):
                note = f"llama.cpp, build '{name}', does not run here: it ends by a signal"
                self.notes += [note] if note not in self.notes else []
                continue
            if found > rate:
                best, rate, arm = arm, found, best
            if arm is not None:
                arm.close()
        return best

    def repacked(self, model: pathlib.Path) -> pathlib.Path:
        """The same weights in the 4-bit format that the peer repacks for its fastest kernels."""
        path = self.options.cache / "q4_0.gguf"
        if not path.exists():
            subprocess.run([self.options.peers / "named" / "peer", "quantise", model, path],
                           check=True, capture_output=True)
        return path

    # ------------------------------------------------------------- the parts

    def engine(self) -> dict:
        """SmolLM2, short context: every path of ours, the peer in two formats, eight streams."""
        model, rounds, asked = self.options.model, arms.Rounds(), []
        for path in ("", "avx512vnni", "avx2"):
            try:
                arm = self.ours("smollm2", model, path)
            except RuntimeError:
                self.notes.append(f"this CPU has no {path}")
                continue
            name = f"ours {path}".strip()
            asked += [(f"{name}: decode", arm, "decode 16 128"), (f"{name}: prefill 512", arm, "prefill 512")]
            asked += [("ours: 8 streams", arm, "streams 8 64")] if path == "" else []
        try:
            asked.append(("ours, class P: prefill 512", self.ours("smollm2", model, prompts="bf16"), "prefill 512"))
        except RuntimeError:
            self.notes.append("this CPU has no AMX-bf16: nothing is measured of class P")
        device, weights = asked[0][1].greeting["name"], asked[0][1].greeting["weight_bytes"]
        for name, file in (("llama.cpp", model), ("llama.cpp Q4_0", self.repacked(model))) \
                if self.options.peers else ():
            arm = self.peer(file)
            asked += [(f"{name}: decode", arm, "decode 16 64"), (f"{name}: prefill 512", arm, "prefill 512")]
        self.rounds(rounds, asked, weights)
        return {"device": device, "weight_bytes": weights, "figures": rounds.figures(self.threads)}

    def rounds(self, rounds: arms.Rounds, asked: list, weights: int) -> None:
        probe = self.probe()
        for number in range(self.options.rounds + 1):
            answers = [("int8 peak", probe.ask("int8"))]
            for name, arm, line in asked:
                if name == "ours: decode":  # beside the stream of the same moment
                    answers.append(("stream", probe.ask(f"read {weights}")))
                answers.append((name, arm.rate(line)))
                if name == "ours: decode":
                    stream = [answers[-2][1], probe.ask(f"read {weights}")]
                    answers.append(("stream", stream[1]))
                    answers[-2][1]["of_stream"] = arms.share_of_stream(answers[-2][1]["rate"], weights, stream)
            for name, answer in answers if number > 0 else ():
                rounds.add(name, answer)
        for arm in {arm for _, arm, _ in asked} | {probe}:
            arm.close()

    def adapters(self) -> dict:
        """Prefill and decode with a seeded LoRA adapter and without, in turns (harness/engine adapter)."""
        package, key = self.seal(self.options.model, "smollm2")
        found = {}
        for name, modules in (("q and v", ("q_proj", "v_proj")), ("all seven", tuple(peft.MODULES))):
            adapter, adapter_key = self.adapter(package, modules)
            done = subprocess.run([self.harness / "engine", "adapter", package, key], check=True,
                                  capture_output=True, text=True,
                                  env={"CASEMATE_THREADS": str(self.threads), "CASEMATE_ADAPTER": str(adapter),
                                       "CASEMATE_ADAPTER_KEY": str(adapter_key)})
            found[name] = json.loads(done.stdout) | {"package_bytes": adapter.stat().st_size}
        return found

    def adapter(self, package: pathlib.Path, modules: tuple[str, ...]) -> tuple[pathlib.Path, pathlib.Path]:
        """One of rank 16 to SmolLM2-135M, sealed for arms without roles, and its key."""
        folder, owned = self.folder / f"adapter-{len(modules)}", package.parent
        source = peft.write(folder, peft.adapter_config(16, 16, modules),
                            peft.tensors(peft.SMOLLM, 16, modules, size=0.15))
        (folder / "config.json").write_text(json.dumps(peft.SMOLLM))
        subprocess.run([self.options.build / "bin" / "casemate-pack", "adapter", source, "--base", package,
                        "--config", folder / "config.json", "--name", "bench", "--out", folder / "a.cmpkg",
                        "--owner", owned / "owner", "--recovery", folder / "r", "--passphrase-file",
                        owned / "pass"], check=True, capture_output=True)
        (folder / "key").write_bytes(package_reader.recovery_key((folder / "r").read_bytes(), PASSPHRASE))
        return folder / "a.cmpkg", folder / "key"

    def long(self) -> dict:
        """Decode behind 4,096 positions, and how a step grows with them."""
        rounds, ours = arms.Rounds(), self.ours("smollm2", self.options.model)
        asked = [(f"ours: decode at {at}", ours, f"decode {at} 32") for at in (64, 1024, 2048, 4096)]
        narrow = self.ours("smollm2", self.options.model, kv="int8")
        asked += [("ours, int8 K and V: decode at 4096", narrow, "decode 4096 32")]
        peer = self.peer(self.options.model)
        asked += [("llama.cpp: decode at 4096", peer, "decode 4096 16")] if peer else []
        self.rounds(rounds, asked, ours.greeting["weight_bytes"])
        return {"device": ours.greeting["name"], "kv_bytes_per_position": ours.greeting["kv_bytes_per_position"],
                "kv_bytes_per_position_int8": narrow.greeting["kv_bytes_per_position"],
                "figures": rounds.figures(self.threads)}

    def growth(self) -> dict:
        """The 1B shape, seeded: speed alone."""
        model = self.options.cache / "seeded-1b.gguf"
        if not model.exists():
            seeded.write(str(model))
        return self.pair(model, "seeded-1b", 24, 128)

    def gemma(self) -> dict:
        """Gemma 3 270M, Q4_K_M: another family, formats that the packer converts."""
        return self.pair(self.options.gemma, "gemma", 64, 512)

    def pair(self, model: pathlib.Path, name: str, tokens: int, prompt: int) -> dict:
        """Decode and prefill of one model, ours and the peer's."""
        rounds, ours, peer = arms.Rounds(), self.ours(name, model), self.peer(model)
        asked = [(f"{who}: {what}", arm, line) for what, line in
                 (("decode", f"decode 16 {tokens}"), ("prefill", f"prefill {prompt}"))
                 for who, arm in (("ours", ours), ("llama.cpp", peer)) if arm]
        self.rounds(rounds, asked, ours.greeting["weight_bytes"])
        return {"weight_bytes": ours.greeting["weight_bytes"], "prompt": prompt,
                "figures": rounds.figures(self.threads)}

    def stolen(self) -> dict:
        """A process that computes all the time on one of our cores."""
        rounds, ours, peer = arms.Rounds(), self.ours("smollm2", self.options.model), None
        if not self.options.quick:
            peer = self.peer(self.options.model)
        last = max(os.sched_getaffinity(0))
        for _ in range(self.options.rounds):
            rounds.add("ours: alone", ours.rate("decode 16 256"))
            if peer:
                rounds.add("llama.cpp: alone", peer.rate("decode 16 32"))
            thief = subprocess.Popen([sys.executable, "-c", "while True: pass"],
                                     preexec_fn=lambda: os.sched_setaffinity(0, {last}))
            time.sleep(0.2)
            rounds.add("ours: one core half stolen", {**ours.rate("decode 16 256"), "cpus": 9})
            if peer:
                rounds.add("llama.cpp: one core half stolen", {**peer.rate("decode 16 8"), "cpus": 9})
            thief.kill()
            thief.wait()
        return {"figures": rounds.figures(self.threads)}

    def load(self) -> dict:
        """Sealed beside plain, one pipeline: warm, cold, and warm on a CPU without AVX-512 and VAES."""
        package, key = self.seal(self.options.model, "smollm2")
        found = {}
        for arm in ("warm", "cold", "narrow"):
            program, words = ("load_narrow" if arm == "narrow" else "load"), (["cold"] if arm == "cold" else [])
            done = subprocess.run([self.harness / program, package, key, self.folder / "plain",
                                   str(4 * self.options.rounds), *words], check=True,
                                  capture_output=True, text=True)
            found[arm] = json.loads(done.stdout)
        return found

    def node(self, programs: pathlib.Path, name: str) -> nodes.Node:
        node = nodes.Node(programs, self.folder / name, self.folder / "owner")
        node.make(self.options.model, "bench")
        return node

    def replies(self, node: nodes.Node, key: str, count: int) -> tuple[list[float], list[float]]:
        """First tokens in ms and rates of `count` streamed replies, after one that warms up."""
        client, first, rates = node.client(key), [], []
        for number in range(count + 1):
            sent, at, tokens = time.monotonic(), 0.0, 0
            for chunk in client.chat.completions.create(
                    model="bench", stream=True, max_tokens=128, temperature=0,
                    stream_options={"include_usage": True}, extra_body={"ignore_eos": True},
                    messages=[{"role": "user", "content": "Count from one to one hundred."}]):
                if chunk.choices and chunk.choices[0].delta.content:
                    at = at or time.monotonic()
                tokens = chunk.usage.completion_tokens if chunk.usage else tokens
            if number > 0:
                first.append(1000 * (at - sent))
                rates.append((tokens - 1) / (time.monotonic() - at))
        return first, rates

    def service(self) -> dict:
        """A whole node, from start to stop, through TLS and the openai client."""
        node = self.node(self.options.build / "bin", "node")
        starts, firsts, rates, resident = [], [], [], {}
        for _ in range(min(self.options.rounds, 3)):
            begun = time.monotonic()
            node.start()
            starts.append(1000 * (time.monotonic() - begun))
            key = node.key("bench")
            time.sleep(0.6)
            first, rate = self.replies(node, key, 2)
            firsts, rates = firsts + first, rates + rate
            time.sleep(1.1)
            resident = {role: facts["resident_bytes"] / 1e6
                        for role, facts in node.status()["roles"].items()}
            node.stop()
        return {"start_to_ready_ms": arms.spread(starts), "first_token_ms": arms.spread(firsts),
                "decode_tokens_per_s": arms.spread(rates), "resident_mb": resident}

    def lean_rate(self, node: nodes.Node, key: str, tokens: int) -> float:
        """One streamed reply, read as bytes: on two cores a client that parses each piece is a large
        part of what it measures."""
        body = json.dumps({"model": "bench", "stream": True, "max_tokens": tokens, "temperature": 0,
                           "ignore_eos": True, "stream_options": {"include_usage": True},
                           "messages": [{"role": "user", "content": "Count from one to one hundred."}]})
        host, port = node.address.split(":")
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            if node.scheme == "https":
                connection = node.context().wrap_socket(connection, server_hostname=host)
            connection.sendall(f"POST /v1/chat/completions HTTP/1.1\r\nHost: {node.address}\r\n"
                               f"Authorization: Bearer {key}\r\nContent-Type: application/json\r\n"
                               f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
            pieces, first = [], 0.0
            while piece := connection.recv(65536):
                if not first and b'"content":"' in piece:
                    first = time.monotonic()
                pieces.append(piece)
            took = time.monotonic() - first
            connection.close()
        usage = re.search(rb'"completion_tokens":\s*(\d+)', b"".join(pieces))
        if not first or usage is None:
            raise RuntimeError(f"no reply: {b''.join(pieces)[:400]!r}")
        return (int(usage[1]) - 1) / took

    def switched(self, name: str) -> nodes.Node:
        """A node whose supervisor can leave layers of the sandbox out."""
        programs = self.folder / name
        shutil.copytree(self.options.build / "bin", programs)
        shutil.copy(self.harness / "casemate-supervisor-switched", programs / "casemate-supervisor")
        return self.node(programs, f"{name}-node")

    def arm(self, node: nodes.Node, confined: bool) -> tuple[float, list[float]]:
        """Milliseconds to ready and rates of one life of a switched node."""
        for name, value in (("CASEMATE_TEST_OFF", "all"), ("CASEMATE_TEST_ACCEPT", "1")):
            os.environ.pop(name, None)
            if not confined:
                os.environ[name] = value
        node.sign()  # what is confined is part of the measurement
        key = node.key("bench")
        begun = time.monotonic()
        node.start()
        took = 1000 * (time.monotonic() - begun)
        time.sleep(0.3)  # what follows a start is over
        self.lean_rate(node, key, 32)
        rates = [self.lean_rate(node, key, 256) for _ in range(3)]
        node.stop()
        return took, rates

    def arms_in_turn(self, turns: dict[str, tuple[nodes.Node, bool]]) -> dict:
        found: dict[str, list[float]] = {}
        for _ in range(min(self.options.rounds, 4)):
            for arm, (node, confined) in turns.items():
                start, rates = self.arm(node, confined)
                found.setdefault(f"{arm}_start_ms", []).append(start)
                found.setdefault(f"{arm}_tokens_per_s", []).extend(rates)
        return {name: arms.spread(values) for name, values in found.items()}

    def sandbox(self) -> dict:
        """The same service with every layer of the sandbox, and with none."""
        node = self.switched("switched")
        return self.arms_in_turn({"on": (node, True), "off": (node, False)})

    def tls(self) -> dict:
        """The same service with TLS and without (bench/plain.c), both outside the sandbox, whose filter
        does not know what a plain socket calls."""
        node, plain = self.switched("tls"), self.switched("plain")
        shutil.copy(self.harness / "casemate-gateway-plain", plain.programs / "casemate-gateway")
        plain.scheme = "http"
        return self.arms_in_turn({"on": (node, False), "off": (plain, False)})

    def start(self) -> dict:
        """From exec to the first token, moment by moment."""
        folder = self.folder / "started"
        folder.mkdir()
        return start.measure(self.options.build / "bin", self.options.model, folder, self.options.rounds)

    def guard(self) -> dict:
        """Decode with the output guard and without; the filter alone, with ten times the rules."""
        package, key = self.seal(self.options.model, "smollm2")
        decode = subprocess.run([self.harness / "engine", "guard", package, key], check=True,
                                capture_output=True, text=True, env={"CASEMATE_THREADS": str(self.threads)})
        texts = sorted((ROOT / "tests" / "engine" / "texts").glob("*.txt"))
        alone = subprocess.run([self.harness / "guard", "bench", *texts], check=True,
                               capture_output=True, text=True)
        lines = [line for line in alone.stdout.splitlines() if line.startswith("{")]
        return {"decode": json.loads(decode.stdout), "filter": [json.loads(line) for line in lines]}


PARTS = ("engine", "adapters", "long", "growth", "gemma", "stolen", "load", "start", "service", "sandbox", "tls", "guard")


def unused(folder: pathlib.Path, name: str) -> pathlib.Path:
    """NAME.json, or NAME-2.json …: no run takes the place of another's figures."""
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(path for path in (folder / f"{name}.json" for name in names) if not path.exists())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", type=pathlib.Path, default=ROOT / "build")
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--gemma", type=pathlib.Path, required=True)
    parser.add_argument("--cache", type=pathlib.Path, default=ROOT / ".cache" / "bench")
    parser.add_argument("--peers", type=pathlib.Path, help="folder of bench/peers.sh; none: ours alone")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of " + ",".join(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="2 rounds, without the 1B shape")
    parser.add_argument("--join", type=pathlib.Path, help="add to this JSON, made by the same commit")
    options = parser.parse_args()
    parts = [part for part in options.parts.split(",") if not (options.quick and part == "growth")]
    options.rounds = 2 if options.quick else options.rounds
    options.cache.mkdir(parents=True, exist_ok=True)
    result = {"machine": arms.machine(ROOT), "model": options.model.name, "threads": options.threads,
              "notes": [], "parts": {}}
    if options.join and options.join.exists():
        result = json.loads(options.join.read_text())
    for part in parts:
        bench = Bench(options)
        begun, load = time.monotonic(), os.getloadavg()[0]
        result["parts"][part] = getattr(bench, part)()
        result["parts"][part]["took_s"] = round(time.monotonic() - begun, 1)
        result["parts"][part]["load_before"] = load
        result["notes"] += [note for note in bench.notes if note not in result["notes"]]
    out = ROOT / "bench" / "results"
    path = options.join or unused(out, f"{time.strftime('%Y-%m-%d')}-{result['machine']['commit']}")
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    rows = report.rows(result)
    path.with_suffix(".svg").write_text(report.picture(result, rows))
    print(report.table(result, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
