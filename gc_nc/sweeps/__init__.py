"""Many runs of one config: which runs there are, and where they run."""

from gc_nc.sweeps.members import grid, one_at_a_time

__all__ = ["grid", "one_at_a_time"]
