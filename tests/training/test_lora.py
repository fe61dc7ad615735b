"""Trials that train adapters: what moves, what is kept, and that nothing but training needs peft."""

import pytest
import torch

from raydml.config.trial import fingerprint, parse_machine, parse_trial
from raydml.data.seal import TestReads
from raydml.errors import ConfigError
from raydml.inference.evaluate import evaluate_checkpoint
from raydml.inference.export import EmbeddingModel, export_model, export_onnx, load_checkpoint
from raydml.models import adapters
from raydml.models.random_weights import write_random_weights
from raydml.training import checkpoint, parts
from raydml.training.trainer import Trainer
from tests.training.test_gradient_cache import assert_equal_gradients
from tests.training.test_gradient_cache import trial_of as trial_of_random_images
from tests.training.test_trainer import assert_resume_is_exact, assert_same, trainer_of, trial_of, without_times

LORA = {"rank": 4, "alpha": 8, "targets": "attention"}
DATA = {**trial_of().data.model_dump(mode="json"), "resize_px": 32, "crop_px": 32}
ADAMW = {"name": "adamw", "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    file = tmp_path_factory.mktemp("weights") / "vit.pth"
    write_random_weights("timm:test_vit", file)
    return {"backbone": "timm:test_vit", "weights": str(file), "embedding_dim": 8, "train": {"lora": LORA}}


def make(model, **changes) -> Trainer:
    return trainer_of(model=model, data=DATA, **{"epochs": 2, "optimizer": ADAMW, **changes})


def test_only_adapters_head_and_loss_move_and_the_optimiser_has_no_more(model):
    trainer = make(model, epochs=1)
    before = {name: value.clone() for name, value in trainer.method.network.state_dict().items()}
    assert (trainer.best_weights.keys()) == make({**model, "train": "all"}).best_weights.keys()
    list(trainer.epochs())
    moved = {
        name for name, value in trainer.method.network.state_dict().items() if not torch.equal(value, before[name])
    }
    of_trunk = {name for name in moved if name.startswith("trunk.")}
    assert moved - of_trunk == {"head.linear.weight", "head.linear.bias"}
    assert of_trunk == {name for name in before if ".lora_" in name}
    groups = {group["name"]: len(group["params"]) for group in trainer.optimizer.param_groups}
    assert groups == {"backbone": len(of_trunk), "head": 2}
    assert len(of_trunk) == 6 * 2 * 2


def test_resume_is_exact_with_adapters(model, tmp_path):
    schedule = {"name": "cosine", "new_layer_warmup_epochs": 1}
    settings = {"epochs": 4, "schedule": schedule, "optimizer": {**ADAMW, "ema": 0.9, "layer_decay": 0.8}}
    assert_resume_is_exact(lambda: make({**model, "drop_path": 0.2}, chunk_size=10, **settings), tmp_path / "c")


def test_an_epoch_with_adapters_continues_from_its_middle(model, tmp_path):
    unbroken = make(model, epochs=1)
    steps = unbroken.steps()
    next(steps)
    unbroken.save(tmp_path / "c")
    (expected,) = (result for result in steps if result is not None)
    resumed = make(model, epochs=1)
    resumed.restore(tmp_path / "c")
    assert without_times(resumed.epochs()) == without_times([expected])
    assert_same(resumed.state_dict(), unbroken.state_dict())


@pytest.fixture(scope="module")
def trained(model, tmp_path_factory):
    """A trial whose last epoch is its best, and its checkpoint."""
    trial = trial_of(model=model, data=DATA, epochs=2, optimizer=ADAMW).model_dump(mode="json")
    trainer = Trainer(parse_trial(trial), parse_machine({}), device="cpu")
    for _ in trainer.epochs():
        trainer.best_metrics = {**trainer.best_metrics, "val_map_at_r": -1.0}  # so that the next epoch is better
    return trainer, trainer.save(tmp_path_factory.mktemp("trained") / "c")


@pytest.fixture
def without_peft(monkeypatch):
    monkeypatch.setattr(adapters, "find_spec", lambda _name: None)


@pytest.mark.usefixtures("without_peft")
def test_the_weights_that_are_kept_have_the_adapters_in_them_and_need_no_peft(trained, tmp_path):
    trainer, folder = trained
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    network = trainer.method.network.eval()
    with torch.no_grad():
        expected = network(images)
        assert (expected - load_checkpoint(folder).network(images)).abs().max() < 1e-6
        exported = EmbeddingModel.load(export_model(folder, tmp_path / "model"))
        assert (expected - exported.network(images)).abs().max() < 1e-6
        # The adapters are what has been learned.
        for name, parameter in network.named_parameters():
            if ".lora_B." in name:
                before, parameter.data = parameter.data, torch.zeros_like(parameter)
                assert before.abs().max() > 0
        assert (expected - network(images)).abs().max() > 1e-2
    card = checkpoint.load_card(folder)
    assert card["network"]["train"] == "all"
    assert card["trial"]["model"]["train"] == {"lora": {"rank": 4, "alpha": 8.0, "targets": "attention"}}
    assert not [name for name in checkpoint.load_weights(folder) if "lora" in name or "base_layer" in name]


@pytest.mark.usefixtures("without_peft")
def test_the_test_classes_are_scored_without_peft(trained, tmp_path):
    trainer, folder = trained
    machine = parse_machine({})
    metrics = evaluate_checkpoint(folder, "val", machine).metrics
    assert metrics["map_at_r"] == pytest.approx(trainer.last_result["val_map_at_r"], abs=1e-3)
    key = TestReads(tmp_path / "test_reads.jsonl").record(checkpoint=str(folder), purpose="a test", commit=None)
    tested = evaluate_checkpoint(folder, "test", machine, key=key).metrics
    assert tested["untrained_map_at_r"] != tested["map_at_r"]


@pytest.mark.slow
@pytest.mark.usefixtures("without_peft")
def test_an_onnx_file_has_the_adapters_in_its_weights(trained, tmp_path):
    assert export_onnx(load_checkpoint(trained[1]), tmp_path / "model.onnx") < 1e-5


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}])
def test_gradients_in_chunks_are_those_of_the_batch(model, changes):
    assert_equal_gradients(trial_of_random_images({**model, **changes}, crop_px=32), num_steps=1)


def test_rates_fall_with_the_depth_of_the_adapters(model):
    optimizer = {**ADAMW, "layer_decay": 0.5, "backbone_learning_rate": 0.1}
    trainer = make(model, optimizer=optimizer)
    names = {id(parameter): name for name, parameter in trainer.method.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    for block in range(6):
        rate = rates[f"network.trunk.model.blocks.{block}.attn.qkv.lora_A.default.weight"]
        assert rate == pytest.approx(0.1 * 0.5 ** (5 - block))


def test_a_missing_peft_is_noticed_before_images_are_opened(model, without_peft, monkeypatch):  # noqa: ARG001
    monkeypatch.setattr("raydml.training.trainer.open_development", lambda *_a, **_k: pytest.fail("too late"))
    with pytest.raises(ValueError, match=r"pip install 'raydml\[lora\]'"):
        make(model)


@pytest.mark.parametrize(
    ("changes", "key", "message"),
    [
        ({"train": {"lora": {"rank": 0}}}, "model.train.lora.rank", "must be >= 1"),
        ({"train": {"lora": {"targets": "attentoin"}}}, "model.train.lora.targets", "is not one of the choices"),
        ({"train": {"lora": {"ranks": 8}}}, "model.train.lora.ranks", "is an unknown key"),
        ({"train": {"lora": {}, "last_blocks": 2}}, "model.train.last_blocks", "is an unknown key"),
        ({"weights": "none"}, "model.train", "leaves random weights as they are"),
        ({"backbone": "timm:test_convnext"}, "model.train.lora", "has no attention"),
        ({"backbone": "timm:beit_base_patch16_224", "data": {**DATA, "resize_px": 224, "crop_px": 224}},
         "model.train.lora", "reads the weights of blocks.0.attn.qkv itself"),
        ({"backbone": "resnet18"}, "model.train.lora", "is not one of timm's transformers"),
    ],
)  # fmt: skip
def test_what_cannot_be_adapted_is_refused_with_the_key(model, changes, key, message):
    data = changes.get("data", DATA)
    with pytest.raises(ConfigError) as refusal:
        trial_of(model={**model, **{name: value for name, value in changes.items() if name != "data"}}, data=data)
    (problem,) = refusal.value.problems
    assert (problem.path, bool(problem.cure)) == (key, True)
    assert message in problem.message


def test_a_trial_with_adapters_is_written_and_read_again(model):
    trial = trial_of(model={**model, "train": {"lora": {}}}, data=DATA)
    assert (trial.model.train.lora.rank, trial.model.train.lora.alpha) == (8, 16)
    assert parse_trial(trial.model_dump(mode="json")) == trial
    assert fingerprint(trial) != fingerprint(trial_of(model={**model, "train": "all"}, data=DATA))
    assert parts.plain_network_arguments(trial)["train"] == "all"
