"""The figures logged at the end of fit match the final weights."""

from __future__ import annotations

import pytest
import torch
from toys import Toy, data, trainer, weights

from lightning_sparse import penalties
from lightning_sparse.callbacks import ReweightedPenalty


@pytest.mark.parametrize("patterns", [[None], [["network.0.*"], ["network.2.*"]]], ids=["one", "two"])
def test_zeros_that_the_user_makes_within_a_frozen_support_are_counted_at_the_end(patterns):
    class Clearing(Toy):
        def on_train_batch_end(self, *_):
            with torch.no_grad():
                self.network[0].weight[:4] = 0

    callbacks = [ReweightedPenalty(penalties.LogSum(2.0), 1e-6, select=select, freeze=0.5) for select in patterns]
    module, run = Clearing(optimizer=lambda parameters: torch.optim.SGD(parameters, 0.1)), trainer(*callbacks, epochs=4)
    run.fit(module, data())
    cleared = 4 * 8 / 176
    assert sum(int((w == 0).sum()) for w in weights(module).values()) / 176 == pytest.approx(cleared)
    assert float(run.callback_metrics["sparsity/total"]) == pytest.approx(cleared)
