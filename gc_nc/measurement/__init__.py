"""What is measured of finished runs: metrics at checkpoints, transfer, and their pictures."""

from gc_nc.errors import require_extra

require_extra("train", "flax", "matplotlib", "scipy")
