"""Methods that weigh pseudo-labels: how much each unlabeled image counts, and as what class. The base of all methods.

A step passes labeled, weak and strong images through the network and then asks its method:

    method.see_labeled(logits, target, num_updates)    # tells it of the labeled images of all processes
    weight = method(weak_logits, index, num_updates)   # of the images of all processes: [U] in [0, 1]
    target = method.target(weak_logits, pseudo_label, index)  # of a process's own images: as what they are trained
    loss = loss + method.further_loss(strong_logits, weight, accelerator)  # what the method adds to the loss

The pseudo-label is the top class of the weak view. The weights are of the joined batch, so running statistics are the
same on all processes; they are buffers, so that checkpoint and device follow. Methods that train on something else
than pseudo-labels compute their losses themselves (`losses`, consistency.py). A new method is one class and one entry
of methods.ALGORITHMS.
"""
import argparse

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from calibratemix import MarginBank
from passes import Outputs
from schedule import running_momentum
from seeds import item_seed

FULL_SCHEDULE = 1024 * 1024  # updates of the published recipe, in which the warmups of presets and methods are counted
TINY = torch.finfo(torch.float32).tiny


class Method(nn.Module):
    """What the step asks of a base method; the constructor takes the size of the unlabeled set, K, and the arguments.

    `forward(logits, index, num_updates)` moves the running statistics and returns the weights `[U]` float32 in [0, 1]
    of the unlabeled images of all processes. It gets the logits of their weak views, `[U, K]` float32 and detached
    (after warmup times CalibrateMix's `mask_scale`, as `see_labeled` and `target` do, but with `own_losses`), their
    positions in the unlabeled set, `[U]` int64, and the updates done so far.

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
        mask_scale: By which the logits of this step are scaled.
    """
    published = dict(
        mu=7, lambda_u=1., lambda_u_warmup=0., threshold=0.95, temperature=0.5, vat_eps=6., mixmatch_alpha=0.5,
        freematch_max_threshold=1.,
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
    mask_scale = 1.

    def __init__(self, num_classes: int):
        super().__init__()
        self.num_classes = num_classes

    @staticmethod
    def schedule(args: argparse.Namespace) -> dict[str, int]:
        """The method's own points and periods in updates, by the words that tell them; they follow the run's length."""
        return {}

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
    """FixMatch's weights, but the weak view itself is trained on (Lee 2013, section 2.2); lambda grows over 0.4.

    The unlabeled images pass together with the labeled ones, as everywhere here. USB passes them by themselves, with
    batch-norm statistics of their own that do not count in the running ones, and has as many of them as labeled ones
    (--mu 1).
    """
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
        self.register_buffer('selected', torch.full((num_unlabeled,), -1))

    def class_thresholds(self) -> torch.Tensor:
        """Current thresholds `[K]`."""
        # Integers: a float32 stops counting by ones at 2^24.
        counts = torch.zeros(self.num_classes + 1, dtype=torch.int64, device=self.selected.device)
        counts.scatter_add_(0, self.selected + 1, counts.new_ones(()).expand(len(self.selected)))
        unused, learned = counts[0], counts[1:]
        beta = learned / torch.maximum(learned.max(), unused)
        return self.threshold * beta / (2 - beta)

    def forward(self, logits: torch.Tensor, index: torch.Tensor, num_updates: int) -> torch.Tensor:
        confidence, label = logits.softmax(1).max(1)
        weight = (confidence >= self.class_thresholds()[label]).float()
        # The table moves by the fixed threshold. Of an index that stands twice in the batch the later row that passes
        # wins, and every row of it writes the same.
        passed = confidence >= self.threshold
        new = torch.where(passed, label, self.selected.gather(0, index))
        place = torch.arange(1, len(index) + 1, device=index.device).add(passed, alpha=len(index))
        last = ((index[:, None] == index) * place).argmax(1)
        self.selected.scatter_(0, index, new[last])
        return weight


class SoftMatch(Method):
    """Truncated Gaussian of the confidence, with uniform alignment (arXiv 2301.10921).

    1 above the running mean of the confidence; below it falls off with half the running deviation (n_sigma = 2). The
    statistics are those of the plain confidence, as in the paper; the published code takes the aligned one's. The class
    means that alignment divides by start from uniform here, in the published code from those of the first batch.
    """

    def __init__(self, num_unlabeled: int, num_classes: int, args: argparse.Namespace):
        super().__init__(num_classes)
        self.momentum, self.align = running_momentum(args), args.softmatch_align
        self.aligned_stats = args.softmatch_usb_stats
        self.register_buffer('mean', torch.tensor(1 / num_classes))
        self.register_buffer('var', torch.tensor(1.))
        self.register_buffer('class_mean', torch.full((num_classes,), 1 / num_classes))

    def forward(self, logits: torch.Tensor, index: torch.Tensor, num_updates: int) -> torch.Tensor:
        probs = logits.softmax(1)
        plain = confidence = probs.amax(1)
        if self.align:
            self.class_mean.lerp_(probs.mean(0), 1 - self.momentum)
            # A class whose probability underflowed in every row has no mean to divide by: 0, not 0/0.
            aligned = probs / self.class_mean.clamp(min=TINY)
            confidence = (aligned / aligned.sum(1, keepdim=True)).amax(1)
        seen = confidence if self.aligned_stats else plain
        self.mean.lerp_(seen.mean(), 1 - self.momentum)
        self.var.lerp_(seen.var(unbiased=len(seen) > 1), 1 - self.momentum)  # one row has no unbiased variance
        below = (confidence - self.mean).clamp(max=0)
        return torch.exp(-2 * below ** 2 / self.var.clamp(min=1e-12))  # 2 var / n_sigma^2 is var / 2


class FreeMatch(Method):
    """Thresholds from the running confidence, global and by class (arXiv 2205.07246); a fairness term.

    Its factor and the bound of the global threshold have defaults as in the published configurations.
    """
    published_for = {'svhn': dict(freematch_max_threshold=0.95)}

    def __init__(self, num_unlabeled: int, num_classes: int, args: argparse.Namespace):
        super().__init__(num_classes)
        self.momentum, self.factor = running_momentum(args), args.freematch_fairness
        self.max_threshold = args.freematch_max_threshold
        self.register_buffer('tau', torch.tensor(1 / num_classes))
        self.register_buffer('class_mean', torch.full((num_classes,), 1 / num_classes))
        self.register_buffer('class_share', torch.full((num_classes,), 1 / num_classes))
        self.register_buffer('classes', torch.arange(num_classes), persistent=False)

    def forward(self, logits: torch.Tensor, index: torch.Tensor, num_updates: int) -> torch.Tensor:
        probs = logits.softmax(1)
        confidence, label = probs.max(1)
        self.tau.lerp_(confidence.mean(), 1 - self.momentum).clamp_(max=self.max_threshold)
        self.class_mean.lerp_(probs.mean(0), 1 - self.momentum)
        share = (label[:, None] == self.classes).mean(0, dtype=torch.float32)
        self.class_share.lerp_(share, 1 - self.momentum)
        thresholds = self.class_mean / self.class_mean.max() * self.tau
        return (confidence >= thresholds[label]).float()

    def further_loss(self, strong_logits: torch.Tensor, weight: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
        """The fairness term times its factor.

        Its batch means are those of all processes. The gradient of a mean flows through the own part of it alone, and
        averaging the gradients over the processes then gives that of the joined batch.
        """
        probs = strong_logits[:, :self.num_classes].softmax(1)
        predicted = probs.argmax(1)[:, None] == self.classes
        sums = own = (torch.stack([probs, predicted]) * weight[:, None]).sum(1)  # over the images that count: [2, K]
        if accelerator.num_processes > 1:
            others = accelerator.reduce(own.detach(), 'sum') - own.detach()
            sums = (own * accelerator.num_processes - own.detach() * (accelerator.num_processes - 1)) + others
        mass, number = sums[0], sums[1].detach()
        # A class that no strong view is counted for has no ratio; as in the published code it then weighs nothing.
        ratio = torch.where(number > 0, mass / number.clamp(min=1), 0)
        ratio = ratio / ratio.sum().clamp(min=1e-12)
        target = self.class_mean / self.class_share.clamp(min=1e-12)
        fairness = (target / target.sum() * torch.log(ratio + 1e-12)).sum() * number.any()
        return self.factor * fairness


class MarginMatch(Method):
    """FlexMatch with a second threshold, on the APM: that of images known to be wrong (CVPR 2023, section 3).

    The network has an extra, virtual class. Now and then a few unlabeled images are drawn to be trained as that class;
    what they reach there, at the 95th percentile, is the APM below which a pseudo-label counts as wrong. As in the
    authors' code there is no such threshold in the first 80,000 of 2^20 updates, the images are drawn anew every
    50,000, and none are wrong in the last tenth. Where text and code differ this follows the text: the code takes the
    99th percentile, and counts a runner-up with a negative logit as 0.
    """

    virtual_class = True

    def __init__(self, num_unlabeled: int, num_classes: int, args: argparse.Namespace):
        super().__init__(num_classes)
        self.flexmatch = FlexMatch(num_unlabeled, num_classes, args)
        self.seed = args.seed
        self.first, self.every, self.last = self.schedule(args).values()
        self.drawn_at = -1
        self.num_wrong = max(1, min(num_unlabeled // 100, num_unlabeled // (num_classes + 1)))
        self.apm = MarginBank(num_unlabeled, num_classes + 1, smoothing=0.997)
        self.wrong_apm = MarginBank(self.num_wrong, smoothing=0.997)
        self.register_buffer('slot', torch.full((num_unlabeled,), -1))  # position among the wrong images, -1: none

    @staticmethod
    def schedule(args: argparse.Namespace) -> dict[str, int]:
        updates = args.epochs * args.train_steps_per_epoch
        return {
            'the start of MarginMatch\'s threshold': round(80_000 / FULL_SCHEDULE * updates),
            'the updates between two of its draws': max(1, round(50_000 / FULL_SCHEDULE * updates)),
            'the end of its draws': round(0.9 * updates),
        }

    def is_wrong(self, index: torch.Tensor) -> torch.Tensor:
        """Which images `[U]` are now trained as the virtual class."""
        return self.slot.gather(0, index) >= 0

    def target(self, logits: torch.Tensor, pseudo_label: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return torch.where(self.is_wrong(index), self.num_classes, pseudo_label)

    def redraw(self, num_updates: int) -> None:
        """Draws the wrong images where that is due, without memory of the last ones."""
        if num_updates == self.drawn_at:
            return  # at another batch of the same update
        self.drawn_at = num_updates
        if num_updates >= self.last:
            self.slot.fill_(-1)
        elif self.first <= num_updates < self.last and (num_updates - self.first) % self.every == 0:
            generator = torch.Generator().manual_seed(item_seed(self.seed, 'marginmatch', num_updates))
            drawn = torch.randperm(len(self.slot), generator=generator)[:self.num_wrong]
            drawn = drawn.to(self.slot.device, non_blocking=True)
            self.slot.fill_(-1).scatter_(0, drawn, torch.arange(self.num_wrong, device=self.slot.device))
            for table in self.wrong_apm.buffers():
                table.zero_()

    def forward(self, logits: torch.Tensor, index: torch.Tensor, num_updates: int) -> torch.Tensor:
        self.redraw(num_updates)
        slot, wrong = self.slot.gather(0, index), self.is_wrong(index)
        label = logits[:, :self.num_classes].argmax(1)
        # A row of NaN is no visit, and below no confident prediction: shapes stay fixed, and nothing waits.
        right_rows, wrong_rows = (logits.masked_fill(rows[:, None], torch.nan) for rows in (wrong, ~wrong))
        # Margins as they are, since those before CalibrateMix's start, which were not scaled, are in the same mean.
        self.apm.update(index, right_rows / self.mask_scale, label)
        self.wrong_apm.update(slot.clamp(min=0), wrong_rows / self.mask_scale, torch.full_like(label, self.num_classes))
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
        self.threshold, self.momentum = args.threshold, running_momentum(args)
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
        probs = logits[:, :self.num_classes].softmax(1) * self.labeled_mean / self.class_mean.clamp(min=TINY)
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
        self.warmup, self.every = self.schedule(args).values()
        self.register_buffer('loss_sum', torch.tensor(0.))
        self.register_buffer('loss_count', torch.tensor(0))  # images in loss_sum
        self.register_buffer('threshold', torch.tensor(torch.inf))

    @staticmethod
    def schedule(args: argparse.Namespace) -> dict[str, int]:
        updates = args.epochs * args.train_steps_per_epoch
        return {
            'the end of Dash\'s warmup': max(1, round(2048 / FULL_SCHEDULE * updates)),
            'the updates between two falls of its threshold': max(1, round(10 / 1024 * updates)),
        }

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
