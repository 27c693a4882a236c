"""CutMix in a training step, and the loss above the entropy of shared labels."""

import pytest
import torch
import torch.nn.functional as F
from raising import D3, FT, build, raw_images
from tiny import tiny_resnet, tiny_vit

from d3_hf.defenses.fst import FSTConfig, FSTTrainer
from d3_hf.defenses.ft_sam import FTSAMConfig, FTSAMTrainer
from d3_hf.defenses.lmr import LMRConfig, LMRTrainer
from d3_hf.training.mixing import CutMix, excess_cross_entropy


def test_a_box_comes_from_the_neighbour_and_the_label_is_shared_by_area():
    images, labels = torch.randn(5, 3, 16, 12), torch.tensor([0, 1, 2, 1, 0])
    mixed, shares = CutMix(3, 1.0, seed=4, process=0)(images, labels, 7).values()
    for i in range(5):
        own = (mixed[i] == images[i]).all(0)
        other = (mixed[i] == images[i - 1]).all(0)
        assert (own ^ other).all() and 0 < other.sum()
        rows, columns = other.any(1).nonzero().flatten(), other.any(0).nonzero().flatten()
        assert other.sum() == len(rows) * len(columns) == (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
        expected = torch.zeros(3)
        expected[labels[i]] += own.float().mean()
        expected[labels[i - 1]] += other.float().mean()
        torch.testing.assert_close(shares[i], expected)


def test_draws_depend_on_seed_process_and_number_alone():
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)

    def drawn(seed=0, process=0, number=0):
        return CutMix(4, 1.0, seed, process)(images, labels, number)["labels"]

    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = drawn()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(drawn(), first)
    others = [drawn(seed=1), drawn(process=1), drawn(number=1)]
    assert all(not torch.equal(other, first) for other in others)


def test_a_whole_number_is_an_alpha():
    images, labels = torch.rand(4, 3, 8, 8), torch.arange(4)
    one, other = (CutMix(4, alpha, seed=3, process=0)(images, labels, 0) for alpha in (1, 1.0))
    assert torch.equal(one["pixel_values"], other["pixel_values"])


def test_the_loss_is_that_above_the_labels_entropy():
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    hard = torch.tensor([0, 1, 2, 3, 0, 1])
    assert torch.equal(excess_cross_entropy(logits, hard), F.cross_entropy(logits, hard, reduction="none"))
    soft = torch.rand(6, 4, dtype=torch.float64).softmax(1)
    soft[0] = torch.tensor([1.0, 0, 0, 0])
    found = excess_cross_entropy(logits, soft)
    for i in range(6):
        log_p = logits[i].detach().log_softmax(0)
        slow = sum(soft[i, k] * (soft[i, k].log() - log_p[k]) for k in range(4) if soft[i, k] > 0)
        torch.testing.assert_close(found[i].detach(), slow)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    torch.testing.assert_close(gradient, logits.detach().softmax(1) - soft)
    torch.testing.assert_close(excess_cross_entropy(soft[1:].log(), soft[1:]), torch.zeros(5, dtype=torch.float64))


@pytest.mark.parametrize(
    "kind", [FT, D3, (FTSAMConfig, FTSAMTrainer), (FSTConfig, FSTTrainer)], ids=lambda kind: kind[0].__name__
)
def test_it_comes_by_rule_to_transformers_and_not_to_convolutions(kind, tmp_path):
    on_transformer = build(kind, tmp_path / "vit", tiny_vit(), optim=None, optim_args=None, warmup_steps=None, cutmix=None)
    assert on_transformer.args.cutmix == 1 and on_transformer.schedule["options"]["cutmix"] == 1
    assert build(kind, tmp_path / "cnn", tiny_resnet(), cutmix=None).args.cutmix == 0
    on_transformer.train()
    assert all(torch.isfinite(p).all() for p in on_transformer.model.parameters())


def test_a_method_whose_loss_it_does_not_fit(tmp_path):
    lmr = LMRConfig, LMRTrainer
    left_out = build(lmr, tmp_path / "without", tiny_vit(), cutmix=None)
    assert left_out.args.cutmix == 0 and "cutmix" not in left_out.schedule.get("options", {})
    with pytest.raises(ValueError, match="LMRTrainer does not take cutmix"):
        build(lmr, tmp_path / "with", tiny_vit(), cutmix=1)


def test_a_step_is_that_on_the_mixed_batch(tmp_path):
    """The gradient that the trainer steps along is that of the loss on what CutMix makes of the same batch."""
    images = raw_images(12)
    options = dict(cutmix=1.0, crop_padding=0, max_steps=1, per_device_train_batch_size=12, learning_rate=1.0, optim="sgd")
    made = build(FT, tmp_path, tiny_vit(), images, **options, optim_args="momentum=0.0", lr_scheduler_type="constant")
    reference = tiny_vit()
    batches = []
    mix = made.mixing
    made.mixing = lambda *batch: batches.append((batch, mix(*batch))) or batches[-1][1]
    made.train()
    (((pixels, labels, number), found),) = batches
    mixed, shares = found.values()
    again = CutMix(3, 1.0, made.args.seed, 0)(pixels, labels, number)
    assert number == 0 and torch.equal(again["pixel_values"], mixed) and not torch.equal(mixed, pixels)
    excess_cross_entropy(reference(pixel_values=mixed).logits, shares).mean().backward()
    for (name, moved), start in zip(made.model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(moved.detach(), (start - start.grad).detach(), msg=name)
