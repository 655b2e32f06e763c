"""What is measured of finished runs: metrics at checkpoints, transfer, and their pictures."""
