"""What results are for those who use them: numbers, tables and pictures."""

from typing import TYPE_CHECKING, Any, cast

from relflat.plot import tables

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from relflat.result import Flatness


class Shown:
    """A measured number; :class:`relflat.Flatness` is one.

    ``float(flat)`` and ``f"{flat:.3g}"`` are its value; ``<``, ``<=``, ``>`` and ``>=`` compare values, with numbers
    too. ``==`` compares all that was measured, as for any record. A notebook shows a table.
    """

    if TYPE_CHECKING:
        value: float
        stderr: float
        method: str
        layer: str
        samples: int

    def __str__(self) -> str:
        error = f" ± {self.stderr:.2g}" if self.stderr else ""
        return f"kappa({self.layer}) = {self.value:.6g}{error} [{self.method}, n={self.samples}]"

    def __float__(self) -> float:
        return self.value

    def __format__(self, spec: str) -> str:
        return format(self.value, spec) if spec else str(self)

    def __lt__(self, other: object) -> bool:
        return NotImplemented if (value := _value(other)) is None else self.value < value

    def __le__(self, other: object) -> bool:
        return NotImplemented if (value := _value(other)) is None else self.value <= value

    def __gt__(self, other: object) -> bool:
        return NotImplemented if (value := _value(other)) is None else self.value > value

    def __ge__(self, other: object) -> bool:
        return NotImplemented if (value := _value(other)) is None else self.value >= value

    def to_dict(self) -> dict[str, Any]:
        """All that was measured, by name; plain values."""
        return dict(vars(self))

    def plot(self, *, ax: "Axes | None" = None, **options: Any) -> "Axes":
        """Draw it with its error: :func:`relflat.plot.layers` of this one layer."""
        return self.alone().plot(ax=ax, **options)

    def alone(self) -> "ByLayer":
        """The mapping with it alone."""
        return ByLayer({self.layer: cast("Flatness", self)})

    def _repr_html_(self) -> str:
        return self.alone()._repr_html_()


def _value(x: object) -> float | None:
    """The number that something stands for; None if it is none."""
    return float(x) if isinstance(x, Shown | float | int) else None


class ByLayer(dict[str, "Flatness"]):
    """``{qualified name: Flatness}`` in order of registration: a dictionary that prints and renders as a table."""

    @property
    def total(self) -> float:
        """Kappa added up over the layers: what FAM's strength multiplies."""
        return sum(flat.value for flat in self.values())

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """All that was measured, by layer and name; plain values."""
        return {name: flat.to_dict() for name, flat in self.items()}

    def plot(self, *, ax: "Axes | None" = None, **options: Any) -> "Axes":
        """Draw a bar with its error for each layer: :func:`relflat.plot.layers`."""
        from relflat.plot import layers

        return layers(self, ax=ax, **options)

    def __str__(self) -> str:
        return tables.as_text(tables.COLUMNS, tables.rows_of(self), tables.about(self))

    def _repr_html_(self) -> str:
        return tables.as_html(tables.COLUMNS, tables.rows_of(self), tables.about(self))
