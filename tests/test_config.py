"""bank.yaml and federation.yaml: every fault is refused by file, key, value and mend, and no secret is shown."""

import math
import traceback

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fedfin.config import FederationConfig, LenderConfig
from fedfin.errors import ConfigError
from fedfin.parsing import load_config, parse_yaml
from fedfin.plan import JobPlan
from fedfin.reference import annotated, reference

FEDERATION = "federation: alps\naddress: fed.example:9092\n"
LENDER = "name: north\nfederation: alps\ncoordinator: fed.example:9092\ndata: {path: loans.csv}\n"
URL = "postgresql://reader@db.bank.example/loans"
both = pytest.mark.parametrize(("model", "text"), [(FederationConfig, FEDERATION), (LenderConfig, LENDER)])


def refusal(text, model):
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, model, origin="the.yaml")
    return str(caught.value)


def lender_with(data):
    return LENDER.replace("{path: loans.csv}", data)


@both
def test_the_required_keys_are_enough(model, text):
    assert parse_yaml(text, model, origin="the.yaml").model_dump(exclude_unset=True) == yaml.safe_load(text)


@pytest.mark.parametrize(("model", "text"), [(FederationConfig, FEDERATION), (LenderConfig, LENDER)])
def test_a_configuration_never_changes(model, text):
    config = parse_yaml(text, model, origin="the.yaml")
    with pytest.raises(ValueError, match="frozen"):
        config.federation = "other"


@both
def test_an_unknown_key_is_refused_and_the_known_ones_are_named(model, text):
    message = refusal(f"{text}lisetn: 0.0.0.0\n", model)
    assert message.startswith("the.yaml: lisetn is not a key of this release; remove it or mend its spelling")
    for key in model.model_fields:
        assert key in message


def test_a_plan_of_mode_shared_parses_once_its_mends_are_made():
    text = (
        f"{FEDERATION}job: {{privacy: {{mode: shared, planned_dropouts: 1, planned_colluders: 1}},"
        " training: {local_steps: 1}, cohort: {min_lenders: 3}}\n"
    )
    assert parse_yaml(text, FederationConfig, origin="the.yaml").job.privacy.planned_colluders == 1


def test_an_unknown_key_in_a_section_is_refused_by_its_path():
    message = refusal(f"{FEDERATION}job: {{training: {{epochs: 3}}}}\n", FederationConfig)
    assert "job.training.epochs is not a key of this release" in message
    assert "local_steps" in message
    message = refusal(f"{LENDER}policy: {{epsilon: 3}}\n", LenderConfig)
    assert "policy.epsilon is not a key of this release" in message
    assert "epsilon_limit" in message


@both
def test_a_missing_key_is_named_with_its_meaning(model, text):
    message = refusal("federation: alps\n", model)
    for name, info in model.model_fields.items():
        if info.is_required() and name != "federation":
            assert f"{name} is missing; add it ({info.description})" in message


@pytest.mark.parametrize(
    ("text", "model", "line"),
    [
        (f"{FEDERATION}address: other:1\n", FederationConfig, 3),
        (f"{FEDERATION}job:\n  name: a\n  name: b\n", FederationConfig, 5),
        (f"{LENDER}name: south\n", LenderConfig, 5),
        (f"{LENDER}policy:\n  max_rounds: 1\n  min_cohort: 2\n  max_rounds: 2\n", LenderConfig, 8),
    ],
)
def test_a_key_given_twice_is_refused_with_its_line(text, model, line):
    key = text.splitlines()[line - 1].split(":")[0].strip()
    assert refusal(text, model) == (
        f"the.yaml, line {line}: the key '{key}' is given twice; keep one; mend the YAML there"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("federation: Alps!\naddress: fed.example:9092\n", "federation is 'Alps!': string should match"),
        ("federation: alps\naddress: fed.example\n", "address is 'fed.example': string should match"),
        ("federation: alps\naddress: fed.example:70000\n", "a port lies between 1 and 65535"),
        ("federation: alps\naddress: fed.example:0\n", "a port lies between 1 and 65535"),
        (f"{FEDERATION}job: {{name: My Job}}\n", "job.name is 'My Job'"),
        (
            f"{FEDERATION}job: {{model: {{kind: tree}}}}\n",
            "job.model.kind is 'tree': input should be 'logistic'",
        ),
        (f"{FEDERATION}job: {{model: {{hidden: [8, 0]}}}}\n", "a hidden layer has one unit at least"),
        (f"{FEDERATION}job: {{model: {{hidden: [1, 1, 1, 1, 1]}}}}\n", "job.model.hidden: "),
        (f"{FEDERATION}job: {{training: {{rounds: 0}}}}\n", "job.training.rounds is 0"),
        (f"{FEDERATION}job: {{training: {{rounds: many}}}}\n", "job.training.rounds is 'many'"),
        (f"{FEDERATION}job: {{training: {{sample_rate: 1.5}}}}\n", "job.training.sample_rate is 1.5"),
        (f"{FEDERATION}job: {{training: {{learning_rate: .nan}}}}\n", "job.training.learning_rate is nan"),
        (f"{FEDERATION}job: {{privacy: {{epsilon: 0}}}}\n", "job.privacy.epsilon is 0"),
        (f"{FEDERATION}job: {{privacy: {{epsilon: .inf}}}}\n", "job.privacy.epsilon is inf"),
        (f"{FEDERATION}job: {{privacy: {{delta: 0.5}}}}\n", "job.privacy.delta is 0.5"),
        (f"{FEDERATION}job: {{privacy: {{mode: secret}}}}\n", "job.privacy.mode is 'secret'"),
        (f"{FEDERATION}job: 7\n", "job is 7"),
        (f"{FEDERATION}job:\n", "job is None"),
        (
            f"{FEDERATION}job: {{cohort: {{wait_for: 2, min_lenders: 3}}}}\n",
            "cohort.wait_for is 2, below cohort.min_lenders 3; raise it",
        ),
        (
            f"{FEDERATION}job: {{privacy: {{planned_dropouts: 1}}}}\n",
            "privacy.planned_colluders 0 mean something in mode shared only, and privacy.mode is local; leave both out",
        ),
        (
            f"{FEDERATION}job: {{privacy: {{mode: shared, planned_dropouts: 3, planned_colluders: 2}}}}\n",
            "together must be below cohort.min_lenders 5, or nobody's share of the noise is sure to be there",
        ),
        (
            f"{FEDERATION}job: {{privacy: {{mode: shared}}}}\n",
            "set training.local_steps to 1 (it is 10), and take more rounds",
        ),
        (f"{FEDERATION}job: {{aggregation: open}}\n", "job.aggregation is 'open'"),
        (
            f"{FEDERATION}job: {{cohort: {{min_lenders: 2}}}}\n",
            "cohort.min_lenders is 2, and a secure sum takes 3 lenders at least; raise it, or set aggregation to plain",
        ),
        (
            f"{FEDERATION}job: {{training: {{strategy: median}}}}\n",
            "aggregation is secure, which shows the coordinator their sum only; set training.strategy to fedavg, or",
        ),
        (
            f"{FEDERATION}job: {{aggregation: plain, privacy: {{mode: shared}}, training: {{local_steps: 1}}}}\n",
            "privacy.mode is shared and aggregation is plain: a share of the noise does not protect a lender whose",
        ),
        (
            f"{FEDERATION}job: {{evaluation: {{times: 11}}}}\n",
            "evaluation.times is 11, and the job has 10 rounds, each judged once at most; lower it",
        ),
    ],
)
def test_a_wrong_value_of_the_federation_is_refused_by_key_and_value(text, expected):
    message = refusal(text, FederationConfig)
    assert message.startswith("the.yaml: ")
    assert expected in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (LENDER.replace("north", "../north"), "name is '../north': string should match"),
        (LENDER.replace(":9092", ":99999"), "a port lies between 1 and 65535"),
        (f"{LENDER}policy: {{epsilon_limit: -1}}\n", "policy.epsilon_limit is -1"),
        (f"{LENDER}policy: {{allow_no_privacy: maybe}}\n", "policy.allow_no_privacy is 'maybe'"),
        (f"{LENDER}policy: {{models: []}}\n", "policy.models: "),
        (f"{LENDER}policy: {{models: [logistic, tree]}}\n", "policy.models.1 is 'tree'"),
        (f"{LENDER}holdout: {{fraction: 1}}\n", "holdout.fraction is 1"),
        (f"{LENDER}holdout: {{source: {{}}}}\n", "give exactly one of path and url"),
        (lender_with("{}"), "give exactly one of path and url"),
        (lender_with(f"{{path: a.csv, url: '{URL}', table: t}}"), "give exactly one of path and url"),
        (lender_with("{path: a.csv, table: t}"), "go with url, not with path; remove them"),
        (lender_with("{path: a.csv, password_env: P}"), "go with url, not with path; remove them"),
        (lender_with(f"{{url: '{URL}'}}"), "with url, give exactly one of table and query"),
        (
            lender_with(f"{{url: '{URL}', table: t, query: q}}"),
            "with url, give exactly one of table and query",
        ),
    ],
)
def test_a_wrong_value_of_a_lender_is_refused_by_key_and_value(text, expected):
    message = refusal(text, LenderConfig)
    assert message.startswith("the.yaml: ")
    assert expected in message


def test_all_faults_are_named_at_once():
    message = refusal("federation: A\naddress: b\nlisten: 7\nschema: x\n", FederationConfig)
    for part in ("federation is 'A'", "address is 'b'", "listen is 7", "schema is not a key"):
        assert part in message


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://reader:hunter2@db/loans",
        "postgresql://reader:hun/ter2@db/loans",
        "postgresql+pg8000://reader:hunter2:x@db:5432/loans",
        "postgresql://:hunter2@db/loans",
        "postgresql://reader@db/loans?password=hunter2",
        "postgresql://reader@db/loans?sslmode=require&password=hunter2",
    ],
)
def test_a_password_in_the_url_is_refused_and_shown_nowhere(url):
    with pytest.raises(ConfigError) as caught:
        parse_yaml(lender_with(f"{{url: '{url}', table: t}}"), LenderConfig, origin="the.yaml")
    assert "password_env" in str(caught.value)
    told = "".join(traceback.format_exception(caught.value))
    assert "hunter2" not in told
    assert "hun/ter2" not in told


@pytest.mark.parametrize(
    "url", [URL, "postgresql://reader@db:5432/loans", "postgresql://db/loans", "sqlite:///a:b/loans.db"]
)
def test_a_url_without_a_password_is_taken_and_not_in_the_repr(url):
    config = parse_yaml(
        lender_with(f"{{url: '{url}', table: t, password_env: P}}"), LenderConfig, origin="the.yaml"
    )
    assert config.data.url == url
    assert url not in repr(config)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("federation: alps\naddress: [\n", 3),
        ("federation: alps\n  address: x\n", 2),
        ("federation: 'alps\n", 2),
        ("a: 1\n\tb: 2\n", 2),
        ("a: 1\n---\nb: 2\n", 2),
        ("a: !!python/object/apply:os.system [ls]\n", 1),
        ("a: *nowhere\n", 1),
        ("federation: alps\naddress: {{ host }}\n", 2),
        ("? [a, b]\n: 1\n", 1),
    ],
)
@pytest.mark.parametrize("model", [FederationConfig, LenderConfig])
def test_a_fault_of_the_yaml_is_refused_with_its_line(text, line, model):
    message = refusal(text, model)
    assert message.startswith(f"the.yaml, line {line}: ")
    assert message.endswith("; mend the YAML there")


@pytest.mark.parametrize(
    "text", ["a: 2024-13-45\n", "a: !!int x\n", "a: !!bool x\n", "a: !!timestamp x\n", "a: " + "[" * 3000]
)
def test_a_value_that_yaml_cannot_read_is_refused(text):
    assert refusal(text, LenderConfig).startswith("the.yaml holds a value that YAML cannot read")


@pytest.mark.parametrize("text", ["", "# nothing\n", "- a\n- b\n", "alps\n", "7\n"])
def test_a_file_without_keys_is_refused(text):
    assert refusal(text, FederationConfig) == (
        "the.yaml does not hold keys and values; start from the example that `fedfin` writes"
    )


@given(st.text(max_size=60))
def test_any_text_is_parsed_or_refused(text):
    try:
        parse_yaml(text, LenderConfig, origin="the.yaml")
    except ConfigError as error:
        assert str(error).startswith("the.yaml")  # noqa: PT017  (either outcome is right)


def test_a_file_that_is_missing_or_unreadable_is_named(tmp_path):
    with pytest.raises(
        ConfigError, match=r"gone.yaml does not exist; give the path of the file with --config"
    ):
        load_config(tmp_path / "gone.yaml", LenderConfig)
    (tmp_path / "latin.yaml").write_bytes("name: züri\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin.yaml cannot be read"):
        load_config(tmp_path / "latin.yaml", LenderConfig)
    with pytest.raises(ConfigError, match=r"cannot be read"):
        load_config(tmp_path, LenderConfig)


@pytest.mark.parametrize(
    ("model", "values"),
    [
        (FederationConfig, {"federation": "alps", "address": "fed.example:9092"}),
        (
            LenderConfig,
            {"name": "n", "federation": "alps", "coordinator": "[::1]:9092", "data": {"path": "loans.csv"}},
        ),
    ],
)
def test_the_annotated_example_parses_back_to_the_defaults(model, values, tmp_path):
    path = tmp_path / "example.yaml"
    path.write_text(annotated(model, values, heading="An example.\nTwo lines."), encoding="utf-8")
    assert load_config(path, model) == model.model_validate(values)


def test_the_annotated_example_holds_the_values_it_was_given(tmp_path):
    job = {"privacy": {"mode": "none", "delta": 3e-7}, "model": {"kind": "mlp", "hidden": [8, 4]}}
    values = {"federation": "no", "address": "fed.example:9092", "job": job}
    text = annotated(FederationConfig, values, heading="An example.")
    config = parse_yaml(text, FederationConfig, origin="the.yaml")
    assert config == FederationConfig(federation="no", address="fed.example:9092", job=JobPlan(**job))


@pytest.mark.parametrize("model", [FederationConfig, LenderConfig])
def test_every_key_has_a_description_and_stands_in_the_example(model):
    rows = reference(model)
    assert [key for key, _, _, description in rows if not description.endswith(".")] == []
    example = annotated(model, {}, heading="An example.")
    optional_table = "holdout.source."
    for key, _, _, _ in rows:
        if not key.startswith(optional_table):
            assert f"{key.rpartition('.')[2]}:" in example


def test_the_reference_names_range_and_default():
    rows = {key: (kind, default) for key, kind, default, _ in reference(FederationConfig)}
    assert rows["federation"] == ("text", "required")
    assert rows["job.privacy.mode"] == ("local or shared or none", "local")
    assert rows["job.privacy.epsilon"] == ("number, > 0, <= 100", "3.0")
    assert rows["job.cohort.wait_for"] == ("whole number, >= 1", "null")


def test_a_configuration_knows_host_and_port():
    for address, host, port in [("fed.example:9092", "fed.example", 9092), ("[::1]:443", "::1", 443)]:
        config = FederationConfig(federation="alps", address=address)
        assert (config.host, config.port) == (host, port)


def test_a_plan_is_named_by_its_content():
    assert JobPlan().digest() == JobPlan.model_validate_json(JobPlan().model_dump_json()).digest()
    other = JobPlan.model_validate({"privacy": {"epsilon": math.nextafter(JobPlan().privacy.epsilon, 9)}})
    assert other.digest() != JobPlan().digest()
    assert len(JobPlan().digest()) == 64
    assert JobPlan.model_validate({"training": {"rounds": 3, "local_steps": 4}}).num_steps == 12
