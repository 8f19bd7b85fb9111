#!/usr/bin/env python3
"""How much can a Based model recall, and what does each byte of its state buy?

Multi-query associative recall, the task of the zoology study: a text writes down pairs of a key and
a value, then names keys again, and the model must answer each with its value. Nothing but memory
helps. This script trains one tiny model per shape (Taylor feature widths x window sizes, and
controls that have only windows, only convolutions or no window), measures each on the same
sequences and plots accuracy against bytes of state.

    python3 recall.py --smoke --out /tmp/recall         # one shape, short texts: under a minute
    python3 recall.py --out recall --jobs 8             # the whole sweep, shared among the GPUs
    python3 recall.py --plot recall/results.json --out recall.png

OUT/<shape>/ holds each model as train.py saves it; OUT/tests.json the test sequences, token by
token with the expected answers (-1: no question here), so that any other runtime can be measured on
them; OUT/results.json the figures.
"""
import argparse, json, time
from pathlib import Path
import torch
import train as based

VOCAB, WIDTH, HEADS, MLP = 512, 64, 2, 256
FEATURES, KEYS = [4, 8, 16, 24], [8, 16, 32, 64]


def shapes():
    """Name, and the model it stands for. A convolution comes first: it puts a key and its value
    into one vector."""
    table = {f"based-f{f}-w{w}": ("cls", f, w) for f in FEATURES for w in KEYS}
    table.update({f"taylor-f{f}": ("clc", f, 8) for f in FEATURES})
    table.update({f"window-w{w}": ("css", 16, w) for w in KEYS})
    table["conv"] = ("ccc", 16, 8)
    return {name: based.Config(layers, WIDTH, HEADS, f, w, MLP, VOCAB)
            for name, (layers, f, w) in table.items()}


def texts(count, length, pairs, generator, device):
    """A batch of sequences and their answers.

    The first 2 * pairs tokens are keys (1 .. V/2 - 1, all different) each followed by its value
    (V/2 .. V - 1). Every key returns once, at an even distance drawn without repetition from a
    power law (exponent 0.01) that favors soon. Between the questions stand random values: with a
    vocabulary of 512, instead of the study's 8192, random words of every kind would often be keys
    by chance and would write false pairs."""
    half, slots = VOCAB // 2, (length - 2 * pairs) // 2
    uniform = lambda *size: torch.rand(*size, generator=generator, device=device)
    keys = 1 + uniform(count, half - 1).argsort(dim=1)[:, :pairs]
    values = half + (uniform(count, pairs) * half).long()
    weight = 0.01 * torch.arange(1, slots + 1, device=device).float() ** (0.01 - 1)
    # The first to finish among racing exponentials with these rates: a weighted draw without
    # repetition.
    race = -torch.log(uniform(count, slots).clamp_min(1e-20)) / weight
    place = 2 * pairs + 2 * race.argsort(dim=1)[:, :pairs]
    tokens = half + (uniform(count, length) * half).long()
    tokens[:, 0:2 * pairs:2], tokens[:, 1:2 * pairs:2] = keys, values
    tokens.scatter_(1, place, keys)
    answers = torch.full((count, length), -1, device=device).scatter_(1, place, values)
    return tokens, answers


@torch.no_grad()
def accuracy(model, tokens, answers):
    """Share of questions answered right by the most probable token, in float32, in the form the C
    runtime uses."""
    right = asked = 0
    for x, y in zip(tokens.split(64), answers.split(64)):
        logits, _ = model.resume(x)
        right += ((logits.argmax(-1) == y) & (y >= 0)).sum().item()
        asked += (y >= 0).sum().item()
    return right / asked


def train_one(job):
    name, config, args, device = job
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.manual_seed(args.seed)
    generator = torch.Generator(device).manual_seed(args.seed)
    model = based.Based(config).to(device).train()
    optimizers = based.make_optimizers(model, args.lr, 0.1, fused=device.type == "cuda")
    span, began, losses = based.Span(config, args.length, device), time.time(), []
    run = torch.compile(model, dynamic=False) if device.type == "cuda" else model
    for step in range(args.steps):
        # Few pairs are learned first and lead the way to many, so every batch has all counts in
        # equal parts.
        parts = [texts(args.batch // len(args.pairs), args.length, n, generator, device)
                 for n in args.pairs]
        tokens, answers = (torch.cat(part) for part in zip(*parts))
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            loss = run(tokens, answers.masked_fill(answers < 0, -100),
                       span).sum() / (answers >= 0).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o in optimizers:
            for group in o.param_groups:
                group["lr"] = args.lr * based.rate_at(step, args.steps, args.steps // 20, 0.7)
            o.step()
            o.zero_grad(set_to_none=True)
        if step % 100 == 0 or step == args.steps - 1:
            losses.append(round(loss.item(), 4))
    model = model.cpu().eval()
    based.save_model(model, None, Path(args.out) / name)
    tests = json.loads((Path(args.out) / "tests.json").read_text())
    result = dict(layers=config.layers, feature=config.feature, keys=config.keys,
                  state_bytes=config.state_bytes(),
                  parameters=sum(p.numel() for p in model.parameters()), losses=losses,
                  seconds=round(time.time() - began, 1),
                  accuracy={n: round(accuracy(model, torch.tensor(t["tokens"]),
                                              torch.tensor(t["answers"])), 5)
                            for n, t in tests.items()})
    print(f"{name}: {result['state_bytes']:,} bytes of state, {result['seconds']} s, "
          f"loss {losses[0]} -> {losses[-1]}, "
          + " ".join(f"{n} pairs {a:.3f}" for n, a in result["accuracy"].items()), flush=True)
    return name, result


def plot(results, path):
    """One panel per number of pairs. A line joins models of one window size: along it only the
    feature width grows."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    panels = sorted({int(n) for r in results.values() for n in r["accuracy"]})[-3:]
    fig, axes = plt.subplots(1, len(panels), figsize=(4.4 * len(panels), 4), sharey=True,
                             squeeze=False)
    for ax, n in zip(axes[0], panels):
        def line(names, **style):
            dots = sorted((results[k]["state_bytes"], results[k]["accuracy"][str(n)]) for k in names
                          if k in results)
            if dots:
                ax.plot([b / 1000 for b, _ in dots], [100 * a for _, a in dots], **style)
        for i, w in enumerate(KEYS):
            line([f"based-f{f}-w{w}" for f in FEATURES], marker="o", color=f"C{i}",
                 label=f"Taylor + window of {w}")
        line([f"taylor-f{f}" for f in FEATURES], marker="^", ls="--", color="C4",
             label="Taylor, no window")
        line([f"window-w{w}" for w in KEYS], marker="s", ls="--", color="0.5", label="windows only")
        line(["conv"], marker="x", ls="", color="k", label="convolutions only")
        ax.set(xscale="log", xlabel="state, kB (float32)", title=f"{n} pairs")
        ax.grid(alpha=0.3)
    axes[0][0].set(ylabel="keys answered right, %", ylim=(-3, 103))
    axes[0][-1].legend(fontsize=7)
    fig.tight_layout()
    fig.savefig(path, dpi=130)


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", required=True, help="folder of the sweep, or picture with --plot")
    p.add_argument("--plot", metavar="RESULTS", help="draw a results.json")
    p.add_argument("--smoke", action="store_true", help="one small shape, short texts, few steps")
    p.add_argument("--only", nargs="*", help="names of shapes (default: all): "
                   + ", ".join(shapes()))
    p.add_argument("--length", type=int, default=256)
    p.add_argument("--pairs", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    p.add_argument("--batch", type=int, default=320, help="sequences per step")
    p.add_argument("--steps", type=int, default=1500)
    p.add_argument("--lr", type=float, default=3e-3)
    p.add_argument("--tests", type=int, default=32, help="test sequences per number of pairs")
    p.add_argument("--jobs", type=int, default=1, help="models trained at the same time")
    p.add_argument("--seed", type=int, default=1)
    args = p.parse_args()
    if args.plot:
        return plot(json.loads(Path(args.plot).read_text()), args.out)
    if args.smoke:
        args.only, args.length, args.pairs = ["based-f8-w8"], 32, [2, 4]
        args.batch, args.steps = 64, 200
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)

    # not the seed of any training text
    generator = torch.Generator().manual_seed(args.seed + 1000)
    tests = {}
    for n in args.pairs:
        tokens, answers = texts(args.tests, args.length, n, generator, "cpu")
        tests[n] = dict(tokens=tokens.tolist(), answers=answers.tolist())
    (out / "tests.json").write_text(json.dumps(tests, separators=(",", ":")) + "\n")

    gpus = torch.cuda.device_count()
    chosen = {n: c for n, c in shapes().items() if not args.only or n in args.only}
    jobs = [(n, c, args, f"cuda:{i % gpus}" if gpus else "cpu")
            for i, (n, c) in enumerate(chosen.items())]
    if args.jobs == 1:
        done = map(train_one, jobs)
    else:
        pool = torch.multiprocessing.get_context("spawn").Pool(args.jobs, maxtasksperchild=1)
        done = pool.imap_unordered(train_one, jobs)
    path, results = out / "results.json", {}
    # written after each model: a sweep cut short keeps what it has
    for name, result in done:
        results[name] = result
        path.write_text(json.dumps(results, indent=1) + "\n")
    plot(results, out / "recall.png")


if __name__ == "__main__":
    main()
