"""The base methods: how much each unlabeled image counts, and as what class.

A step passes labeled, weak and strong images through the network and then asks its method:

    method.see_labeled(logits, target, num_updates)    # tells it of the labeled images of all processes
    weight = method(weak_logits, index, num_updates)   # of the images of all processes: [U] in [0, 1]
    target = method.target(weak_logits, pseudo_label, index)  # of a process's own images: as what they are trained
    loss = loss + method.further_loss(strong_logits, weight, accelerator)  # what the method adds to the loss

The pseudo-label is the top class of the weak view. The weights are of the joined batch, so running statistics are the
same on all processes; they are buffers, so that checkpoint and device follow. Methods that train on something else
than pseudo-labels compute their losses themselves (`losses`). A new method is one class and one entry of ALGORITHMS.
"""
import argparse
import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from calibratemix import PRESETS, MarginBank
from passes import Outputs, divergence, find_adversary, mean_square, mix, rotate, still_statistics
from seeds import item_seed

FULL_SCHEDULE = 1024 * 1024  # updates of the published recipe, in which the warmups of presets and methods are counted


class Method(nn.Module):
    """What the step asks of a base method; the constructor takes the size of the unlabeled set, K, and the arguments.

    `forward(logits, index, num_updates)` moves the running statistics and returns the weights `[U]` float32 in [0, 1]
    of the unlabeled images of all processes. It gets the logits of their weak views, `[U, K]` float32 and detached,
    their positions in the unlabeled set, `[U]` int64, and the updates done so far.

    Attributes:
        published: Arguments by name that are not given, as the method's published recipe has them for CIFAR-10.
        published_for: Those of another data set, by its name, where they differ.
        views: Views of an unlabeled image by name, and their kinds. Without strong ones the weak ones are trained on.
        labeled_views: Those of a labeled image.
        virtual_class: The network has a class K beside the set's own, and the method sees its logit too.
        further_outputs: Outputs of the network behind those of all classes, for a task of the method's own.
        takes_average: The weak views pass through the averaged network.
        trains_on_views: False where the views are only looked at, and the method passes what it trains on.
        weak_apart: Whether --weak-forward no-grad can be had.
        own_losses: The method computes the labeled and the unlabeled loss itself.
    """
    published = dict(
        mu=7, lambda_u=1., lambda_u_warmup=0., threshold=0.95, temperature=0.5, vat_eps=6., mixmatch_alpha=0.5,
    )
    published_for = {}
    views = {'weak': 'weak', 'strong': 'strong'}
    labeled_views = {'image': 'weak'}
    virtual_class = False
    further_outputs = 0
    takes_average = False
    trains_on_views = True
    weak_apart = True
    own_losses = False

    def __init__(self, num_classes: int):
        super().__init__()
        self.num_classes = num_classes

    def see_labeled(self, logits: torch.Tensor, target: torch.Tensor, num_updates: int) -> None:
        """Moves what is kept of labeled images: of all processes, logits `[B, K]` and targets `[B]`, before the step's
        call. Both may hold an extra class K, of threshold samples.
        """

    def target(self, logits: torch.Tensor, pseudo_label: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """As what a process's own images are trained: classes `[U]` int64 or probabilities, of the shape of the logits.

        Args:
            logits: `[U, K]` of the weak views, or more columns where the network has an extra class.
            pseudo_label: `[U]` int64, their top class.
            index: `[U]` int64, positions in the unlabeled set.
        """
        return pseudo_label

    def further_loss(
            self,
            strong_logits: torch.Tensor,
            weight: torch.Tensor,
            accelerator: Accelerator,
    ) -> torch.Tensor | float:
        """What is added to the loss, a scalar, from a process's own strong logits `[U, K]` and weights `[U]`."""
        return 0.

    def losses(
            self,
            model: nn.Module,
            labeled: dict,
            unlabeled: dict,
            out: Outputs,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | float]:
        """With `own_losses`, a process's own labeled and unlabeled loss, and what is added to their weighted sum."""
        raise NotImplementedError


def sharpen(probs: torch.Tensor, temperature: float) -> torch.Tensor:
    """Probabilities `[U, K]` to the power of 1 / temperature, which again add up to 1."""
    return (probs.log() / temperature).softmax(1)


def widen(probs: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Probabilities `[U, K]` with zeros for an extra class of the logits."""
    return F.pad(probs, (0, logits.shape[1] - probs.shape[1]))


def move_mean(mean: torch.Tensor, rows: torch.Tensor, momentum: float) -> None:
    """Moves a running mean `[K]` towards that of rows `[B, K]`; rows that are not finite do not count."""
    good = rows.isfinite().all(1)
    new = rows.masked_fill(~good[:, None], 0).sum(0) / good.sum().clamp(min=1)
    mean.lerp_(new, (1 - momentum) * good.any())


class FixMatch(Method):
    """1 where the confidence reaches the threshold, else 0 (arXiv 2001.07685, eq. 4)."""

    def __init__(self, num_unlabeled: int, num_classes: int, args: argparse.Namespace):
        super().__init__(num_classes)
        self.threshold = args.threshold

    def forward(self, logits: torch.Tensor, index: torch.Tensor, num_updates: int) -> torch.Tensor:
        return (logits.softmax(1).amax(1) >= self.threshold).float()


class PseudoLabel(FixMatch):
    """FixMatch's weights, but the weak view itself is trained on (Lee 2013, section 2.2); lambda grows over 0.4."""
    published = dict(lambda_u_warmup=0.4)
    views = {'weak': 'weak'}
    weak_apart = False


class FlexMatch(Method):
    """FixMatch with a threshold for each class that grows as the class is learned (arXiv 2110.08263).

    The table holds each image's last prediction that passed the fixed threshold, -1 before there is one. The images
    still at -1 count in the denominator, which warms the thresholds up.
    """

    def __init__(self, num_unlabeled: int, num_classes: int, args: argparse.Namespace):
        super().__init__(num_classes)
        self.threshold = args.threshold
        self.register_buffer('selected', torch.full((num_unlabeled,), -1, dtype=torch.int32))

    def class_thresholds(self) -> torch.Tensor:
        """Current thresholds `[K]`."""
        # Integers: a float32 stops counting by ones at 2^24.
        counts = torch.zeros(self.num_classes + 1, dtype=torch.int64, device=self.selected.device)
        counts.scatter_add_(0, self.selected.long() + 1, counts.new_ones(()).expand(len(self.selected)))
        unused, learned = counts[0], counts[1:]
        beta = learned / torch.maximum(learned.max(), unused)
        return self.threshold * beta / (2 - beta)

    def forward(self, logits: torch.Tensor, index: torch.Tensor, num_updates: int) -> torch.Tensor:
        confidence, label = logits.softmax(1).max(1)
        weight = (confidence >= self.class_thresholds()[label]).float()
        # The table moves by the fixed threshold. Of an index that stands twice in the batch the later row wins.
        row = torch.arange(len(index), device=index.device)
        passed = (index[:, None] == index) & (confidence >= self.threshold)
        last = torch.where(passed, row, -1).amax(1)
        new = torch.where(last >= 0, label[last.clamp(min=0)].int(), self.selected.gather(0, index))
        self.selected.scatter_(0, index, new)
        return weight


class SoftMatch(Method):
    """Truncated Gaussian of the confidence, with uniform alignment (arXiv 2301.10921).

    1 above the running mean of the confidence; below it falls off with half the running deviation (n_sigma = 2). The
    statistics are those of the plain confidence, as in the paper; the published code takes the aligned one's.
    """

    def __init__(self, num_unlabeled: int, num_classes: int, args: argparse.Namespace):
        super().__init__(num_classes)
        self.momentum, self.align = args.stat_momentum, args.softmatch_align
        self.aligned_stats = args.softmatch_usb_stats
        self.register_buffer('mean', torch.tensor(1 / num_classes))
        self.register_buffer('var', torch.tensor(1.))
        self.register_buffer('class_mean', torch.full((num_classes,), 1 / num_classes))

    def forward(self, logits: torch.Tensor, index: torch.Tensor, num_updates: int) -> torch.Tensor:
        probs = logits.softmax(1)
        plain = confidence = probs.amax(1)
        if self.align:
            self.class_mean.lerp_(probs.mean(0), 1 - self.momentum)
            aligned = probs / self.class_mean
            confidence = (aligned / aligned.sum(1, keepdim=True)).amax(1)
        seen = confidence if self.aligned_stats else plain
        self.mean.lerp_(seen.mean(), 1 - self.momentum)
        self.var.lerp_(seen.var(unbiased=len(seen) > 1), 1 - self.momentum)  # one row has no unbiased variance
        below = (confidence - self.mean).clamp(max=0)
        return torch.exp(-below ** 2 / (2 * self.var.clamp(min=1e-12) / 4))


class FreeMatch(Method):
    """Thresholds from the running confidence, global and by class (arXiv 2205.07246); a fairness term."""

    def __init__(self, num_unlabeled: int, num_classes: int, args: argparse.Namespace):
        super().__init__(num_classes)
        self.momentum, self.factor = args.stat_momentum, args.freematch_fairness
        self.register_buffer('tau', torch.tensor(1 / num_classes))
        self.register_buffer('class_mean', torch.full((num_classes,), 1 / num_classes))
        self.register_buffer('class_share', torch.full((num_classes,), 1 / num_classes))

    def forward(self, logits: torch.Tensor, index: torch.Tensor, num_updates: int) -> torch.Tensor:
        probs = logits.softmax(1)
        confidence, label = probs.max(1)
        self.tau.lerp_(confidence.mean(), 1 - self.momentum)
        self.class_mean.lerp_(probs.mean(0), 1 - self.momentum)
        self.class_share.lerp_(F.one_hot(label, self.num_classes).float().mean(0), 1 - self.momentum)
        thresholds = self.class_mean / self.class_mean.max() * self.tau
        return (confidence >= thresholds[label]).float()

    def further_loss(self, strong_logits: torch.Tensor, weight: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
        """The fairness term times its factor.

        Its batch means are those of all processes. The gradient of a mean flows through the own part of it alone, and
        averaging the gradients over the processes then gives that of the joined batch.
        """
        probs = strong_logits[:, :self.num_classes].softmax(1)
        own = torch.cat([
            (probs * weight[:, None]).sum(0),
            (F.one_hot(probs.argmax(1), self.num_classes) * weight[:, None]).sum(0),
            weight.sum()[None],
        ])
        others = accelerator.reduce(own.detach(), 'sum') - own.detach()
        sums = (own * accelerator.num_processes - own.detach() * (accelerator.num_processes - 1)) + others
        number = sums[-1].detach().clamp(min=1)
        mean, share = sums[:self.num_classes] / number, sums[self.num_classes:-1] / number
        # A class that no strong view is counted for has no ratio; as in the published code it then weighs nothing.
        ratio = torch.where(share > 0, mean / share.clamp(min=1e-12), 0)
        ratio = ratio / ratio.sum().clamp(min=1e-12)
        target = self.class_mean / self.class_share.clamp(min=1e-12)
        fairness = (target / target.sum() * torch.log(ratio + 1e-12)).sum() * (sums[-1].detach() > 0)
        return self.factor * fairness


class MarginMatch(Method):
    """FlexMatch with a second threshold, on the APM: that of images known to be wrong (CVPR 2023, section 3).

    The network has an extra, virtual class. Now and then a few unlabeled images are drawn to be trained as that class;
    what they reach there, at the 95th percentile, is the APM below which a pseudo-label counts as wrong. As in the
    authors' code there is no such threshold in the first 80,000 of 2^20 updates, the images are drawn anew every
    50,000, and none are wrong in the last tenth.
    """

    virtual_class = True

    def __init__(self, num_unlabeled: int, num_classes: int, args: argparse.Namespace):
        super().__init__(num_classes)
        self.flexmatch = FlexMatch(num_unlabeled, num_classes, args)
        self.seed = args.seed
        updates = args.epochs * args.train_steps_per_epoch
        self.first = round(80_000 / FULL_SCHEDULE * updates)
        self.every = max(1, round(50_000 / FULL_SCHEDULE * updates))
        self.last = round(0.9 * updates)
        self.num_wrong = max(1, min(num_unlabeled // 100, num_unlabeled // (num_classes + 1)))
        self.apm = MarginBank(num_unlabeled, num_classes + 1, smoothing=0.997)
        self.wrong_apm = MarginBank(self.num_wrong, smoothing=0.997)
        self.register_buffer('slot', torch.full((num_unlabeled,), -1))  # position among the wrong images, -1: none

    def is_wrong(self, index: torch.Tensor) -> torch.Tensor:
        """Which images `[U]` are now trained as the virtual class."""
        return self.slot.gather(0, index) >= 0

    def target(self, logits: torch.Tensor, pseudo_label: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return torch.where(self.is_wrong(index), self.num_classes, pseudo_label)

    def redraw(self, num_updates: int) -> None:
        """Draws the wrong images where that is due, without memory of the last ones."""
        if num_updates == self.last:
            self.slot.fill_(-1)
        elif self.first <= num_updates < self.last and (num_updates - self.first) % self.every == 0:
            generator = torch.Generator().manual_seed(item_seed(self.seed, 'marginmatch', num_updates))
            drawn = torch.randperm(len(self.slot), generator=generator)[:self.num_wrong].to(self.slot.device)
            self.slot.fill_(-1).scatter_(0, drawn, torch.arange(self.num_wrong, device=self.slot.device))
            for table in self.wrong_apm.buffers():
                table.zero_()

    def forward(self, logits: torch.Tensor, index: torch.Tensor, num_updates: int) -> torch.Tensor:
        self.redraw(num_updates)
        slot, wrong = self.slot.gather(0, index), self.is_wrong(index)
        label = logits[:, :self.num_classes].argmax(1)
        # A row of NaN is no visit, and below no confident prediction: shapes stay fixed, and nothing waits.
        right_rows, wrong_rows = (logits.masked_fill(rows[:, None], torch.nan) for rows in (wrong, ~wrong))
        self.apm.update(index, right_rows, label)
        self.wrong_apm.update(slot.clamp(min=0), wrong_rows, torch.full_like(label, self.num_classes))
        seen = torch.where(self.wrong_apm.count > 0, self.wrong_apm.value, torch.nan)
        threshold = seen.nanquantile(0.95)
        weight = self.flexmatch(right_rows[:, :self.num_classes], index, num_updates)
        weight = weight * ((self.apm.lookup(index, label) >= threshold) | threshold.isnan())
        # The wrong images count as much as an average other one.
        return torch.where(wrong, weight.sum() / (~wrong).sum().clamp(min=1), weight)


class UDA(FixMatch):
    """FixMatch's weights with soft, sharpened pseudo-labels (arXiv 1904.12848, additional training techniques).

    Without training signal annealing, which its published recipe for images has switched off.
    """
    published = dict(threshold=0.8, temperature=0.4)

    def __init__(self, num_unlabeled: int, num_classes: int, args: argparse.Namespace):
        super().__init__(num_unlabeled, num_classes, args)
        self.temperature = args.temperature

    def target(self, logits: torch.Tensor, pseudo_label: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return widen((logits[:, :self.num_classes] / self.temperature).softmax(1), logits)


class AdaMatch(Method):
    """Distribution alignment and a relative confidence threshold (arXiv 2106.04732, section 3).

    Probabilities are multiplied by the running mean of those of labeled images over that of unlabeled ones. An image
    counts whose aligned confidence reaches the threshold times the mean confidence of the labeled images of the step.
    Without the random interpolation of logits, which the paper has for another domain, and with the threshold of USB.
    """

    def __init__(self, num_unlabeled: int, num_classes: int, args: argparse.Namespace):
        super().__init__(num_classes)
        self.threshold, self.momentum = args.threshold, args.stat_momentum
        self.register_buffer('labeled_mean', torch.full((num_classes,), 1 / num_classes))
        self.register_buffer('class_mean', torch.full((num_classes,), 1 / num_classes))
        self.register_buffer('least', torch.tensor(1.))  # confidence from which an image counts in this step

    def see_labeled(self, logits: torch.Tensor, target: torch.Tensor, num_updates: int) -> None:
        own_class = (target < self.num_classes)[:, None]
        probs = logits[:, :self.num_classes].masked_fill(~own_class, torch.nan).softmax(1)
        move_mean(self.labeled_mean, probs, self.momentum)
        self.least.copy_(self.threshold * probs.amax(1).nanmean())

    def align(self, logits: torch.Tensor) -> torch.Tensor:
        """Aligned probabilities `[U, K]`."""
        probs = logits[:, :self.num_classes].softmax(1) * self.labeled_mean / self.class_mean
        return probs / probs.sum(1, keepdim=True)

    def forward(self, logits: torch.Tensor, index: torch.Tensor, num_updates: int) -> torch.Tensor:
        move_mean(self.class_mean, logits.softmax(1), self.momentum)
        return (self.align(logits).amax(1) >= self.least).float()

    def target(self, logits: torch.Tensor, pseudo_label: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return widen(self.align(logits), logits)


class Dash(Method):
    """Images whose loss is below a threshold that falls geometrically (arXiv 2109.00650, algorithm 1).

    The loss is the cross-entropy of the weak view with its own sharpened probabilities, which are the pseudo-label. The
    threshold starts at C times the mean loss of labeled images, seen in the last tenth of a warmup on these alone, and
    falls by a factor of gamma every ten of 1,024 epochs. At its smallest value pseudo-labels are hard. As in USB, but
    that the loss there is of evaluation images, and that the warmup here is part of the run: 2,048 of 2^20 updates.
    """
    C, GAMMA, SMALLEST = 1.0001, 1.27, 0.05

    def __init__(self, num_unlabeled: int, num_classes: int, args: argparse.Namespace):
        super().__init__(num_classes)
        self.temperature = args.temperature
        updates = args.epochs * args.train_steps_per_epoch
        self.warmup = max(1, round(2048 / FULL_SCHEDULE * updates))
        self.every = max(1, round(10 / 1024 * updates))
        self.register_buffer('loss_sum', torch.tensor(0.))
        self.register_buffer('loss_count', torch.tensor(0))  # images in loss_sum
        self.register_buffer('threshold', torch.tensor(torch.inf))

    def see_labeled(self, logits: torch.Tensor, target: torch.Tensor, num_updates: int) -> None:
        if self.warmup - max(1, self.warmup // 10) <= num_updates < self.warmup:
            loss = F.cross_entropy(logits, target, reduction='none')
            good = loss.isfinite()
            self.loss_sum += loss.masked_fill(~good, 0).sum()
            self.loss_count += good.sum()

    def threshold_at(self, num_updates: int) -> torch.Tensor:
        """The threshold after so many updates, scalar; at the end of the warmup C times the labeled loss."""
        start = self.loss_sum / self.loss_count.clamp(min=1)
        falls = (num_updates - self.warmup) // self.every
        return (self.C * self.GAMMA ** -falls * start).clamp(min=self.SMALLEST)

    def forward(self, logits: torch.Tensor, index: torch.Tensor, num_updates: int) -> torch.Tensor:
        if num_updates < self.warmup:
            return torch.zeros(len(logits), device=logits.device)
        self.threshold.copy_(self.threshold_at(num_updates))
        loss = F.cross_entropy(logits, self.target(logits, logits.argmax(1), index), reduction='none')
        return (loss <= self.threshold).float()

    def target(self, logits: torch.Tensor, pseudo_label: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        soft = (logits[:, :self.num_classes] / self.temperature).softmax(1)
        hard = F.one_hot(pseudo_label, self.num_classes).float()
        return widen(torch.where(self.threshold <= self.SMALLEST, hard, soft), logits)


class DeFixMatch(FixMatch):
    """FixMatch's loss, less the same loss of the labeled images: unbiased (arXiv 2203.07512, section 3).

    The labeled images are trained on in their strong view too, half and half. Half the weight of FixMatch's loss.
    """
    published = dict(lambda_u=0.5)
    labeled_views = {'image': 'weak', 'strong': 'strong'}
    own_losses = True

    def __init__(self, num_unlabeled: int, num_classes: int, args: argparse.Namespace):
        super().__init__(num_unlabeled, num_classes, args)
        self.label_smoothing = args.label_smoothing

    def pseudo_loss(self, weak_logits: torch.Tensor, strong_logits: torch.Tensor) -> torch.Tensor:
        """FixMatch's loss of any images, `[N, K]` both, without asking for their labels."""
        confidence, label = weak_logits.detach()[:, :self.num_classes].softmax(1).max(1)
        loss = F.cross_entropy(strong_logits, label, reduction='none')
        return (loss * (confidence >= self.threshold)).mean()

    def losses(self, model: nn.Module, labeled: dict, unlabeled: dict, out: Outputs) -> tuple:
        views = (out.logits, out.labeled_strong_logits)
        both = [F.cross_entropy(z, labeled['target'], label_smoothing=self.label_smoothing) for z in views]
        bias = self.pseudo_loss(*views)
        return sum(both) / 2, self.pseudo_loss(out.weak_logits, out.strong_logits) - bias, 0.


# --- Consistency ------------------------------------------------------------------------------------------------------

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
    gives the pseudo-labels for CalibrateMix.
    """
    published = dict(mu=1, lambda_u=50., lambda_u_warmup=0.4)
    takes_average = True
    weak_apart = False


class VAT(Consistency):
    """Divergence of what the network says of an image and of its adversarial neighbour (arXiv 1704.03976, eq. 5 to 8).

    A small factor of the entropy of the unlabeled images is added, as in the published recipe.
    """
    published = dict(mu=1, lambda_u_warmup=0.4)
    views = {'weak': 'weak'}
    weak_apart = False
    ENTROPY = 0.06

    def __init__(self, num_unlabeled: int, num_classes: int, args: argparse.Namespace):
        super().__init__(num_unlabeled, num_classes, args)
        self.eps = args.vat_eps

    def losses(self, model: nn.Module, labeled: dict, unlabeled: dict, out: Outputs) -> tuple:
        images, said = unlabeled['weak'], out.weak_logits[:, :self.num_classes]
        with still_statistics(model):
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
        self.momentum = args.stat_momentum
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
        probs = out.weak_logits[:, :self.num_classes].softmax(1) * share / self.class_mean
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


ALGORITHMS = {
    'supervised': None,
    'pseudo_label': PseudoLabel,
    'fixmatch': FixMatch,
    'flexmatch': FlexMatch,
    'softmatch': SoftMatch,
    'freematch': FreeMatch,
    'marginmatch': MarginMatch,
    'uda': UDA,
    'adamatch': AdaMatch,
    'dash': Dash,
    'defixmatch': DeFixMatch,
    'pi_model': PiModel,
    'meanteacher': MeanTeacher,
    'vat': VAT,
    'mixmatch': MixMatch,
    'remixmatch': ReMixMatch,
}


# --- Arguments --------------------------------------------------------------------------------------------------------

def published(algorithm: str, dataset: str = '') -> dict:
    """Arguments that a method's published recipe has for a data set, by name."""
    method = ALGORITHMS[algorithm] or Method
    name = dataset.rpartition('/')[2].lower()
    return {**Method.published, **method.published, **method.published_for.get(name, {})}


def fit_to_method(args: argparse.Namespace) -> None:
    """Sets the arguments of `published` where they are not given."""
    for name, value in published(args.algorithm, args.dataset).items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def without_defaults(entries: dict, given: Iterable[str]) -> dict:
    """A run's arguments by name, without those that it took from `published` and that another method may not have.

    Args:
        entries: The arguments, from a file.
        given: Names of the arguments that the command line gives.
    """
    if not {'algorithm', 'dataset'} & set(given) or entries.get('algorithm', 'fixmatch') not in ALGORITHMS:
        return entries
    own = published(entries.get('algorithm', 'fixmatch'), entries.get('dataset') or '')
    return {name: value for name, value in entries.items() if name not in own or value != own[name]}


def tell_published(name: str) -> str:
    """The default of an argument, and which methods and data sets have another."""
    others, usual = {}, Method.published[name]
    for algorithm in ALGORITHMS:
        for dataset in ('', *getattr(ALGORITHMS[algorithm], 'published_for', ())):
            value = published(algorithm, dataset)[name]
            if value != published(algorithm)[name] or (not dataset and value != usual):
                others.setdefault(value, []).append(f'{algorithm} on {dataset}' if dataset else algorithm)
    return '; '.join([f'{usual:g}', *(f'{value:g} with {", ".join(names)}' for value, names in others.items())])


def find_clash(args: argparse.Namespace) -> str | None:
    """What in the arguments the method cannot be combined with, in a line, if there is any."""
    method = ALGORITHMS[args.algorithm] or Method
    if args.weak_forward == 'no-grad' and not method.weak_apart:
        return (f'--weak-forward no-grad: with {args.algorithm} there is no pass over weak and strong images that it '
                'could part; leave it out')
    if method.takes_average and not args.model_ema:
        return f'--no-model-ema: {args.algorithm} needs the averaged network; choose another --algorithm'
    if args.logit_margin_penalty and not method.trains_on_views:
        return (f'--logit-margin-penalty: {args.algorithm} trains on mixed images, and has no unlabeled logits of its '
                'own to press down; leave it out')
    return None


def num_outputs(args: argparse.Namespace, num_classes: int) -> int:
    """Outputs of the network: the classes, an extra one, and further ones of the method's own."""
    return num_classes + has_extra_class(args) + getattr(ALGORITHMS[args.algorithm], 'further_outputs', 0)


def has_extra_class(args: argparse.Namespace) -> bool:
    """Whether the network has an extra class K, which is no pseudo-label, and neither evaluated nor saved."""
    return getattr(ALGORITHMS[args.algorithm], 'virtual_class', False) or args.aum_threshold_samples is not None


def lambda_u(num_updates: int, args: argparse.Namespace) -> float:
    """Factor of the unlabeled loss: grows from 0 over --lambda-u-warmup, then --lambda-u."""
    share = args.lambda_u_warmup
    if share is None:  # in a checkpoint of an earlier version
        share = published(args.algorithm, args.dataset)['lambda_u_warmup']
    warmup = share * args.epochs * args.train_steps_per_epoch
    return args.lambda_u * min(1, num_updates / warmup) if warmup else args.lambda_u


def warmup_updates(args: argparse.Namespace) -> float:
    """Updates of the base method alone, before CalibrateMix mixes; infinite without it."""
    if not args.calibratemix:
        return math.inf
    if args.calmix_warmup_epochs is not None:
        return round(args.calmix_warmup_epochs * args.train_steps_per_epoch)
    share = PRESETS[args.calmix_preset]['warmup_steps'] / FULL_SCHEDULE
    return round(share * args.epochs * args.train_steps_per_epoch)
