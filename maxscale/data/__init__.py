"""Data as a pure function: `batch(step)` depends on the seed, the step and the schedule, and on nothing else."""
