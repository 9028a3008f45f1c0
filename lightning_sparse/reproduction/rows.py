"""The rows of the paper's case study. The published figures are one run each, from the authors' public notebook.

LeNet-300-100 (266,200 weights; biases neither penalised nor counted), MNIST, 48,000 training and 12,000 validation images,
batch 128, 200 epochs, Adam with a learning rate that falls linearly to 0, no pre-training, warm-up or fine-tuning. A weight
counts as non-zero where alpha >= 0.05. Source: LeJeune, Javadi, Baraniuk, NeurIPS 2021, arXiv 2106.07769.
"""

from __future__ import annotations

from dataclasses import dataclass, field

EPOCHS = (1, 10, 25, 50, 100, 150, 190, 200)


@dataclass(frozen=True)
class Row:
    """A method of the table: its packaged recipe and, if published, its figures in %."""

    title: str
    recipe: str
    test_error: float | None = None
    nonzero: float | None = None
    shares: tuple[float, ...] = field(default=(), repr=False)  # non-zero share at EPOCHS
    errors: tuple[float, ...] = field(default=(), repr=False)  # validation error in % at EPOCHS
    slip: str = ""  # how the published run deviates from its method

    @property
    def key(self) -> str:
        """Name of the recipe in file names and on the command line."""
        return key_of(self.recipe)


def key_of(recipe: str) -> str:
    """Return the last part of a recipe's packaged name or path, without ``.yaml``."""
    return recipe.rsplit("/", 1)[-1].removesuffix(".yaml")


ROWS = (
    Row(
        "VarDrop+LR+AR",
        "paper/vardrop_lr_ar",
        3.21,
        2.38,
        (0.190, 0.052, 0.039, 0.032, 0.027, 0.025, 0.024, 0.024),
        (20.1, 9.2, 6.7, 5.2, 4.2, 3.9, 3.7, 3.7),
    ),
    Row(
        "VarDrop+LR",
        "paper/vardrop_lr",
        1.41,
        8.85,
        (1, 1, 1, 0.280, 0.134, 0.098, 0.089, 0.089),
        (5.3, 2.4, 1.9, 1.9, 1.8, 1.8, 1.7, 1.7),
    ),
    Row(
        "VarDrop",
        "paper/vardrop",
        1.54,
        59.46,
        (1, 1, 1, 0.968, 0.796, 0.651, 0.597, 0.595),
        (5.2, 2.2, 2.0, 1.8, 1.7, 1.7, 1.6, 1.6),
    ),
    Row(
        "eta-Trick",
        "paper/eta_trick",
        2.16,
        5.13,
        (1, 1, 0.727, 0.115, 0.083, 0.063, 0.052, 0.051),
        (5.4, 2.6, 2.5, 2.5, 2.6, 2.4, 2.3, 2.3),
        slip="it minimised a dual with a doubled term, plus 1e-3 times the sum of log(eta / lam)",
    ),
    Row(
        "AdaProx",
        "paper/ada_prox",
        2.94,
        2.76,
        (0.351, 0.071, 0.038, 0.030, 0.027, 0.027, 0.027, 0.028),
        (10.8, 6.4, 4.5, 3.8, 3.4, 3.4, 3.3, 3.3),
        slip="its prox also ran on the validation batches, so that lam was in effect about 1.25 times as large",
    ),
    Row(
        "AdaTikhonov",
        "paper/ada_tikhonov",
        2.88,
        1.83,
        (0.809, 0.492, 0.222, 0.145, 0.109, 0.088, 0.048, 0.018),
        (10.2, 5.8, 4.0, 3.4, 3.0, 3.0, 3.0, 3.1),
    ),
    Row(
        "LogSum",
        "paper/log_sum",
        2.93,
        1.90,
        (0.814, 0.473, 0.206, 0.156, 0.114, 0.091, 0.039, 0.019),
        (10.1, 5.8, 4.2, 3.5, 3.2, 3.1, 3.1, 3.1),
    ),
    Row("AdaDrop", "paper/ada_drop"),
    Row("AdaDrop, calibrated", "paper/ada_drop_calibrated"),
    Row("GaussDrop", "paper/gauss_drop"),
    Row("GaussDrop, calibrated", "paper/gauss_drop_calibrated"),
)
