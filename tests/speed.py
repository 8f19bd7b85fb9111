"""Makes the tables of speed.md and README.md and the two plots from the measurements in speed.csv.

    python3 tests/speed.py

The tables lie between comments that name them and what they show: <!-- beside llama-360m -->. The
sentences of README.md with figures (claims) are changed by hand; test_bench.py compares them.
"""
import csv
import re
import textwrap
from pathlib import Path

HERE = Path(__file__).resolve().parent
PAGES = HERE / "speed.md", HERE.parent / "README.md"
SIZE, PEER = "based-360m-q8", "llama-360m"      # what README and the plots show
MANY = "writing 64 texts after 1024"
REQUESTS = "64 requests: 512 tokens read, 1,024 written"
NAMES = {"mamba-370m": "Mamba 370M", "mamba2-370m": "Mamba-2 370M", "rwkv7-0.4b": "RWKV-7 0.4B",
         "llama-110m-f32": "`run`, 32 bits", "llama-110m-q8": "`runq`, 8 bits"}


def read(path=HERE / "speed.csv"):
    return list(csv.DictReader(path.read_text().splitlines()))


def pairs(rows, models):
    """{(machine, kernels): {(what, model): {threads: (based.c's row, the other program's)}}}

    Programs that took turns stand one after the other in the file: this one's row is the last one
    before the other's. What was measured again replaces what was measured before; older versions
    are left out. The machine that was measured last comes first, with its best kernels; its first
    test is computed (whole_requests).
    """
    ours, found, versions = {}, {}, {}
    for row in rows:
        place = row["machine"], row["kernels"]
        test = *place, row["threads"], row["what"]
        if row["program"].startswith("based.c"):
            ours[test] = row
        elif row["model"] in models:
            version = ours[test]["program"].split()[1]
            tests = found.pop(place, {}) if versions.get(place) == version else {}
            tests.setdefault((row["what"], row["model"]), {})[row["threads"]] = ours[test], row
            found[place], versions[place] = tests, version
    found = {place: whole_requests(tests) | tests for place, tests in found.items()}
    machines = list(dict.fromkeys(machine for machine, _ in reversed(found)))
    return dict(sorted(found.items(), key=lambda item: (machines.index(item[0][0]), item[0][1])))


def whole_requests(tests):
    """Computed from two other tests: 64 requests of 512 tokens, to each of which 1,024 are written.

    Tokens read and written per second. The time of a token grows in a straight line with those
    before it, if at all, so writing in the middle, after 1,024 tokens, is the mean.
    """
    def whole(reading, writing):
        seconds = 64 * 512 / float(reading["value"]) + 64 * 1024 / float(writing["value"])
        return {**writing, "value": 64 * (512 + 1024) / seconds}

    found = {}
    for (what, model), writing in tests.items():
        reading = tests.get(("reading 512", model), {})
        both = {threads: tuple(map(whole, reading[threads], writing[threads]))
                for threads in writing if threads in reading and what == MANY}
        if both:
            found[REQUESTS, model] = both
    return found


def number(value):
    value = float(value)
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def ratio(ours, theirs):
    """How many times as fast; how many times as much memory the other one needs."""
    memory, quotient = ours["unit"] == "MB", float(ours["value"]) / float(theirs["value"])
    times = 1 / quotient if memory else quotient
    digits = f"{times:.{int(times < 9.95)}f}"
    return f"1/{digits}" if memory else f"{digits}x"


def compared(pair):
    return [number(row["value"]) for row in pair] + [ratio(*pair)] if pair else [""] * 3


def plain(what):
    """A test's name as a reader expects it."""
    what = re.sub(r"(\d+)$", lambda n: f"{int(n[1]):,} tokens", what)
    what = what.replace("after 0 tokens", "at the beginning").replace("reading ", "a prompt of ")
    return what.replace("most memory", "MB of memory").replace("a prompt", "reading a prompt")


def table(header, lines):
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header)]
                     + lines).replace("| --- ", "|---").replace("--- |", "---|")


def told(rows):
    """Programs with their versions, and the days."""
    rows = [*rows]
    programs, days = (dict.fromkeys(row[of] for row in rows) for of in ("program", "date"))
    return ", ".join([*programs, " and ".join(days)])


def under(caption, rows, *contents):
    """A table with a caption, which also names the programs."""
    return textwrap.fill(f"{caption}: {told(rows)}", 100) + "\n\n" + table(*contents)


def beside(rows, *models):
    """A table for each machine."""
    text = []
    for (machine, kernels), tests in pairs(rows, models).items():
        used = [row for test in tests.values() for pair in test.values() for row in pair]
        lines = [[", ".join(filter(None, (NAMES.get(model), plain(what)))),
                  *compared(by_threads.get("1")), *compared(by_threads.get("2"))]
                 for (what, model), by_threads in tests.items()
                 if not (model in NAMES and what.startswith("most memory"))]
        other = used[1]["program"].split()[0]
        header = ["", "based.c, 1 thread", other, "", "based.c, 2 threads", other, ""]
        text.append(under(f"**{machine}**, {kernels} kernels", used, header, lines))
    return "\n\n".join(text)


def alone(rows, what, *models):
    """What based.c does alone, with one thread / two: a line for each model, machine and version.

    what: "speed", or "share" of the memory's speed
    """
    start = {"speed": "", "share": "share of the memory's speed, "}[what]
    found, columns = {}, set()
    for row in rows:
        match = re.fullmatch(start + r"writing after (\d+)", row["what"])
        if match and row["model"] in models and row["program"].startswith("based.c"):
            columns.add(int(match[1]))
            line = found.setdefault((row["machine"], row["model"], row["program"]), {})
            line.setdefault(int(match[1]), {})[row["threads"]] = row
    lines = []
    for (machine, model, _), line in reversed(found.items()):
        used = (row for cell in line.values() for row in cell.values())
        cells = (line.get(column, {}) for column in sorted(columns))
        lines.append([model, f"{machine}: {told(used)}", *(cell and " / ".join(
            number(cell[n]["value"]) if n in cell else "–" for n in "12") or "" for cell in cells)])
    return table(["", "", *(f"after {column:,}" for column in sorted(columns))], lines)


def guesses(rows):
    found = {}
    for row in rows:
        match = re.fullmatch(r"guesses: (.*); (.*) right", row["what"])
        if match:
            found[match[1], row["model"]] = row, match[2]
    used = [row for row, _ in found.values()]
    lines = [[title, model, right, f"{float(row['value']):.2f}x"]
             for (title, model), (row, right) in found.items()]
    return under(f"**{used[0]['machine']}**, one thread", used,
                 ["", "", "right guesses", "speed"], lines)


def shown(rows):
    """The pairs of README: (label, pair)."""
    machine = [row["machine"] for row in rows if row["what"] == MANY][-1]
    found = {kernels: tests for (name, kernels), tests in pairs(rows, [PEER]).items()
             if name == machine}
    best, other = (next((tests for kernels, tests in found.items()
                         if (kernels == "avx512vnni") == vnni), {}) for vnni in (False, True))

    def pair(tests, what, threads):
        return tests.get((what, PEER), {}).get(threads)
    rows = [(REQUESTS, pair(best, REQUESTS, "2")),
            ("writing 64 texts after 1,024 tokens", pair(best, MANY, "2")),
            ("the same with one thread", pair(best, MANY, "1")),
            ("the same without AMX (AVX-512 VNNI)", pair(other, MANY, "2")),
            ("MB of memory, 64 texts after 1,024 tokens", pair(best, "most memory, " + MANY, "2")),
            ("reading a prompt of 512 tokens", pair(best, "reading 512", "2")),
            ("writing one text at the beginning", pair(best, "writing after 0", "2")),
            ("writing one text after 4,096 tokens", pair(best, "writing after 4096", "2"))]
    return machine, [(label, pair) for label, pair in rows if pair]


def summary(rows):
    machine, found = shown(rows)
    used = (row for _, pair in found for row in pair)
    return under(machine, used, ["", "based.c", "llama.cpp", ""],
                 [[label, *compared(pair)] for label, pair in found])


def claims(rows):
    """What README says in sentences."""
    _, found = shown(rows)
    found = dict(found)
    ratios = sorted(float(a["value"]) / float(b["value"]) for label, (a, b) in found.items()
                    if label in ("writing 64 texts after 1,024 tokens", "the same with one thread"))
    ours, theirs = (number(row["value"])
                    for row in found["MB of memory, 64 texts after 1,024 tokens"])
    return [f"64 texts at once {ratios[0]:.0f} to {ratios[-1]:.0f} times as fast as llama.cpp",
            f"with {ours} MB of memory instead of {theirs} MB"]


def render(text, rows):
    """A page with its tables made anew."""
    tables = {function.__name__: function
              for function in (beside, alone, guesses, summary)}

    def make(found):
        name, *models = found[1].split()
        return f"<!-- {found[1]} -->\n{tables[name](rows, *models)}\n<!-- end -->"
    return re.sub(r"<!-- ((?:" + "|".join(tables) + r")\b.*?) -->.*?<!-- end -->", make, text,
                  flags=re.S)


def curves(rows, start):
    """What a plot shows: its title, and {label: points}, of tests whose name begins so.

    Of the machine with the most points; of the last one, if several have as many.
    """
    machines, amx = {}, {row["machine"] for row in rows if row["kernels"] == "amx"}
    for row in rows:
        depth = re.fullmatch(re.escape(start) + r"writing after (\d+)", row["what"])
        best = row["kernels"] == "amx" or row["machine"] not in amx
        if depth and row["model"] in (SIZE, PEER) and best:
            label = f"{row['program'].split()[0]}, {row['threads']} thread"
            label += "s" * (row["threads"] != "1")
            points = machines.setdefault(row["machine"], {})
            points[label, int(depth[1])] = row
    machine, points = max(reversed(machines.items()), key=lambda item: len(item[1]))
    title = f"360 million parameters, 8 bits\n{machine}\n{told(points.values())}"
    lines = {}
    for (label, depth), row in sorted(points.items(), key=lambda item: item[0]):
        lines.setdefault(label, []).append((depth, float(row["value"])))
    return title, lines


PLOTS = {"speed_by_depth.png": ("", "tokens per second"),
         "memory_by_depth.png": ("most memory, ", "most memory of the process, MB")}


def draw(rows, name, directory=HERE):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker
    start, label = PLOTS[name]
    title, lines = curves(rows, start)
    figure, axes = pyplot.subplots(figsize=(7, 4.8))
    for of, points in lines.items():
        axes.plot(*zip(*points), marker="o" if "1" in of else "s", label=of,
                  color="C0" if of.startswith("based.c") else "C1",
                  linestyle=":" if "1" in of else "-")
    axes.set_xscale("symlog", linthresh=1024)
    depths = sorted({depth for points in lines.values() for depth, _ in points})
    axes.set_xticks(depths, [f"{n:,}" for n in depths])
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel("tokens before")
    axes.set_ylabel(label)
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    figure.tight_layout()
    figure.savefig(directory / name, dpi=110, metadata={"Description": repr((title, lines))})
    pyplot.close(figure)


def main():
    rows = read()
    for page in PAGES:
        page.write_text(render(page.read_text(), rows))
    for name in PLOTS:
        draw(rows, name)


if __name__ == "__main__":
    main()
