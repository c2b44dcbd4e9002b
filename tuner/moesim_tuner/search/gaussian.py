"""Gaussian processes over encoded points, in NumPy: fit, predict, condition on what is only thought.

Matérn kernel with nu = 5/2 and a length scale for each parameter (Rasmussen and Williams, Gaussian Processes for
Machine Learning, 2006, equations 2.25, 2.26, 4.17, 5.8 and 5.9), a constant mean of 0, the signal's variance profiled
out. Legend: N points told, M candidates, D columns of an encoded point, P parameters; a parameter has one column or
several.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, cholesky, solve_triangular
from scipy.optimize import minimize

__all__ = ["Floats", "Posterior", "Scales", "fit_scales"]

Floats = NDArray[np.float64]
_ROOT5 = math.sqrt(5.0)
_LENGTH_AT, _LENGTH_SPREAD = 0.6, 0.8
"""log-normal prior of a length scale: its median, as a share of a parameter's range, times the root of how many
parameters there are (Hvarfner et al., arXiv:2402.02229, section 4: scales grow with the root of the dimension)"""
_NOISE_AT, _NOISE_SPREAD = 1e-5, 1.5
_LEAST_NOISE, _MOST_NOISE = 1e-6, 0.3


@dataclass(frozen=True)
class Scales:
    """What is learned of a process: length_P, a length scale a parameter; noise: variance of what is no function of
    the point, as a share of the signal's."""

    length_P: Floats
    noise: float


def _matern(square_NM: Floats) -> Floats:
    """Correlation at squared distances (equation 4.17)."""
    square_NM = np.maximum(square_NM, 0.0)
    root_NM = np.sqrt(square_NM)
    root_NM *= -_ROOT5
    square_NM *= 5.0 / 3.0
    square_NM -= root_NM
    square_NM += 1.0
    square_NM *= np.exp(root_NM, out=root_NM)
    return square_NM


def _squares(a_ND: Floats, b_MD: Floats) -> Floats:
    """Squared distances [N, M]."""
    out = a_ND @ b_MD.T
    out *= -2.0
    out += (a_ND * a_ND).sum(axis=1)[:, None]
    out += (b_MD * b_MD).sum(axis=1)[None, :]
    return np.asarray(out)


def fit_scales(x_ND: Floats, y_N: Floats, column_D: NDArray[np.int64], parameters: int, steps: int = 25) -> Scales:
    """Length scales and noise of the highest posterior density. column_D: whose column each is."""
    number = len(y_N)
    apart_PNN = np.zeros((parameters, number, number))
    for p in range(parameters):
        own = x_ND[:, column_D == p]
        apart_PNN[p] = np.maximum(_squares(own, own), 0.0)
    prior = math.log(_LENGTH_AT * math.sqrt(max(parameters, 1)))

    def loss(theta: Floats) -> tuple[float, Floats]:
        weight_P = np.exp(-2.0 * theta[:-1])
        noise = math.exp(theta[-1])
        root = _ROOT5 * np.sqrt(np.tensordot(weight_P, apart_PNN, 1))
        fall = np.exp(-root)
        k_NN = (1.0 + root + root * root / 3.0) * fall
        k_NN[np.diag_indices(number)] += noise
        low = cholesky(k_NN, lower=True, check_finite=False)
        inverse = cho_solve((low, True), np.eye(number), check_finite=False)
        alpha_N = inverse @ y_N
        signal = max(float(y_N @ alpha_N) / number, 1e-12)
        value = 0.5 * number * math.log(signal) + float(np.log(np.diag(low)).sum())
        rest = inverse - np.outer(alpha_N, alpha_N) / signal
        slope_NN = rest * ((5.0 / 3.0) * (1.0 + root) * fall)
        gradient = np.empty(parameters + 1)
        gradient[:-1] = 0.5 * np.tensordot(apart_PNN, slope_NN, 2) * weight_P
        gradient[-1] = 0.5 * noise * float(np.trace(rest))
        off_P, off = (theta[:-1] - prior) / _LENGTH_SPREAD, (theta[-1] - math.log(_NOISE_AT)) / _NOISE_SPREAD
        value += 0.5 * float(off_P @ off_P) + 0.5 * off * off
        gradient[:-1] += off_P / _LENGTH_SPREAD
        gradient[-1] += off / _NOISE_SPREAD
        return value, gradient

    start = np.full(parameters + 1, prior)
    start[-1] = math.log(_NOISE_AT)
    bounds = [(math.log(0.03), math.log(60.0))] * parameters + [(math.log(_LEAST_NOISE), math.log(_MOST_NOISE))]
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": steps})
    # a ten-thousandth more or less is another processor's rounding
    theta = np.round(found.x, 4)
    return Scales(np.exp(theta[:-1]), math.exp(float(theta[-1])))


class Posterior:
    """A process that has seen `y_N` at `x_ND`, at M candidates: mean_M, deviation_M. `imagine` conditions it on a
    candidate having its mean (Ginsbourger et al., 2010, "kriging believer"), which makes the others' deviations
    smaller and leaves the means."""

    def __init__(self, x_ND: Floats, y_N: Floats, column_D: NDArray[np.int64], scales: Scales, at_MD: Floats) -> None:
        length_D = scales.length_P[column_D]
        x_ND, self._at_MD = x_ND / length_D, at_MD / length_D
        k_NN = _matern(_squares(x_ND, x_ND))
        k_NN[np.diag_indices(len(y_N))] = 1.0 + scales.noise
        low = cholesky(k_NN, lower=True, check_finite=False)
        half_N = solve_triangular(low, y_N, lower=True, check_finite=False)
        self._signal = max(float(half_N @ half_N) / len(y_N), 1e-12)
        self._noise = scales.noise
        across_NM = solve_triangular(low, _matern(_squares(x_ND, self._at_MD)), lower=True, check_finite=False)
        self.mean_M: Floats = half_N @ across_NM
        self._rows = [across_NM]
        self._variance_M: Floats = 1.0 - (across_NM * across_NM).sum(axis=0)

    @property
    def deviation_M(self) -> Floats:
        """Of the function, without noise."""
        return np.sqrt(self._signal * np.maximum(self._variance_M, 1e-10))

    def imagine(self, index: int) -> None:
        """Candidate `index` has been tried and was as expected."""
        own = _matern(_squares(self._at_MD[index : index + 1], self._at_MD))[0]
        for rows in self._rows:
            own -= rows[:, index] @ rows
        own /= math.sqrt(max(float(own[index]) + self._noise, 1e-10))
        self._rows.append(own[None, :])
        self._variance_M = self._variance_M - own * own
