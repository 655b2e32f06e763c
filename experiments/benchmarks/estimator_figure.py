"""The picture of the estimators benchmark."""

from pathlib import Path

from matplotlib.figure import Figure

_MARKERS = "osv^Dx"


def draw_errors(
    errors: dict[str, dict[int, float]], exact_products: int, path: Path, title: str
) -> None:
    """Draws the relative error of an example against Jacobian products; a line marks exact GC.

    Args:
      errors: {method: {products: error}}.
      exact_products: the number of products that an exact norm costs.
      path: the PNG to write.
      title: the title of the picture.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for (method, values), marker in zip(errors.items(), _MARKERS, strict=True):
        axes.plot(list(values), list(values.values()), marker=marker, label=method)
    axes.axvline(exact_products, color="black", linestyle="--", label="exact")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="Jacobian products an example",
        ylabel="RMS error of an example / GC",
        title=title,
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.01, 0.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
