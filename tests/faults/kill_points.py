#!/usr/bin/env python3
"""Kill each role before and after each message, and look at what becomes of the service.

    kill_points.py --build build-faults [--points N] [--shard 0/2] [--modes restartable,strict]

A run without a kill counts the points that each process passes between start and stop, with one
streamed reply, one quote, and an adapter that is loaded and taken back on the way. Then for each point a service is started whose process ends
there (tests/faults/kill_point.c). What must hold, whatever the point:

- nothing hangs: each request of a client has a final answer or a final error, within 1 s of a death;
- the service is ready again within 1 s and the time of a start, or has ended with the code that says
  why, and then the next start is ready;
- once it is over no process of it is left.

Each job uses one node for all its points: what a kill leaves behind must not spoil the next start."""
import argparse
import collections
import datetime
import http.client
import json
import os
import pathlib
import random
import signal
import ssl
import sys
import tempfile
import threading
import time

TESTS = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS))
import node as nodes  # noqa: E402
import tiny_adapter  # noqa: E402
import tiny_model  # noqa: E402

VARIABLE = "CASEMATE_KILL_POINT"
ROLES = ("gateway", "worker", "keeper", "devtpm", "supervisor")
ERROR_S, BACK_S, HANG_S = 1.0, 1.0, 10.0
BODY = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "hello there"}],
                   "max_tokens": 12, "temperature": 0, "stream": True, "ignore_eos": True})


class Fault(AssertionError):
    """A promise that did not hold."""


class Late(Fault):
    """It held, but not in time: on a busy machine the next try may be in time."""


class Client(threading.Thread):
    """Asks for a streamed reply and a quote, again and again, and notes how each ended and when."""

    def __init__(self, node: nodes.Node, key: str):
        super().__init__(daemon=True)
        self.node, self.key, self.over = node, key, threading.Event()
        self.ended: list[tuple[float, float, str, str]] = []  # began, ended, what, how
        self.began, self.streams, self.quotes = 0.0, 0, 0

    def run(self):
        while not self.over.is_set():
            for what, ask in (("stream", self.stream), ("quote", self.quote)):
                self.began = time.time()
                try:
                    how = ask()
                except (OSError, http.client.HTTPException, ssl.SSLError) as error:
                    how = "hang" if isinstance(error, TimeoutError) else f"closed: {error!r}"
                self.ended.append((self.began, time.time(), what, how))
                self.streams += what == "stream" and how == "whole"
                self.quotes += what == "quote" and how == "whole"
                if how != "whole":
                    break
            self.over.wait(0.1)

    def connect(self) -> http.client.HTTPSConnection:
        host, port = self.node.status()["listen"].rsplit(":", 1)
        return http.client.HTTPSConnection(host, int(port), context=self.node.context(), timeout=HANG_S)

    def stream(self) -> str:
        connection = self.connect()
        connection.request("POST", "/v1/chat/completions", BODY, {
            "Authorization": f"Bearer {self.key}", "Content-Type": "application/json"})
        reply = connection.getresponse()
        text = reply.read().decode()
        connection.close()
        if reply.status != 200:
            return f"{reply.status} {json.loads(text)['error']['code']}"
        if "event: error" in text:
            return "error event"
        return "whole" if text.endswith("data: [DONE]\n\n") else "CUT IN SILENCE"

    def quote(self) -> str:
        connection = self.connect()
        connection.request("GET", f"/v1/attestation?nonce={os.urandom(32).hex()}")
        reply = connection.getresponse()
        body = reply.read()
        connection.close()
        return "whole" if reply.status == 200 and len(body) > 500 else str(reply.status)


def log_lines(node: nodes.Node, start: int) -> list[dict]:
    lines = []
    for line in node.log.read_bytes()[start:].decode(errors="replace").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            pass
    return lines


def seconds_of(line: dict) -> float:
    return datetime.datetime.fromisoformat(line["time"]).timestamp()


def alive(pid: int) -> bool:
    try:
        return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def descendants(pid: int) -> set[int]:
    found = set()
    try:
        children = open(f"/proc/{pid}/task/{pid}/children").read().split()
    except OSError:
        return found
    for child in map(int, children):
        found |= {child} | descendants(child)
    return found


class Run:
    """One service from start to end, with a client at it."""

    def __init__(self, node: nodes.Node, key: str, point: str):
        self.node, self.key, self.point = node, key, point
        self.log_start = node.log.stat().st_size if node.log.exists() else 0
        self.pids: set[int] = set()
        self.ends = 0
        self.ready_at: list[float] = []  # rising edges
        self.unready_at: list[float] = []

    def step(self) -> bool:
        """Look once; True while the service runs."""
        service = self.node.service
        self.pids |= descendants(service.pid)
        status = self.node.status()
        ready = status.get("pid") == service.pid and bool(status.get("ready"))
        if ready and len(self.ready_at) == len(self.unready_at):
            self.ready_at.append(time.time())
        elif not ready and len(self.ready_at) > len(self.unready_at):
            self.unready_at.append(time.time())
        if status.get("ends_total", 0) != self.ends:  # whoever is left has to serve again
            self.ends = status["ends_total"]
            self.client.streams = self.client.quotes = 0
        return service.poll() is None

    def adapters(self) -> list[str]:
        return [adapter["state"] for adapter in self.node.status().get("adapters", [{"state": "none is told"}])]

    def until(self, what: str, condition, seconds: float):
        end = time.monotonic() + seconds
        while self.step() and not condition():
            if time.monotonic() > end:
                raise Fault(f"hang: not {what} within {seconds} s:\n{self.node.tail()}")
            time.sleep(0.01)

    def go(self) -> None:
        os.environ[VARIABLE] = self.point
        (self.node.state / "run" / "status.json").unlink(missing_ok=True)
        (self.node.state / "adapters.table").write_bytes(self.node.table)
        self.began = time.time()
        self.client = Client(self.node, self.key)
        self.node.start(wait=False)
        del os.environ[VARIABLE]
        try:
            self.until("listening", lambda: self.node.status().get("listen") and
                       (self.node.state / "run" / "tls-certificate.pem").exists(), 15)
            self.client.start()
            self.until("served", lambda: self.client.streams and self.client.quotes and
                       self.adapters() == ["serving"], 20)
            (self.node.state / "adapters.table").unlink()
            self.until("taken back", lambda: self.adapters() == [], 10)
            self.stopped_at = time.time()
            if self.node.service.poll() is None:
                self.node.service.send_signal(signal.SIGTERM)
            self.until("stopped", lambda: False, 20)
            self.over_at = time.time()
        finally:
            self.client.over.set()
            self.code = self.node.service.poll()
            if self.code is None:
                self.node.service.kill()
                self.node.service.wait()
            if self.client.ident:
                self.client.join(HANG_S + 1)
        end = time.monotonic() + 1
        while any(map(alive, self.pids)):
            if time.monotonic() > end:
                raise Fault(f"orphans: {[p for p in self.pids if alive(p)]}")
            time.sleep(0.01)

    def judge(self, strict: bool, start_s: float) -> tuple[str, str, float]:
        """(where, how it went, seconds until it was back); raises Fault."""
        lines = log_lines(self.node, self.log_start)
        points = [line for line in lines if line["event"] == "kill_point"]
        role = self.point.split(":")[0]
        deaths = [line for line in lines if line["event"] == "role_ended" and line["end"] == "signal"]
        where = points[0]["where"] if points else "not reached"
        if not points:
            if self.code != 0 or deaths:
                raise Fault(f"nobody was killed, but the service ended with {self.code}")
            return where, "not reached", 0.0
        died = self.over_at if role == "supervisor" else seconds_of(deaths[0]) if deaths else 0.0
        if not deaths and role != "supervisor":
            raise Fault(f"{role} died at '{where}', and the log does not say so")
        for began, ended, what, how in self.client.ended:
            if how in ("hang", "CUT IN SILENCE"):
                raise Fault(f"{what}: {how}")
            if began < died and ended > died + ERROR_S and how != "whole":
                raise Late(f"{what}: {how}, only {ended - died:.2f} s after the death")
        final = role == "devtpm" or (role == "keeper" and strict)
        stopping = died >= self.stopped_at - 0.05
        wanted = {-signal.SIGILL} if role == "supervisor" else {6} if final else {0}
        if stopping and role != "supervisor":
            wanted = {0} | wanted
        if self.code not in wanted:
            raise Fault(f"exit code {self.code}, expected {wanted}")
        if role == "supervisor" or self.code != 0 or stopping:
            return where, "ended", 0.0
        back = [at for at in self.ready_at if at > died]
        seconds = (back[0] - died) if back else 0.0  # a death that nobody has to notice
        if seconds > BACK_S + start_s:
            raise Late(f"'{where}': back after {seconds:.2f} s, expected {BACK_S + start_s:.2f} s at most")
        return where, "replaced", seconds


class Job:
    """A node of its own, and the points that it is put through."""

    def __init__(self, build: pathlib.Path, folder: pathlib.Path, mode: str):
        self.mode = mode
        self.node = nodes.Node(build / "bin", folder / "node", folder / "owner")
        tiny_model.write(str(folder / "tiny.gguf"))
        self.node.make(folder / "tiny.gguf", "tiny", mode=mode)
        tiny_adapter.allow(self.node, self.node.owner)
        self.node.sign()
        red = tiny_adapter.pack(self.node, folder / "adapters", "red", 1)
        self.node.run("casemate", "adapter", "add", red, "--state", self.node.state)
        self.node.table = (self.node.state / "adapters.table").read_bytes()
        self.key = self.node.key("faults")
        self.late: list[tuple[str, int, str]] = []

    def count(self) -> dict[str, list[str]]:
        """Role -> names of its points, in the order of a run in which nobody dies."""
        points = collections.defaultdict(list)
        run = Run(self.node, self.key, "count")
        run.go()
        lines = log_lines(self.node, run.log_start)
        for line in lines:
            if line["event"] == "kill_point":
                points[line["process"].removeprefix("casemate-")].append(line["where"])
        return points

    def start_seconds(self) -> float:
        """The slowest of three starts in which nobody dies."""
        slowest = 0.0
        for _ in range(3):
            run = Run(self.node, self.key, "none:0")
            run.go()
            if run.code != 0:
                raise Fault(f"a service that nobody touched ended with {run.code}")
            slowest = max(slowest, run.ready_at[0] - run.began)
        return slowest

    def kill(self, role: str, at: int, start_s: float) -> tuple[str, str, float]:
        run = Run(self.node, self.key, f"{role}:{at}")
        run.go()
        judged = run.judge(self.mode == "strict", start_s)
        if judged[1] == "ended":  # what a service manager does next
            again = Run(self.node, self.key, "none:0")
            again.go()
            if again.code != 0 or not again.ready_at:
                raise Fault(f"the next start ended with {again.code}")
        return judged


    def kill_in_time(self, role: str, at: int, start_s: float) -> tuple[str, str, float]:
        """The best of three tries; what was late is counted and told."""
        for left in (2, 1, 0):
            try:
                return self.kill(role, at, start_s)
            except Late as late:
                self.late.append((role, at, str(late)))
                if left == 0:
                    raise


def choose(points: dict[str, list[str]], most: int, seed: int) -> list[tuple[str, int]]:
    """Each kind of point of each role once, at a random one of its occurrences; then the others."""
    draw = random.Random(seed)
    first, rest = [], []
    for role in ROLES:
        kinds = collections.defaultdict(list)
        for at, where in enumerate(points.get(role, []), 1):
            kinds[where].append(at)
        for where in kinds:
            draw.shuffle(kinds[where])
            first.append((role, kinds[where][0]))
            rest += [(role, at) for at in kinds[where][1:]]
    draw.shuffle(first)
    draw.shuffle(rest)
    return (first + rest)[:most]


def campaign(build: pathlib.Path, mode: str, most: int, seed: int = 1,
             roles: tuple = ROLES, shard: tuple = (0, 1), tell=lambda text: None) -> tuple[list, list]:
    """Put `most` points through, or this shard's part of them; (judged, faults)."""
    judged, faults = [], []
    with tempfile.TemporaryDirectory(prefix="casemate-faults-") as folder:
        job = Job(build, pathlib.Path(folder), mode)
        points = job.count()
        start_s = job.start_seconds()
        number, shards = shard
        chosen = [c for c in choose(points, 1 << 30, seed) if c[0] in roles and c[1] % shards == number]
        chosen = chosen[:-(-most // shards)]
        tell(f"{mode}: {sum(map(len, points.values()))} points "
             f"({', '.join(f'{r} {len(points[r])}' for r in ROLES)}), start {start_s:.2f} s, "
             f"{len(chosen)} put through")
        for role, at in chosen:
            try:
                judged.append((role, at, *job.kill_in_time(role, at, start_s)))
            except (AssertionError, OSError, RuntimeError) as fault:
                faults.append((role, at, f"{type(fault).__name__}: {fault}"))
                tell(f"{mode} {role}:{at}: {fault}")
        for role, at, text in job.late:
            tell(f"{mode} {role}:{at}: late, tried again: {text}")
    return judged, faults


def summary(judged: list, faults: list) -> str:
    how = collections.Counter((role, h) for role, _, _, h, _ in judged)
    back = sorted(s for *_, h, s in judged if h == "replaced")
    kinds = len({(role, where) for role, _, where, _, _ in judged})
    text = ", ".join(f"{role} {h} {n}" for (role, h), n in sorted(how.items()))
    if back:
        text += (f"; back after {back[len(back) // 2]:.2f} s in the middle, {back[-1]:.2f} s at most")
    return f"{len(judged)} held ({kinds} kinds), {len(faults)} did not: {text}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--build", type=pathlib.Path, required=True)
    parser.add_argument("--points", type=int, default=1 << 30)
    parser.add_argument("--modes", default="restartable,strict")
    parser.add_argument("--roles", default=",".join(ROLES))
    parser.add_argument("--shard", default="0/1", help="part of the points: number/of")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    bad = 0
    for mode in options.modes.split(","):
        # In strict mode only the keeper's death has another outcome.
        roles = tuple(options.roles.split(",")) if mode != "strict" else ("keeper",)
        judged, faults = campaign(options.build.resolve(), mode, options.points, options.seed, roles,
                                  tuple(map(int, options.shard.split("/"))),
                                  lambda text: print(text, flush=True))
        print(f"{mode}: {summary(judged, faults)}", flush=True)
        bad += len(faults)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
