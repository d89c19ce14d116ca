#!/usr/bin/env python3
"""Run Criterion executables and believe only their JSON.

Criterion alone lets a leak found at exit pass, exits 0 when nothing matched, and forgets skips in
its last line. This wrapper runs each executable with --json, fails it on a non-zero exit, on zero
tests, on a sanitizer report and on a time-out, names every skip, and prints one line of totals.
"""
import argparse
import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time


def run_one(program: pathlib.Path, timeout_s: int) -> dict:
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report_path = pathlib.Path(folder) / "report.json"
        command = [str(program), f"--json={report_path}", "--quiet", "-j1"]
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                  timeout=timeout_s, text=True, errors="replace")
            output, code = done.stdout, done.returncode
        except subprocess.TimeoutExpired as late:
            text = late.stdout or b""
            output = text.decode(errors="replace") if isinstance(text, bytes) else text
            output, code = output + f"\ntimed out after {timeout_s} s", -1
        report = json.loads(report_path.read_text()) if report_path.exists() else None
    result = {"name": program.name, "output": output, "seconds": time.monotonic() - started,
              "passed": 0, "failed": 0, "skipped": [], "problems": []}
    if report is None:
        result["problems"].append(f"no report (exit {code})")
    else:
        for suite in report["test_suites"]:
            for test in suite["tests"]:
                name = f"{suite['name']}::{test['name']}"
                status = test["status"].upper()
                if status in ("PASSED", "PASS"):
                    result["passed"] += 1
                elif status in ("SKIPPED", "SKIP"):
                    result["skipped"].append(name)
                else:
                    result["failed"] += 1
                    result["problems"].append(f"{name}: {test['status']}")
        if result["passed"] + result["failed"] == 0:
            result["problems"].append("no test ran")
        if code != 0 and result["failed"] == 0:
            result["problems"].append(f"exit code {code}")
    for sign in ("LeakSanitizer", "AddressSanitizer", "runtime error:", "ThreadSanitizer"):
        if sign in output:
            result["problems"].append(f"sanitizer: {sign}")
    if result["problems"] and result["failed"] == 0:
        result["failed"] = 1
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=pathlib.Path, help="folder of test executables")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--timeout", type=int, default=600, help="seconds per executable")
    parser.add_argument("--summary", type=pathlib.Path, help="write totals as JSON")
    options = parser.parse_args()
    programs = sorted(p for p in options.folder.iterdir()
                      if p.is_file() and os.access(p, os.X_OK) and p.name.endswith("_test"))
    if not programs:
        print(f"criterion_run: no *_test executables in {options.folder}")
        return 1
    passed = failed = 0
    skipped: list[str] = []
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for result in pool.map(lambda program: run_one(program, options.timeout), programs):
            passed += result["passed"]
            failed += result["failed"]
            skipped += [f"{result['name']}::{name}" for name in result["skipped"]]
            mark = "FAIL" if result["problems"] else "ok"
            print(f"{mark:4} {result['name']}: {result['passed']} passed, {result['failed']} failed"
                  f" ({result['seconds']:.1f} s)")
            if result["problems"]:
                print("\n".join(f"     {problem}" for problem in result["problems"]))
                print("\n".join(result["output"].splitlines()[-60:]))
    for name in skipped:
        print(f"skip {name}")
    print(f"unit tests: {passed} passed, {failed} failed, {len(skipped)} skipped")
    if options.summary:
        options.summary.write_text(json.dumps(
            {"passed": passed, "failed": failed, "skipped": skipped}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
