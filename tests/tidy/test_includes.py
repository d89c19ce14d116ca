"""Who may include whom: "May include" of each folder's page, enforced, and tested itself."""
import pathlib
import re

import pytest

# folder -> (project folders it may include, third-party header prefixes it may include)
BASE = "runtime/base"
TABLE = {
    "runtime/base": ((), ()),
    "policies": ((BASE,), ("yaml.h",)),
    "kernels": ((BASE,), ()),
    "sandbox": ((BASE, "policies"), ()),
    "sandbox/compile": ((BASE, "sandbox"), ("seccomp.h",)),
    "loader/package": ((BASE,), ("openssl/",)),
    "loader/stream": ((BASE, "kernels/device.h", "kernels/model.h", "loader/package"), ("openssl/",)),
    "loader/tpm": ((BASE,), ("openssl/", "tss2/")),
    "loader/evidence": ((BASE, "loader/package", "loader/tpm/enrolment.h", "loader/tpm/measure.h",
                         "loader/tpm/internal.h"), ("openssl/",)),
    "loader/pack": ((BASE, "kernels/model.h", "loader/package", "loader/tpm/enrolment.h",
                     "loader/tpm/measure.h"), ("openssl/", "jansson.h")),
    "runtime/devtpm": ((BASE, "sandbox/confine.h",), ("libtpms/",)),
    "runtime/keeper": ((BASE, "sandbox/confine.h", "loader/package", "loader/evidence/evidence.h", "loader/tpm"), ("openssl/", "tss2/")),
    "runtime/worker": ((BASE, "sandbox/confine.h", "kernels/device.h", "kernels/guard/unicode.h", "kernels/model.h",
                        "loader/package", "loader/stream"), ()),
    "runtime/gateway": ((BASE, "sandbox/confine.h",), ("openssl/", "event2/", "jansson.h")),
    # Of the package and the policy list the supervisor knows sizes alone.
    "runtime/supervisor": ((BASE, "policies", "sandbox", "loader/package/package.h",
                            "loader/tpm/enrolment.h", "loader/tpm/measure.h"), ()),
    "runtime/cli": ((BASE, "policies", "kernels/guard", "loader/package", "loader/tpm/enrolment.h",
                     "loader/tpm/measure.h", "sandbox"),
                    ("sqlite3.h", "jansson.h", "openssl/")),
}
THIRD_PARTY = ("openssl/", "tss2/", "libtpms/", "event2/", "jansson.h", "yaml.h", "sqlite3.h",
               "cap-ng.h", "seccomp.h", "criterion/", "cuda")
INCLUDE = re.compile(r'^\s*#\s*include\s+([<"])([^>"]+)[>"]', re.MULTILINE)


def violations(path: str, text: str) -> list[str]:
    owner = max((folder for folder in TABLE if path.startswith(folder + "/")), key=len, default=None)
    if owner is None:
        return [f"{path}: in no folder of the table"]
    folders, libraries = TABLE[owner]
    found = []
    for kind, name in INCLUDE.findall(text):
        if kind == '"':
            allowed = any(name == item or name.startswith(item + "/")
                          for item in (*folders, owner))
            if not allowed:
                found.append(f"{path}: {owner} may not include {name}")
        elif name.startswith(THIRD_PARTY) and not name.startswith(libraries or ("\0",)):
            found.append(f"{path}: {owner} may not include <{name}>")
    return found


def test_includes_point_down_only(repo: pathlib.Path):
    found, count = [], 0
    for folder in TABLE:
        for source in sorted((repo / folder).rglob("*.[ch]")):
            path = source.relative_to(repo).as_posix()
            if max((f for f in TABLE if path.startswith(f + "/")), key=len) == folder:
                found += violations(path, source.read_text())
                count += 1
    assert count > 10
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path,text", [
    ("runtime/base/x.c", '#include "kernels/device.h"\n'),
    ("kernels/cpu/x.c", "#include <openssl/evp.h>\n"),
    ("runtime/gateway/x.c", '#include "loader/package/package.h"\n'),
    ("runtime/supervisor/x.c", "#include <openssl/evp.h>\n"),
    ("runtime/worker/x.c", '#include "runtime/gateway/http.h"\n'),
    ("elsewhere/x.c", ""),
])
def test_a_violation_is_found(path, text):
    assert violations(path, text)
