"""The code on the pages runs as it is printed, on small stand-ins for what the reader brings."""

import contextlib
import copy
import functools
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import ImageFolder

from ola_augment import OLAAugment, OLALearner

pytestmark = pytest.mark.filterwarnings("ignore:.*pairs of steps are too few")

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(
    str(path.relative_to(DOCS))[:-3]
    for path in DOCS.glob("**/*.md")
    if "```python" in path.read_text() and not {"_build", "generated"} & {*path.parts}
)


def blocks(page):
    return re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text(), re.DOTALL)


def run(page, names, smaller=None):
    """Execute a page's blocks one after the other; texts that must be smaller here are replaced."""
    smaller = smaller or {}
    lost = [text for text in smaller if text not in "".join(blocks(page))]
    assert not lost, f"{page} has no {lost}"
    for block in blocks(page):
        for old, new in smaller.items():
            block = block.replace(old, new)
        exec(compile(block, f"docs/{page}.md", "exec"), names)
    return names


def reader():
    """What a reader has before they open the page."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))
    images = torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8)
    targets = torch.randint(0, 4, (8,))
    floats = images / 255
    batch, cross_entropy = (images, targets), nn.CrossEntropyLoss()
    return {
        "torch": torch,
        "copy": copy,
        "DataLoader": DataLoader,
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "criterion": cross_entropy,
        "normalize": lambda x: x.float() / 255 - 0.5,
        "pairs": [(batch, batch)] * 2,
        "loader": [batch] * 4,
        "images": images,
        "targets": targets,
        "next_images": floats,
        "next_targets": targets,
        "held_out": floats,
        "held_out_targets": targets,
        "dataset": TensorDataset(images, targets),
        "data": TensorDataset(images, targets),
        "epochs": 1,
        "generator": torch.Generator().manual_seed(0),
    }


def test_every_page_with_code_has_its_test():
    tests = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {page.split("/")[-1].replace("index", "first_page") for page in PAGES} <= tests


def test_first_page():
    names = reader() | {"held_out": reader()["loader"]}
    run("index", names)
    assert names["learner"].pairs == 2


def changed(page):
    """Lines of a page's diff, as they are after the change."""
    (diff,) = re.findall(r"```diff\n(.*?)```", page, re.DOTALL)
    return [line[1:].strip() for line in diff.splitlines() if not line.startswith("-")]


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_diff_is_what_the_whole_loop_has(page):
    text = (DOCS.parent / page).read_text()
    whole = [
        line.split("  #")[0].strip()
        for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        for line in block.splitlines()
    ]
    lines = changed(text)
    assert len(lines) > 7
    assert [line for line in whole if line in lines] == lines


def test_alignment():
    from ola_augment import GradientAlignment

    names = reader() | {"GradientAlignment": GradientAlignment}
    names["images"] = names["images"] / 255
    for block in blocks("alignment"):
        names["model"].zero_grad()
        exec(compile(block, "docs/alignment.md", "exec"), names)
    assert names["captured"].norms().shape == (8,)


def test_architecture():
    @torch.library.custom_op("mine::scaled_linear", mutates_args=())
    def scaled_linear(x: torch.Tensor, w: torch.Tensor, scale: float) -> torch.Tensor:
        return scale * (x @ w.T)

    run("architecture", {"torch": torch})


def test_gpu_loop():
    names = reader() | {"scaler": torch.amp.GradScaler("cpu"), "held_out": reader()["loader"]}
    run("guides/gpu_loop", names, {'"cuda", torch.float16': '"cpu", torch.bfloat16'})
    assert names["learner"].pairs == 2


def test_paper_method():
    names = reader()
    run("paper_method", names)
    assert (names["learner"].pairs, names["learner"].reference) == (2, "next")


def test_reference_and_strength():
    names = run("guides/reference_and_strength", reader() | {"held_out": [(None,)], "pairs": 4000})
    learner, augment = names["learner"], OLAAugment(strength=1)
    told = OLALearner.recommended(learner._model, augment, [(None,)], 4000)
    for name in ("learn_pairs", "learn_every", "rejoins"):
        assert getattr(learner, name) == getattr(told, name)
    for name in ("explores", "shrink", "scale", "decay"):
        assert getattr(learner.updater, name) == getattr(told.updater, name)
    others = {"policy": None, "_expected": None, "_mean": None}
    assert vars(learner.trial) | others == vars(told.trial) | others
    assert learner.trial._expected == learner.updater.told_apart
    assert told.trial._expected == told.updater.told_apart


def test_workers():
    names = reader() | {"OLAAugment": OLAAugment, "OLALearner": OLALearner}
    names["held_out"] = names["loader"]
    names["dataset"] = TensorDataset(names["images"].repeat(4, 1, 1, 1), names["targets"].repeat(4))
    run(
        "guides/workers",
        names,
        {"batch_size=128": "batch_size=8", "num_workers=4": "num_workers=0"},
    )
    assert names["learner"].pairs == 2


def test_extending():
    names = run("guides/extending", {})
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    _, actions = names["augment"].augment(images)
    names["augment"].policy.log_prob(actions).sum().backward()
    assert names["augment"].policy.logit.grad is not None


def test_albumentations(monkeypatch):
    """With a stand-in that blurs nothing: the package is not needed to run the page."""

    def made(*steps, **_):
        def run(image):
            steps_here = steps[0] if steps and isinstance(steps[0], list) else ()
            for step in steps_here:
                image = step(image=image)["image"]
            return {"image": image}

        return run

    def blur(limit, **settings):
        random = {"angle_range", "direction_range", "allow_shifted"} - set(settings)
        assert not random, f"draws its {random}, which is not replayed"
        ends = (limit, settings["angle_range"], settings["direction_range"])
        assert all(low == high for low, high in ends)
        assert not settings["allow_shifted"]
        return made()

    names = ("Compose", "RandomResizedCrop", "HorizontalFlip")
    stand_in = SimpleNamespace(**dict.fromkeys(names, made), MotionBlur=blur)
    monkeypatch.setitem(sys.modules, "albumentations", stand_in)
    names = run("guides/albumentations", reader())
    images = names["images"]
    assert (
        names["load"](images[0].movedim(0, -1).numpy()) == images[0].movedim(0, -1).numpy()
    ).all()
    result, actions = names["OLAAugment"](names["space"], max_ops=2).augment(images)
    assert (result == images).all()
    assert actions.batch_size == len(images)


def test_what_albumentations_blurs_is_replayed():
    pytest.importorskip("albumentations")
    space = run("guides/albumentations", reader())["space"]
    augment = OLAAugment(space, max_ops=1)
    images = torch.randint(0, 256, (16, 3, 24, 24), dtype=torch.uint8)
    result, actions = augment.augment(images)
    assert not torch.equal(result, images)
    assert torch.equal(augment.replay(images, actions), result)


def test_operations():
    run("operations", {})


def test_which_images():
    names = run("which_images", {})
    assert names["augmented"].dtype == torch.int16


def test_influence():
    from ola_augment import GradientAlignment

    torch.manual_seed(0)
    model, F = nn.Linear(5, 4), nn.functional
    train_x, train_y = torch.randn(6, 5), torch.randint(0, 4, (6,))
    test_x, test_y = torch.randn(3, 5), torch.randint(0, 4, (3,))
    checkpoints = [copy.deepcopy(model.state_dict()), nn.Linear(5, 4).state_dict()]
    expected = 0
    for state, lr in zip(checkpoints, (0.1, 0.2), strict=True):
        rows = []
        for x, y in ((test_x, test_y), (train_x, train_y)):
            delta = F.linear(x, state["weight"], state["bias"]).softmax(1) - F.one_hot(y, 4)
            with_bias = torch.cat((x, torch.ones(len(x), 1)), dim=1)
            rows.append(torch.einsum("bi,bj->bij", delta, with_bias).flatten(1))
        expected = expected + lr * rows[0] @ rows[1].T
    names = {
        "torch": torch,
        "F": F,
        "GradientAlignment": GradientAlignment,
        "model": model,
        "checkpoints": checkpoints,
        "learning_rates": [0.1, 0.2],
        "train_x": train_x,
        "train_y": train_y,
        "test_x": test_x,
        "test_y": test_y,
    }
    run("guides/influence", names)
    torch.testing.assert_close(names["scores"], expected, rtol=1e-2, atol=1e-3)
    assert names["features"].shape == (6, 16)


def test_testing():
    pytest.importorskip("hypothesis")
    names = run("testing", {})
    names["test_shapes_stay"]()


def test_kornia():
    pytest.importorskip("kornia")
    images = torch.rand(4, 3, 16, 16)
    boxes = torch.tensor([[[2.0, 2.0, 10.0, 12.0]]]).repeat(4, 1, 1)
    names = {"images": images, "masks": torch.ones(4, 1, 16, 16), "boxes": boxes}
    names["points"] = torch.full((4, 1, 2), 5.0)
    run("kornia", names)
    assert names["augment"].last_actions.log_prob.shape == (4,)


def test_reliability():
    names = reader() | {"augment": OLAAugment()}
    run("reliability", names, {"num_workers=2": "num_workers=0"})
    assert names["actions"].log_prob.shape == (1,)


def test_tutorial(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib").use("agg")
    monkeypatch.chdir(tmp_path)
    for part, count in (("train", 10), ("test", 2)):
        for label in ("cat", "dog"):
            folder = tmp_path / part / label
            folder.mkdir(parents=True)
            for index in range(count):
                Image.effect_noise((72, 64), 50 + index).convert("RGB").save(
                    folder / f"{index}.png"
                )
    smaller = {"epochs = 50": "epochs = 1", "batch_size=64": "batch_size=4", "64": "32"}
    names = run("tutorial", {}, smaller)
    assert len(names["history"]) == 1
    for file in ("metrics.csv", "run.pt", "policy.png", "tables.png", "samples.png", "policy.json"):
        assert (tmp_path / file).stat().st_size > 100, file


def test_the_tutorial_refuses_a_folder_that_lacks_a_class(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("train/a", "train/b", "train/c", "test/a", "test/c"):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(tmp_path / folder / "0.png")
    with pytest.raises(AssertionError):
        run("tutorial", {})
    (tmp_path / "test" / "b").mkdir()  # and the way out
    train, test = (ImageFolder(part, allow_empty=True) for part in ("train", "test"))
    assert test.class_to_idx == train.class_to_idx
    assert test.targets == [0, 2]


class Accelerator:
    """As accelerate's, with every batch an update."""

    sync_gradients = True

    def accumulate(self, model):
        return contextlib.nullcontext()

    def backward(self, loss):
        loss.backward()


def test_ddp(tmp_path):
    from torch import distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        names = reader() | {
            "dist": dist,
            "DistributedDataParallel": DistributedDataParallel,
            "OLAAugment": OLAAugment,
            "OLALearner": OLALearner,
            "accelerator": Accelerator(),
            "pairs": 4000,
            "fully_shard": lambda module: module,  # for one process nothing is to be shared
        }
        names["model"].blocks = []
        names |= {"network": names["model"], "loader": [(names["images"], names["targets"])] * 4}
        names |= {"held_out": names["loader"]}
        assert run("guides/ddp", names)["learner"].pairs == 2
    finally:
        dist.destroy_process_group()


def test_timm():
    timm = pytest.importorskip("timm")
    from timm.data import Mixup
    from timm.loss import SoftTargetCrossEntropy

    names = reader() | {
        "timm": timm,
        "F": nn.functional,
        "OLALearner": OLALearner,
        "OLAAugment": OLAAugment,
        "pairs": 4000,
        "SoftTargetCrossEntropy": SoftTargetCrossEntropy,
        "mixup": Mixup(mixup_alpha=0.2, num_classes=4),
    }
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    names["loader"] = names["held_out"] = [(images, torch.tensor([0, 3]))] * 2
    smaller = {
        '"vit_tiny_patch16_224"': '"vit_tiny_patch16_224", img_size=32, depth=1, num_classes=4',
    }
    run("guides/timm", names, smaller)
    assert names["fixed"](images).shape == images.shape


@pytest.mark.filterwarnings("ignore")  # its own
def test_lightning():
    lightning = pytest.importorskip("lightning")

    class LitModel(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))

        def training_step(self, batch, _):
            images, labels = batch
            return nn.functional.cross_entropy(self.network(images.float() / 255), labels)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = functools.partial(
        lightning.Trainer,
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(reader()["dataset"], batch_size=2)
    names = {"LitModel": LitModel, "Trainer": trainer, "loader": loader}
    names |= {"images": reader()["images"], "labels": reader()["targets"]}
    names["normalize"] = reader()["normalize"]
    run("guides/lightning", names)
    assert names["learner"].pairs == 1


@pytest.mark.filterwarnings("ignore")  # its own
def test_huggingface(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    datasets = pytest.importorskip("datasets")
    from torchvision.transforms import v2
    from torchvision.transforms.v2.functional import pil_to_tensor

    monkeypatch.chdir(tmp_path)
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        image_size=32, patch_size=16, num_labels=2,
    )  # fmt: skip
    pictures = [Image.effect_noise((40, 40), 50) for _ in range(8)]
    names = {
        "torch": torch,
        "v2": v2,
        "pil_to_tensor": pil_to_tensor,
        "model": transformers.ViTForImageClassification(config),
        "TrainingArguments": functools.partial(
            transformers.TrainingArguments,
            max_steps=2,
            per_device_train_batch_size=2,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        ),
        "dataset": datasets.Dataset.from_dict({"image": pictures, "label": [0, 1] * 4}),
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "images": torch.zeros(2, 3, 32, 32, dtype=torch.uint8),
        "labels": torch.tensor([0, 1]),
    }
    run("guides/huggingface", names, {"(224, 224)": "(32, 32)"})
    assert names["learner"].pairs == 1


#: Not what an English reader would say, or says something else.
UNCLEAR = (
    "known by heart", "by heart", "place of use", "in the place of", "every so man", "so manyth",
    "level with", "are known of", "held to ten", "whoever drew", "by its parts", "no matter",
    "seldom equalize", "learns itself", "to and fro", "turned digits", "turned images", "will pay",
    "turned by up to", "where the model will be used",
)  # fmt: skip


def test_the_errors_of_the_faq_are_those_of_the_code():
    pages = [*(DOCS.parent / "ola_augment").rglob("*.py")]
    code = re.sub(r'"\s*f?"', "", " ".join(page.read_text(encoding="utf-8") for page in pages))
    code = re.sub(r"\{[^{}]*\}", "0", code)
    text = (DOCS / "faq.md").read_text(encoding="utf-8").split("## Errors")[1]
    errors = re.findall(r"^`(.+)`$", text, re.MULTILINE)
    assert len(errors) > 10
    for error in errors:
        for part in re.split(r"\.\.\.|\d+", error):
            assert part.strip()[:25] in code, (error, part)  # placeholders may follow


def test_the_pages_use_plain_words():
    root = DOCS.parent
    files = [
        *root.glob("*.md"),
        *DOCS.glob("*.md"),
        *DOCS.glob("guides/*.md"),
        *DOCS.glob("api/*.md"),
    ]
    files += [root / "Makefile", *root.glob("ola_augment/**/*.py"), *root.glob("examples/**/*.py")]
    found = []
    for file in files:
        text = " ".join(file.read_text(encoding="utf-8").split()).lower()
        found += [f"{file.relative_to(root)}: {words}" for words in UNCLEAR if words in text]
    assert not found


def test_findings_are_listed_with_the_line_that_they_explain():
    root = DOCS.parent
    rows = re.findall(r"^\| `([\w-]+)` \|.*\| (.*) \|$", (DOCS / "findings.md").read_text(), re.M)
    scripts = sorted((root / "findings").glob("*.sh"))
    assert sorted(name for name, _ in rows) == [script.stem for script in scripts]
    for _, ours in rows:
        *names, file = (
            re.findall(r"`([\w./]+)`", ours)[:2] if "` in `" in ours else [ours.split("`")[1]]
        )
        assert all(name in (root / file).read_text() for name in names), ours
    for script in scripts:
        text = script.read_text()
        assert "ola_augment" not in text, script
        assert re.search(r"^# Seen with .*\d+\.\d+", text, re.M), script
        assert re.search(r"pip install --quiet[^|]*==", text), script
        assert "diff seen.txt" in text, script
