"""Tune's schedulers, which here judge a trial by its validations only.

A trial also reports checkpoints that it saved between validations (`train.checkpoint_every`), with NaN for the metric.
"""

import math
import random

import numpy as np
from ray.tune import schedulers

from hrm_lm.tuning.space import PERTURBED, Sweep


class JudgesValidations:
    """Mixed into a scheduler: lets a trial go on, unjudged, from a report without the metric."""

    _metric: str

    def on_trial_result(self, tune_controller, trial, result) -> str:
        if math.isnan(result[self._metric]):
            return schedulers.TrialScheduler.CONTINUE
        return super().on_trial_result(tune_controller, trial, result)  # type: ignore[misc]  # a mixin


class ASHA(JudgesValidations, schedulers.ASHAScheduler):
    """Asynchronous successive halving."""


class HyperBand(JudgesValidations, schedulers.HyperBandScheduler):
    """Successive halving in brackets."""


class PBT(JudgesValidations, schedulers.PopulationBasedTraining):
    """Population-based training."""


def scheduler(sweep: Sweep) -> schedulers.TrialScheduler:
    """The scheduler that the sweep's file names."""
    options, steps = sweep.tune, sweep.config.train.steps
    if options.scheduler == "asha":
        return ASHA(
            time_attr="step", max_t=steps, grace_period=sweep.grace_steps, reduction_factor=options.reduction_factor
        )
    if options.scheduler == "hyperband":
        return HyperBand(time_attr="step", max_t=steps, reduction_factor=options.reduction_factor)
    if options.scheduler == "pbt":
        random.seed(options.seed)  # it draws from the global generators
        np.random.seed(options.seed)
        space = sweep.param_space()
        return PBT(
            time_attr="step",
            perturbation_interval=sweep.grace_steps,
            hyperparam_mutations={dotted: space[dotted] for dotted in PERTURBED if dotted in space},
        )
    return schedulers.FIFOScheduler()
