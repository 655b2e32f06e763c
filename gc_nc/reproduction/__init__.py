"""From finished runs to figures, verdicts on the paper's claims, and a report."""
