"""Methods that compare or mix views: every unlabeled image counts alike, and the losses are the method's own."""
import argparse

import torch
import torch.nn.functional as F
from torch import nn

from passes import Outputs, divergence, find_adversary, mean_square, mix, rotate, still_statistics
from pseudo_labels import TINY, Method, move_mean, sharpen, widen
from schedule import running_momentum


class Consistency(Method):
    """Methods in which every unlabeled image counts alike, and that compute their losses themselves."""
    own_losses = True

    def __init__(self, num_unlabeled: int, num_classes: int, args: argparse.Namespace):
        super().__init__(num_classes)
        self.label_smoothing, self.temperature, self.alpha = args.label_smoothing, args.temperature, args.mixmatch_alpha

    def forward(self, logits: torch.Tensor, index: torch.Tensor, num_updates: int) -> torch.Tensor:
        return torch.ones(len(logits), device=logits.device)

    def labeled_loss(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Cross-entropy with classes `[B]` or probabilities `[B, K]`."""
        return F.cross_entropy(logits, target, label_smoothing=self.label_smoothing)


class PiModel(Consistency):
    """Mean squared difference of the probabilities of two weak views (arXiv 1610.02242, algorithm 1).

    The gradient is that of the second view alone, as in the published recipe: on average half of the paper's.
    """
    published = dict(mu=1, lambda_u=10., lambda_u_warmup=0.4)
    views = {'weak': 'weak', 'strong': 'weak'}

    def losses(self, model: nn.Module, labeled: dict, unlabeled: dict, out: Outputs) -> tuple:
        weak, strong = (logits[:, :self.num_classes] for logits in (out.weak_logits, out.strong_logits))
        return self.labeled_loss(out.logits, labeled['target']), mean_square(strong, weak.softmax(1)), 0.


class MeanTeacher(PiModel):
    """As the Pi-model, but the first weak view passes through the averaged network (arXiv 1703.01780, section 2).

    That is the one that is evaluated, in evaluation mode, on the schedule of --model-ema-decay and its warmup. It also
    gives CalibrateMix the pseudo-labels and features of unlabeled images; those of labeled ones are the trained
    network's, so that the ranking compares the two networks' features.
    """
    published = dict(mu=1, lambda_u=50., lambda_u_warmup=0.4)
    takes_average = True
    weak_apart = False


class VAT(Consistency):
    """Divergence of what the network says of an image and of its adversarial neighbour (arXiv 1704.03976, eq. 5 to 8).

    A small factor of the entropy of the unlabeled images is added, as in the published recipe. What is compared comes
    of passes over the unlabeled images alone, or batch norm would tell the two apart where nothing has moved.
    """
    published = dict(mu=1, lambda_u_warmup=0.4)
    views = {'weak': 'weak'}
    weak_apart = False
    ENTROPY = 0.06

    def __init__(self, num_unlabeled: int, num_classes: int, args: argparse.Namespace):
        super().__init__(num_unlabeled, num_classes, args)
        self.eps = args.vat_eps

    def losses(self, model: nn.Module, labeled: dict, unlabeled: dict, out: Outputs) -> tuple:
        images = unlabeled['weak']
        with still_statistics(model):
            with torch.no_grad():  # in a batch of the same images as below: labeled ones change what batch norm does
                said = model(images)[1][:, :self.num_classes].float()
            moved = images + find_adversary(model, images, said, self.eps)
            said_there = model(moved)[1][:, :self.num_classes].float()
        log_probs = out.strong_logits[:, :self.num_classes].log_softmax(1)
        entropy = -(log_probs.exp() * log_probs).sum(1).mean()
        labeled_loss = self.labeled_loss(out.logits, labeled['target'])
        return labeled_loss, divergence(said, said_there).mean(), self.ENTROPY * entropy


class MixMatch(Consistency):
    """Guesses for two weak views, averaged and sharpened, then mixup of all images (arXiv 1905.02249, algorithm 1).

    The images are mixed within a process's own batch.
    """
    published = dict(mu=1, lambda_u=100., lambda_u_warmup=0.4)
    published_for = {'cifar100': dict(lambda_u=150.)}
    views = {'weak': 'weak', 'strong': 'weak'}
    trains_on_views = False
    weak_apart = False

    def guess(self, out: Outputs) -> torch.Tensor:
        """Sharpened probabilities `[U, K]` (equations 6 and 7)."""
        views = [logits[:, :self.num_classes].softmax(1) for logits in (out.weak_logits, out.strong_logits)]
        return sharpen(sum(views) / 2, self.temperature)

    def losses(self, model: nn.Module, labeled: dict, unlabeled: dict, out: Outputs) -> tuple:
        known, guess = F.one_hot(labeled['target'], out.logits.shape[1]).float(), widen(self.guess(out), out.logits)
        images, targets = mix(
            torch.cat([labeled['image'], unlabeled['weak'], unlabeled['strong']]),
            torch.cat([known, guess, guess]),
            self.alpha,
        )
        logits, number = model(images)[1].float(), len(known)
        loss = self.labeled_loss(logits[:number], targets[:number])
        return loss, mean_square(logits[number:], targets[number:]), 0.


class ReMixMatch(Consistency):
    """Distribution alignment, strong views as anchored by the weak one, rotations (arXiv 1911.09785, algorithm 1).

    Two strong views. The class shares that are aligned to are those of the labels seen so far, each class counted once
    more, so that none is missing at the start. The four outputs that tell by how much an image is turned are the last
    ones of the network's own classifier, and are not saved with the weights.
    """
    published = dict(mu=1, lambda_u=1.5, lambda_u_warmup=1 / 64, mixmatch_alpha=0.75)
    views = {'weak': 'weak', 'first': 'strong', 'second': 'strong'}
    labeled_views = {'image': 'weak', 'strong': 'strong'}
    further_outputs = 4
    trains_on_views = False
    weak_apart = False
    PLAIN = 0.5 / 1.5  # factor of the loss of the first strong view as it is, beside that of the mixed images
    ROTATION = 0.5

    def __init__(self, num_unlabeled: int, num_classes: int, args: argparse.Namespace):
        super().__init__(num_unlabeled, num_classes, args)
        self.momentum = running_momentum(args)
        self.register_buffer('class_count', torch.ones(num_classes, dtype=torch.int64))
        self.register_buffer('class_mean', torch.full((num_classes,), 1 / num_classes))

    def see_labeled(self, logits: torch.Tensor, target: torch.Tensor, num_updates: int) -> None:
        own_class = target < self.num_classes
        self.class_count.scatter_add_(0, target.clamp(max=self.num_classes - 1), own_class.long())

    def forward(self, logits: torch.Tensor, index: torch.Tensor, num_updates: int) -> torch.Tensor:
        move_mean(self.class_mean, logits.softmax(1), self.momentum)
        return super().forward(logits, index, num_updates)

    def guess(self, out: Outputs) -> torch.Tensor:
        """Aligned and sharpened probabilities `[U, K]` of the weak view."""
        share = self.class_count / self.class_count.sum()
        probs = out.weak_logits[:, :self.num_classes].softmax(1) * share / self.class_mean.clamp(min=TINY)
        return sharpen(probs / probs.sum(1, keepdim=True), self.temperature)

    def losses(self, model: nn.Module, labeled: dict, unlabeled: dict, out: Outputs) -> tuple:
        width, first = out.logits.shape[1], unlabeled['first']
        known, guess = F.one_hot(labeled['target'], width).float(), widen(self.guess(out), out.logits)
        images, targets = mix(
            torch.cat([labeled['strong'], first, unlabeled['second'], unlabeled['weak']]),
            torch.cat([known, guess, guess, guess]),
            self.alpha,
        )
        turns = torch.randint(4, (len(first),), device=first.device)
        logits = model(torch.cat([images, first, rotate(first, turns)]))[1].float()
        mixed, plain, turned = logits.split([len(images), len(first), len(first)])
        number = len(known)
        unlabeled_loss = F.cross_entropy(mixed[number:, :width], targets[number:])
        unlabeled_loss = unlabeled_loss + self.PLAIN * F.cross_entropy(plain[:, :width], guess)
        rotation = F.cross_entropy(turned[:, width:], turns)
        return self.labeled_loss(mixed[:number, :width], targets[:number]), unlabeled_loss, self.ROTATION * rotation
