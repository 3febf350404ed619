"""What a run learns: k-NN accuracy of raw pixels, at step 0 and at the end, for several seeds.

`python -m tools.measure_learning SET OUT --config demo --steps 600 --seeds 0 1 2` prints the row of
docs/results.md for a folder SET with `train/CLASS/*` and `test/CLASS/*`; runs lie in OUT.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from dinov2_fast.config import load_config
from dinov2_fast.data.datasets import open_images
from dinov2_fast.demo import ImageSet, accuracies, features_of, measure_before
from dinov2_fast.models.frozen import load_model
from dinov2_fast.train.trainer import train

COLUMNS = {
    "raw pixels": "knn_raw_pixels",
    "step 0": "knn_untrained",
    "step 0, patch mean": "knn_untrained_patch_mean",
    "trained": "knn_trained",
    "trained, patch mean": "knn_trained_patch_mean",
}


def measure(folder: Path, out: Path, *, preset: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """One seed: accuracies in percent before and after training.

    Args:
        folder: holds `train` and `test`, each with one folder per class.
        out: run directory; a finished run in it is measured again, not made again.
        preset: configuration, a preset's name or a path.
        overrides: dotted settings, the seed among them.
    Returns:
        `COLUMNS`' values, steps and seconds.
    """
    config = load_config(preset, {**overrides, "data.path": str(folder / "train")})
    train_source, test_source = open_images(folder / "train"), open_images(folder / "test")
    images = ImageSet(train_source, test_source, len(train_source.class_names))
    before = measure_before(config, images)
    run = train(config, out)
    trained = load_model(out, device="cpu")
    after = accuracies("trained", *features_of(trained, images))
    return {**before, **after, "steps": run["steps"], "seconds": run["seconds"]}


def table_row(name: str, results: list[dict[str, Any]]) -> str:
    """Median over seeds with the smallest and largest in brackets, as a row of a Markdown table."""
    cells = []
    for key in COLUMNS.values():
        values = sorted(result[key] for result in results)
        median = f"{statistics.median(values):.1f}"
        cells.append(median if values[0] == values[-1] else f"{median} ({_range(values)})")
    return f"| {name} | {results[0]['steps']} | {' | '.join(cells)} |"


def _range(values: list[float]) -> str:
    return f"{values[0]:.1f} to {values[-1]:.1f}"


def main() -> None:
    """Read the command line, measure every seed, print a line each and the table's row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, metavar="SET")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--config", default="demo")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    results = []
    for seed in options.seeds:
        overrides: dict[str, Any] = {"run.seed": seed}
        if options.steps is not None:
            overrides["schedule.total_steps"] = options.steps
        out = options.out / f"seed-{seed}"
        results.append(measure(options.folder, out, preset=options.config, overrides=overrides))
        print(json.dumps({"seed": seed, **results[-1]}), flush=True)
    print(f"| set | steps | {' | '.join(COLUMNS)} |\n|{'---|' * (2 + len(COLUMNS))}")
    print(table_row(options.folder.name, results))


if __name__ == "__main__":
    main()
