#!/usr/bin/env bash
# Trainer.estimated_stepping_batches, which Lightning's documentation gives to schedulers as their
# number of steps, is inf for a run without an end, and -1, an int like any other, for a run of
# max_epochs over an IterableDataset, whose steps are not known. torch's OneCycleLR refuses -1;
# CosineAnnealingLR takes it as T_max, and lets the learning rate jump between its two ends, step by
# step, for the whole run.
#
# Seen with lightning 2.6.6, torch 2.14.1: the output at the end.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet lightning==2.6.6 torch==2.14.1
cd "$folder"
cat > seen.py <<'PYTHON'
import logging
import warnings

warnings.simplefilter("ignore")
import lightning as L
import torch
from torch.utils.data import DataLoader, IterableDataset

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.zeros(6, 1))


class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.rates = []

    def configure_optimizers(self):
        steps = self.trainer.estimated_stepping_batches
        print(type(steps).__name__, steps)
        sgd = torch.optim.SGD(self.parameters(), lr=1.0)
        if steps == float("inf"):
            return sgd
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, T_max=steps)
        return {"optimizer": sgd, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch, index):
        self.rates.append(round(self.optimizers().param_groups[0]["lr"], 3))
        return self.layer(batch).mean()


quiet = dict.fromkeys(
    ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
)
for name, options in {
    "a list, two epochs": {"max_epochs": 2},
    "a stream, two epochs": {"max_epochs": 2},
    "a stream, without an end": {"max_epochs": -1, "max_time": {"seconds": 0}},
}.items():
    print(name, end=": ")
    data = Stream() if "stream" in name else list(torch.zeros(6, 1))
    module = Module()
    L.Trainer(accelerator="cpu", **options, **quiet).fit(module, DataLoader(data, batch_size=2))
    if options["max_epochs"] == 2:
        print("  learning rates", *module.rates)
PYTHON
venv/bin/python -I seen.py 2> said.txt | tee seen.txt
diff seen.txt - <<'EXPECTED'
a list, two epochs: int 6
  learning rates 1.0 0.933 0.75 0.5 0.25 0.067
a stream, two epochs: int -1
  learning rates 1.0 0.0 1.0 0.0 1.0 0.0
a stream, without an end: float inf
EXPECTED
