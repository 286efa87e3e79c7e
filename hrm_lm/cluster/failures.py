"""What happens when workers fail: a UserError ends the run, anything else starts the workers again and is told.

Ray Train has no public place for either. Left alone, it starts the workers again after any error, and says nothing of it
at the log level that this project gives it.
"""

from typing import Any

from ray.train import Result, TrainingFailedError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision

from hrm_lm.cluster.start import say
from hrm_lm.errors import StorageError, UserError
from hrm_lm.filesystem import one_line


class Trainer(TorchTrainer):
    """A TorchTrainer with this module's failure policy."""

    def _initialize_and_run_controller(self, **options: Any) -> Result:
        options["failure_policy"] = FailurePolicy(self.run_config.failure_config)
        return super()._initialize_and_run_controller(**options)


class FailurePolicy(DefaultFailurePolicy):
    """Lives in Ray Train's controller, whose standard error Ray hands to the driver."""

    attempt = 1

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        failures = getattr(training_failed_error, "worker_failures", {})  # by rank
        # The other workers' errors, if there are any, follow from the UserError: their collectives are cut off.
        if any(isinstance(e, UserError) and not isinstance(e, StorageError) for e in failures.values()):
            return FailureDecision.RAISE
        decision = super().make_decision(training_failed_error)
        if decision == FailureDecision.RETRY:
            self.attempt += 1
            limit = self.failure_config.max_failures
            allowed = "any number" if limit < 0 else limit
            what = "; ".join(f"worker {rank}: {_line(error)}" for rank, error in sorted(failures.items())[:2])
            say(
                f"{what or _line(training_failed_error)}\n"
                f"attempt {self.attempt} starts the workers from the last checkpoint "
                f"({self._worker_group_failures} failures of workers, ray.max_failures allows {allowed})"
            )
        return decision


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)[:200]}"
