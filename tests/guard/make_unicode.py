#!/usr/bin/env python3
"""Write kernels/guard/unicode_table.c: what the guard's views know of Unicode 15.0.

Data: the Unicode Character Database of Debian 12's package `unicode-data`, and UTS #39's confusables.txt as
it lies in Debian's source package `icu` 72.1 (source/data/unidata/).
usage: make_unicode.py /usr/share/unicode CONFUSABLES.TXT kernels/guard/unicode_table.c"""
import pathlib
import re
import sys

BLOCK = 128
POINTS = 0x110000
HANGUL = range(0xAC00, 0xAC00 + 11172)
MARK, WORD, IGNORABLE, BIDI, BACK = 1, 2, 4, 8, 16


def rows(path: pathlib.Path):
    for line in path.read_text(encoding="utf-8-sig").splitlines():
        fields = [field.strip() for field in line.split("#")[0].split(";")]
        if len(fields) > 1:
            yield fields


def points(field: str) -> range:
    first, _, last = field.partition("..")
    return range(int(first, 16), int(last or first, 16) + 1)


def text(field: str) -> tuple[int, ...]:
    return tuple(int(point, 16) for point in field.split())


class Database:
    def __init__(self, folder: pathlib.Path, confusables: pathlib.Path):
        self.ccc, self.category, self.single = {}, {}, {}
        self.flags = [0] * POINTS
        for row in rows(folder / "UnicodeData.txt"):
            point = int(row[0], 16)
            if row[3] != "0":
                self.ccc[point] = int(row[3])
            if row[5] and not row[5].startswith("<"):
                self.single[point] = text(row[5])
        for row in rows(folder / "extracted/DerivedGeneralCategory.txt"):
            mark, word = row[1] in ("Mn", "Me"), row[1][0] in "LN" or row[1] == "Mc"
            for point in points(row[0]):
                self.flags[point] |= MARK * mark | WORD * word
        for row in rows(folder / "DerivedCoreProperties.txt"):
            if row[1] == "Default_Ignorable_Code_Point":
                for point in points(row[0]):
                    self.flags[point] |= IGNORABLE
        for row in rows(folder / "PropList.txt"):
            if row[1] == "Bidi_Control":
                for point in points(row[0]):
                    self.flags[point] |= BIDI
        folds, excluded = {}, set()
        for row in rows(folder / "DerivedNormalizationProps.txt"):
            if row[1] == "NFKC_CF":
                folds.update((point, text(row[2])) for point in points(row[0]))
            elif row[1] == "Full_Composition_Exclusion":
                excluded.update(points(row[0]))
            elif row[1] == "NFC_QC" and row[2] == "M":
                for point in points(row[0]):
                    self.flags[point] |= BACK
        self.pairs = sorted((*pair, point) for point, pair in self.single.items()
                            if point not in excluded and len(pair) == 2)
        self.fold = {point: self.decomposed(folds.get(point, (point,))) for point in
                     {*folds, *self.single}}
        looks = {text(row[0])[0]: text(row[1]) for row in rows(confusables)}
        self.look = {point: self.decomposed(look) for point, look in looks.items()}

    def decomposed(self, string) -> tuple[int, ...]:
        """Canonical decomposition, not yet in order."""
        out = []
        for point in string:
            if point in HANGUL:
                first, tail = divmod(point - HANGUL.start, 28)
                out += [0x1100 + first // 21, 0x1161 + first % 21, *([0x11A7 + tail] if tail else [])]
                continue
            out += self.decomposed(self.single[point]) if point in self.single else [point]
        return tuple(out)


class Pool:
    """Expansions, each once: count, then code points. Entry 0 is empty, and means "as it is"."""
    def __init__(self):
        self.values, self.where = [0], {}

    def add(self, string: tuple[int, ...]) -> int:
        if string not in self.where:
            self.where[string] = len(self.values)
            self.values += [len(string), *string]
        return self.where[string]


def trie(values: list[int]) -> tuple[list[int], list[int]]:
    index, blocks, seen = [], [], {}
    for start in range(0, POINTS, BLOCK):
        block = tuple(values[start:start + BLOCK])
        if block not in seen:
            seen[block] = len(blocks) // BLOCK
            blocks += block
        index.append(seen[block])
    return index, blocks


def array(name: str, kind: str, values) -> str:
    body = ",".join(str(value) for value in values)
    lines = re.sub(r"(.{1,110}(?:,|$))", r"    \1\n", body)
    return f"const {kind} {name}[] = {{\n{lines}}};\n"


def two_stage(name: str, kind: str, values: list[int]) -> str:
    index, blocks = trie(values)
    assert max(index) < 256
    return array(f"cm_unicode_{name}_index", "uint8_t", index) + array(f"cm_unicode_{name}", kind, blocks)


def main() -> None:
    data = Database(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
    pool, fold, look, kinds, kind_of = Pool(), [0] * POINTS, [0] * POINTS, [], [0] * POINTS
    for table, source in ((fold, data.fold), (look, data.look)):
        for point, string in sorted(source.items()):
            table[point] = 0 if string == (point,) else pool.add(string)
    for point in range(POINTS):
        kind = (data.ccc.get(point, 0), data.flags[point])
        if kind not in kinds:
            kinds.append(kind)
        kind_of[point] = kinds.index(kind)
    assert len(kinds) < 256 and len(pool.values) < 65536
    pairs = [f"{{0x{a:x}, 0x{b:x}, 0x{c:x}}}" for a, b, c in data.pairs]
    lines = "\n".join("    " + ", ".join(pairs[i:i + 4]) + "," for i in range(0, len(pairs), 4))
    out = f"""/* Generated by tests/guard/make_unicode.py from Unicode 15.0.0 and UTS #39 15.0.0; do not edit. */
#include "kernels/guard/unicode.h"

/* clang-format off */
{array("cm_unicode_pool", "uint32_t", pool.values)}
{two_stage("fold", "uint16_t", fold)}
{two_stage("look", "uint16_t", look)}
{two_stage("kind", "uint8_t", kind_of)}
const struct cm_unicode_kind cm_unicode_kinds[] = {{
    {", ".join(f"{{{a},{b}}}" for a, b in kinds)}
}};
const struct cm_unicode_pair cm_unicode_pairs[] = {{
{lines}
}};
/* clang-format on */
const uint32_t cm_unicode_pair_count = {len(pairs)};
"""
    pathlib.Path(sys.argv[3]).write_text(out)


if __name__ == "__main__":
    main()
