"""Scores of a checkpoint on tasks: which tasks there are, their verdicts, the work and its spread over a cluster, results."""
