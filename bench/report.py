"""What a bench's JSON says: rows with goals, a Markdown table, a picture."""
import html

# Rows that the speed table has and no arm measures yet.
ABSENT = ("adapters in one batch",)


def figure(part: dict, name: str, key: str = "rate") -> dict | None:
    return part.get("figures", {}).get(name, {}).get(key)


def ratio(part: dict, ours: str, other: str, key: str = "rate") -> float | None:
    a, b = figure(part, ours, key), figure(part, other, key)
    return a["median"] / b["median"] if a and b else None


def show(value: dict | None, unit: str) -> str:
    if value is None:
        return "not measured"
    return (f"{value['median']:.4g} [{value['least']:.4g} … {value['greatest']:.4g}] {unit}, "
            f"{value['rounds']} rounds")


def stream_share(part: dict, name: str, bytes_per_token: float) -> float | None:
    """Round by round; of an older file, which has no such figure, median by median."""
    found = figure(part, name, "of_stream")
    if found:
        return found["median"]
    rate, stream = figure(part, name), figure(part, "stream", "gb_per_s")
    return rate["median"] * bytes_per_token / 1e9 / stream["median"] if rate and stream else None


class Row:
    def __init__(self, what: str, value: float | None, goal: float | None, detail: str,
                 at_most: bool = False, unit: str = "×"):
        self.what, self.value, self.goal, self.detail = what, value, goal, detail
        self.at_most, self.unit = at_most, unit

    def met(self) -> str:
        if self.value is None or self.goal is None:
            return ""
        return "yes" if (self.value <= self.goal if self.at_most else self.value >= self.goal) else "**no**"

    def text(self) -> str:
        number = "not measured" if self.value is None else f"{self.value:.2f} {self.unit}"
        goal = "" if self.goal is None else f"{'≤' if self.at_most else '≥'} {self.goal:g}"
        return f"| {self.what} | {number} | {goal} | {self.met()} | {self.detail} |"


def engine_rows(parts: dict, intel: bool) -> list[Row]:
    part = parts["engine"]
    weights = part["weight_bytes"]
    rows = []
    for other, decode, prefill in (("llama.cpp", 3.3 if intel else 2.2, 8 if intel else 4.4),
                                   ("llama.cpp Q4_0", None, 1.7)):
        for what, goal in (("decode", decode), ("prefill 512", prefill)):
            rows.append(Row(f"{what}: ours ÷ {other}", ratio(part, f"ours: {what}", f"{other}: {what}"),
                            goal, f"{show(figure(part, f'ours: {what}'), 'tok/s')}; "
                            f"{show(figure(part, f'{other}: {what}'), 'tok/s')}"))
    rows.append(Row("decode: share of the stream", stream_share(part, "ours: decode", weights), 0.7,
                    f"{weights / 1e6:.1f} MB a token; {show(figure(part, 'stream', 'gb_per_s'), 'GB/s')}",
                    unit=""))
    for path in ("avx512vnni", "avx2"):
        for what in ("decode", "prefill 512"):
            rows.append(Row(f"{what}: ours, {path} ÷ llama.cpp",
                            ratio(part, f"ours {path}: {what}", f"llama.cpp: {what}"), None,
                            show(figure(part, f"ours {path}: {what}"), "tok/s")))
    prompts = figure(part, "ours, class P: prefill 512")
    for other, name, goal in (("llama.cpp", "llama.cpp", 14), ("ours, exact", "ours", None)) if prompts else ():
        rows.append(Row(f"prefill 512: ours, class P ÷ {other}",
                        ratio(part, "ours, class P: prefill 512", f"{name}: prefill 512"), goal,
                        show(prompts, "tok/s")))
    rows.append(Row("8 streams ÷ one", ratio(part, "ours: 8 streams", "ours: decode"), 3,
                    show(figure(part, "ours: 8 streams"), "tok/s, all together")))
    slow, median = (figure(part, "ours: 8 streams", f"step_{k}_ms") for k in ("slowest", "median"))
    rows.append(Row("8 streams: slowest step ÷ median", slow["median"] / median["median"], 2,
                    f"{slow['median']:.2f} and {median['median']:.2f} ms", at_most=True))
    ops = 2 * 106.2e6 * 1e-12
    peak, rate = figure(part, "int8 peak", "tops"), figure(part, "ours: prefill 512")
    rows.append(Row("prefill 512: share of the VNNI peak", rate["median"] * ops / peak["median"], None,
                    show(peak, "TOPS"), unit=""))
    return rows


def adapter_rows(part: dict) -> list[Row]:
    return [Row(f"{what} with an adapter at {name} ÷ without", found[f"{what}_with_by_without"],
                0.9 if what == "decode" else None,
                f"{found[f'{what}_with']:.1f} and {found[f'{what}_without']:.1f} tok/s; rank 16, "
                f"{found['package_bytes'] / 1e6:.1f} MB")
            for name, found in part.items() if isinstance(found, dict) for what in ("decode", "prefill")]


def long_rows(part: dict) -> list[Row]:
    places = [at for at in (64, 1024, 2048, 4096) if figure(part, f"ours: decode at {at}", "step_median_ms")]
    steps = [figure(part, f"ours: decode at {at}", "step_median_ms")["median"] for at in places]
    slope = (steps[-1] - steps[0]) / (places[-1] - places[0])
    worst = max(abs(step - (steps[0] + slope * (at - places[0]))) / step for at, step in zip(places, steps))
    per_second = part["kv_bytes_per_position"] / (slope * 1e-3) / 1e9
    return [Row("decode at 4k: ours ÷ llama.cpp",
                ratio(part, "ours: decode at 4096", "llama.cpp: decode at 4096"), 2.5,
                f"{show(figure(part, 'ours: decode at 4096'), 'tok/s')}; "
                f"{show(figure(part, 'llama.cpp: decode at 4096'), 'tok/s')}"),
            Row("decode at 4k: int8 K and V ÷ fp16",
                ratio(part, "ours, int8 K and V: decode at 4096", "ours: decode at 4096"), None,
                f"{show(figure(part, 'ours, int8 K and V: decode at 4096'), 'tok/s')}; "
                f"{part['kv_bytes_per_position_int8']} and {part['kv_bytes_per_position']} bytes a position"),
            Row("step linear in context: greatest deviation", worst, 0.15,
                f"{steps[0]:.2f} ms + {1e6 * slope:.0f} ns a position ({per_second:.1f} GB/s of K and V)",
                at_most=True, unit="")]


def pair_rows(part: dict, name: str, decode: float | None, prefill: float | None) -> list[Row]:
    return [Row(f"{name}, {what}{count}: ours ÷ llama.cpp", ratio(part, f"ours: {what}", f"llama.cpp: {what}"),
                goal, f"{show(figure(part, f'ours: {what}'), 'tok/s')}; "
                f"{show(figure(part, f'llama.cpp: {what}'), 'tok/s')}")
            for what, count, goal in (("decode", "", decode), ("prefill", f" {part['prompt']}", prefill))]


def growth_rows(parts: dict) -> list[Row]:
    part = parts["growth"]
    share = stream_share(part, "ours: decode", part["weight_bytes"])
    rows = [Row("1B shape, decode: share of the stream", share, 0.85,
                f"{show(figure(part, 'ours: decode'), 'tok/s')}; {part['weight_bytes'] / 1e6:.0f} MB; "
                f"{show(figure(part, 'stream', 'gb_per_s'), 'GB/s')}", unit="")]
    rows += pair_rows(part, "1B shape", None, None)
    if "engine" in parts and share:
        small = stream_share(parts["engine"], "ours: decode", parts["engine"]["weight_bytes"])
        rows.append(Row("share of the stream, 135M ÷ 1B", small / share, 0.85, ""))
    return rows


def stolen_rows(part: dict) -> list[Row]:
    rows = [Row("one core half stolen ÷ alone",
                ratio(part, "ours: one core half stolen", "ours: alone"), 0.45,
                show(figure(part, "ours: one core half stolen"), "tok/s"))]
    slow = figure(part, "ours: one core half stolen", "step_slowest_ms")
    step = figure(part, "ours: alone", "step_median_ms")
    rows.append(Row("one core half stolen: longest stall", slow["median"] - step["median"], 5,
                    f"slowest step {show(slow, 'ms')}", at_most=True, unit="ms"))
    rows.append(Row("the same, llama.cpp ÷ alone",
                    ratio(part, "llama.cpp: one core half stolen", "llama.cpp: alone"), None,
                    show(figure(part, "llama.cpp: one core half stolen"), "tok/s")))
    return rows


def load_rows(part: dict) -> list[Row]:
    rows = []
    for kind, name, goal in (("warm", "warm file", 1.4), ("narrow", "warm file, without VAES", 1.7),
                             ("cold", "cold file", 1.05)):
        if kind not in part:
            continue  # a result of before that arm
        found = part[kind]
        sealed, plain = (found[arm]["total"]["median"] for arm in ("sealed_ms", "plain_ms"))
        stages = ", ".join(f"{name} {value['median']:.1f}" for name, value in found["sealed_ms"].items())
        rows.append(Row(f"load, {name}: sealed ÷ plain", sealed / plain, goal,
                        f"ms: {stages}", at_most=True))
    return rows


def start_rows(part: dict) -> list[Row]:
    rows = []
    for arm, name in (("moments_ms", "start, warm file, to the first token, TPM out"),
                      ("moments_swtpm_ms", "the same, with a TPM that runs already (swtpm)")):
        if arm not in part:
            continue  # a result of before that arm
        moments = part[arm]
        last = moments["first token, without the TPM"]
        way = ", ".join(f"{name} {ms['median']:.0f}" for name, ms in
                        sorted(moments.items(), key=lambda item: item[1]["median"]) if name.endswith(" role_ready"))
        rows.append(Row(name, last["median"], 60, f"{show(last, 'ms')}; TPM commands "
                        f"{moments['TPM commands']['median']:.0f}; {way}", unit="ms", at_most=True))
    return rows


def service_rows(part: dict) -> list[Row]:
    resident = ", ".join(f"{role} {size:.1f}" for role, size in part["resident_mb"].items())
    return [Row("`casemate serve` to ready", part["start_to_ready_ms"]["median"], None,
                show(part["start_to_ready_ms"], "ms"), unit="ms"),
            Row("first token over TLS, 40 prompt tokens", part["first_token_ms"]["median"], None,
                show(part["first_token_ms"], "ms"), unit="ms"),
            Row("decode over the whole service", part["decode_tokens_per_s"]["median"], None,
                show(part["decode_tokens_per_s"], "tok/s"), unit="tok/s"),
            Row("resident", None if not resident else part["resident_mb"]["worker"], None,
                f"MB: {resident}", unit="MB (worker)")]


def switch_rows(what: str, part: dict) -> list[Row]:
    on, off = part["on_tokens_per_s"], part["off_tokens_per_s"]
    return [Row(f"decode over the service: {what} on ÷ off", on["median"] / off["median"], 0.95,
                f"{show(on, 'tok/s')}; {show(off, 'tok/s')}; start "
                f"{part['on_start_ms']['median']:.0f} and {part['off_start_ms']['median']:.0f} ms")]


def guard_rows(part: dict) -> list[Row]:
    decode = part["decode"]
    few, many = (next(f for f in part["filter"] if f["rules"] == rules) for rules in (200, 2000))
    return [Row("decode: guard on ÷ off", decode["on_by_off"], 0.99,
                f"{decode['decode_guard_on']:.1f} and {decode['decode_guard_off']:.1f} tok/s"),
            Row("output filter, 200 rules", few["mb_per_s"], 40,
                f"[{few['least']} … {few['greatest']}]; held back: median {few['held_bytes_p50']}, "
                f"99 % within {few['held_bytes_p99']} bytes", unit="MB/s a core"),
            Row("output filter, 10 × the rules: time", few["mb_per_s"] / many["mb_per_s"], 1.25,
                f"{many['mb_per_s']} MB/s; 2,000 rules compile in {many['compile_ms']} ms", at_most=True)]


def rows(result: dict) -> list[Row]:
    parts, intel = result["parts"], "amx_int8" in result["machine"]["features"]
    makers = {"engine": lambda: engine_rows(parts, intel),
              "adapters": lambda: adapter_rows(parts["adapters"]), "long": lambda: long_rows(parts["long"]),
              "growth": lambda: growth_rows(parts),
              "gemma": lambda: pair_rows(parts["gemma"], "Gemma 3 270M", 1.8, 2),
              "stolen": lambda: stolen_rows(parts["stolen"]),
              "load": lambda: load_rows(parts["load"]), "service": lambda: service_rows(parts["service"]),
              "start": lambda: start_rows(parts["start"]),
              "sandbox": lambda: switch_rows("sandbox", parts["sandbox"]),
              "tls": lambda: switch_rows("TLS", parts["tls"]),
              "guard": lambda: guard_rows(parts["guard"])}
    return [row for name, make in makers.items() if name in parts for row in make()]


def table(result: dict, found: list[Row]) -> str:
    machine = result["machine"]
    caches = ", ".join(f"{name} {size}" for name, size in machine["caches"].items())
    lines = [f"{machine['cpu']}, {machine['cores']} cores ({', '.join(machine['features'])}; {caches}); "
             f"cgroup CPU {machine['cgroup_cpu']}, memory {machine['cgroup_memory']}; commit "
             f"{machine['commit']}; {result['threads']} threads; {result['model']}.", "",
             "| what | figure | goal | met | from |", "|---|---|---|---|---|"]
    lines += [row.text() for row in found]
    lines += [""] + [f"- {note}" for note in result["notes"]]
    disturbed = sum(f["disturbed_rounds"] for part in result["parts"].values()
                    for f in part.get("figures", {}).values())
    every = sum(f["all_rounds"] for part in result["parts"].values()
                for f in part.get("figures", {}).values())
    lines += [f"- {disturbed} of {every} rounds shared their cores with other work; they count only where "
              "a figure has no other.", f"- No arm yet: {', '.join(ABSENT)}."]
    return "\n".join(lines)


def picture(result: dict, found: list[Row]) -> str:
    """Bars of what has a goal, each as a share of its goal."""
    shown = [row for row in found if row.goal and row.value]
    height = 30 * len(shown) + 50
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" width="860" height="{height}" '
             'font-family="sans-serif" font-size="13">',
             f'<text x="10" y="20">{html.escape(result["machine"]["cpu"])}, commit '
             f'{result["machine"]["commit"]}; the line is the goal, longer is better</text>']
    for i, row in enumerate(shown):
        share = row.goal / row.value if row.at_most else row.value / row.goal
        y, width = 40 + 30 * i, 200 * min(share, 1.9)
        colour = "#3a7d44" if share >= 1 else "#b5482a"
        lines += [f'<text x="10" y="{y + 15}">{html.escape(row.what)}</text>',
                  f'<rect x="370" y="{y}" width="{width:.0f}" height="20" fill="{colour}"/>',
                  f'<text x="{376 + width:.0f}" y="{y + 15}">{row.value:.2f} {row.unit}</text>']
    lines += [f'<line x1="570" y1="34" x2="570" y2="{height - 12}" stroke="black"/>', "</svg>"]
    return "\n".join(lines) + "\n"


def table_of_two(first: dict, second: dict) -> str:
    """Two runs side by side; the details are the second one's."""
    one = {row.what: row for row in rows(first)}
    lines = ["| what | run 1 | run 2 | goal | met | run 2 from |", "|---|---|---|---|---|---|"]
    for row in rows(second):
        before = one.get(row.what)
        cell = "–" if before is None or before.value is None else f"{before.value:.2f}"
        parts = row.text().split(" | ")
        met = row.met() if before is None or before.met() == row.met() else "once"
        lines.append(" | ".join([parts[0], cell, parts[1], parts[2], met, parts[4]]))
    return "\n".join(lines)


if __name__ == "__main__":
    import json
    import pathlib
    import sys
    print(table_of_two(*(json.loads(pathlib.Path(path).read_text()) for path in sys.argv[1:3])))
