"""From finished runs to figures, verdicts on the paper's claims, and a report."""

from gc_nc.errors import require_extra

require_extra("sweeps", "jinja2")
