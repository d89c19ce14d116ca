"""Each claim of the threat model and of the front page names tests or pages, and these exist."""
import pathlib
import re

TEST = re.compile(r"`((?:test_\w+\.py|\w+_test)(?:::\w+)?)`")


def rows(text: str) -> list[list[str]]:
    """Cells of each table row that makes a claim."""
    found = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
             for line in text.splitlines() if line.startswith("| ")]
    return [row for row in found if row[-1] != "shown by"]


def unlinked(row: list[str]) -> bool:
    excused = any("*not yet*" in cell or "does not apply" in cell for cell in row)
    return not (TEST.search(row[-1]) or "./run" in row[-1] or excused)


def missing(name: str, tests: pathlib.Path) -> bool:
    file, _, inside = name.partition("::")
    paths = list(tests.rglob(file if file.endswith(".py") else f"{file}.c"))
    return not paths or (inside != "" and
                         not any(re.search(rf"\b{inside}\b", path.read_text()) for path in paths))


def test_each_claim_is_shown_by_tests_that_exist(repo):
    text = (repo / "docs/threat-model.md").read_text()
    claims = rows(text)
    assert len(claims) > 40
    assert [row[:2] for row in claims if unlinked(row)] == []
    names = TEST.findall(text)
    assert len(names) > 60 and [name for name in names if missing(name, repo / "tests")] == []


def test_each_promise_of_the_front_page_is_shown(repo):
    promises = [row for row in rows((repo / "README.md").read_text()) if not row[0].startswith("---")]
    assert len(promises) > 10
    for promise, shown in promises:
        names = re.findall(r"\b(test_\w+\.py|\w+_test)\b", shown)
        pages = re.findall(r"\]\(([^)]+)\)", shown)
        assert names or pages or "./run" in shown, promise
        assert [name for name in names if missing(name, repo / "tests")] == [], promise
        assert [page for page in pages if not (repo / page).exists()] == [], promise


def test_numbers_of_the_front_page_are_those_of_the_tables(repo):
    page = (repo / "README.md").read_text()
    calls = dict(re.findall(r"^### (\w+)(?:-serve)?: (\d+) calls$", (repo / "docs/sandbox.md").read_text(), re.MULTILINE))
    told = page.partition("system calls left: ")[2].partition(" |")[0]
    assert dict(re.findall(r"(\w+) (\d+)", told)) == {role: calls[role] for role in
                                                      ("gateway", "keeper", "worker", "supervisor")}
    rows = (repo / "tests/escape/attempts.c").read_text().partition("struct attempt attempts[] = {")[2]
    assert f"{rows.count('ROW(')} attempts to get out" in page


def test_a_planted_fault_is_found(repo):
    assert unlinked(["a", "b", "c", "because"]) and not unlinked(["a", "b", "c", "`test_way.py`"])
    assert missing("test_way.py::test_nothing_of_that", repo / "tests")
    assert missing("no_such_test", repo / "tests") and not missing("tpm_seal_test", repo / "tests")
