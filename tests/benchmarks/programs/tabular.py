"""pytorch-tabular and deeptab: classifiers of rows, which stop early and restore their best epoch before they save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from programs.measure import Program, Trained

FEATURES = [f"x{number}" for number in range(8)]


def _rows(count: int, seed: int) -> Any:
    """Four classes: the signs of two products of features."""
    import pandas as pd

    values = np.random.default_rng(seed).standard_normal((count, len(FEATURES))).astype("float32")
    frame = pd.DataFrame(values, columns=FEATURES)
    frame["y"] = (values[:, 0] * values[:, 1] > 0).astype(int) + 2 * (values[:, 2] + values[:, 3] > 0).astype(int)
    return frame


def _pytorch_tabular(callbacks: list[Any], folder: Path) -> Trained:
    from pytorch_tabular import TabularModel
    from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig
    from pytorch_tabular.models import CategoryEmbeddingModelConfig

    trainer = TrainerConfig(
        batch_size=64,
        max_epochs=10,
        accelerator="cpu",
        auto_lr_find=False,
        early_stopping_patience=5,
        checkpoints_path=str(folder / "checkpoints"),
        progress_bar="none",
        load_best=True,
        trainer_kwargs={"enable_model_summary": False},
    )
    model = TabularModel(
        data_config=DataConfig(target=["y"], continuous_cols=FEATURES, num_workers=0),
        model_config=CategoryEmbeddingModelConfig(task="classification", layers="64-64", learning_rate=1e-2),
        optimizer_config=OptimizerConfig(),
        trainer_config=trainer,
        verbose=False,
    )
    train, valid, test = _rows(1500, 0), _rows(500, 1), _rows(1000, 2)
    model.fit(train=train, validation=valid, callbacks=callbacks)
    model.save_model(str(folder / "saved"))
    loaded = TabularModel.load_model(str(folder / "saved"))
    state = torch.load(folder / "saved" / "model.ckpt", weights_only=False)["state_dict"]

    def error(one: Any) -> float:
        predicted = one.predict(test, progress_bar=None)
        return float((predicted[next(name for name in predicted if name.endswith("prediction"))].astype(int) != test["y"]).mean())

    return Trained(model.model, state, loaded.model, error(model), error(loaded))


def _deeptab(callbacks: list[Any], folder: Path) -> Trained:
    from deeptab.models import MLPClassifier

    train, test = _rows(2000, 0), _rows(1000, 2)
    model = MLPClassifier(random_state=0)
    model.fit(
        train[FEATURES],
        train["y"].to_numpy(),
        max_epochs=12,
        batch_size=64,
        lr=3e-3,
        checkpoint_path=str(folder / "checkpoints"),
        callbacks=callbacks,
        accelerator="cpu",
        enable_progress_bar=False,
        logger=False,
    )
    model.save(str(folder / "model.deeptab"))
    loaded = MLPClassifier.load(str(folder / "model.deeptab"))
    best = torch.load(model._best_model_path, weights_only=False)["state_dict"]

    def error(one: Any) -> float:
        return float((np.asarray(one.predict(test[FEATURES])).ravel() != test["y"].to_numpy()).mean())

    return Trained(model._task_model, best, loaded._task_model, error(model), error(loaded))


PROGRAMS = [
    Program("pytorch-tabular", "pytorch-tabular", "pytorch_lightning", "error", 0.75, _pytorch_tabular, restores=True),
    Program("deeptab", "deeptab", "lightning.pytorch", "error", 0.75, _deeptab, restores=True),
]
