#!/usr/bin/env python3
"""Add up what the test stages counted and print the one closing line."""
import json
import pathlib
import sys
import xml.etree.ElementTree as ElementTree


def main() -> int:
    build, sanitized, failures = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3:]
    passed = failed = 0
    skipped: list[str] = []
    for folder in (build, sanitized):
        path = folder / "unit.json"
        if path.exists():
            unit = json.loads(path.read_text())
            passed, failed = passed + unit["passed"], failed + unit["failed"]
            skipped += unit["skipped"]
    path = build / "pytest.xml"
    if path.exists():
        for case in ElementTree.parse(path).getroot().iter("testcase"):
            kinds = {child.tag for child in case}
            if "skipped" in kinds:
                skipped.append(f"{case.get('classname')}::{case.get('name')}")
            elif kinds & {"failure", "error"}:
                failed += 1
            else:
                passed += 1
    for name in skipped:
        print(f"skipped: {name}")
    for name in failures:
        print(f"stage failed: {name}")
    failed = max(failed, len(failures))
    print(f"{passed} passed, {failed} failed, {len(skipped)} skipped")
    return 1 if failed or passed == 0 else 0


if __name__ == "__main__":
    sys.exit(main())
