"""A run as `torchrun` starts it: reports a hash of every rank's networks, dies on request.

Arguments: settings as JSON, run directory, rank and step to be killed at (-1 for never).
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

from dinov2_fast.config import load_config
from dinov2_fast.train import trainer


def main() -> None:
    settings, out, rank, step = json.loads(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:])
    original = trainer.train_step

    def train_step(session, batch):
        first_life = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if first_life and (session.place.rank, session.step) == (rank, step):
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(session, batch)
        digest = hashlib.sha256()
        for tensor in (
            *session.pair.state_dict().values(),
            *session.optimizer.state_dict().values(),
        ):
            digest.update(tensor.numpy().tobytes())
        line = {
            "rank": session.place.rank,
            "step": session.step + 1,
            "hash": digest.hexdigest(),
            "images": batch.sample_indices.tolist(),
        }
        with open(out.parent / f"rank{session.place.rank}.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        return result

    trainer.train_step = train_step
    trainer.train(load_config("debug", settings), out)


if __name__ == "__main__":
    main()
