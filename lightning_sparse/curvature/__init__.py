r"""Estimates of H_jj, the curvature that calibrates the mask form: (1 - alpha_j) / alpha_j = lam / (H_jj eta_j).

H is the diagonal of the generalised Gauss-Newton matrix of the loss as it is averaged: over N labels, which are samples,
tokens or pixels. For a layer with input x and output gradient g of the batch's loss, H = N times the sum over samples of
(sum over positions of g x^T)^2: the gradients of a sample's labels are summed before they are squared.
"""

from lightning_sparse.curvature.estimate import Curvature, EmpiricalFisher, calibrated
from lightning_sparse.curvature.sampled import InputMoment, SampledFisher

__all__ = ["Curvature", "EmpiricalFisher", "InputMoment", "SampledFisher", "calibrated"]
