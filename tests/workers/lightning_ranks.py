"""A training by Lightning on two ranks: python -m tests.workers.lightning_ranks OUT.safetensors."""

import json
import sys
from pathlib import Path

from limbeck.train.checkpoint import save_weights
from limbeck.train.lightning import DistillationData, DistillationModule
from tests.test_lightning import SETTINGS, distiller, items, trainer

if __name__ == "__main__":
    out = Path(sys.argv[1])
    settings = SETTINGS.model_copy(update={"accumulation": 2})
    trained = distiller(0.0)
    running = trainer(strategy="ddp", devices=2)
    running.fit(DistillationModule(trained, settings), datamodule=DistillationData(items(), items(), settings))
    assert running.world_size == 2
    if running.is_global_zero:
        save_weights(trained, out)
        scores = {name: float(value) for name, value in running.callback_metrics.items()}
        out.with_suffix(".json").write_text(json.dumps(scores))
