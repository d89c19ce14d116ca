#!/usr/bin/env python3
"""Many clients of mixed length against the real service, abandoning and coming again.

Each reply is compared with the one that the same request got alone, before; memory of every role is
watched from the first minute on; what was lost, mixed up or refused is counted. `./run soak SECONDS`."""
import argparse
import http.client
import json
import pathlib
import random
import ssl
import sys
import tempfile
import threading
import time

TESTS = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS))
import node as nodes  # noqa: E402

KEYS = 4  # tenants; each has its share of the clients
SAMPLINGS = [{"temperature": 0}, {"temperature": 1, "seed": 11},
             {"temperature": 0.8, "seed": 12, "top_p": 0.9, "frequency_penalty": 0.5},
             {"temperature": 0, "stop": ["e "]}]


def catalogue(count: int, words_most: int, tokens_most: int) -> list[dict]:
    """Requests of mixed length; some share a beginning, so that prefixes are reused."""
    seeded = random.Random(7)
    shared = " ".join(seeded.choice("the a of red blue fox sees one".split()) for _ in range(40))
    made = []
    for i in range(count):
        words = " ".join(seeded.choice("sun rain and or tell me why how is it".split())
                         for _ in range(seeded.randint(1, words_most)))
        text = f"{shared} {i} {words}" if i % 3 == 0 else f"{i} {words}"
        made.append({"model": "soak", "stream": True, "ignore_eos": True,
                     "max_tokens": seeded.randint(1, tokens_most),
                     "stream_options": {"include_usage": True},
                     "messages": [{"role": "user", "content": text}], **SAMPLINGS[i % 4]})
    return made


class Tally:
    def __init__(self):
        self.lock = threading.Lock()
        self.counts = dict.fromkeys(("whole", "abandoned", "busy", "wrong", "lost"), 0)
        self.first_ms, self.faults, self.cached_tokens, self.tokens = [], [], 0, 0
        self.slow_ratios = []

    def add(self, what: str, note="") -> None:
        with self.lock:
            self.counts[what] += 1
            if note and len(self.faults) < 20:
                self.faults.append(note)


class Client:
    """One connection at a time; plain sockets, so that 64 of them leave the cores to the service."""

    def __init__(self, node, key):
        host, port = node.address.rsplit(":", 1)
        self.place, self.key, self.context = (host, int(port)), key, node.context()
        self.connection = None

    def close(self) -> None:
        if self.connection:
            self.connection.close()
        self.connection = None

    def send(self, request: dict) -> http.client.HTTPResponse:
        if self.connection is None:
            self.connection = http.client.HTTPSConnection(*self.place, timeout=120,
                                                          context=self.context)
        self.connection.request("POST", "/v1/chat/completions", json.dumps(request),
                                {"Authorization": f"Bearer {self.key}",
                                 "Content-Type": "application/json"})
        return self.connection.getresponse()

    def ask(self, request: dict, chunks_most=None) -> dict:
        """Reads the stream, or `chunks_most` chunks of text of it."""
        sent = time.monotonic()
        response = self.send(request)
        reply = {"status": response.status, "text": "", "times": [], "whole": False, "usage": None}
        if response.status != 200:
            reply["text"] = response.read().decode(errors="replace")
            return reply
        for line in response:
            if not line.startswith(b"data: "):
                continue
            if line.strip() == b"data: [DONE]":
                reply["whole"] = True
                response.read()
                break
            chunk = json.loads(line[6:])
            reply["usage"] = chunk.get("usage") or reply["usage"]
            for choice in chunk.get("choices", []):
                if choice["delta"].get("content"):
                    reply["times"].append(time.monotonic() - sent)
                    reply["text"] += choice["delta"]["content"]
            if chunks_most is not None and len(reply["times"]) >= chunks_most:
                break
        return reply


def client_run(node, key, seed, requests, alone, end, tally) -> None:
    seeded = random.Random(seed)
    client = Client(node, key)
    while time.monotonic() < end:
        which = seeded.randrange(len(requests))
        leave = seeded.randint(0, 6) if seeded.random() < 0.25 else None
        try:
            reply = client.ask(requests[which], leave)
        except (OSError, http.client.HTTPException, ssl.SSLError, ValueError) as fault:
            tally.add("lost", f"request {which}: {type(fault).__name__}: {fault}")
            client.close()
            continue
        if reply["status"] in (429, 503):
            tally.add("busy")
            time.sleep(seeded.uniform(0.05, 0.3))
        elif reply["status"] != 200:
            tally.add("lost", f"request {which}: {reply['status']} {reply['text'][:200]}")
        elif reply["whole"]:
            right = reply["text"] == alone[which]
            tally.add("whole" if right else "wrong",
                      "" if right else f"request {which}: {reply['text'][:80]!r} is not "
                                       f"{alone[which][:80]!r}")
            with tally.lock:
                if reply["times"]:
                    tally.first_ms.append(1000 * reply["times"][0])
                details = reply["usage"]["prompt_tokens_details"]
                tally.cached_tokens += details["cached_tokens"]
                tally.tokens += reply["usage"]["completion_tokens"]
        elif leave is not None and alone[which].startswith(reply["text"]):
            tally.add("abandoned")
            client.close()
        else:
            tally.add("wrong", f"request {which}: cut short, or no beginning of its reply")
            client.close()
        if seeded.random() < 0.2:
            client.close()  # and a new handshake
    client.close()


def resident(node) -> dict[str, int]:
    """Bytes of each role now."""
    found = {}
    for role, facts in node.status()["roles"].items():
        if facts.get("pid"):
            pages = pathlib.Path(f"/proc/{facts['pid']}/statm").read_text().split()[1]
            found[role] = int(pages) * 4096
    return found


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0.0


def run(node, requests, seconds: float, clients: int) -> dict:
    """The service must be ready. Raises nothing: what went wrong is in the figures."""
    keys = [node.key(f"soak-{i}") for i in range(KEYS)]
    time.sleep(1.2)
    solo = Client(node, keys[0])
    alone = [solo.ask(request)["text"] for request in requests]
    solo.close()
    tally, start = Tally(), time.monotonic()
    pids = {role: facts["pid"] for role, facts in node.status()["roles"].items()}
    end = start + seconds
    threads = [threading.Thread(target=client_run, args=(node, keys[i % KEYS], i, requests, alone,
                                                         end, tally)) for i in range(clients)]
    for thread in threads:
        thread.start()
    samples = []
    while time.monotonic() < end:
        time.sleep(min(1.0, seconds / 10))
        samples.append(resident(node))
    for thread in threads:
        thread.join(180)
    left = sum(thread.is_alive() for thread in threads)
    warm = samples[len(samples) // 5:]
    again = [solo.ask(request)["text"] for request in requests]
    solo.close()
    same = {role: facts["pid"] for role, facts in node.status()["roles"].items()} == pids
    third = max(1, len(warm) // 3)
    growth = {role: max(s[role] for s in warm[-third:]) - max(s[role] for s in warm[:third])
              for role in warm[-1]}
    figures = node.get("/metrics", keys[0])[1].splitlines()
    in_flight = next(line.split()[-1] for line in figures
                     if line.startswith("casemate_requests_in_flight "))
    return {"seconds": seconds, "left_in_flight": int(float(in_flight)), "clients": clients, "requests": len(requests), **tally.counts,
            "stuck_clients": left, "same_processes": same, "same_alone_after": again == alone,
            "completion_tokens_per_s": tally.tokens / seconds,
            "cached_prompt_tokens": tally.cached_tokens,
            "first_token_ms": {"median": percentile(tally.first_ms, 0.5),
                               "p99": percentile(tally.first_ms, 0.99),
                               "greatest": max(tally.first_ms, default=0.0)},
            "growth_bytes": growth, "resident_bytes": warm[-1], "faults": tally.faults}


def faults(result: dict, worker_growth_most: int = 0) -> list[str]:
    """Why this run is no success. A short run sees memory that was taken before be touched first."""
    found = [f"{what}: {result[what]}" for what in ("wrong", "lost", "stuck_clients", "left_in_flight")
             if result[what]]
    found += [f"{what} is false" for what in ("same_processes", "same_alone_after")
              if not result[what]]
    found += [f"{role} grew by {bytes_} bytes" for role, bytes_ in result["growth_bytes"].items()
              if bytes_ > (worker_growth_most if role == "worker" else 4 << 20)]
    if result["whole"] < result["clients"]:
        found.append(f"only {result['whole']} whole replies")
    return found + result["faults"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", type=pathlib.Path, required=True)
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=64)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="casemate-soak-") as folder:
        node = nodes.Node(options.build / "bin", pathlib.Path(folder) / "node",
                          pathlib.Path(folder) / "owner")
        node.make(options.model, "soak")
        node.start("--requests_max", "128", "--queue_max", "128")
        try:
            result = run(node, catalogue(40, 120, 120), options.seconds, options.clients)
        finally:
            ended = node.stop(60)
    print(json.dumps(result, indent=1))
    why = faults(result) + ([] if ended == 0 else [f"the service ended with {ended}"])
    print("soak: " + ("nothing lost, mixed up or grown" if not why else "; ".join(why)))
    return 1 if why else 0


if __name__ == "__main__":
    sys.exit(main())
