"""Arms that answer lines (bench/arm.h), asked in turn so that all of them meet the same machine."""
import json
import os
import pathlib
import statistics
import subprocess


class Arm:
    """A process that has loaded its model once. Its answers are dictionaries."""

    def __init__(self, *words, greets=True, **environment):
        self.process = subprocess.Popen([str(word) for word in words], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True,
                                        env={**os.environ, **environment})
        self.greeting = self.read() if greets else {}

    def read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"arm ended with {self.process.wait()}: {self.process.args}")
        return json.loads(line)

    def ask(self, line: str) -> dict:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.read()

    def rate(self, line: str) -> dict:
        """Tokens per second, and whether other processes took CPU time meanwhile: both threads
        of an arm compute or spin all the time, so less than 1.9 CPU seconds a second is theft."""
        answer = self.ask(line)
        answer["rate"] = answer["tokens"] / answer["seconds"]
        answer["cpus"] = answer["cpu_seconds"] / answer["seconds"]
        return answer

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def spread(values: list[float]) -> dict:
    return {"median": statistics.median(values), "least": min(values), "greatest": max(values),
            "rounds": len(values)}


def share_of_stream(rate: float, weights: int, streams: list[dict]) -> float:
    """Of the mean stream just before and just after."""
    return rate * weights / 1e9 / statistics.mean(answer["gb_per_s"] for answer in streams)


class Rounds:
    """What each measurement gave, round by round."""

    def __init__(self):
        self.answers: dict[str, list[dict]] = {}

    def add(self, name: str, answer: dict) -> None:
        self.answers.setdefault(name, []).append(answer)

    def calm(self, name: str, cpus: float = 1.9) -> list[dict]:
        """The undisturbed rounds; all of them where there is none."""
        answers = self.answers[name]
        return [a for a in answers if a.get("cpus", cpus) >= cpus] or answers

    def figures(self, threads: int) -> dict:
        found = {}
        for name, answers in self.answers.items():
            calm = self.calm(name, 0.95 * threads)
            keys = [key for key in ("rate", "gb_per_s", "gb_per_s_best", "tops", "of_stream", "step_median_ms",
                                 "step_slowest_ms")
                    if key in answers[0]]
            found[name] = {key: spread([a[key] for a in calm]) for key in keys}
            found[name]["disturbed_rounds"] = sum(a.get("cpus", threads) < 0.95 * threads
                                                  for a in answers)
            found[name]["all_rounds"] = len(answers)
        return found


def machine(root: pathlib.Path) -> dict:
    info = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    flags = next(line for line in info if line.startswith("flags")).split()
    caches = {}
    for index in sorted(pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind = (index / "type").read_text().strip().lower()
        caches[f"l{(index / 'level').read_text().strip()} {kind}"] = (index / "size").read_text().strip()

    def limit(*paths):
        for path in paths:
            if pathlib.Path(path).exists():
                return pathlib.Path(path).read_text().strip()
        return "none"
    commit = subprocess.run(["git", "describe", "--always", "--dirty", "--exclude", "*"], cwd=root,
                            capture_output=True, text=True).stdout.strip()
    return {"cpu": next(line for line in info if line.startswith("model name")).split(":")[1].strip(),
            "cores": os.cpu_count(), "caches": caches,
            "features": [f for f in ("avx2", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16",
                                     "vaes", "sha_ni") if f in flags],
            "cgroup_cpu": limit("/sys/fs/cgroup/cpu.max", "/sys/fs/cgroup/cpu/cpu.cfs_quota_us"),
            "cgroup_memory": limit("/sys/fs/cgroup/memory.max",
                                   "/sys/fs/cgroup/memory/memory.limit_in_bytes"),
            "kernel": os.uname().release, "commit": commit}
