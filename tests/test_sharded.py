"""Models under FSDP2's fully_shard, two real processes: exact against an unsharded copy."""

import copy

import pytest
import torch
import torch.nn.functional as F
from alignment_oracles import sum_loss
from loops import dataset, learner_of, logits, network, plain_loop
from ranks import run_checks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from ola_augment import OLAAugment, OLALearner
from ola_augment.alignment import BackPACKAlignment, DirectionalAlignment, GradientAlignment
from ola_augment.alignment._fsdp import reference
from ola_augment.alignment.proof.sums import SumCheck
from ola_augment.training import recommended, trial

RANKS = 2


class Block(nn.Module):
    def __init__(self, width, checkpointed, dropout):
        super().__init__()
        self.norm, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, dropout=dropout, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 13), nn.GELU(), nn.Linear(13, width))
        self.checkpointed = checkpointed

    def inner(self, x):
        h = self.norm(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.after(x))

    def forward(self, x):
        return (
            checkpoint(self.inner, x, use_reentrant=False) if self.checkpointed else self.inner(x)
        )


class Transformer(nn.Module):
    """A class token, positions, a norm that is used twice, rows that two ranks share unevenly."""

    def __init__(self, checkpointed=False, dropout=0.0, width=6):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 2, 2)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 5, width))
        self.blocks = nn.ModuleList(Block(width, checkpointed, dropout) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(len(x), -1, -1), x), 1) + self.positions
        x = self.norm(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def sharded(model, blocks=True, **options):
    options.setdefault("mesh", init_device_mesh("cpu", (RANKS,)))
    for block in model.blocks if blocks else ():
        fully_shard(block, **options)
    return fully_shard(model, **options)


def batch(rank, number, size, dtype=torch.float64):
    generator = torch.Generator().manual_seed(10 * number + rank)
    x = torch.randn(size, 3, 4, 4, generator=generator, dtype=dtype)
    return x, torch.randint(0, 3, (size,), generator=generator)


def whole(gradients):
    return {name: one.full_tensor() for name, one in gradients.items()}


def one_by_one(model, x, y, g):
    """Alignments and norms by one autograd.grad for each example."""
    parameters = {name: one for name, one in model.named_parameters() if one.requires_grad}
    found = []
    for i in range(len(x)):
        loss = sum_loss(model(x[i : i + 1]), y[i : i + 1])
        own = torch.autograd.grad(loss, list(parameters.values()))
        pairs = list(zip(parameters, own, strict=True))
        along = sum((d.double() * g[name].double()).sum() for name, d in pairs)
        found.append((along, torch.stack([d.double().norm() for _, d in pairs]).norm()))
    return [torch.stack(one) for one in zip(*found, strict=True)]


def one_pass(model, x, y):
    sum_loss(model(x).to(x.dtype), y).backward()


def worst(rank, model, size=4, dtype=torch.float64, backward=one_pass, **options):
    """The largest relative errors of alignments and norms over some pairs of steps."""
    plain = copy.deepcopy(model)
    model = sharded(model, **options)
    engine = GradientAlignment(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    errors = torch.zeros(2, dtype=torch.float64)
    for pair in range(2):
        state = {name: one.full_tensor() for name, one in model.state_dict().items()}
        plain.load_state_dict(state)
        x, y = batch(rank, 100 + pair, 4, dtype)
        F.cross_entropy(model(x).to(dtype), y).backward()
        g = engine.gradients()
        optimizer.zero_grad()
        x, y = batch(rank, pair, size + rank, dtype)
        with engine.capture(gradients=g, norms=True) as captured:
            backward(model, x, y)
        optimizer.step()
        optimizer.zero_grad()
        expected = one_by_one(plain, x, y, whole(g))
        for place, (found, true) in enumerate(
            zip((captured.align(), captured.norms()), expected, strict=True)
        ):
            error = (found.double() - true).abs().max() / true.abs().max()
            errors[place] = max(errors[place], error)
    return errors


def blocks_and_root(rank, given):
    return worst(rank, Transformer().double())


def not_resharded(rank, given):
    return worst(rank, Transformer().double(), reshard_after_forward=False)


def root_alone(rank, given):
    reference._BUCKET = 100  # several messages
    return worst(rank, Transformer().double(), blocks=False)


def checkpointed(rank, given):
    return worst(rank, Transformer(checkpointed=True).double())


def partly_frozen(rank, given):
    model = Transformer().double()
    model.blocks[0].requires_grad_(False)
    model.norm.bias.requires_grad_(False)
    return worst(rank, model)


def in_micro_batches(rank, given):
    """Gradients are averaged with the second one alone."""

    def backward(model, x, y):
        for last, part in enumerate(zip(x.split(3), y.split(3), strict=True)):
            model.set_requires_gradient_sync(bool(last))
            sum_loss(model(part[0]), part[1]).backward()

    return worst(rank, Transformer().double(), size=4, backward=backward)


def in_two_passes(rank, given):
    """Both are over before the backward of their sum."""

    def backward(model, x, y):
        parts = zip(x.split(3), y.split(3), strict=True)
        sum(sum_loss(model(part), labels) for part, labels in parts).backward()

    return worst(rank, Transformer().double(), size=4, backward=backward)


def in_bfloat16(rank, given):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return worst(rank, Transformer(), mp_policy=policy, dtype=torch.float32)


PAIRS = 24


def loss(model, images, targets):
    return F.cross_entropy(model(images.double() / 255), targets)


def run_of(rank, model, stopped=False, evaluated=False):
    """A whole run of the recommended learner, which ranks with other numbers of images share."""
    trial._SHORTEST = 1  # pairs of a window
    recommended.SHORTEST_RUN = PAIRS
    images, targets = dataset(48)[rank * 24 : rank * 24 + 24]
    parts = [part[16:].split(2 + 2 * rank) for part in (images, targets)]
    held_out = list(zip(*parts, strict=True))

    def made():
        augment = OLAAugment(
            "rand_augment", strength=1.0, generator=torch.Generator().manual_seed(rank)
        )
        return OLALearner.recommended(model, augment, held_out, PAIRS, loss)

    learner, optimizer = made(), torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for step in range(2 * PAIRS):
        if stopped and step in (3, 14, 31):
            state, learner = learner.state_dict(), made()
            learner.load_state_dict(state)
        if evaluated and step % 9 == 7:
            with torch.no_grad():
                model(images[:2].double())
        few = torch.arange(step, step + 3 + rank) % 16
        with learner.step(images[few]) as half:
            loss(model, half.images, targets[few]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not learner.skipped, learner.skipped
    assert learner.trial.over
    weights = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return {
        "logits": logits(learner),
        "weights": torch.cat([one.detach().flatten() for one in weights]),
        "losses": torch.tensor(learner.trial._losses),
        "moment": learner.updater._moment,
    }


def layers_and_root(model):
    for layer in (model[0], model[4]):
        fully_shard(layer, mesh=init_device_mesh("cpu", (RANKS,)))
    return fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))


def learned_by_ddp(rank, given):
    return run_of(rank, DistributedDataParallel(network().double()))


def learned_in_shards(rank, given):
    return run_of(rank, layers_and_root(network().double()), evaluated=True)


def learned_after_stops(rank, given):
    return run_of(rank, layers_and_root(network().double()), stopped=True)


def cosines(rank, model):
    """The other way to have the reference first, with the norm of a reference in shards."""
    learner = learner_of(model, reference="current", cosine=True)
    images, targets = dataset(32)[rank * 16 : rank * 16 + 16]
    plain_loop(model, learner, list(zip(images.split(4), targets.split(4), strict=True)), 2)
    assert not learner.skipped, learner.skipped
    return logits(learner)


def cosines_by_ddp(rank, given):
    return cosines(rank, DistributedDataParallel(network()))


def cosines_in_shards(rank, given):
    return cosines(rank, layers_and_root(network()))


class Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx, delta):
        x, w = ctx.saved_tensors
        return delta @ w, delta.T @ x


class Odd(nn.Module):
    """Does something odd where its rank is told to."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(5, 6), nn.Tanh())])
        self.last = nn.Linear(6, 3)
        self.odd = ""

    def forward(self, x):
        x = self.blocks[0](x)
        if self.odd == "mixes":
            x = x - x.mean(0)
        if self.odd == "hides":
            return Hidden.apply(x, self.last.weight) + self.last.bias
        if self.odd == "transforms":
            return torch.func.vmap(self.last)(x)
        return self.last(x)


def said_of_a_capture(engine, x, y, norm=sum_loss, hook=False):
    """What a pair refuses, "" where it does not."""
    model = engine.model
    sum_loss(model(x), y).backward()
    g = engine.gradients()
    model.zero_grad()
    try:
        with engine.capture(gradients=g, norms=True) as captured:
            outputs = model(x)
            if hook:
                outputs.register_hook(lambda gradient: 2 * gradient)
            norm(outputs, y).backward()
        captured.align()
    except (RuntimeError, ValueError) as error:
        return str(error)
    finally:
        model.zero_grad()
    return ""


def refused_by_one_or_all(rank, given):
    """Whoever has nothing against it refuses with the others; the next pair is fine."""
    engine = GradientAlignment(Odd())  # before the model is sharded
    model = sharded(engine.model)
    x, y = torch.randn(4 + rank, 5), torch.arange(4 + rank) % 3
    said = {}
    for odd in ("mixes", "hides", "transforms"):
        for ranks in ((1,), (0, 1)):
            model.odd = odd if rank in ranks else ""
            said[f"{odd} {ranks}"] = said_of_a_capture(engine, x, y)
    model.odd = ""
    said["fine"] = said_of_a_capture(engine, x, y)

    def contrastive(outputs, y):
        return (outputs @ outputs.T).logsumexp(1).sum() if rank else sum_loss(outputs, y)

    def penalised(outputs, y):
        if rank:
            model.last.weight.square().sum().backward()
        return sum_loss(outputs, y)

    said["penalty (1,)"] = said_of_a_capture(engine, x, y, penalised)
    receive = SumCheck.receive
    if rank:  # the gradient that a parameter received is not what its uses explain
        SumCheck.receive = lambda self, name, gradient: receive(self, name, 2 * gradient)
    said["off (1,)"] = said_of_a_capture(engine, x, y)
    SumCheck.receive = receive
    said["loss mixes (1,)"] = said_of_a_capture(engine, x, y, contrastive)
    said["hook (1,)"] = said_of_a_capture(engine, x, y, hook=bool(rank))
    said["empty (1,)"] = said_of_a_capture(engine, x[: 4 - 4 * rank], y[: 4 - 4 * rank])
    said["fine again"] = said_of_a_capture(engine, x, y)
    return said


def said_at_first(make):
    """What an engine says of a model, before and after an evaluation of it."""
    try:
        model = make()
    except Exception as error:
        return [f"fully_shard: {error}"] * 2
    said = []
    for evaluated in (False, True):
        if evaluated:
            with torch.no_grad():
                model(torch.ones(2, 5))
        try:
            GradientAlignment(model)
        except ValueError as error:
            said.append(str(error))
        else:
            said.append("")
    return said


def other_forms(rank, given):
    mesh = init_device_mesh("cpu", (RANKS,))
    replicas = init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("replicas", "shards"))

    def parts_alone():
        model = Odd()
        fully_shard(model.blocks[0], mesh=mesh)
        return model

    def together():
        model = Odd()
        fully_shard([model.blocks[0], model.last], mesh=mesh)
        return fully_shard(model, mesh=mesh)

    def ignores():
        model = Odd()
        return fully_shard(model, mesh=mesh, ignored_params={model.last.weight})

    def tensor_parallel():
        return parallelize_module(Odd(), mesh, {"last": ColwiseParallel()})

    makes = {
        "a part alone": parts_alone,
        "a list": together,
        "ignored": ignores,
        "copies": lambda: sharded(Odd(), mesh=replicas),
        "offloaded": lambda: sharded(Odd(), offload_policy=CPUOffloadPolicy(pin_memory=False)),
        "another dimension": lambda: sharded(
            Odd(), shard_placement_fn=lambda p: Shard(1) if p.shape == (3, 6) else None
        ),
        "tensor parallel": tensor_parallel,
        "fine": lambda: sharded(Odd()),
    }
    found = {name: said_at_first(make) for name, make in makes.items()}

    model = sharded(Odd())
    augment = OLAAugment("rand_augment", strength=1.0)
    learner = OLALearner(model, augment, reference="current")
    others = {
        "directional": lambda: DirectionalAlignment(model, lambda model, x: model(x).sum(1)),
        "backpack": lambda: BackPACKAlignment(model),
        "next": lambda: OLALearner(model, augment),
        "in a framework": lambda: learner.check_model(model),
        "no reference": lambda: GradientAlignment(model).capture().__enter__(),
        "a whole reference": lambda: (
            GradientAlignment(model).capture(gradients={"last.bias": torch.zeros(3)}).__enter__()
        ),
    }
    for name, use in others.items():
        found[name] = []
        for evaluated in (False, True):
            if evaluated:
                with torch.no_grad():
                    model(torch.ones(2, 5))
            try:
                use()
            except ValueError as error:
                found[name].append(str(error))
    return found


EXACT = [
    blocks_and_root,
    not_resharded,
    root_alone,
    checkpointed,
    partly_frozen,
    in_micro_batches,
    in_two_passes,
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    runs = [learned_by_ddp, learned_in_shards, learned_after_stops]
    runs += [cosines_by_ddp, cosines_in_shards]
    checks = [*EXACT, in_bfloat16, *runs, other_forms, refused_by_one_or_all]
    return run_checks(checks, tmp_path_factory.mktemp("ranks"), ranks=RANKS)


@pytest.mark.parametrize("check", EXACT, ids=lambda check: check.__name__)
def test_alignments_and_norms_are_exact(found, check):
    for errors in found[check.__name__]:
        assert not isinstance(errors, str), errors
        assert float(errors.max()) < 1e-12


def test_in_bfloat16_they_are_as_exact_as_it_is(found):
    for errors in found["in_bfloat16"]:
        assert not isinstance(errors, str), errors
        assert float(errors.max()) < 0.03


def test_the_recommended_learner_learns_what_it_learns_under_ddp(found):
    expected = found["learned_by_ddp"][0]
    for check in ("learned_in_shards", "learned_after_stops"):
        for rank in found[check]:
            assert not isinstance(rank, str), rank
            for name, value in rank.items():
                torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-9)
                assert torch.equal(value, found[check][0][name])  # the same on all ranks


def test_cosines_with_the_plain_batch_as_reference(found):
    expected = found["cosines_by_ddp"][0]
    assert float(expected.abs().max()) > 0.05
    for rank in found["cosines_in_shards"]:
        assert not isinstance(rank, str), rank
        torch.testing.assert_close(rank, expected, rtol=1e-3, atol=1e-4)


def test_what_one_rank_refuses_all_do_and_the_next_pair_is_fine(found):
    reasons = {
        "mixes": "could not be told apart",
        "hides": "cannot be verified while processes share",
        "off": "recorded uses do not explain",
        "penalty": "outside of the passes of the module",
        "transforms": "inside a torch.func transform",
        "loss mixes": "the loss mixes the examples",
        "hook": "cannot be verified while processes share",
        "empty": "the batch is empty",
    }
    elsewhere = "another process refused"
    for rank, said in enumerate(found["refused_by_one_or_all"]):
        assert not isinstance(said, str), said
        for case, text in said.items():
            if case.startswith("fine"):
                assert text == "", case
                continue
            own = rank == 1 or case.endswith("(0, 1)")
            assert (reasons[case.rsplit(" (", 1)[0]] if own else elsewhere) in text, case


FORMS = {
    "a part alone": "and the model itself was not",
    "a list": "a list of modules",
    "ignored": "'last.weight' is one that fully_shard ignores",
    "copies": "HSDP",
    "offloaded": "offloaded to the CPU",
    "another dimension": "along another dimension",
    "tensor parallel": "'last.weight' is sharded over processes (tensor parallel",
    "directional": "'blocks.0.0.weight' is sharded",
    "backpack": "'blocks.0.0.weight' is sharded",
    "next": "give held-out batches",
    "in a framework": "loop of your own",
    "no reference": "give the reference first",
    "a whole reference": "gradients['last.bias'] must be sharded",
    "fine": "",
}


def test_other_forms_are_refused_by_name_also_after_an_evaluation(found):
    for rank in found["other_forms"]:
        assert not isinstance(rank, str), rank
        assert rank.keys() == FORMS.keys()
        for form, said in rank.items():
            assert len(said) == 2, form
            assert all(FORMS[form] in text for text in said), (form, said)
            assert FORMS[form] or not any(said)
