"""Many runs of one config: which they are, and where they run."""

from gc_nc.sweeps.members import grid

__all__ = ["grid"]
