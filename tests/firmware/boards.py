"""Builds the firmware for every board, runs it in QEMU, and prints RAM, flash and instructions.

    python3 tests/firmware/boards.py MODEL [--window KEYS] [--boards M3,M4F,...] [--tokens N]
                                     [--prompt TEXT] [--ram KIB]
    python3 tests/firmware/boards.py --size

The logits must be the host's, bit for bit: ./run MODEL -t 0 --repeat-penalty 1 -n N -i PROMPT -v
prints the same fingerprint. The linker is given no more RAM than --ram, so a table that appears at
all proves that the program fits. Instructions per token are counted, not timed (tests/insncount.c):
the same in every run, and a lower bound of cycles, since QEMU knows nothing of caches and flash.
"""
import argparse
import bisect
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
FIRMWARE = ROOT / "tests" / "firmware"
ARM, RISCV, XTENSA = "arm-none-eabi-", "riscv64-unknown-elf-", "xtensa-lx106-elf-"
EMULATORS = {ARM: "qemu-system-arm", RISCV: "qemu-system-riscv32", XTENSA: "qemu-system-xtensa"}
KIB = 1024


class Board:
    """A machine of QEMU.

    flash and ram are where they begin and how long they are; outside is a second, larger memory
    that a checkpoint goes to if it does not fit into flash beside the program.
    """

    def __init__(self, core, machine, tools, flags, flash, ram, outside=None):
        self.core, self.machine, self.tools, self.flags = core, machine, tools, flags.split()
        self.flash, self.ram, self.outside = flash, ram, outside

    def emulator(self):
        return EMULATORS[self.tools]


MPS2 = dict(flash=(0, 4096 * KIB), ram=(0x20000000, 4096 * KIB))
VIRT = dict(flash=(0x80000000, 32768 * KIB), ram=(0x82000000, 4096 * KIB))
BOARDS = [
    # Code for an M0+ on a board with an M3, which has the same instructions and more
    Board("M0+", "mps2-an385", ARM, "-mcpu=cortex-m0plus -mthumb", outside=0x21000000, **MPS2),
    Board("M3", "mps2-an385", ARM, "-mcpu=cortex-m3 -mthumb", outside=0x21000000, **MPS2),
    Board("M4F", "mps2-an386", ARM, "-mcpu=cortex-m4 -mthumb -mfloat-abi=hard -mfpu=fpv4-sp-d16",
          outside=0x21000000, **MPS2),
    Board("M7", "mps2-an500", ARM, "-mcpu=cortex-m7 -mthumb -mfloat-abi=hard -mfpu=fpv5-d16",
          outside=0x60000000, **MPS2),
    Board("M33", "mps2-an505", ARM, "-mcpu=cortex-m33 -mthumb -mfloat-abi=hard",
          flash=(0x10000000, 4096 * KIB), ram=(0x38000000, 4096 * KIB), outside=0x80000000),
    Board("M55", "mps3-an547", ARM, "-mcpu=cortex-m55 -mthumb -mfloat-abi=hard",
          flash=(0, 512 * KIB), ram=(0x20000000, 512 * KIB), outside=0x70000000),
    Board("RV32IMAC", "virt", RISCV, "-march=rv32imac -mabi=ilp32", **VIRT),
    Board("RV32IMAFC", "virt", RISCV, "-march=rv32imafc -mabi=ilp32f", **VIRT),
    Board("lx106", "sim", XTENSA, "-mlongcalls", flash=(0x60000000, 16384 * KIB),
          ram=(0x61000000, 4096 * KIB)),
    # A real chip's limits: 1 MB of flash, 128 KB of RAM
    Board("STM32F405", "netduinoplus2", ARM,
          "-mcpu=cortex-m4 -mthumb -mfloat-abi=hard -mfpu=fpv4-sp-d16",
          flash=(0x08000000, 1024 * KIB), ram=(0x20000000, 128 * KIB)),
]
# make size: cores, with or without a board here
CORES = [("Cortex-M0+", ARM, "-mcpu=cortex-m0plus -mthumb"),
         ("Cortex-M3", ARM, "-mcpu=cortex-m3 -mthumb"),
         ("Cortex-M4F", ARM, "-mcpu=cortex-m4 -mthumb -mfloat-abi=hard -mfpu=fpv4-sp-d16"),
         ("Cortex-M7", ARM, "-mcpu=cortex-m7 -mthumb -mfloat-abi=hard -mfpu=fpv5-d16"),
         ("Cortex-M33", ARM, "-mcpu=cortex-m33 -mthumb -mfloat-abi=hard"),
         ("Cortex-M55", ARM, "-mcpu=cortex-m55 -mthumb -mfloat-abi=hard"),
         ("RV32IMAC", RISCV, "-march=rv32imac -mabi=ilp32"),
         ("RV32IMAFC", RISCV, "-march=rv32imafc -mabi=ilp32f"),
         ("Xtensa lx106", XTENSA, "-mlongcalls")]
# As most embedded projects build: gcc may fuse float operations, unless the source forbids it.
STRICT = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-DBASED_FREESTANDING",
          "-ffunction-sections", "-fdata-sections", f"-I{ROOT}"]
# What a program is linked with besides main.c: output and the end of the program, the C library
HOSTED = [FIRMWARE / "semihost.c", "--specs=picolibc.specs", "--oslib=semihost", "--crt0=minimal"]
LIBRARY = {ARM: HOSTED, RISCV: HOSTED, XTENSA: [
    FIRMWARE / "lx106.c", "--specs=/usr/lib/xtensa-lx106-elf/picolibc.specs", "-nostartfiles",
    "-T", FIRMWARE / "lx106.ld"]}
PACKAGES = ("gcc-arm-none-eabi picolibc-arm-none-eabi gcc-riscv64-unknown-elf "
            "picolibc-riscv64-unknown-elf gcc-xtensa-lx106 picolibc-xtensa-lx106-elf "
            "qemu-system-arm qemu-system-misc")


class Failed(Exception):
    pass


def command(*args, **more):
    """stdout and stderr of a command that must succeed."""
    done = subprocess.run([str(a) for a in args], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, stdin=subprocess.DEVNULL, timeout=900, **more)
    if done.returncode:
        raise Failed(f"{' '.join(map(str, args))}\n{done.stdout}")
    return done.stdout


# ---- Building ------------------------------------------------------------------------------------

def fits_flash(board, model):
    return model.stat().st_size + 64 * KIB <= board.flash[1]


def holds(board, model):
    """A checkpoint too large for the flash may lie in memory that the board has outside."""
    return fits_flash(board, model) or board.outside is not None


def build(board, model, options, out, ram):
    """The firmware as an ELF file, and how to load the checkpoint where it is not inside."""
    inside = fits_flash(board, model)
    if not holds(board, model):
        raise Failed(f"{model.stat().st_size:,} bytes do not fit into the flash of {board.machine}")
    places = {"__flash": board.flash[0], "__flash_size": board.flash[1], "__ram": board.ram[0],
              "__ram_size": ram, "__stack_size": options.stack * KIB}
    sources, loader = [ROOT / "based.c", ROOT / "tokenizer.c", FIRMWARE / "main.c"], []
    if inside:
        sources.append(FIRMWARE / "model.S")
    else:
        places.update(checkpoint=board.outside, checkpoint_end=board.outside + model.stat().st_size)
        loader = ["-device", f"loader,file={model},addr={board.outside:#x},force-raw=on"]
    arena = ram - (options.stack + 2) * KIB
    command(f"{board.tools}gcc", *STRICT, *options.optimise.split(), *board.flags,
            *LIBRARY[board.tools], f'-DMODEL="{model}"',
            f'-DPROMPT="{options.prompt}"', f"-DTOKENS={options.tokens}", f"-DARENA={arena}",
            *sources, "-Wl,--gc-sections",
            *(f"-Wl,--defsym={name}={value:#x}" for name, value in places.items()),
            "-o", out, "-lm")
    return loader


def sections(tools, path):
    """(text and constants, initialized data, zeroed data) of an ELF file."""
    text, data, bss = command(f"{tools}size", path).splitlines()[1].split()[:3]
    return int(text), int(data), int(bss)


def symbols(tools, path):
    """[(address, name)] of the functions of an ELF file, in order."""
    rows = (line.split() for line in command(f"{tools}nm", "-n", path).splitlines())
    return [(int(row[0], 16), row[2]) for row in rows if len(row) == 3 and row[1] in "tTwW"]


# ---- Running -------------------------------------------------------------------------------------

def counter(directory):
    """The plugin, or None where it cannot be built."""
    out = directory / "insncount.so"
    try:
        command(os.environ.get("CC", "cc"), "-O2", "-shared", "-fPIC", "-o", out,
                ROOT / "tests" / "insncount.c")
    except (Failed, OSError):
        return None
    return out


def emulate(board, elf, loader, plugin, directory):
    """What the firmware printed, and how many instructions had run when each token began."""
    counts, profile = directory / "counts", directory / "profile"
    args = ["timeout", "600", board.emulator(), "-M", board.machine, "-display", "none",
            "-monitor", "none", "-serial", "stdio" if board.machine == "sim" else "null",
            "-semihosting-config", "enable=on,target=native", "-kernel", elf, *loader]
    if board.machine == "virt":
        args += ["-bios", "none"]
    if board.machine == "sim":
        args += ["-cpu", board.core]
    if plugin:
        mark = dict((name, at) for at, name in symbols(board.tools, elf))["token_begins"]
        args += ["-plugin", f"file={plugin},out={counts},mark={mark:#x},profile={profile}"]
    text = command(*args)
    marks = [int(line) for line in counts.read_text().split()[:-1]] if plugin else []
    return text, marks


def most_instructions(board, elf, directory):
    """Lines that name the functions that took the most instructions."""
    functions, total = symbols(board.tools, elf), {}
    starts = [at for at, _ in functions]
    for line in (directory / "profile").read_text().splitlines():
        address, count = line.split()
        name = functions[max(bisect.bisect(starts, int(address, 16)) - 1, 0)][1]
        total[name] = total.get(name, 0) + int(count)
    everything = sum(total.values())
    first = sorted(total.items(), key=lambda item: -item[1])[:8]
    return [f"    {100 * count / everything:5.1f} %  {name}" for name, count in first]


def value(text, name):
    found = re.search(rf"^{name}(\w+)$", text, re.M)
    if not found:
        raise Failed(f"the firmware said nothing of '{name}':\n{text}")
    return found.group(1)


def measure(board, model, options, plugin, want):
    """One row of the table, and the profile if wanted.

    Raises Failed if anything is not as it must be.
    """
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        elf = directory / "firmware.elf"
        loader = build(board, model, options, elf, min(options.ram * KIB, board.ram[1]))
        text, marks = emulate(board, elf, loader, plugin, directory)
        got, story = value(text, "logits #"), text.split("\nlogits #")[0]
        if got != want["logits"] or story.rstrip("\n") != want["story"].rstrip("\n"):
            raise Failed(f"{board.core}: logits #{got} on the board, "
                         f"#{want['logits']} on this computer\n{text}")
        taken = [int(value(text, key + " ")) for key in ("arena", "other", "stack")]
        code = sum(sections(board.tools, elf)[:2]) - (0 if loader else model.stat().st_size)
        steps = [after - before for before, after in zip(marks, marks[1:])]
        row = [board.machine, board.core, f"{sum(taken):,}", *(f"{n:,}" for n in taken),
               f"{code:,}", f"{sum(steps) // len(steps):,}" if steps else "-", f"#{got}"]
        profile = plugin and options.profile
        return row, most_instructions(board, elf, directory) if profile else []


def host(model, options):
    """The same story on this computer."""
    done = subprocess.run([ROOT / "run", model, "-t", "0", "--repeat-penalty", "1",
                           "-n", str(options.tokens), "-i", options.prompt, "-v"],
                          capture_output=True, text=True, check=False)
    found = re.search(r"logits #(\w+)", done.stderr)
    if done.returncode or not found:
        raise Failed(f"./run {model}: {done.stderr}")
    return {"story": done.stdout, "logits": found.group(1)}


def table(head, rows):
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        print("  ".join(cell.ljust(w) if i < 2 else cell.rjust(w)
                        for i, (cell, w) in enumerate(zip(row, widths))))


# ---- A smaller window ----------------------------------------------------------------------------

def checksum(data):
    """based_checksum of based.h part 7, over whole words."""
    lanes, g = list(range(1, 17)), len(data)
    data += bytes(-len(data) % 64)
    for i, word in enumerate(struct.unpack(f"<{len(data) // 4}I", data)):
        if i * 4 < g:
            lanes[i % 16] = (lanes[i % 16] * 0x9e3779b1 + word) & 0xffffffff
    for lane in lanes:
        g = ((g ^ lane) * 0x9e3779b97f4a7c15) & 0xffffffffffffffff
        g ^= g >> 32
    return g


def shrink(model, window, out):
    """A copy of a checkpoint whose window layers see at most `window` keys.

    That is a number in the header; the weights are the same. Text that is shorter than the window
    stays the same too.
    """
    data = bytearray(model.read_bytes())
    for layer in range(struct.unpack_from("<I", data, 40)[0]):
        at = 256 + 128 * layer + 44
        keys = struct.unpack_from("<I", data, at)[0]
        struct.pack_into("<I", data, at, min(keys, window))
    struct.pack_into("<Q", data, 24, checksum(bytes(data[32:])))
    out.write_bytes(data)
    return out


# ---- The two tables ------------------------------------------------------------------------------

def firmware(options, directory):
    model = Path(options.model).resolve()
    if options.window:
        model = shrink(model, options.window, directory / model.name)
    boards = [b for b in BOARDS if not options.boards or b.core in options.boards.split(",")]
    missing = {tool for b in boards for tool in (b.tools + "gcc", b.emulator())
               if not shutil.which(tool)}
    if not boards:
        raise Failed(f"--boards {options.boards}: there are {', '.join(b.core for b in BOARDS)}")
    if missing:
        raise Failed(f"not here: {', '.join(sorted(missing))} "
                     f"(on Debian: apt-get install {PACKAGES})")
    want, plugin, rows = host(model, options), counter(directory), []
    for board in boards:
        if not options.boards and (board.ram[1] < options.ram * KIB or not holds(board, model)):
            continue                    # too small for this model; it is tried when it is named
        row, lines = measure(board, model, options, plugin, want)
        rows.append(row)
        print("\n".join([f"{board.core} on {board.machine}: as on this computer", *lines]),
              file=sys.stderr)
    print(want["story"].rstrip("\n"))
    seen = f", windows of {options.window} keys" if options.window else ""
    print(f"\n{model.name}, {model.stat().st_size:,} bytes in flash{seen}; "
          f"{options.tokens} tokens after {options.prompt!r}\n")
    table(["board", "core", "RAM", "= arena", "+ static", "+ stack", "code", "instructions/token",
           "logits"], rows)
    print(f"\n{len(rows)} boards: the same text and logits as on this computer, #{want['logits']}")


def size():
    """Bytes of flash and RAM of the library on each core.

    Also those of the whole firmware without its checkpoint.
    """
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for core, tools, flags in CORES:
            if not shutil.which(tools + "gcc"):
                rows.append([core, f"{tools}gcc", *["not here"] * 7])
                continue
            row = [core, f"{tools}gcc"]
            for level in ("-Os", "-O2"):
                out, whole, static = Path(name) / "o", Path(name) / "elf", 0
                for source in ("based.c", "tokenizer.c"):
                    command(f"{tools}gcc", level, *STRICT, *flags.split(), LIBRARY[tools][1],
                            "-c", ROOT / source, "-o", out)
                    text, data, bss = sections(tools, out)
                    row.append(f"{text:,}")
                    static += data + bss
                command(f"{tools}gcc", level, *STRICT, *flags.split(), *LIBRARY[tools],
                        ROOT / "based.c", ROOT / "tokenizer.c", FIRMWARE / "main.c",
                        "-Wl,--gc-sections", "-DARENA=4096", "-Wl,--defsym=checkpoint=0",
                        "-Wl,--defsym=checkpoint_end=0", "-Wl,--defsym=__flash_size=0x40000",
                        "-o", whole, "-lm")
                row.append(f"{sum(sections(tools, whole)[:2]):,}")
            rows.append([*row, str(static)])
    print("Bytes of code and constants, compiled for size and for speed; "
          "static RAM of the library\n")
    table(["core", "compiler", "based.c -Os", "tokenizer.c -Os", "firmware -Os",
           "based.c -O2", "tokenizer.c -O2", "firmware -O2", "RAM"], rows)
    print("\nfirmware: tests/firmware/main.c with all it links, without the checkpoint. "
          "The rest of the RAM is the caller's:\n"
          "based_model_bytes + based_session_bytes, and a stack of about 2,300 bytes; "
          "make firmware measures them.")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", help="checkpoint")
    parser.add_argument("--window", type=int, metavar="KEYS",
                        help="let window layers see at most so many keys")
    parser.add_argument("--boards", metavar="M3,...",
                        help="only these: " + ", ".join(b.core for b in BOARDS))
    parser.add_argument("--tokens", type=int, default=40, metavar="N",
                        help="generate N tokens (40)")
    parser.add_argument("--prompt", default="Once upon a time", metavar="TEXT")
    parser.add_argument("--ram", type=int, default=192, metavar="KIB",
                        help="RAM that there is, in KiB (192)")
    parser.add_argument("--stack", type=int, default=6, metavar="KIB", help="of which stack (6)")
    parser.add_argument("--optimise", default="-O2", metavar="FLAGS", help="compiler flags (-O2)")
    parser.add_argument("--profile", action="store_true",
                        help="name the functions that took the most instructions")
    parser.add_argument("--size", action="store_true",
                        help="only the sizes of the code on every core")
    options = parser.parse_args()
    if not options.size and not options.model:
        parser.error("which MODEL?")
    try:
        with tempfile.TemporaryDirectory() as name:
            size() if options.size else firmware(options, Path(name))
    except Failed as e:
        print(f"boards.py: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
