"""Image classification data: sources, class splits, and batches that live on the device."""
