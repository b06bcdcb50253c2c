#!/usr/bin/env bash
# lightning 2.6.1: Trainer.estimated_stepping_batches, which its documentation gives to schedulers as
# total_steps, is -1 for a loader over an IterableDataset, though max_epochs ends the run after as many
# steps as there are: no infinity, no None, no error. A schedule over -1 steps is refused by torch's
# OneCycleLR, and taken by others: CosineAnnealingLR(optimizer, T_max=-1) raises the learning rate
# and lowers it again, over two steps, for ever.
