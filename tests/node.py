"""A whole node as its operator runs it: keys, enrolment, package, service. Used by demo and tests."""
import json
import os
import pathlib
import signal
import ssl
import subprocess
import time
import urllib.request


def wait(until, seconds: float = 10, told=lambda: ""):
    """What `until` gives once it is true of something; if it never is, `told` says what is instead."""
    end = time.monotonic() + seconds
    while not (found := until()):
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds} s: {told()}")
        time.sleep(0.02)
    return found


def no_bug(log: str):
    """No assertion of a role failed: its line stands in the log, whoever has replaced the role since."""
    told = [line for line in log.splitlines() if "please report this line" in line]
    assert told == [], told


class Node:
    def __init__(self, programs: pathlib.Path, state: pathlib.Path, owner: pathlib.Path):
        self.programs, self.state, self.owner = programs, state, owner
        self.package = state / "model.cmpkg"
        self.service: subprocess.Popen | None = None
        self.log = state / "service.log"
        self.address = ""
        self.pcrs: list[str] = []
        self.scheme = "https"  # "http": the bench's twin arm
        self.chain = {4: "00" * 32, 7: "00" * 32}  # of the boot, where the TPM is no development TPM

    def run(self, program: str, *words, check=True):
        done = subprocess.run([self.programs / program, *map(str, words)], capture_output=True,
                              text=True, timeout=300)
        if check and done.returncode != 0:
            raise RuntimeError(f"{program} {words[0]}: exit {done.returncode}: {done.stderr.strip()}")
        return done

    def enrol(self, tpm="development", mode="restartable") -> None:
        """Owner keys and node: whatever is not there yet."""
        if not (self.owner / "owner.key").exists():
            self.run("casemate-pack", "keygen", "--owner", self.owner)
        if not (self.state / "enrolment.bin").exists():
            self.run("casemate", "init", "--state", self.state, "--owner-key",
                     self.owner / "owner.pub", "--policy-key", self.owner / "policy.pub", "--package",
                     self.package, "--node-name", "node-1", "--tpm", tpm,
                     "--attest-mode", mode)

    def make(self, model: pathlib.Path, name: str, *pack_options, tpm="development",
             mode="restartable") -> None:
        """Owner keys, node, package: whatever is not there yet."""
        self.enrol(tpm, mode)
        self.pcrs = [] if tpm == "development" else [
            word for pcr, value in self.chain.items() for word in ("--pcr", f"{pcr}={value}")]
        measure = self.measure()
        if not self.package.exists():
            self.run("casemate-pack", "pack", model, "--out", self.package, "--owner", self.owner,
                     "--node", self.state / "enrolment.bin", "--measurement", measure, "--name", name,
                     *self.pcrs, *pack_options)
        else:
            self.sign()

    def measure(self) -> pathlib.Path:
        """What a start would measure now, for the owner to sign."""
        out = self.state / "node.measure"
        self.run("casemate", "measure", "--state", self.state, "--out", out)
        return out

    def sign(self, command="policy-sign") -> None:
        """The owner signs this node's present state."""
        self.run("casemate-pack", command, self.package, "--owner", self.owner, "--node",
                 self.state / "enrolment.bin", "--measurement", self.measure(), *self.pcrs)

    def key(self, name: str, *words) -> str:
        return self.run("casemate", "keys", "add", name, "--state", self.state, *words).stdout.strip()

    def start(self, *options, wait=True) -> None:
        out = open(self.log, "ab")
        self.service = subprocess.Popen(
            [self.programs / "casemate", "serve", "--state", self.state, "--listen", "127.0.0.1:0",
             *map(str, options)], stdout=out, stderr=out)
        out.close()
        if wait:
            self.ready()

    def status(self) -> dict:
        try:
            return json.loads((self.state / "run" / "status.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return {}

    def ready(self, seconds: float = 30, pid_not: int = 0) -> None:
        """Until status says ready (and the worker is not pid_not)."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.service is not None and self.service.poll() is not None:
                raise RuntimeError(f"the service ended with {self.service.returncode}:\n{self.tail()}")
            status = self.status()
            if (status.get("pid") == self.service.pid and status.get("ready") and
                    status["roles"]["worker"]["pid"] != pid_not):
                self.address = status["listen"]
                return
            time.sleep(0.02)
        raise RuntimeError(f"not ready within {seconds} s:\n{self.tail()}")

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])

    def context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.state / "run" / "tls-certificate.pem")

    def get(self, path: str, key: str = "") -> tuple[int, str]:
        request = urllib.request.Request(f"https://{self.address}{path}")
        if key:
            request.add_header("Authorization", f"Bearer {key}")
        try:
            with urllib.request.urlopen(request, context=self.context(), timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def client(self, key: str):
        """The unmodified openai client."""
        import httpx2
        import openai
        return openai.OpenAI(base_url=f"{self.scheme}://{self.address}/v1", api_key=key, max_retries=0,
                             http_client=httpx2.Client(verify=self.context(), timeout=60))

    def pid(self, role: str) -> int:
        return self.status()["roles"][role]["pid"]

    def stop(self, seconds: float = 30) -> int:
        if self.service is None:
            return 0
        if self.service.poll() is None:
            os.kill(self.service.pid, signal.SIGTERM)
        try:
            code = self.service.wait(seconds)
            no_bug(self.log.read_text(errors="replace"))
            return code
        except subprocess.TimeoutExpired:
            self.service.kill()
            self.service.wait()
            raise
        finally:
            self.service = None
