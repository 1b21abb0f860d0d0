"""What files for others call models and texts, and which values are paths of this machine."""

import pytest

from sae_dist.public_names import local_paths, model_name, text_name


@pytest.mark.parametrize(
    ("model", "name"),
    [("gpt2", "gpt2"), ("google/gemma-2-2b", "google/gemma-2-2b"), ("/home/alice/acme-ft", "acme-ft"),
     ("/home/alice/acme-ft/", "acme-ft"), ("~/acme-ft", "acme-ft"), ("../acme-ft", "acme-ft"),
     ("alice/models/acme-ft", "acme-ft"), (None, "None")],
)  # fmt: skip
def test_a_folder_is_called_by_its_last_part_and_a_name_stays(model, name):
    assert model_name(model) == name


@pytest.mark.parametrize(
    ("text", "name"),
    [({"kind": "builtin"}, "builtin"), ({"kind": "jsonl", "path": "clients/mails.jsonl"}, "mails.jsonl"),
     ({"kind": "files", "path": "/home/alice/mails"}, "mails"), ({"kind": "mixture", "sources": []}, "mixture"),
     ({"kind": "huggingface", "path": "owner/name"}, "owner/name"),
     ({"kind": "huggingface", "path": "/home/alice/saved"}, "saved"), ({}, "None")],
)  # fmt: skip
def test_a_text_is_called_by_its_last_part_or_its_kind(text, name):
    assert text_name(text) == name


def test_paths_are_found_by_their_keys():
    values = {"store": "/data/s", "hook": "resid_post.3", "model": "owner/name", "n": 3, "sites": [{"hook": "x"}],
              "started_from": {"dictionary": "~/d", "weights": "f0"}, "imported": {"from": "hf://owner"}}  # fmt: skip
    assert dict(local_paths(values)) == {"store": "/data/s", "started_from.dictionary": "~/d"}
