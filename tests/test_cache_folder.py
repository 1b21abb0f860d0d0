"""A home folder that cannot be written to, or is unknown, is one line or costs nothing but time."""

import pytest
import yaml

from sae_dist.cache_folder import cache_folder
from sae_dist.cli.main import main
from sae_dist.config import CONF_DIR, UserError, load
from sae_dist.plan import probe
from sae_dist.plan.machine import Machine


@pytest.fixture
def no_home(monkeypatch):
    for name in ("SAE_DIST_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/proc")  # nobody can make a folder there, whoever runs the tests


@pytest.mark.usefixtures("no_home")
def test_a_model_that_cannot_be_kept_is_one_line(tmp_path, capsys):
    assert main(["run", "preset=tiny", f"out={tmp_path}/run"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "cannot be kept in /proc/.cache/sae_dist/models" in said and "set SAE_DIST_CACHE" in said


def test_an_unknown_home_is_one_line(monkeypatch):
    monkeypatch.setenv("SAE_DIST_CACHE", "~nobody-by-this-name/cache")
    with pytest.raises(UserError, match="no cache folder .*; set SAE_DIST_CACHE to a folder"):
        cache_folder()


@pytest.mark.usefixtures("no_home")
def test_a_measurement_that_cannot_be_kept_is_a_warning(caplog):
    machine = load(Machine, yaml.safe_load((CONF_DIR / "machine" / "h100.yaml").read_text()))
    probe.keep(machine)
    assert "the measurement cannot be kept in /proc/.cache/sae_dist/machines" in caplog.text
