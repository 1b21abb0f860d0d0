"""The keys of tracking: what the environment fills in, what is refused, what is never shown."""

import pytest

from sae_dist.cli.main import main
from sae_dist.config import UserError, load
from sae_dist.monitor.config import WEBHOOK, AlertsConfig, WandbConfig, public

SECRET = "https://hooks.example.com/services/T0/B0/secret"


@pytest.mark.parametrize(
    ("environment", "given", "mode"),
    [({}, None, "offline"), ({"WANDB_MODE": "disabled"}, None, "disabled"), ({"WANDB_MODE": "dryrun"}, None, "offline"),
     ({"WANDB_MODE": "disabled"}, "online", "online"), ({"WANDB_MODE": ""}, None, "offline")],
)  # fmt: skip
def test_the_mode_is_the_one_that_is_given_else_the_environments(monkeypatch, environment, given, mode):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert load(WandbConfig, {"mode": given}).mode == mode
    assert environment or WandbConfig().mode == mode


def test_a_mode_of_the_environment_that_is_none_is_refused(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    with pytest.raises(UserError, match="mode='sometimes': give 'offline', 'online' or 'disabled'"):
        load(WandbConfig, {})


def test_the_webhook_may_be_in_the_environment_and_is_not_written_down(monkeypatch):
    monkeypatch.setenv(WEBHOOK, SECRET)
    assert load(AlertsConfig, {}).webhook == SECRET
    shown = public({"alerts": {"webhook": SECRET, "dead": 0.5}})
    assert shown == {"alerts": {"webhook": None, "dead": 0.5}}
    assert load(AlertsConfig, shown["alerts"]).webhook == SECRET  # a process that this one starts has it


@pytest.mark.parametrize(
    "given", ["hooks.example.com/secret", "file:///etc/secret", "https:///secret", "http://[secret"]
)
def test_a_wrong_webhook_is_refused_without_being_shown(given, capsys):
    assert main(["train", "store=s", f"alerts.webhook='{given}'"]) == 2
    said = capsys.readouterr().err
    assert "error: alerts.webhook: it is no URL" in said and "secret" not in said


def test_a_budget_needs_a_price():
    with pytest.raises(UserError, match="alerts.cost and alerts.price_per_hour go together"):
        load(AlertsConfig, {"cost": 100})
