"""darts, neuralforecast and pytorch-forecasting: forecasts of a noisy sum of two waves; the error is a share of its variance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from programs.measure import Program, Trained

PAST, FUTURE, LENGTH, HELD = 24, 6, 600, 150
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def _series() -> np.ndarray[Any, Any]:
    time = np.arange(LENGTH)
    waves = np.sin(2 * np.pi * time / 12) + 0.5 * np.sin(2 * np.pi * time / 31)
    return (waves + 0.1 * np.random.default_rng(0).standard_normal(LENGTH)).astype("float32")


def _windows() -> list[int]:
    """Where forecasts begin that are held against the series: after what was trained on."""
    return list(range(LENGTH - HELD + PAST, LENGTH - FUTURE, FUTURE))


def _share(forecasts: list[Any]) -> float:
    """Mean squared error of one forecast a window, as a share of the variance."""
    values = _series()
    errors = [np.asarray(given).ravel()[:FUTURE] - values[at : at + FUTURE] for at, given in zip(_windows(), forecasts, strict=True)]
    return float(np.mean(np.square(errors)) / values.var())


def _darts(callbacks: list[Any], folder: Path) -> Trained:
    from darts import TimeSeries
    from darts.models import NBEATSModel

    values = _series()
    model = NBEATSModel(
        PAST,
        FUTURE,
        generic_architecture=True,
        num_stacks=2,
        num_blocks=1,
        num_layers=2,
        layer_widths=64,
        n_epochs=12,
        batch_size=32,
        random_state=0,
        optimizer_kwargs={"lr": 2e-3},
        pl_trainer_kwargs=QUIET | {"callbacks": callbacks},
    )
    model.fit(TimeSeries.from_values(values[:-HELD]))
    model.save(str(folder / "model.pt"))
    loaded = NBEATSModel.load(str(folder / "model.pt"), trusted=True)  # it also holds the callbacks
    state = torch.load(folder / "model.pt.ckpt", weights_only=False)["state_dict"]

    def error(one: Any) -> float:
        pasts = [TimeSeries.from_values(values[at - PAST : at]) for at in _windows()]
        return _share([forecast.values() for forecast in one.predict(FUTURE, series=pasts, verbose=False)])

    return Trained(model.model, state, loaded.model, error(model), error(loaded))


def _neuralforecast(callbacks: list[Any], folder: Path) -> Trained:
    import pandas as pd
    from neuralforecast import NeuralForecast
    from neuralforecast.models import MLP
    from safetensors.torch import load_file

    values = _series()
    frame = pd.DataFrame({"unique_id": "a", "ds": np.arange(LENGTH), "y": values})
    model = MLP(
        h=FUTURE,
        input_size=PAST,
        hidden_size=64,
        num_layers=2,
        max_steps=200,
        learning_rate=3e-3,
        random_seed=0,
        windows_batch_size=64,
        callbacks=callbacks,
        **QUIET,
    )
    program = NeuralForecast(models=[model], freq=1)
    program.fit(frame[:-HELD])
    program.save(str(folder / "saved"), overwrite=True, save_dataset=False)
    loaded = NeuralForecast.load(str(folder / "saved"))
    (path,) = [path for path in (folder / "saved").iterdir() if path.name.startswith("MLP")]
    state = load_file(path)

    def error(one: Any) -> float:
        pasts = [frame[at - PAST : at].assign(unique_id=f"w{at:04d}") for at in _windows()]
        found = one.predict(pd.concat(pasts))
        return _share([found[found["unique_id"] == f"w{at:04d}"]["MLP"].to_numpy() for at in _windows()])

    return Trained(program.models[0], state, loaded.models[0], error(program), error(loaded))


def _pytorch_forecasting(callbacks: list[Any], folder: Path) -> Trained:
    import lightning.pytorch
    import pandas as pd
    from pytorch_forecasting import NHiTS, TimeSeriesDataSet
    from pytorch_forecasting.data import EncoderNormalizer
    from pytorch_forecasting.metrics import MAE

    values = _series()
    frame = pd.DataFrame({"series": "a", "time": np.arange(LENGTH), "y": values})
    options: dict[str, Any] = {"time_idx": "time", "target": "y", "group_ids": ["series"], "time_varying_unknown_reals": ["y"]}
    data = TimeSeriesDataSet(
        frame[:-HELD],
        max_encoder_length=PAST,
        min_encoder_length=PAST,
        max_prediction_length=FUTURE,
        min_prediction_length=FUTURE,
        target_normalizer=EncoderNormalizer(),
        **options,
    )
    model = NHiTS.from_dataset(data, learning_rate=3e-3, hidden_size=64, loss=MAE(), log_interval=-1, optimizer="adam")
    trainer = lightning.pytorch.Trainer(max_epochs=6, default_root_dir=folder, callbacks=callbacks, gradient_clip_val=1.0, **QUIET)
    trainer.fit(model, data.to_dataloader(train=True, batch_size=32, num_workers=0))
    path = trainer.checkpoint_callback.best_model_path  # type: ignore[union-attr]
    loaded = NHiTS.load_from_checkpoint(path, weights_only=False)
    state = torch.load(path, weights_only=False)["state_dict"]
    asked = TimeSeriesDataSet.from_dataset(data, frame[LENGTH - HELD :], predict=False, stop_randomization=True)

    def error(one: Any) -> float:
        loader = asked.to_dataloader(train=False, batch_size=256, num_workers=0)
        found = one.predict(loader, mode="prediction", trainer_kwargs={**QUIET})
        return _share([found[at - (LENGTH - HELD) - PAST] for at in _windows()])

    return Trained(model, state, loaded, error(model), error(loaded))


PROGRAMS = [
    Program("darts (N-BEATS)", "darts", "pytorch_lightning", "MSE / variance", 1.0, _darts),
    Program("neuralforecast (MLP)", "neuralforecast", "pytorch_lightning", "MSE / variance", 1.0, _neuralforecast),
    Program("pytorch-forecasting (N-HiTS)", "pytorch-forecasting", "lightning.pytorch", "MSE / variance", 1.0, _pytorch_forecasting),
]
