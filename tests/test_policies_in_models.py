"""A transform or policy kept as an attribute of a model: what it must not do there."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset

from ola_augment import (
    GARUpdater,
    GradientAlignment,
    LogProbs,
    OLAAugment,
    OLAPolicy,
    Policy,
    RandAugment,
    SearchSpace,
    SplitPolicy,
    UniformPolicy,
)

NAMES = {"num_ops_logits", "keep_logits", "magnitude_logits"}


class Net(nn.Module):
    """A classifier that keeps the transform of its training images."""

    def __init__(self):
        super().__init__()
        self.augment = OLAAugment("rand_augment", generator=torch.Generator().manual_seed(0))
        self.linear = nn.Linear(3 * 4 * 4, 2)

    def forward(self, images):
        return self.linear(images.to(self.linear.weight.dtype).flatten(1) / 255)


def images(n=4):
    return torch.randint(
        0, 256, (n, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


def learned(policy):
    with torch.no_grad():
        for i, logits in enumerate(policy.named_logits().values()):
            logits.copy_(torch.randn(logits.shape, generator=torch.Generator().manual_seed(i)))
    return policy


def logits_of(model):
    return {name: t.detach().clone() for name, t in model.augment.policy.named_logits().items()}


def test_optimizers_and_loops_over_modules_do_not_meet_the_logits():
    model = Net()
    assert [name for name, _ in model.named_parameters()] == ["linear.weight", "linear.bias"]
    assert not list(model.buffers())
    assert not [p for m in (model.augment, model.augment.policy) for p in m.parameters()]
    model.requires_grad_(False)
    assert all(logits.requires_grad for logits in model.augment.policy.named_logits().values())
    optimizer = torch.optim.AdamW(Net().parameters(), lr=0.1, weight_decay=0.5)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2


def test_ddp_trains_a_model_that_holds_a_transform(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        model = Net()
        parallel = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
        engine, updater = GradientAlignment(parallel), GARUpdater(model.augment.policy)
        for _ in range(3):  # the second forward pass is where unused parameters are reported
            augmented, actions = model.augment.augment(images())
            with engine.capture():
                F.cross_entropy(parallel(augmented), torch.tensor([0, 1, 0, 1])).backward()
            optimizer.step()
            optimizer.zero_grad()
            F.cross_entropy(parallel(images()), torch.tensor([0, 1, 0, 1])).backward()
            updater.step(actions, engine.align())
        assert model.augment.policy.keep_logits.abs().max() > 0
    finally:
        torch.distributed.destroy_process_group()


def averaged_by_torch(model):
    return AveragedModel(model, use_buffers=True)


def averaged_by_timm(model):
    # timm's utilities, not its models: pytest.importorskip keeps it out of the requirements.
    return pytest.importorskip("timm.utils").ModelEmaV2(model, decay=0.9)


@pytest.mark.parametrize("average", [averaged_by_torch, averaged_by_timm])
def test_averages_leave_the_logits_alone(average):
    model = Net()
    ema = average(model)
    first = logits_of(ema.module)
    learned(model.augment.policy)
    now = logits_of(model)
    for _ in range(3):
        (ema.update_parameters if hasattr(ema, "update_parameters") else ema.update)(model)
    for name in NAMES:
        assert torch.equal(logits_of(ema.module)[name], first[name])
        assert torch.equal(logits_of(model)[name], now[name])


def test_state_dict_of_the_model_has_the_logits():
    model, other = Net(), Net()
    learned(model.augment.policy)
    state = model.state_dict()
    assert {f"augment.policy.{name}" for name in NAMES} < set(state)
    for assign in (False, True):
        held = other.augment.policy.keep_logits
        other.load_state_dict(state, assign=assign)
        assert all(torch.equal(logits_of(other)[n], logits_of(model)[n]) for n in NAMES)
        assert other.augment.policy.keep_logits is held  # an updater's reference stays good
    with torch.no_grad():
        model.augment.policy.keep_logits.zero_()
    assert state["augment.policy.keep_logits"].abs().max() > 0  # a snapshot, not a view


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("policy.keep_logits"), r"Missing key.*policy\.keep_logits"),
        (lambda state: state.update(x=torch.zeros(1)), "Unexpected key.*x"),
        (lambda state: state.update({"policy.x": torch.zeros(1)}), r"Unexpected key.*policy\.x"),
        (lambda state: state["policy.keep_logits"].fill_(torch.nan), r"keep_logits holds NaN"),
        (
            lambda state: state.update({"policy.keep_logits": torch.zeros(3)}),
            r"keep_logits must have shape \(14,\), got \(3,\)",
        ),
    ],
)
def test_bad_states_are_refused_before_any_logits_change(change, message):
    augment = OLAAugment("rand_augment")
    learned(augment.policy)
    state = OLAAugment("rand_augment").state_dict()
    change(state)
    before = copy.deepcopy(augment.state_dict())
    with pytest.raises(RuntimeError, match=message):
        augment.load_state_dict(state)
    if "Missing" not in message and "Unexpected" not in message:  # torch reports those afterwards
        assert all(torch.equal(value, before[name]) for name, value in augment.state_dict().items())


def reassigned(policy):
    policy.keep_logits = nn.Parameter(torch.ones(len(policy.space)))
    return policy


def loaded(policy):
    policy.load_state_dict(learned(OLAPolicy("rand_augment")).state_dict(), assign=True)
    return policy


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda policy: pickle.loads(pickle.dumps(policy)),
    "double": lambda policy: policy.double(),
    "double and back": lambda policy: policy.double().float(),
    "half": lambda policy: policy.half(),
    "model.half": lambda policy: nn.Sequential(policy).half()[0],
    "bfloat16": lambda policy: policy.to(torch.bfloat16),
    "meta": lambda policy: policy.to("meta"),
    "loaded with assign": loaded,
    "reassigned": reassigned,
}


class Drawn(Dataset):
    def __init__(self, policy):
        self.augment = OLAAugment("rand_augment")
        self.augment.policy = policy

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return self.augment.augment(torch.zeros(1, 2, 2, dtype=torch.uint8))[1].keep


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("name", COPIES)
def test_workers_see_the_logits_of_every_copy_change(name):
    policy = COPIES[name](learned(OLAPolicy("rand_augment")))
    assert set(policy.named_logits()) == NAMES
    for logits in policy.named_logits().values():
        assert logits.is_shared()
        assert logits.is_leaf
        assert logits.requires_grad
        assert logits.device.type == "cpu"
        assert logits.dtype == (torch.float64 if name == "double" else torch.float32)
    batches = iter(DataLoader(Drawn(policy), 4, num_workers=1, prefetch_factor=1))
    next(batches)
    with torch.no_grad():
        policy.keep_logits.fill_(-50)
    late = list(batches)[4:]  # prefetched before the change: one or two
    assert not torch.cat(late).any()


def test_logits_that_change_while_tables_are_computed(monkeypatch):
    policy = OLAPolicy("rand_augment")
    logsigmoid = functional.logsigmoid

    def interrupted(logits):
        found = logsigmoid(logits)
        with torch.no_grad():  # as the process that learns does
            policy.keep_logits.fill_(-50)
        return found

    monkeypatch.setattr(functional, "logsigmoid", interrupted)
    log_probs = policy.log_probs()
    torch.testing.assert_close(log_probs.keep.exp() + log_probs.drop.exp(), torch.ones(14))
    policy.sample(3)


def test_copies_are_independent_and_hold_the_same_values():
    policy = learned(OLAPolicy("rand_augment"))
    for name in ("deepcopy", "pickle"):
        twin = COPIES[name](policy)
        before = policy.keep_logits.detach().clone()
        assert torch.equal(twin.keep_logits, before)
        with torch.no_grad():
            twin.keep_logits.add_(1)
        assert torch.equal(policy.keep_logits, before)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_worker_warns_of_logits_that_it_will_not_see_change():
    policy = OLAPolicy("rand_augment")
    policy.keep_logits.data = torch.ones(14)  # replaces the shared memory behind our back
    told = WarnedIn(policy)
    [message] = next(iter(DataLoader(told, 1, num_workers=1)))
    assert "keep_logits: not in shared memory" in message
    [message] = next(iter(DataLoader(WarnedIn(OLAPolicy("rand_augment")), 1, num_workers=1)))
    assert message == ""


class WarnedIn(Drawn):
    def __getitem__(self, index):
        import warnings

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            super().__getitem__(index)
        return " ".join(str(warning.message) for warning in caught)


def test_logits_that_cannot_be_shared_are_told(monkeypatch):
    def full(tensor):
        raise RuntimeError("no space left on device")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.warns(UserWarning, match=r"not in shared memory.*no space left"):
        policy = OLAPolicy("rand_augment")
    assert policy.sample(2).batch_size == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_defaults_and_assignments_stay_in_float32(dtype):
    policy = OLAPolicy("rand_augment")
    policy.keep_logits = nn.Parameter(torch.ones(14, dtype=dtype))
    assert policy.keep_logits.dtype == torch.float32
    assert policy.log_prob(policy.sample(3)).dtype == torch.float32
    with pytest.raises(TypeError, match=r"keep_logits must be an nn\.Parameter, got Tensor"):
        policy.keep_logits = torch.zeros(14)
    with pytest.raises(TypeError, match="floating-point"):
        policy.keep_logits = nn.Parameter(torch.zeros(14, dtype=torch.int64), requires_grad=False)


def test_models_made_on_the_meta_device_have_a_working_policy():
    with torch.device("meta"):
        policy = OLAPolicy("rand_augment")
    policy.to_empty(device="cpu")
    assert policy.sample(4).batch_size == 4
    assert not policy.keep_logits.any()


class OwnPolicy(Policy):
    """A user's own kind, its logits assigned as anybody would."""

    def __init__(self, submodule=False):
        super().__init__("rand_augment", 1)
        if submodule:
            self.own = nn.Linear(1, 14, bias=False)
        else:
            self.own_logits = nn.Parameter(torch.zeros(14))

    def log_probs(self):
        keep = self.own.weight[:, 0] if hasattr(self, "own") else self.own_logits
        return (
            UniformPolicy(self.space, 1)
            .log_probs()
            ._replace(keep=F.logsigmoid(keep), drop=F.logsigmoid(-keep))
        )


@pytest.mark.parametrize("submodule", [False, True])
def test_a_users_own_kind_of_policy_learns(submodule):
    policy = OwnPolicy(submodule)
    assert isinstance(policy.log_probs(), LogProbs)
    assert policy.space == SearchSpace.rand_augment()
    if not submodule:
        assert not list(nn.Sequential(policy).parameters())
        assert policy.own_logits.is_shared()
    actions = policy.sample(64)
    before = policy.log_probs().keep.detach()
    GARUpdater(policy).step(actions, torch.randn(64))
    assert not torch.equal(policy.log_probs().keep, before)


def test_frozen_logits_are_not_learned():
    policy = OLAPolicy("rand_augment").requires_grad_(False)
    with pytest.raises(ValueError, match=r"OLAPolicy is frozen; policy.requires_grad_\(\)"):
        GARUpdater(policy)
    policy.requires_grad_()
    with pytest.raises(ValueError, match="optimizer must hold the policy's logits, 3 of 3 are"):
        GARUpdater(policy, optimizer=torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0))


def test_the_split_policy_is_no_parameter_either():
    model = nn.Sequential(nn.Linear(2, 2), SplitPolicy(3))
    assert len(list(model.parameters())) == 2
    assert model.state_dict()["1.logits"].shape == (3,)
    assert copy.deepcopy(model)[1].logits.is_shared()


def test_repr_shows_what_was_learned():
    policy = OLAPolicy("rand_augment", max_ops=2)
    with torch.no_grad():
        policy.keep_logits[3] = 3.0
        policy.num_ops_logits[1] = 2.0
        policy.magnitude_logits[3, 30] = 50.0
    shown = repr(policy)
    assert "space='rand_augment', max_ops=2" in shown
    assert "1 .. 2 operations: 0.12, 0.88" in shown
    assert "rotate: kept 0.95, mean bin 30.0" in shown
    assert "identity: kept 0.50\n" in shown
    assert "nan" not in repr(OLAAugment())
    strong = OLAPolicy("rand_augment", strength=1.5)
    with torch.no_grad():
        strong.keep_logits[:3] = -50
    shown = repr(strong).splitlines()
    assert "space='rand_augment', max_ops=4, strength=1.5" in shown[0] + shown[1]
    assert not any("operations:" in line for line in shown)
    assert any(line.strip() == "rotate: drawn 0.09, mean bin 15.0" for line in shown)
    assert any(line.strip() == "equalize: drawn 0.00" for line in shown)
    assert "num_ops=2, magnitude=9" in repr(RandAugment().policy)
    assert "num_ops=1, keep_prob=1.0" in repr(UniformPolicy("rand_augment", 1, 1.0))
    assert "usage=[0.67, 0.67, 0.67]" in repr(SplitPolicy(3))


def test_eval_changes_nothing():
    model = Net()
    drawn = [model.augment.augment(images())[0]]
    model.augment.generator.manual_seed(0)
    model.eval()
    drawn.append(model.augment.augment(images())[0])
    assert torch.equal(*drawn)


@pytest.mark.filterwarnings("ignore")  # Lightning meets deprecations of torch
def test_lightning_trains_a_module_that_holds_a_transform(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def training_step(self, batch, _):
            return F.cross_entropy(
                self.net(self.net.augment(batch)), torch.zeros(len(batch), dtype=torch.int64)
            )

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=0.5)

    module = Module()
    before = logits_of(module.net)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=3,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        precision="bf16-true",
    )
    trainer.fit(module, DataLoader(list(images(12)), batch_size=4))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert all(torch.equal(logits_of(module.net)[name], before[name]) for name in NAMES)
    assert module.net.augment.policy.keep_logits.dtype == torch.float32
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert "net.augment.policy.keep_logits" in state


def test_a_model_that_holds_a_transform_moves_and_changes_its_dtype():
    """`nn.Module.to` goes through methods of the modules it holds, which ours must not replace."""
    model = nn.Sequential(OLAAugment("rand_augment"), nn.Linear(2, 2))
    assert model.double().to("cpu").share_memory()[1].weight.dtype is torch.float64
    model.to(torch.float32).requires_grad_(False).zero_grad()
    ours = [kind for kind in type(model[0]).__mro__ if "ola_augment" in kind.__module__]
    private = {name for kind in ours for name in vars(kind) if name[:2] != "__" and name[0] == "_"}
    assert not private & set(vars(nn.Module))
