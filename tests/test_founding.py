"""The coordinator's identity key: made with the folder, stated by the authority, and made for older folders."""

import pytest

from fedfin.errors import ConfigError
from fedfin.server.founding import found, open_federation


@pytest.fixture
def federation(tmp_path):
    return found(tmp_path / "coop", name="coop", address="127.0.0.1:9443", schema_text="columns", job={})


def test_a_new_federation_has_an_identity_key_that_its_authority_states(federation):
    identity = federation.identity()
    identity.statement.verify(federation.authority().root, "coop")
    assert identity.statement.public_key() == identity.key.public_key()
    assert (federation.directory / "keys" / "identity.key").stat().st_mode & 0o777 == 0o600
    assert open_federation(federation.config_path).identity().statement == identity.statement


def test_an_older_folder_gets_one_at_its_first_start(federation):
    federation.statement_path.unlink()
    (federation.directory / "keys" / "identity.key").unlink()
    identity = open_federation(federation.config_path).identity()
    identity.statement.verify(federation.authority().root, "coop")
    assert open_federation(federation.config_path).identity().statement == identity.statement


def test_a_statement_that_was_lost_is_made_again_for_the_same_key(federation):
    before = federation.identity()
    federation.statement_path.unlink()
    after = open_federation(federation.config_path).identity()
    assert after.statement.key == before.statement.key


def test_a_lost_key_is_not_made_anew_in_silence(federation):
    (federation.directory / "keys" / "identity.key").unlink()
    with pytest.raises(ConfigError, match=r"identity\.key"):
        open_federation(federation.config_path).identity()


@pytest.mark.parametrize("text", ["", "{}", "another key's"])
def test_a_statement_of_another_key_or_none_is_refused(federation, tmp_path, text):
    other = found(tmp_path / "other", name="coop", address="127.0.0.1:9444", schema_text="columns", job={})
    federation.statement_path.write_text(other.statement_path.read_text() if text[:1] == "a" else text)
    with pytest.raises(ConfigError, match="restore"):
        federation.identity()
