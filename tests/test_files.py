"""Policies as JSON files."""

import json
import tempfile

import pytest
import torch
from hypothesis import given, settings

from ola_augment import (
    OLAPolicy,
    Operation,
    Policy,
    RandAugmentPolicy,
    SearchSpace,
    SplitPolicy,
    UniformPolicy,
    load_policy,
    save_policy,
    testing,
)
from ola_augment.files import describe_policy, read_transform


def changed_policy(space="wide_long"):
    policy = OLAPolicy(space, max_ops=2)
    with torch.no_grad():
        for logits in policy.named_logits().values():
            logits.normal_(generator=torch.Generator().manual_seed(0))
    return policy


@settings(max_examples=30, deadline=None, derandomize=True)
@given(testing.policies())
def test_round_trip_is_exact(policy):
    with tempfile.TemporaryDirectory() as folder:
        save_policy(policy, f"{folder}/policy.json")
        again = load_policy(f"{folder}/policy.json")
    assert (again.space, again.max_ops) == (policy.space, policy.max_ops)
    assert repr(again) == repr(policy)
    for name, logits in policy.named_logits().items():
        assert torch.equal(again.named_logits()[name], logits)


POLICIES = [
    changed_policy(),
    OLAPolicy("rand_augment", strength=1.5),
    UniformPolicy("rand_augment", 3, 0.25),
    RandAugmentPolicy(SearchSpace.wide_long(5), 3, 2),
    RandAugmentPolicy(num_ops=0),
    SplitPolicy(3, inverted=False),
]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_every_kind_of_policy_comes_back(policy, tmp_path):
    with torch.no_grad():
        for logits in policy.named_logits().values():
            logits.copy_(torch.randn(logits.shape).abs())
    save_policy(policy, tmp_path / "policy.json")
    again = load_policy(tmp_path / "policy.json")
    assert type(again) is type(policy)
    assert repr(again) == repr(policy)
    assert getattr(again, "space", None) == getattr(policy, "space", None)
    for one, other in zip(again.log_probs(), policy.log_probs(), strict=True):
        assert one is other is None or torch.equal(one, other)


class OwnPolicy(UniformPolicy):
    """A user's own kind, with an argument of its own."""

    def __init__(self, space, own):
        super().__init__(space)
        self.own = own

    def arguments(self):
        return {"own": self.own}


def test_a_users_own_kind_comes_back_or_says_what_it_needs(tmp_path):
    save_policy(OwnPolicy("rand_augment", 7), tmp_path / "policy.json")
    assert load_policy(tmp_path / "policy.json").own == 7

    class Silent(Policy):
        def log_probs(self):
            return UniformPolicy(self.space).log_probs()

    with pytest.raises(TypeError, match=r"Silent must define arguments\(\)"):
        save_policy(Silent("rand_augment", 2), tmp_path / "silent.json")
    assert not (tmp_path / "silent.json").exists()


def test_files_of_the_first_format_are_read(tmp_path):
    policy = changed_policy("rand_augment")
    save_policy(policy, tmp_path / "policy.json")
    content = json.loads((tmp_path / "policy.json").read_text())
    for key in ("kind", "arguments"):
        del content[key]
    content |= {"format": "ola_augment/policy/1", "max_ops": 2}
    (tmp_path / "first.json").write_text(json.dumps(content))
    again = load_policy(tmp_path / "first.json")
    assert type(again) is OLAPolicy
    assert torch.equal(again.keep_logits, policy.keep_logits)


def test_own_kernels_come_back_with_the_space(tmp_path):
    space = SearchSpace((Operation("mine", kernel=lambda images, _: images), Operation("invert")))
    save_policy(changed_policy(space), tmp_path / "policy.json")
    assert load_policy(tmp_path / "policy.json", space).space is space
    with pytest.raises(ValueError, match="unknown operation 'mine'"):
        load_policy(tmp_path / "policy.json")
    with pytest.raises(ValueError, match=r"other operations.*'wide_long': \['mine', 'invert'\]"):
        load_policy(tmp_path / "policy.json", SearchSpace.wide_long())
    save_policy(SplitPolicy(2), tmp_path / "split.json")
    with pytest.raises(ValueError, match=r"other operations.*'custom': None"):
        load_policy(tmp_path / "split.json", space)


def test_bad_files_are_refused(tmp_path):
    path = tmp_path / "policy.json"
    with pytest.raises(TypeError, match="Policy or SplitPolicy, got Linear"):
        save_policy(torch.nn.Linear(1, 1), path)
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
    refused(good | {"kind": "Unpickler"}, "not a complete policy file: KeyError.*Unpickler")
    refused(good | {"arguments": {"max_ops": 2, "more": 1}}, "not a complete policy file")
    refused(good | {"arguments": [2]}, "not a complete policy file")
    for bins in ({}, [31], "31", None):
        space = good["space"] | {"num_magnitude_bins": bins}
        refused(good | {"space": space}, "not a complete policy file: TypeError.*must be an int")
    refused(good | {"space": good["space"] | {"operations": 3}}, "not a complete policy file")
    logits = good["logits"]
    refused(good | {"logits": logits | {"num_ops_logits": [0.0]}}, "shapes")
    refused(good | {"logits": logits | {"num_ops_logits": [0.0, float("nan")]}}, "NaN")
    with pytest.raises(FileNotFoundError):
        load_policy(tmp_path / "missing.json")


def test_what_a_transform_adds_comes_back(tmp_path):
    path = tmp_path / "policy.json"
    save_policy(changed_policy(), path)
    assert read_transform(path) == {}
    save_policy(changed_policy(), path, transform={"fill": [1, 2, 3]})
    assert read_transform(path) == {"fill": [1, 2, 3]}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"transform": ["x" * 50]}))
    with pytest.raises(ValueError, match=r"transform is \['x{38}$"):
        read_transform(path)


def test_descriptions_are_equal_where_logits_are_interchangeable():
    same = describe_policy(OLAPolicy("rand_augment", 2))
    assert describe_policy(OLAPolicy(SearchSpace.rand_augment(), 2)) == same
    assert describe_policy(SplitPolicy(2)) == describe_policy(SplitPolicy(2))
    others = OLAPolicy("rand_augment", 3), OLAPolicy("wide_long", 2), SplitPolicy(2), SplitPolicy(3)
    assert len({same, *map(describe_policy, others)}) == 5
