"""A released model on disk: it comes back whole and under its digest, or it is refused."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from fedfin.credit.binning import Bins
from fedfin.credit.export import ReleasedModel, load_model, model_digest, save_model
from fedfin.credit.models import architecture_of, model_fingerprint, num_parameters
from fedfin.credit.schema import Schema
from fedfin.errors import ConfigError
from fedfin.plan import JobPlan

SCHEMA = Schema.from_yaml(
    """
label: {name: bad, bad: 1, good: 0, definition: 90 days past due}
columns:
  - {name: income, kind: numeric, minimum: 0, maximum: 10, grid_cells: 4}
  - {name: home, kind: categorical, categories: [owner, rent]}
""",
    "schema.yaml",
)
BINS = Bins((("income", (0.0, 2.5, 10.0)),))
PLAN = JobPlan.model_validate({"model": {"kind": "mlp", "hidden": [2]}})
ARCHITECTURE = architecture_of(PLAN.model, SCHEMA, BINS)
FINGERPRINT = model_fingerprint(SCHEMA.fingerprint(), BINS.fingerprint(), ARCHITECTURE)
SIZE = num_parameters(ARCHITECTURE)


def model_with(weights):
    return ReleasedModel(
        job_id="credit-1",
        rounds=3,
        plan=PLAN.model_dump_json(),
        schema=SCHEMA,
        bins=BINS,
        fingerprint=FINGERPRINT,
        weights=np.asarray(weights, dtype=np.float32),
    )


MODEL = model_with(np.linspace(-1, 1, SIZE))


@pytest.fixture
def folder(tmp_path):
    save_model(MODEL, tmp_path / "model")
    return tmp_path / "model"


def alter(folder, **fields):
    path = folder / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


finite = st.floats(allow_nan=False, allow_infinity=False, width=32)


@settings(max_examples=20)
@given(st.lists(finite, min_size=SIZE, max_size=SIZE))
def test_a_model_comes_back_as_it_was_saved(tmp_path_factory, values):
    model, folder = model_with(values), tmp_path_factory.mktemp("models") / "deep" / "model"
    save_model(model, folder)
    loaded = load_model(folder)
    for item in dataclasses.fields(ReleasedModel):
        if item.name not in ("weights", "plan"):
            assert getattr(loaded, item.name) == getattr(model, item.name)
    assert JobPlan.model_validate_json(loaded.plan) == PLAN
    assert_array_equal(loaded.weights.view(np.uint32), model.weights.view(np.uint32), strict=True)
    assert loaded.digest == model.digest


def test_a_model_is_two_files_without_pickle(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["model.json", "model.safetensors"]
    assert json.loads((folder / "model.json").read_text())["digest"] == MODEL.digest
    assert list(load_tensors((folder / "model.safetensors").read_bytes())) == ["weights"]


def test_saving_the_same_model_again_gives_the_same_bytes(folder, tmp_path):
    save_model(MODEL, tmp_path / "again")
    for name in ("model.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_the_digest_is_of_fingerprint_and_weights_in_any_byte_order():
    weights = np.array([0.5, -1.0], dtype=np.float32)
    assert model_digest("f", weights) == model_digest("f", weights.astype(">f4"))
    assert model_digest("f", weights) != model_digest("g", weights)
    assert model_digest("f", weights) != model_digest("f", weights[::-1])
    assert model_digest("f", weights) != model_digest("f", np.nextafter(weights, np.float32(2)))


def test_the_repr_shows_no_weights():
    assert "weights" not in repr(MODEL)


@settings(max_examples=40)
@given(st.data())
def test_any_altered_byte_of_the_weights_is_refused(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("models")
    save_model(MODEL, folder)
    path = folder / "model.safetensors"
    whole = bytearray(path.read_bytes())
    start = len(whole) - 4 * SIZE  # safetensors' header may be written in several ways; the values may not
    position = data.draw(st.integers(start, len(whole) - 1))
    whole[position] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bytes(whole))
    with pytest.raises(ConfigError, match=r"are not those that model\.json names; take the model again"):
        load_model(folder)


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe\x00", None])
def test_a_file_that_is_damaged_or_missing_is_refused(folder, name, content):
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(ConfigError, match="does not hold a whole model"):
        load_model(folder)


@settings(max_examples=30)
@given(st.data())
def test_cut_files_are_refused(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("models")
    save_model(MODEL, folder)
    path = folder / data.draw(st.sampled_from(["model.json", "model.safetensors"]))
    whole = path.read_bytes().rstrip()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(ConfigError, match="does not hold a whole model"):
        load_model(folder)


def test_a_digest_of_another_model_is_refused(folder):
    alter(folder, digest="0" * 64)
    with pytest.raises(
        ConfigError, match=r"the weights are not those that model\.json names; take the model again"
    ):
        load_model(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"schema": SCHEMA.to_yaml().replace("maximum: 10", "maximum: 11")},
        {"bins": Bins((("income", (0.0, 5.0, 10.0)),)).to_json()},
        {"bins": Bins((("wealth", (0.0, 2.5, 10.0)),)).to_json()},
        {"plan": {**PLAN.model_dump(mode="json"), "model": {"kind": "mlp", "hidden": [3]}}},
        {"plan": {**PLAN.model_dump(mode="json"), "model": {"kind": "logistic"}}},
        {"fingerprint": "0" * 64},
    ],
    ids=["schema", "bins", "other-columns", "width", "kind", "fingerprint"],
)
def test_weights_under_another_schema_bins_or_architecture_are_refused(folder, fields):
    """The digest is over the fingerprint; what the fingerprint stands for must be what the file holds."""
    alter(folder, **fields)
    with pytest.raises(ConfigError, match=r"take (it|the model) again"):
        load_model(folder)


@pytest.mark.parametrize(
    "fields",
    [{"bins": "no bins"}, {"bins": "[]"}, {"schema": "no: schema"}, {"plan": {"rounds": 1}}, {"plan": None}],
)
def test_parts_that_cannot_be_read_are_refused(folder, fields):
    alter(folder, **fields)
    with pytest.raises(ConfigError, match=r"take it again"):
        load_model(folder)


@pytest.mark.parametrize(
    "weights",
    [
        MODEL.weights.astype(np.float64),
        MODEL.weights.reshape(1, -1),
        MODEL.weights[:-1],
        np.append(MODEL.weights, np.float32(0)),
    ],
    ids=["float64", "matrix", "short", "long"],
)
def test_weights_of_another_type_or_shape_are_refused(folder, weights):
    (folder / "model.safetensors").write_bytes(save_tensors({"weights": np.ascontiguousarray(weights)}))
    alter(folder, digest=model_digest(FINGERPRINT, weights))
    with pytest.raises(ConfigError, match="take the model again"):
        load_model(folder)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be made .*; free the disk or mend its permissions"):
        save_model(MODEL, tmp_path / "file" / "model")


def test_without_model_json_there_is_no_model_yet(tmp_path, monkeypatch):
    """It is written last, so that a crash in between leaves no half model behind it."""
    from fedfin.credit import export

    written = []
    monkeypatch.setattr(export, "write_public", lambda path, content: written.append(path.name))
    save_model(MODEL, tmp_path)
    assert written == ["model.safetensors", "model.json"]
