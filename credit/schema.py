"""The federation's schema: which columns a loan has, what they mean, and what counts as bad.

One file, `schema.yaml`, the same at every lender: it is public and holds no loan. A lender's own column
names and spellings are translated to it in `bank.yaml` (see `credit/source.py`). Ranges and histogram
grids stand here, and not in the data, because bins are derived from sums over all lenders: what is fixed
in public beforehand costs no privacy.
"""

import hashlib
import json
from typing import Annotated, Literal

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field, field_validator, model_validator

from fedfin.parsing import parse_yaml
from fedfin.plan import Section

__all__ = ["CategoricalColumn", "Column", "Label", "NumericColumn", "Schema"]

_NAME_PATTERN = r"^[A-Za-z][A-Za-z0-9_]{0,63}$"


def _spelling(value: object) -> object:
    """Take a whole number of YAML for the text it is in a table; leave the rest for pydantic to judge."""
    if isinstance(value, bool):
        msg = "YAML reads a bare yes, no, on or off as true or false; put the word between quotes"
        raise ValueError(msg)  # noqa: TRY004  (pydantic turns a ValueError, not a TypeError, into a refusal)
    return str(value) if isinstance(value, int) else value


def _listed(value: object) -> object:
    return value if isinstance(value, list | tuple) else [value]


Spelling = Annotated[str, BeforeValidator(_spelling), Field(min_length=1, max_length=200)]
Spellings = Annotated[tuple[Spelling, ...], BeforeValidator(_listed)]


class _Column(Section):
    name: str = Field(pattern=_NAME_PATTERN, description="The column's name in the federation.")
    description: str = Field(default="", description="What the column holds, in words.")
    nullable: bool = Field(default=False, description="Whether a loan may lack the value.")
    protected: bool = Field(
        default=False,
        description="A protected attribute: serves fairness figures, is no input of the model.",
    )
    protected_as_feature: str | None = Field(
        default=None,
        description="The reason, in words, why this protected attribute may be an input after all.",
    )

    @model_validator(mode="after")
    def _reason_has_words(self) -> "_Column":
        reason = self.protected_as_feature
        if reason is not None and not reason.strip():
            msg = f"protected_as_feature of {self.name} is empty; write the reason in words or remove the key"
            raise ValueError(msg)
        if reason is not None and not self.protected:
            msg = f"protected_as_feature of {self.name} needs protected: true; set it, or remove the reason"
            raise ValueError(msg)
        return self

    @property
    def is_feature(self) -> bool:
        """Whether the model may see the column."""
        return not self.protected or self.protected_as_feature is not None


class NumericColumn(_Column):
    """A column of numbers with a public valid range and a public histogram grid."""

    kind: Literal["numeric"] = Field(default="numeric", description="numeric.")
    unit: str = Field(default="", description="Unit of the values, such as months or EUR.")
    minimum: float = Field(description="Smallest valid value.")
    maximum: float = Field(description="Largest valid value.")
    integer: bool = Field(default=False, description="Whether only whole numbers are valid.")
    special_codes: dict[float, str] = Field(
        default_factory=dict,
        description="Values that are no measurement, with their meaning, such as -1: no bureau record.",
    )
    grid: Literal["linear", "log"] = Field(
        default="linear", description="Spacing of the histogram cells; log is even in log(1 + value)."
    )
    grid_cells: int = Field(
        default=64, ge=2, le=4096, description="Cells of the public histogram from which bins are derived."
    )

    @field_validator("special_codes")
    @classmethod
    def _codes_have_meanings(cls, codes: dict[float, str]) -> dict[float, str]:
        for code, meaning in codes.items():
            if not meaning.strip():
                msg = f"special code {code:g} has no meaning; say in words what it stands for"
                raise ValueError(msg)
        return dict(sorted(codes.items()))

    @model_validator(mode="after")
    def _range_and_grid_are_sound(self) -> "NumericColumn":
        if self.minimum >= self.maximum:
            msg = f"minimum {self.minimum:g} of {self.name} is not below maximum {self.maximum:g}; widen it"
            raise ValueError(msg)
        if self.grid == "log" and self.minimum < 0:
            msg = f"grid of {self.name} is log, but minimum {self.minimum:g} is negative; use grid: linear"
            raise ValueError(msg)
        if not np.isfinite(self.maximum - self.minimum) or not np.all(np.diff(self.grid_edges()) > 0):
            msg = f"range of {self.name} cannot be cut into {self.grid_cells} cells; lower grid_cells"
            raise ValueError(msg)
        return self

    @property
    def special_values(self) -> NDArray[np.float64]:
        """The special codes, ascending, shape (num_codes,)."""
        return np.array(sorted(self.special_codes), dtype=np.float64)

    def grid_edges(self) -> NDArray[np.float64]:
        """Return the boundaries of the histogram cells.

        Returns:
            Shape (grid_cells + 1,), strictly increasing, from exactly `minimum` to exactly `maximum`. Cell i
            is [edge i, edge i + 1), the last one closed on both sides. Special codes are not in any cell,
            even where they lie within the range.
        """
        if self.grid == "linear":
            edges = np.linspace(self.minimum, self.maximum, self.grid_cells + 1, dtype=np.float64)
        else:
            low, high = np.log1p(self.minimum), np.log1p(self.maximum)
            edges = np.expm1(np.linspace(low, high, self.grid_cells + 1, dtype=np.float64))
        edges[0], edges[-1] = self.minimum, self.maximum  # rounding must not put a valid value outside
        return edges


class CategoricalColumn(_Column):
    """A column of words out of a closed list."""

    kind: Literal["categorical"] = Field(default="categorical", description="categorical.")
    categories: tuple[Spelling, ...] = Field(
        min_length=1, description="Every spelling that a loan may have, in the order of the model's inputs."
    )

    @field_validator("categories")
    @classmethod
    def _categories_differ(cls, categories: tuple[str, ...]) -> tuple[str, ...]:
        _refuse_padding(categories)
        twice = _repeated(categories)
        if twice is not None:
            msg = f"category {twice!r} stands twice; remove one"
            raise ValueError(msg)
        return categories


Column = NumericColumn | CategoricalColumn


class Label(Section):
    """The outcome of a loan, and what makes it bad."""

    name: str = Field(pattern=_NAME_PATTERN, description="Name of the outcome's column in the federation.")
    bad: Spellings = Field(min_length=1, description="Spelling or spellings of a bad loan, such as 1.")
    good: Spellings = Field(min_length=1, description="Spelling or spellings of a good loan, such as 0.")
    definition: str = Field(
        min_length=1, description="When a loan is bad, in words, such as 90 days past due within 12 months."
    )

    @model_validator(mode="after")
    def _spellings_differ(self) -> "Label":
        _refuse_padding(self.bad + self.good)
        twice = _repeated(self.bad + self.good)
        if twice is not None:
            msg = f"label value {twice!r} stands twice in bad and good; let it stand in one of them, once"
            raise ValueError(msg)
        return self


class Schema(Section):
    """What every lender of a federation agrees a loan looks like."""

    description: str = Field(default="", description="Which loans these are, in words.")
    label: Label = Field(description="The outcome.")
    columns: tuple[Annotated[Column, Field(discriminator="kind")], ...] = Field(
        min_length=1, description="The columns, in the order of the model's inputs."
    )

    @model_validator(mode="after")
    def _columns_fit_together(self) -> "Schema":
        # Compared without case: PostgreSQL folds names, and two columns that differ in case only are a trap.
        twice = _repeated(tuple(column.name.casefold() for column in self.columns))
        if twice is not None:
            msg = f"column {twice!r} stands twice in columns (case makes no difference); rename or remove one"
            raise ValueError(msg)
        if any(column.name.casefold() == self.label.name.casefold() for column in self.columns):
            msg = f"label {self.label.name!r} stands among columns, as a model input; remove it there"
            raise ValueError(msg)
        if not self.features:
            msg = "every column is protected, so the model has no input; add a column that is not"
            raise ValueError(msg)
        return self

    @property
    def features(self) -> tuple[Column, ...]:
        """The columns that may be inputs of the model, in order."""
        return tuple(column for column in self.columns if column.is_feature)

    @property
    def protected(self) -> tuple[Column, ...]:
        """The protected attributes, in order, whether or not they are features."""
        return tuple(column for column in self.columns if column.protected)

    def fingerprint(self) -> str:
        """Return the SHA-256 of the schema's canonical JSON, hex; equal ones mean equal schemas."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_yaml(self) -> str:
        """Return the schema as YAML that `from_yaml` reads back to an equal schema."""
        plain = self.model_dump(mode="python", exclude_defaults=True)
        plain["columns"] = [
            {"name": column.name, "kind": column.kind}
            | {key: list(value) if isinstance(value, tuple) else value for key, value in entry.items()}
            for column, entry in zip(self.columns, plain["columns"], strict=True)
        ]
        plain["label"] = {k: list(v) if isinstance(v, tuple) else v for k, v in plain["label"].items()}
        return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=110)

    @classmethod
    def from_yaml(cls, text: str, origin: str) -> "Schema":
        """Parse a schema file.

        Args:
            text: The file's content.
            origin: The file's name, for errors.

        Raises:
            ConfigError: The text is no YAML, or a key is unknown, absent or holds what it may not; names the
                file, the key, the value and the mend.
        """
        return parse_yaml(text, cls, origin=origin)


def _repeated(words: tuple[str, ...]) -> str | None:
    """Return the first word that stands twice, or None when all differ."""
    seen: set[str] = set()
    for word in words:
        if word in seen:
            return word
        seen.add(word)
    return None


def _refuse_padding(words: tuple[str, ...]) -> None:
    for word in words:
        if word != word.strip():
            msg = f"value {word!r} has spaces around it, which tables are read without; remove them"
            raise ValueError(msg)
