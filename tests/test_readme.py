"""What README.md and models/origins/README.md show must work. Every command in a block that begins
with ```sh is run as it stands, in a copy of the project that holds what a fresh clone holds; those
that cannot be run here are listed in NOT_RUN, each with the reason. The demo's text in the picture,
a fingerprint and results of the originals are compared. The programs compile without a warning.
Links and their anchors lead somewhere, and sizes of states follow from the shapes that the exporter
knows."""
import html
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

np = pytest.importorskip("numpy")
import export           # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
README, ORIGINS = "README.md", "models/origins/README.md"
PAGES = (README, ORIGINS, "models/README.md", "tests/README.md", "tests/data/README.md",
         "tests/speed.md")
TEXT = {page: (ROOT / page).read_text() for page in PAGES}
CC = shlex.split(os.environ.get("CC", "cc"))
ABSENT = [tool for tool in ("c++", "pkg-config") if not shutil.which(tool)]

NOT_RUN = {
    "git clone --depth 1 <this repository> based.c && cd based.c":
        "the reader fills in the address",
    "python3 -m venv build/export && . build/export/bin/activate":
        "this test runs with the packages of tests/requirements.txt",
    "pip install -r models/requirements.txt": "the same",
    "./run models/stories260K.bin --bench":
        "takes half a minute; test_cli.py runs --bench with a smaller model",
    "parallel --pipe --block 1M --keep-order ./run models/based-82m-english.bin --jsonl - -j 1 -q "
    "< requests.jsonl > answers.jsonl": "needs GNU parallel; test_engines.py runs it",
    **dict.fromkeys((
        "sbatch --array=0-15 --cpus-per-task=2 --wrap '",
        'awk "NR % $SLURM_ARRAY_TASK_COUNT == $SLURM_ARRAY_TASK_ID" requests.jsonl |',
        "./run models/based-82m-english.bin --jsonl - -j 2 > answers.$SLURM_ARRAY_TASK_ID.jsonl'"),
        "needs Slurm; test_engines.py runs it"),
}
# The tiny model that stands for the released one has no tokenizer: it reads ids, not a prompt.
INSTEAD = {'./run based.bin -i "The capital of France is" -n 30':
           './run based.bin --tokens "3 1 4" --ignore-eos -n 0 --dump-logits l.f32',
           "./run smollm2.bin -m chat":
           './run smollm2.bin --tokens "3 1 4" --ignore-eos -n 0 --dump-logits l.f32'}


def blocks(page, language):
    """The contents of the fenced blocks in this language."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT[page], re.S | re.M)
    assert {found for found, _ in fenced} <= {"sh", "c", "cpp", ""}, page
    return [content for found, content in fenced if found == language]


def commands(block):
    """The commands of a block, without comments and with continued lines joined."""
    lines = re.sub(r"\s*\\\n\s*", " ", block).splitlines()
    return [re.sub(r"\s+#.*", "", line).strip() for line in lines if line.strip()]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the project without what was built; `python3` and `cc` for the PATH lie beside."""
    place = tmp_path_factory.mktemp("clone") / "based.c"

    def link_models(source, target):
        (os.symlink if source.endswith((".bin", ".xz")) else shutil.copy2)(source, target)
    ignored = shutil.ignore_patterns(".git", "build", "run", "*.o", "__pycache__", ".pytest_cache",
                                     ".hypothesis")
    shutil.copytree(ROOT, place, ignore=ignored, copy_function=link_models)
    # tiny models of the same kinds stand for released ones
    (place / "path" / "to").mkdir(parents=True)
    for name, tiny in (("based-360m", "hazyresearch-tiny"),
                       ("powercoder-3b", "decoders/powercoder"),
                       ("SmolLM2-135M-Instruct", "decoders/llama3")):
        (place / "path" / "to" / name).symlink_to(ROOT / "tests" / "data" / tiny)
    (place.parent / "bin").mkdir()
    compiler = shlex.join([shutil.which(CC[0]), *CC[1:]])
    for name, command in (("python3", f'{shlex.quote(sys.executable)} "$@"'),
                          ("cc", f'{compiler} "$@" -O1')):      # done in less time than -O3
        script = place.parent / "bin" / name
        script.write_text(f"#!/bin/sh\nexec {command}\n")
        script.chmod(0o755)
    return place


def run_blocks(page, place):
    """Runs the commands of a page in order, each block in one shell; returns
    {commands of a block: (stdout, stderr)}."""
    environment = {name: value for name, value in os.environ.items()
                   if name not in ("CC", "MAKEFLAGS", "MAKELEVEL")}
    environment["HOME"] = str(place.parent / "home")
    environment["PATH"] = f"{place.parent / 'bin'}:{environment['PATH']}"
    printed = {}
    for block in blocks(page, "sh"):
        script = [INSTEAD.get(c, c) for c in commands(block)
                  if c not in NOT_RUN and not any(tool in c for tool in ABSENT)]
        if script:
            done = subprocess.run(["sh", "-ec", "\n".join(script)], cwd=place, env=environment,
                                  stdin=subprocess.DEVNULL, capture_output=True, text=True)
            assert done.returncode == 0, f"{page}:\n{block}\n{done.stderr}"
            printed[tuple(commands(block))] = done.stdout, done.stderr
    return printed


def output_of(printed, part):
    """(stdout, stderr) of the only block in which a command contains this text."""
    found = [output for block, output in printed.items() if any(part in c for c in block)]
    assert len(found) == 1, part
    return found[0]


def test_readme(clone):
    """All of its commands; the text of the demo, which tests/pictures/make.py has put into a
    picture; the fingerprint; and what the programs print."""
    (clone / "tell.c").write_text(blocks(README, "c")[0])
    (clone / "step.cpp").write_text(blocks(README, "cpp")[0])
    printed = run_blocks(README, clone)
    picture = (ROOT / "tests" / "pictures" / "terminal.svg").read_text()
    shown = " ".join(html.unescape(re.sub(r"<style.*?</style>|<[^>]*>", "", picture)).split())
    told = output_of(printed, "make demo")[0]
    assert " ".join(told[told.index("\nThe fox"):].split()) in shown
    fingerprint = re.search(r"`(logits #\w+)`", TEXT[README])[1]
    assert fingerprint in output_of(printed, " -v")[1].splitlines()
    story = output_of(printed, "tell.c")[0]
    assert len(story.split()) > 30 and story.isascii()


def test_the_originals(clone):
    """All commands of that page, with inputs made here; those with known results give these."""
    torch, taylor, origins = (pytest.importorskip(name) for name in ("torch", "taylor", "origins"))
    from safetensors.numpy import save_file
    if not (clone / "run").exists():
        subprocess.run(["make", "-s", "run"], cwd=clone, check=True)
    rng = np.random.default_rng(1)
    origins.write_llama(clone / "stories15M.bin", rng, (64, 96, 2, 8, 4, 512, 256))
    (clone / "tokenizer.bin").symlink_to(ROOT / "tests" / "data" / "tok512.bin")
    shapes = {"to_q.0.weight": (32, 12), "to_kv.0.weight": (64, 12), "to_out.0.weight": (12, 32)}
    layer = {name: np.float32(rng.normal(size=shape)) for name, shape in shapes.items()}
    torch.save({name: torch.tensor(x) for name, x in layer.items()}, clone / "layer.pt")
    rng.normal(size=(30, 12)).astype("<f4").tofile(clone / "x.f32")
    edifice = dict(taylor.golden("edifice_based.txt"))["c2 2 2 all 16 16 7"]
    weights = {name: np.float32(x) for name, x in edifice.items() if "." in name}
    save_file(weights, clone / "edifice.safetensors")
    edifice["x"][1].astype("<f4").tofile(clone / "window.f32")
    sata = dict(taylor.golden("sata.txt"))["sata d8 dv8 P4"]
    np.concatenate([sata[name] for name in "QKV"], 1).astype("<f4").tofile(clone / "qkv.f32")
    (clone / "sata.c").write_text(blocks(ORIGINS, "c")[0])

    (clone / "y.f32").unlink(missing_ok=True)
    printed = run_blocks(ORIGINS, clone)
    y = np.fromfile(clone / "y.f32", "<f4").reshape(7, 16)
    assert np.abs(y - edifice["y"][1]).max() < 1e-5
    first, *rows = output_of(printed, "sata.c")[0].splitlines()
    features, state = map(int, re.findall(r"\d+", first)[:2])
    floats = 165 * 14 + 16 * 16
    assert features == 165 and 0 <= state - 4 * floats <= 256
    assert f"{floats:,} floats" in TEXT[ORIGINS]
    assert np.abs(np.array([row.split() for row in rows], np.float64) - sata["Y"]).max() < 1e-4


def test_what_is_not_run_is_there():
    """A command that was changed in the text must not stay in the lists."""
    shown = [block for page in (README, ORIGINS) for block in blocks(page, "sh")]
    assert {*NOT_RUN, *INSTEAD} - {c for block in shown for c in commands(block)} == set()


@pytest.mark.parametrize("page", [README, ORIGINS])
def test_the_programs_compile(page, tmp_path):
    for language, compiler in (("c", [*CC, "-std=c99"]), ("cpp", ["c++", "-std=c++11"])):
        for program in blocks(page, language) if compiler[0] not in ABSENT else []:
            (tmp_path / f"program.{language}").write_text(program)
            subprocess.run([*compiler, "-Wall", "-Wextra", "-Werror", f"-I{ROOT}", "-c", "-o",
                            tmp_path / "program.o", tmp_path / f"program.{language}"], check=True)


def state_floats(l):
    """Floats of one layer's state: inputs of a convolution, keys and values of a window, or both
    of these and sums."""
    if l.mixer == 1:
        return (l.conv_width - 1) * l.head_dim_v
    ring = l.kv_heads * (l.head_dim_k + l.head_dim_v)
    if l.mixer == 3:
        return l.window * ring
    assert l.mixer == 2 and l.decay == l.sinks == l.window == 0
    features = math.comb(l.degree + l.head_dim_k, l.degree)
    return l.kv_heads * features * (l.head_dim_v + 2 + (l.head_dim_v + 1) // 2) + l.chunk * ring


@pytest.mark.parametrize("name", ["based-360m", "based-1b"])
def test_state_table(name):
    """The row's state and the length of an ordinary cache that it equals, from the shapes alone."""
    options = SimpleNamespace(window=None, chunk=16, seed=1)
    config, layers, _ = export.open_random(name, options, print)
    state = 4 * sum(map(state_floats, layers))
    row = re.search(rf"^\| {name} \| ([\d,]+) \| ([\d.]+) MB \| (\d+) tokens \|",
                    TEXT["tests/speed.md"], re.M)
    assert int(row[1].replace(",", "")) == export.parameters(config, layers)
    assert f"{state / 1e6:.3g}" == row[2]
    assert round(state / (2 * len(layers) * config.dim * 4)) == int(row[3])
    if name == "based-360m":
        said = " ".join(TEXT[README].split())
        assert f": {row[2]} MB for" in said and f"after {row[3]} tokens" in said


def anchors(text):
    """What GitHub makes of headings: lower case, no punctuation, hyphens instead of spaces."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_file_it_names_exists(page):
    prose = re.sub(r"^```.*?^```$", "", TEXT[page], flags=re.S | re.M)
    for name, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]+))?\)", prose):
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), name
        assert not anchor or anchor in anchors(target.read_text()), anchor
    for name in re.findall(r"`((?:tests|models)/[\w./]+)`", TEXT[page]):
        assert (ROOT / name).exists(), name


def test_lines_are_short():
    """At most 100 columns, except in tables and in what a program prints."""
    for page in PAGES:
        text = re.sub(r"^```(\w*)\n.*?^```$", lambda fence: fence[0] if fence[1] else "",
                      TEXT[page], flags=re.S | re.M)
        long = [line for line in text.splitlines() if len(line) > 100 and line[0] != "|"]
        assert long == [], page
