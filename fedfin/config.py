"""bank.yaml and federation.yaml: parsed once, unknown keys refused, every key documented from here.

The descriptions of the fields are the documentation: `annotated` writes the examples that `fedfin server init`
and `fedfin client join` leave, and `reference` writes docs/configuration.md; a test holds both to this file.
"""

import re
import types
import typing
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from fedfin.errors import ConfigError
from fedfin.identity import LENDER_NAME_PATTERN
from fedfin.plan import JobPlan, Section

__all__ = [
    "DataSource",
    "FederationConfig",
    "HoldoutConfig",
    "LenderConfig",
    "LenderPolicy",
    "annotated",
    "load_config",
    "parse_yaml",
    "reference",
]

ModelT = TypeVar("ModelT", bound=BaseModel)

_ADDRESS = r"^[A-Za-z0-9_.:\[\]-]+:[0-9]{1,5}$"


class FederationConfig(Section):
    """federation.yaml: the coordinator's whole configuration; paths are relative to the file."""

    federation: str = Field(
        pattern=LENDER_NAME_PATTERN,
        description="The federation's name, in every lender's certificate folder.",
    )
    address: str = Field(
        pattern=_ADDRESS,
        description="host:port under which lenders reach the coordinator; the host is in its certificate.",
    )
    listen: str = Field(
        default="127.0.0.1",
        description="Address that the public TLS listener binds to; 0.0.0.0 for all interfaces of the machine.",
    )
    schema_path: str = Field(
        default="schema.yaml",
        description="The federation's schema: the columns that every lender maps its own to.",
    )
    job: JobPlan = Field(default_factory=JobPlan, description="The job that `fedfin server` runs.")

    @field_validator("address")
    @classmethod
    def _port_exists(cls, address: str) -> str:
        return _with_port(address)

    @property
    def port(self) -> int:
        """Port of the public listener."""
        return int(self.address.rpartition(":")[2])

    @property
    def host(self) -> str:
        """Host name or address in the server's certificate."""
        return self.address.rpartition(":")[0].strip("[]")


class DataSource(Section):
    """Where a lender's loans are; exactly one of path and url."""

    path: str | None = Field(
        default=None, description="A .csv, .csv.gz or .parquet file; relative to bank.yaml, or absolute."
    )
    url: str | None = Field(
        default=None,
        description=(
            "An SQLAlchemy URL without a password, such as postgresql://reader@db.bank.example/loans or"
            " sqlite:///loans.db; PostgreSQL is read through pg8000."
        ),
        repr=False,
    )
    table: str | None = Field(default=None, description="With url: the table or view to read.")
    query: str | None = Field(default=None, description="With url: a SELECT to read instead of a table.")
    password_env: str | None = Field(
        default=None,
        description="With url: the environment variable that holds the password, never the password.",
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="The federation's column name: this table's column name; only where they differ.",
    )
    values: dict[str, dict[str, str]] = Field(
        default_factory=dict,
        description="For a category column: this table's spelling: the federation's spelling.",
    )
    accepted_leaks: tuple[str, ...] = Field(
        default=(),
        description=(
            "Columns that `fedfin client check` suspects to leak the outcome and that you looked at: each was known"
            " before the decision on the loan."
        ),
    )
    missing: tuple[str, ...] = Field(
        default=("", "NA", "N/A", "NaN", "nan", "null", "NULL"),
        description="Texts that mean a missing value in this table.",
    )

    @model_validator(mode="after")
    def _one_place(self) -> "DataSource":
        if (self.path is None) == (self.url is None):
            msg = "give exactly one of path and url"
            raise ValueError(msg)
        if self.path is not None and (self.table or self.query or self.password_env):
            msg = "table, query and password_env go with url, not with path; remove them"
            raise ValueError(msg)
        if self.url is not None and (self.table is None) == (self.query is None):
            msg = "with url, give exactly one of table and query"
            raise ValueError(msg)
        return self

    @field_validator("url")
    @classmethod
    def _no_password(cls, url: str | None) -> str | None:
        if url is not None and (
            re.search(r"//[^@]*:[^@]+@", url) or re.search(r"[?&](password|passwd|pwd)=", url)
        ):
            msg = "take the password out of the URL and name the environment variable that holds it in password_env"
            raise ValueError(msg)
        return url


class HoldoutConfig(Section):
    """The loans on which this lender judges models; they never train one."""

    fraction: float = Field(
        default=0.3,
        gt=0,
        lt=1,
        description="Share of the loans held out, chosen by a secret hash of each row, so it stays the same.",
    )
    source: DataSource | None = Field(
        default=None, description="A table of its own with held-out loans, in place of the fraction."
    )


class LenderPolicy(Section):
    """What this lender agrees to; a job outside it is refused, whatever the coordinator says."""

    epsilon_limit: float = Field(
        default=3.0,
        gt=0,
        le=1000,
        description="Epsilon that all jobs together may spend on one data snapshot, held against the RDP figure.",
    )
    max_delta: float = Field(
        default=1e-5,
        gt=0,
        lt=1e-2,
        description="The largest delta accepted; keep it below one over the number of loans.",
    )
    allow_no_privacy: bool = Field(
        default=False,
        description=(
            "true lets jobs of privacy mode none run on these loans: what leaves then can reveal single loans."
            " For public or synthetic data only."
        ),
    )
    models: tuple[Literal["logistic", "mlp"], ...] = Field(
        default=("logistic", "mlp"), min_length=1, description="Architectures accepted."
    )
    max_parameters: int = Field(
        default=100_000, ge=1, description="The largest model accepted, in parameters."
    )
    max_rounds: int = Field(default=200, ge=1, description="The most rounds of a job.")
    min_cohort: int = Field(default=2, ge=1, description="The smallest quorum (cohort.min_lenders) accepted.")


class LenderConfig(Section):
    """bank.yaml: a lender's whole configuration; paths are relative to the file."""

    name: str = Field(pattern=LENDER_NAME_PATTERN, description="The lender's name in the federation.")
    federation: str = Field(pattern=LENDER_NAME_PATTERN, description="The federation this lender joined.")
    coordinator: str = Field(pattern=_ADDRESS, description="host:port of the coordinator.")
    data: DataSource = Field(description="The loans that train the model.")
    holdout: HoldoutConfig = Field(default_factory=HoldoutConfig, description="The loans that judge it.")
    policy: LenderPolicy = Field(default_factory=LenderPolicy, description="What this lender agrees to.")

    @field_validator("coordinator")
    @classmethod
    def _port_exists(cls, coordinator: str) -> str:
        return _with_port(coordinator)


def load_config(path: Path, model: type[ModelT]) -> ModelT:
    """Read and check a configuration file.

    Args:
        path: A YAML file.
        model: The pydantic model it must fit.

    Raises:
        ConfigError: Names the file, every wrong key, the value seen and the mend.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        msg = f"{path} does not exist; give the path of the file with --config"
        raise ConfigError(msg) from error
    except (OSError, UnicodeDecodeError) as error:
        msg = f"{path} cannot be read: {error}"
        raise ConfigError(msg) from error
    return parse_yaml(text, model, origin=str(path))


def parse_yaml(text: str, model: type[ModelT], *, origin: str) -> ModelT:
    """Parse YAML text into `model`; `origin` names it in errors.

    Raises:
        ConfigError: As `load_config`.
    """
    try:
        data = yaml.load(text, Loader=_StrictLoader)  # noqa: S506  (a SafeLoader that refuses repeated keys)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{origin}, line {mark.line + 1}" if mark is not None else origin
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        msg = f"{where}: {problem}; mend the YAML there"
        raise ConfigError(msg) from error
    except (ValueError, LookupError, AttributeError, RecursionError) as error:
        # PyYAML's own constructors, on a value such as 2024-13-45 or `!!int x`: no place is known.
        msg = f"{origin} holds a value that YAML cannot read ({error}); put texts between quotes"
        raise ConfigError(msg) from error
    if not isinstance(data, dict):
        msg = f"{origin} does not hold keys and values; start from the example that `fedfin` writes"
        raise ConfigError(msg)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = [_explain(detail, model) for detail in error.errors(include_url=False)]
        msg = f"{origin}: " + "; ".join(problems)
        # from None: the original would print the values it was given.
        raise ConfigError(msg) from None


def annotated(model: type[BaseModel], values: Mapping[str, Any], *, heading: str) -> str:
    """Return YAML text with every key of `model`, its description above it and its value or default.

    Args:
        model: The configuration's type.
        values: The values to write, nested like the model; other keys get their defaults, commented out where
            the default is "not given".
        heading: The first comment.
    """
    lines = [f"# {line}".rstrip() for line in heading.strip().splitlines()]
    lines += ["", *_annotate(model, values, indent=0)]
    return "\n".join(lines) + "\n"


def reference(model: type[BaseModel], *, prefix: str = "") -> list[tuple[str, str, str, str]]:
    """Return (key, type and range, default, description) for every key of `model`, nested keys dotted."""
    rows: list[tuple[str, str, str, str]] = []
    for name, info in model.model_fields.items():
        section = _section_of(info.annotation)
        kind = "section" if section else _type_text(info.annotation) + _range_text(info.metadata)
        default = (
            "required"
            if info.is_required()
            else ("" if section else _scalar(info.get_default(call_default_factory=True)))
        )
        rows.append((f"{prefix}{name}", kind, default, info.description or ""))
        if section:
            rows += reference(section, prefix=f"{prefix}{name}.")
    return rows


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, which YAML would silently overwrite."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:  # noqa: FBT001, FBT002
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(
                    problem="a key is a list or a mapping (braces in a text need quotes)",
                    problem_mark=key_node.start_mark,
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key!r} is given twice; keep one", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _with_port(address: str) -> str:
    if not 1 <= int(address.rpartition(":")[2]) <= 65535:
        msg = "a port lies between 1 and 65535; mend it"
        raise ValueError(msg)
    return address


def _explain(detail: ErrorDetails, model: type[BaseModel]) -> str:
    key = ".".join(str(part) for part in detail["loc"]) or "the file"
    info = _field_at(model, detail["loc"])
    about = f" ({info.description})" if info is not None and info.description else ""
    match detail["type"]:
        case "missing":
            return f"{key} is missing; add it{about}"
        case "extra_forbidden":
            known = ", ".join(_keys_at(model, detail["loc"][:-1]))
            return f"{key} is not a key of this release; remove it or mend its spelling (known here: {known})"
        case _:
            value = detail["input"]
            shown = (
                repr(value) if isinstance(value, int | float | str | bool | None) else type(value).__name__
            )
            if "url" in key or len(shown) > 80:
                shown = "the value given"
            message = detail["msg"].removeprefix("Value error, ")
            return f"{key} is {shown}: {message[:1].lower()}{message[1:]}{about}"


def _field_at(model: type[BaseModel], location: tuple[int | str, ...]) -> Any:  # noqa: ANN401  (pydantic's FieldInfo)
    info = None
    section: type[BaseModel] | None = model
    for part in location:
        if section is None or not isinstance(part, str) or part not in section.model_fields:
            return info
        info = section.model_fields[part]
        section = _section_of(info.annotation)
    return info


def _keys_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    for part in location:
        info = model.model_fields.get(str(part))
        section = _section_of(info.annotation) if info else None
        if section is None:
            return []
        model = section
    return list(model.model_fields)


def _section_of(annotation: Any) -> type[BaseModel] | None:  # noqa: ANN401  (a type expression)
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    for option in options:
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


def _annotate(model: type[BaseModel], values: Mapping[str, Any], *, indent: int) -> list[str]:
    pad = "  " * indent
    lines: list[str] = []
    for name, info in model.model_fields.items():
        section = _section_of(info.annotation)
        lines += [f"{pad}# {line}" for line in _wrap(info.description or "", 100 - len(pad))]
        given = values.get(name)
        if section is not None and (
            given is not None or info.is_required() or info.default_factory is not None
        ):
            lines.append(f"{pad}{name}:")
            lines += _annotate(section, given or {}, indent=indent + 1)
        elif name in values:
            lines.append(f"{pad}{name}: {_scalar(given)}")
        else:
            default = info.get_default(call_default_factory=True)
            comment = "# " if default is None or info.is_required() else ""
            lines.append(
                f"{pad}{comment}{name}: {'' if default is None or info.is_required() else _scalar(default)}".rstrip()
            )
    return lines


def _wrap(text: str, width: int) -> list[str]:
    lines: list[str] = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def _scalar(value: object) -> str:
    if isinstance(value, BaseModel):
        return ""
    if isinstance(value, float) and 0.0 < abs(value) < 1e-3:
        # YAML 1.1 reads 1e-05 as text: it wants the point.
        mantissa, exponent = f"{value:e}".split("e")
        return f"{float(mantissa)}e{int(exponent):+03d}"
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True, width=10_000).strip().removesuffix("...").strip()


def _type_text(annotation: Any) -> str:  # noqa: ANN401  (a type expression)
    if typing.get_origin(annotation) is Literal:
        return " or ".join(str(option) for option in typing.get_args(annotation))
    if isinstance(annotation, types.UnionType):
        return " or ".join(
            _type_text(option) for option in typing.get_args(annotation) if option is not type(None)
        )
    if typing.get_origin(annotation) is typing.Annotated:
        return _type_text(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) is tuple:
        return f"list of {_type_text(typing.get_args(annotation)[0])}"
    if typing.get_origin(annotation) is dict:
        return "map"
    names = {int: "whole number", float: "number", str: "text", bool: "true or false"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _range_text(metadata: list[Any]) -> str:
    signs = {"gt": "> ", "ge": ">= ", "lt": "< ", "le": "<= "}
    parts = [
        f"{sign}{bound:g}"
        for rule in metadata
        for key, sign in signs.items()
        if (bound := getattr(rule, key, None)) is not None
    ]
    return f", {', '.join(parts)}" if parts else ""
