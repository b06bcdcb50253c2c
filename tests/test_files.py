"""Policies as JSON files."""

import json

import pytest
import torch

from ola_augment import (
    OLAPolicy,
    Operation,
    SearchSpace,
    UniformPolicy,
    load_policy,
    save_policy,
)


def changed_policy(space="wide_long"):
    policy = OLAPolicy(space, max_ops=2)
    with torch.no_grad():
        for logits in policy.parameters():
            logits.normal_(generator=torch.Generator().manual_seed(0))
    return policy


def test_round_trip_is_exact(tmp_path):
    policy = changed_policy()
    save_policy(policy, tmp_path / "policy.json")
    again = load_policy(tmp_path / "policy.json")
    assert again.space == policy.space
    assert again.max_ops == 2
    assert all(
        torch.equal(a, b) for a, b in zip(policy.parameters(), again.parameters(), strict=True)
    )


def test_own_kernels_come_back_with_the_space(tmp_path):
    space = SearchSpace((Operation("mine", kernel=lambda images, _: images), Operation("invert")))
    save_policy(changed_policy(space), tmp_path / "policy.json")
    assert load_policy(tmp_path / "policy.json", space).space is space
    with pytest.raises(ValueError, match="unknown operation 'mine'"):
        load_policy(tmp_path / "policy.json")
    with pytest.raises(ValueError, match="other operations"):
        load_policy(tmp_path / "policy.json", SearchSpace.wide_long())


def test_bad_files_are_refused(tmp_path):
    path = tmp_path / "policy.json"
    with pytest.raises(TypeError, match="UniformPolicy"):
        save_policy(UniformPolicy(), path)
    assert not path.exists()
    save_policy(changed_policy(), path)
    good = json.loads(path.read_text())

    def refused(content, message):
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(ValueError, match=message):
            load_policy(path)

    refused("\x80\x02", "not a policy file")
    refused([1], "not a policy file")
    refused(good | {"format": "other"}, "format")
    refused({"format": good["format"]}, "not a complete policy file")
    logits = good["logits"]
    refused(good | {"logits": logits | {"num_ops_logits": [0.0]}}, "shapes")
    refused(good | {"logits": logits | {"num_ops_logits": [0.0, float("nan")]}}, "NaN")
    with pytest.raises(FileNotFoundError):
        load_policy(tmp_path / "missing.json")
