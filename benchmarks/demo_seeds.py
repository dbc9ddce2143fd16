"""The demo over several training seeds: does LAPA beat Scratch every time?

    python benchmarks/demo_seeds.py --output outputs/seeds --seeds 1 2 3 4 5

Every seed has its own video, labelled episodes, initialisation and training; the start states that are played are the same.
About eight minutes per seed; finished seeds are not run again.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from lapa.evaluation.demo import main as run_demo
from lapa.evaluation.statistics import intervals_overlap


def cell(table: dict) -> str:
    """A success rate with its interval, in %."""
    low, high = table["ci95"]
    return f"{100 * table['success']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/seeds"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    args = parser.parse_args()
    reports = []
    for seed in args.seeds:
        folder = args.output / f"seed-{seed}"
        run_demo(["--seed", str(seed), "--output", str(folder)])
        reports.append(json.loads((folder / "report.json").read_text(encoding="utf-8")))
    print("\n| seed | LAPA, % | Scratch, % | intervals apart | motion R² | minutes |\n|---|---|---|---|---|---|")
    for report in reports:
        lapa, scratch = (report["methods"][name]["pooled"] for name in ("lapa", "scratch"))
        apart = lapa["success"] > scratch["success"] and not intervals_overlap(lapa, scratch)
        print(
            f"| {report['seed']} | {cell(lapa)} | {cell(scratch)} | {'yes' if apart else 'no'} | "
            f"{report['quantizer']['motion_r2']:.2f} | {report['minutes']:.1f} |"
        )
    for name in ("lapa", "scratch"):
        rates = np.array([100 * report["methods"][name]["pooled"]["success"] for report in reports])
        print(f"{name}: mean {rates.mean():.1f}, standard deviation over seeds {rates.std(ddof=1):.1f}")


if __name__ == "__main__":
    main()
