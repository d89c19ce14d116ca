"""House rules that a script can see: lengths, folder pages, words, paths. Each finds a planted fault."""
import pathlib
import re
import subprocess

WORDS = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
PATHS = re.compile(r"(?<![\w.])/(work|farm|root|home)/")
FUNCTION_LINES, FILE_LINES = 100, 900
GENERATED = {"runtime/worker/unicode_table.c", "kernels/guard/unicode_table.c"}


def tracked(repo: pathlib.Path) -> list[str]:
    return subprocess.run(["git", "ls-files"], cwd=repo, capture_output=True, text=True,
                          check=True).stdout.splitlines()


def long_functions(text: str) -> list[int]:
    """First lines of functions that are too long: from a brace in column 0 to the closing one."""
    found, start = [], 0
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("{"):
            start = number
        elif line.startswith("}") and start:
            if number - start > FUNCTION_LINES:
                found.append(start)
            start = 0
    return found


def test_lengths(repo):
    faults = []
    for name in tracked(repo):
        if name.endswith((".c", ".h")) and name not in GENERATED and not name.startswith("tests/"):
            text = (repo / name).read_text()
            faults += [f"{name}:{line}: function over {FUNCTION_LINES} lines"
                       for line in long_functions(text)]
            if text.count("\n") > FILE_LINES:
                faults.append(f"{name}: over {FILE_LINES} lines")
    assert not faults, "\n".join(faults)


def test_words_and_paths(repo):
    faults = []
    for name in tracked(repo):
        if name.endswith((".c", ".h", ".py", ".md", ".txt")) or name == "run":
            if name.startswith("tests/tidy/") or name.startswith("tests/engine/texts/"):
                continue
            for number, line in enumerate((repo / name).read_text().splitlines(), 1):
                if WORDS.search(line) or PATHS.search(line):
                    faults.append(f"{name}:{number}: {line.strip()[:80]}")
    assert not faults, "\n".join(faults)


def pageless(names: list[str]) -> list[str]:
    """Folders of code with no page in them or above them, the front page aside."""
    def opened(folder: str) -> bool:
        above = folder.rpartition("/")[0]
        return f"{folder}/README.md" in names or above != "" and f"{above}/README.md" in names
    folders = {name.rpartition("/")[0] for name in names if name.endswith((".c", ".h", ".py"))}
    return sorted(folder for folder in folders if not opened(folder))


def test_each_folder_of_code_opens_with_a_page(repo):
    assert pageless(tracked(repo)) == []


def test_planted_faults_are_found():
    assert long_functions("int f(void)\n{\n" + "    x();\n" * 101 + "}\n") == [2]
    assert long_functions("int f(void)\n{\n" + "    x();\n" * 50 + "}\n") == []
    assert pageless(["README.md", "a/README.md", "a/b/x.c", "c/x.py"]) == ["c"]
    assert WORDS.search("/* TODO: later */") and PATHS.search("see /home/me/x")
