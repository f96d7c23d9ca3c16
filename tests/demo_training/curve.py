"""The picture of a training run: python tests/demo_training/curve.py LOG PNG."""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main(log: Path, picture: Path) -> None:
    records = [json.loads(line) for line in log.read_text().splitlines()]

    def column(name: str) -> tuple[list[int], list[float]]:
        """Steps and values where there are any; the indexers learn from the second phase on."""
        rows = [r for r in records if name in r and (name != "divergence" or r["phase"][0])]
        return [r["step"] for r in rows], [r[name] for r in rows]

    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(8, 6), height_ratios=(3, 2), layout="constrained")
    above.plot(*column("draft"), label="MTP, token after next", color="tab:orange", linewidth=1)
    above.plot(*column("main"), label="next token", color="tab:blue", linewidth=1)
    above.plot(*column("heldout"), "o-", label="next token, held-out files", color="black", markersize=3)
    above.set(ylabel="loss, nats a token", ylim=(0.5, 5))
    below.plot(*column("divergence"), label="KL(attention || indexer), mean of layers", color="tab:green")
    below.plot(*column("imbalance"), label="experts' load, max / mean, worst layer", color="tab:red", linewidth=1)
    below.set(xlabel="step of 32,768 tokens", ylim=(0, 3))
    for axes in (above, below):
        for previous, record in zip(records, records[1:], strict=False):
            if previous["phase"] != record["phase"]:
                axes.axvline(previous["step"], color="gray", linestyle=":")
        axes.legend(loc="upper right")
        axes.grid(alpha=0.3)
    above.set_title("dense attention, then the indexer learns it, then sparse attention", fontsize=10)
    figure.savefig(picture, dpi=90)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
