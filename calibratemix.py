"""CalibrateMix: mixup guided by training dynamics, for calibrated semi-supervised image classifiers.

Rahman, Mohan, Sosea, Caragea, "CalibrateMix: Guided-Mixup Calibration of Image Semi-Supervised Models",
arXiv 2511.12964. This file stands alone: copy it into your own repository. It needs torch, and never calls a model.
A complete FixMatch loop with CalibrateMix:

    import torch
    import torch.nn.functional as F
    from torch import nn
    from calibratemix import CalibrateMix
    x, y, u = torch.rand(40, 3, 32, 32), torch.arange(40) % 10, torch.rand(400, 3, 32, 32)  # your images and labels
    backbone = nn.Sequential(nn.Conv2d(3, 32, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    head = nn.Linear(32, 10)
    optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=0.03, momentum=0.9, nesterov=True)
    calmix = CalibrateMix(num_labeled=40, num_unlabeled=400, num_classes=10, warmup_steps=5)  # and .to(device)
    for step in range(20):
        i, j = torch.randint(40, (8,)), torch.randint(400, (56,))  # indices into the labeled and the unlabeled set
        weak, strong = u[j], (u[j] + 0.1 * torch.randn(56, 3, 32, 32)).clamp(0, 1)  # your weak and strong augmentation
        features = backbone(torch.cat([x[i], weak, strong]))
        (f, f_weak, _), (z, z_weak, z_strong) = (t.split([8, 56, 56]) for t in (features, head(features)))
        confidence, pseudo = calmix.for_mask(z_weak.detach(), step).softmax(1).max(1)
        loss_u = (F.cross_entropy(z_strong, pseudo, reduction='none') * (confidence >= 0.95)).mean()
        loss = F.cross_entropy(z, y[i]) + loss_u
        calmix.update(i, y[i], z, j, pseudo, z_weak, step)
        if step >= calmix.warmup_steps:
            mixed = calmix.mix(i, y[i], x[i], f, j, pseudo, weak, f_weak)
            loss = loss + calmix.weight * calmix.loss(head(backbone(mixed.images)), mixed)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

What to know before it runs in your own loop:

* Device: `calmix.to(device)` moves its tables, which are buffers; it has no parameters. No step waits for the device.
* Checkpoints: save and load `calmix.state_dict()` as you do the model's, or a resumed run starts with empty tables.
* An index is the position of an image in its set, also of a copy that fills a batch. Indices and labels are int64.
* If labeled images are in the unlabeled set too, give `labeled_to_unlabeled`, or one may be mixed with itself.
* By default the first 102,400 steps do not mix: set `warmup_steps`. In the paper it is a tenth of all steps.
* Batch norm: set `track_running_stats` of each to False for the pass of the mixed images, and back. Else half of the
  running statistics are of images unlike those that come to be classified, which costs accuracy and confidence.
* On several processes, gather the six tensors that `update` takes, so that the tables are the same on all. `mix` and
  `loss` work on a process's own batch. Keep `calmix` out of the wrapped model, or DDP sends its tables each step.
* Tested with Python 3.8 and torch 2.0 (on the CPU alone), and with Python 3.11 and torch 2.14.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ['PRESETS', 'CalibrateMix', 'MarginBank', 'Mixed', 'margin', 'margins', 'pair_dissimilar', 'split_easy_hard']

# The paper's warmup is 100 of 1024 epochs of 1024 steps. It gives no weight: 0.5 was chosen on validation images.
PRESETS = {'paper': dict(
    gamma=0.4, gamma_dist='fixed', topk=0.05, similarity='cosine', space='feature', loss='ce', weight=0.5,
    weight_rate=0.0, mask_scale=1.0, split='batch', pairing='targeted', min_confidence=0.0, warmup_steps=100 * 1024,
    apm_in_warmup=True, mixed_statistics=False,
)}
PRESETS['authors-code'] = dict(
    PRESETS['paper'], gamma_dist='beta-batch', topk=15 / 224, space='pixel', loss='bce', warmup_steps=150_000,
    apm_in_warmup=False, mixed_statistics=True,  # they have 2 * base + mix: weight 0.5 at twice the learning rate
)
# Not the paper's: chosen on validation images of CIFAR-10, the second one of digits and MNIST too. Its w rises only
# where the network is surer than it is right.
PRESETS['ours'] = dict(PRESETS['paper'], gamma=0.5, topk=0.0)
PRESETS['steered'] = dict(PRESETS['ours'], pairing='random', weight=1.0, weight_rate=0.1, mask_scale=1.5)
ERRORS_PER_CHANGE = 1.2  # wrong pseudo-labels for each one that changes between two visits, as measured in short runs
CHOICES = dict(
    gamma_dist=('fixed', 'beta-batch', 'beta-pair'), similarity=('cosine', 'euclidean', 'dot'),
    space=('feature', 'pixel'), loss=('ce', 'bce'), split=('batch', 'joined', 'bank'), pairing=('targeted', 'random'),
)


def _expect(ok: bool, name: str, expected: str, got: object) -> None:
    if not ok:
        raise ValueError(f'{name}: expected {expected}, got {got}')


def _expect_int64(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if getattr(tensor, 'dtype', None) != torch.int64:
            raise TypeError(f'{name}: expected an int64 tensor, got {getattr(tensor, "dtype", type(tensor).__name__)}')


def margins(logits: Tensor) -> Tensor:
    """Margin of every class, `z_c - max_{j != c} z_j` (Pleiss et al. 2020, arXiv 2001.10528, eq. 1).

    Logits (not probabilities) `[B, K]` of any floating dtype, K at least 2 or ValueError -> `[B, K]` float32, detached.
    """
    _expect(logits.ndim == 2 and logits.shape[-1] > 1, 'logits', '[B, K] with K >= 2', list(logits.shape))
    logits = logits.detach().float()
    best, top = logits.topk(2)
    # The strongest rival of every class is the top one, but of the top one the second.
    return logits - best[:, :1].expand_as(logits).scatter(1, top[:, :1], best[:, 1:])


def margin(logits: Tensor, label: Tensor) -> Tensor:
    """Margin of one class per row, `z_y - max_{j != y} z_j`: logits `[B, K]`, label `[B]` int64 -> `[B]` float32."""
    return margins(logits).gather(1, label[:, None]).squeeze(1)


class MarginBank(nn.Module):
    """Running margins of a whole set, updated by index.

    A visit with margin m after t earlier ones updates `v <- m * d/(1+t) + v * (1 - d/(1+t))`. With d = 1 that is the
    mean over all visits, the AUM of the labeled set (Pleiss et al. 2020). With d = 0.997 it is the APM of the unlabeled
    set (MarginMatch, CVPR 2023), kept for every class because the pseudo-label may change. An update costs
    O(B^2 + B * K), whatever N is. The tables are the buffers `value`, `count` and `label`.

    Args:
        num_samples: N, the size of the set.
        num_classes: K to keep the margin of every class, `[N, K]`; None to keep that of the given label, `[N]`.
        smoothing: d, in (0, 1].
        dtype: Storage, torch.float32 or torch.float16; arithmetic is float32. A float16 entry is at most 65504. After
            some thousand visits it stands still, as a visit would move it by less than 1/2000 of itself.
            A module's `.half()`, `.bfloat16()` and `.double()` change it for the banks in that module too.
    """

    def __init__(self, num_samples: int, num_classes: int | None = None, smoothing: float = 1.0,
                 dtype: torch.dtype = torch.float32):
        super().__init__()
        _expect(num_samples >= 0, 'num_samples', '0 or more', num_samples)
        _expect(num_classes is None or num_classes >= 2, 'num_classes', 'None or at least 2', num_classes)
        _expect(0 < smoothing <= 1, 'smoothing', 'a number in (0, 1]', smoothing)
        _expect(dtype in (torch.float32, torch.float16), 'dtype', 'torch.float32 or torch.float16', dtype)
        self.num_samples, self.smoothing = num_samples, smoothing
        shape = (num_samples,) if num_classes is None else (num_samples, num_classes)
        self.register_buffer('value', torch.zeros(shape, dtype=dtype))
        self.register_buffer('count', torch.zeros(num_samples, dtype=torch.int32))
        self.register_buffer('label', torch.full((num_samples,), -1, dtype=torch.int32))

    def _check(self, index: Tensor) -> None:
        _expect_int64(index=index)
        if len(index) and not index.is_cuda:  # there `gather` checks it, for negative ones too
            for end in (int(index.min()), int(index.max())):
                if not 0 <= end < self.num_samples:
                    raise IndexError(f'index {end} is outside of the bank of {self.num_samples} samples')

    @torch.no_grad()
    def update(self, index: Tensor, logits: Tensor, label: Tensor, repeated: bool | None = None) -> None:
        """Adds one visit per row. Rows whose margins are not finite (a float16 pass that overflowed) change nothing.

        Args:
            index: `[B]` int64 in [0, N). One that stands twice is two visits, one after the other.
            logits: `[B, K]` of the weak view, any floating dtype.
            label: `[B]` int64, the labels or the current pseudo-labels.
            repeated: Whether one may. None: it is looked up; on CUDA, which would have to be waited for, taken as so.

        Raises IndexError (index outside of [0, N)) or torch's RuntimeError (label outside of [0, K)), both
        device-side assertions on CUDA; TypeError (index or label no int64 tensor), ValueError (shapes do not fit).
        """
        self._check(index)
        _expect_int64(label=label)
        if not len(index) == len(logits) == len(label):
            raise ValueError(f'index, logits, label: {len(index)}, {len(logits)} and {len(label)} rows')
        m = margins(logits) if self.value.ndim == 2 else margin(logits, label)[:, None]
        if self.value.ndim == 2:
            _expect(m.shape[1] == self.value.shape[1], 'logits', f'{self.value.shape[1]} classes', m.shape[1])
        self._add(index, m, label, repeated)

    def _add(self, row: Tensor, m: Tensor, label: Tensor, repeated: bool | None) -> None:
        """Adds visits with margins m, `[B, K]` or `[B, 1]`, to rows of the tables."""
        if len(row) == 0:
            return
        count, old = self.count.gather(0, row), self.value.index_select(0, row).float().view(m.shape)
        # A bound far below the largest float32, so that no difference of two margins overflows either. NaN fails it.
        visit = m.abs().amax(1) < 1e19
        label = torch.where(visit, label.int(), self.label[row])
        # As a step from the old value: after many visits 1 - rate is too coarse in float32, and its error adds up.
        step = torch.where(visit[:, None], m, old).sub_(old)
        rate = visit * self.smoothing
        if repeated is None:
            repeated = row.is_cuda or len(row.unique()) < len(row)
        if repeated:
            # The recursion unrolled: a place in the batch is the t-th visit to its sample, and what it adds is faded by
            # the visits to the same sample at later places. All of it, and the last visit's label, goes to each place.
            same = row[:, None] == row  # [B, B], symmetric
            earlier = same.tril(-1)
            rate = rate / (1 + count + (earlier & visit).sum(1))
            step.mul_((rate * (1 - earlier.T * rate).prod(1))[:, None])
            place = torch.arange(1, len(row) + 1, device=row.device)
            last = (same * place.add(visit, alpha=len(row))).argmax(1)
            step, label = torch.zeros_like(step).index_add_(0, last, step).index_select(0, last), label[last]
        else:
            step.mul_((rate / (1 + count))[:, None])
        new = old.add_(step).view(-1, *self.value.shape[1:])
        if self.value.dtype == torch.float16:
            new = new.clamp_(-65504, 65504)  # beyond it float16 would store inf, for good
        # Repeated rows write equal values, so the order of writing does not matter.
        self.value.index_copy_(0, row, new.to(self.value.dtype))
        self.label.index_copy_(0, row, label)
        self.count.index_add_(0, row, visit.int())

    def lookup(self, index: Tensor, label: Tensor | None = None) -> Tensor:
        """Current values, `[B]` float32: AUM, or with a table per class the APM of `label` `[B]`. Never seen: -inf."""
        self._check(index)
        value = self.value[index] if self.value.ndim == 1 else self.value[index, label]
        return value.float().masked_fill(self.count.gather(0, index) == 0, -torch.inf)

    def median(self) -> Tensor:
        """Median over the samples seen so far, each at its last label: scalar float32, NaN when none was seen. O(N)."""
        value = self.value
        if value.ndim == 2:
            value = value.gather(1, self.label.long().clamp(min=0)[:, None]).squeeze(1)
        return torch.where(self.count > 0, value.float(), torch.nan).nanmedian()


def split_easy_hard(score: Tensor, threshold: Tensor | None = None) -> Tensor:
    """Splits scores `[B]`, AUM or APM, into easy (large, True) and hard: `[B]` bool.

    Without a threshold the batch is split at its own median, by rank: the easy half is the one rounded down, and ties
    go by position. With one, the scalar median of a whole bank, scores above it are easy, and those equal to it
    alternate. A score of -inf (never seen) ranks hardest. NaN, of which banks have none, raises a ValueError that
    names its position; CUDA, which would have to be waited for, does not check.
    """
    if not score.is_cuda and score.isnan().any():
        raise ValueError(f'score: NaN at position {int(score.isnan().nonzero()[0])}')
    if threshold is None:
        easiest = score.argsort(descending=True, stable=True)[:len(score) // 2]
        return torch.zeros_like(score, dtype=torch.bool).index_fill_(0, easiest, True)
    tie = score == threshold
    return (score > threshold) | (tie & (tie.cumsum(0) % 2 == 0))


def pair_dissimilar(similarity: Tensor, allowed: Tensor, topk: float) -> tuple[Tensor, Tensor]:
    """Draws for each row one of the allowed columns, uniformly among the `max(1, round(topk * n))` least similar.

    Args:
        similarity: `[P, Q]` float, NaN counting as most similar. Not read where topk is 0.
        allowed: `[P, Q]` bool; n is a row's number of allowed columns.
        topk: Share in [0, 1]; 0 means any allowed column.

    Returns the partners, `[P]` int64, and which rows have one, `[P]` bool; where there is none, it is arbitrary.
    """
    num, candidates = allowed.shape[1], allowed.sum(1)
    if num == 0:
        return candidates, candidates > 0
    if topk == 0:  # at random from [-1, 0) where allowed, else from [0, 1)
        return torch.rand(allowed.shape, device=allowed.device).add_(allowed, alpha=-1).argmin(1), candidates > 0
    # In float64, as float32 falls on the wrong side of some halves. MPS has none.
    wide = torch.float32 if allowed.device.type == 'mps' else torch.float64
    k = (candidates.to(wide) * topk).round().clamp(min=1)
    # A row's first k columns are its k least similar. torch sorts NaN after inf, that is after what is not allowed.
    similarity = similarity.nan_to_num(nan=torch.finfo(similarity.dtype).max).masked_fill(~allowed, torch.inf)
    lowest = similarity.topk(max(1, round(topk * num)), largest=False).indices
    pick = (torch.rand(len(k), device=k.device) * k).long()
    return lowest.gather(1, pick[:, None]).squeeze(1), candidates > 0


class Mixed(NamedTuple):
    """What `CalibrateMix.mix` returns: one row per labeled image."""
    images: Tensor  # [P, C, H, W], dtype of the labeled images
    target: Tensor  # [P, K] float32, rows add up to 1
    gamma: Tensor  # [P] float32, weight of the labeled image; 1 where there is no partner
    partner: Tensor  # [P] int64, row of the unlabeled batch
    paired: Tensor  # [P] bool, False where the other side has no candidate
    easy: Tensor  # [P] bool, the labeled image is of the easy half (its partner then of the hard one)
    weight: Tensor  # [P] float32, of the row in the loss: adds up to 1 over each group that has a pair


class CalibrateMix(nn.Module):
    """Margin banks, split, pairing, mixup and its loss, for a training loop: `update`, then `mix`, then `loss`.

    A ValueError (TypeError if labeled_to_unlabeled is not int64) names a wrong option, its value and what is allowed.

    Args:
        num_labeled, num_unlabeled, num_classes: Images in the labeled and in the unlabeled set, and K.
        preset: 'paper' (arXiv 2511.12964), 'authors-code' (their public code), 'ours' (equal weights, no ranking) or
            'steered' (random pairs, equal weights, a w that finds itself). It has the values of options that are None.
        gamma: Weight g of the labeled image in [0, 1] (gamma_dist 'fixed'), else the parameter of Beta(gamma, gamma).
        gamma_dist: 'fixed'; 'beta-batch', one draw per group and step; 'beta-pair', one draw per pair.
        topk: Share of the candidates among which the partner is drawn, the least similar ones; 0 draws among all.
        similarity, space: 'cosine', 'euclidean' (negative distance) or 'dot'; of penultimate 'feature' or of 'pixel'.
        loss: 'ce', cross-entropy with soft targets; 'bce', binary cross-entropy averaged over the classes.
        weight: w, the factor of the mixup loss in the total; kept here for the training loop, not applied by `loss`.
        weight_rate: r. Above 0, `steer` moves w between 0, its start, and `weight`; the attribute is a float32 buffer.
        mask_scale: Factor of the logits by which the base method chooses pseudo-labels after warmup, see `for_mask`.
        split: Median of the 'batch' or of the whole 'bank' (O(N) a step). 'joined': a caller splits a larger batch.
        pairing: 'targeted', or 'random' split and partners: the paper's random-mixup baseline through the same code.
        min_confidence: Unlabeled images with less confidence are no candidates; 0 takes all, as the paper does.
        warmup_steps: Steps in which the base method runs alone; kept here for the training loop.
        apm_in_warmup: Margins of unlabeled images count from the first step on, not only after warmup.
        mixed_statistics: Mixed images move batch norm's running statistics too; kept here for the training loop.
        apm_smoothing, bank_dtype, apm: Of the unlabeled images' bank d and storage, or a bank of your own in its place.
        labeled_to_unlabeled: `[num_labeled]` int64, a labeled image's index in the unlabeled set, or -1: no image is
            mixed with itself. None if the sets are disjoint.
    """

    def __init__(
            self, num_labeled: int, num_unlabeled: int, num_classes: int, preset: str = 'paper', *,
            gamma: float | None = None, gamma_dist: str | None = None,
            topk: float | None = None, similarity: str | None = None, space: str | None = None,
            loss: str | None = None, weight: float | None = None, weight_rate: float | None = None,
            mask_scale: float | None = None, split: str | None = None, pairing: str | None = None,
            min_confidence: float | None = None, warmup_steps: int | None = None, apm_in_warmup: bool | None = None,
            mixed_statistics: bool | None = None, apm_smoothing: float = 0.997, bank_dtype: torch.dtype = torch.float32,
            apm: MarginBank | None = None, labeled_to_unlabeled: Tensor | None = None,
    ):
        super().__init__()
        _expect(preset in PRESETS, 'preset', f'one of {", ".join(PRESETS)}', repr(preset))
        given = dict(locals())
        for name in PRESETS[preset]:
            value = PRESETS[preset][name] if given[name] is None else given[name]
            if name in CHOICES:
                _expect(value in CHOICES[name], name, f'one of {", ".join(CHOICES[name])}', repr(value))
            given[name] = value
            setattr(self, 'loss_type' if name == 'loss' else name, value)  # `loss` is a method
        for name in ('topk', 'min_confidence') + ('gamma',) * (self.gamma_dist == 'fixed'):
            _expect(0 <= getattr(self, name) <= 1, name, 'a number in [0, 1]', getattr(self, name))
        for name in ('mask_scale',) + ('gamma',) * (self.gamma_dist != 'fixed'):
            _expect(0 < getattr(self, name) < torch.inf, name, 'a positive number', getattr(self, name))
        for name in ('num_labeled', 'num_unlabeled', 'weight', 'weight_rate', 'warmup_steps'):
            _expect(given[name] >= 0, name, '0 or more', given[name])
        self.options = {name: given[name] for name in PRESETS[preset]}
        self.num_classes = num_classes
        self.aum = MarginBank(num_labeled)
        self.apm = MarginBank(num_unlabeled, num_classes, apm_smoothing, bank_dtype) if apm is None else apm
        _expect(self.apm.num_samples == num_unlabeled, 'apm', f'{num_unlabeled} samples', self.apm.num_samples)
        if self.split == 'bank':
            self.apm.median()  # a bank that has none says so here, and not after the warmup
        where = torch.full((num_labeled,), -1) if labeled_to_unlabeled is None else labeled_to_unlabeled
        _expect_int64(labeled_to_unlabeled=where)
        _expect(where.shape == (num_labeled,), 'labeled_to_unlabeled', f'[{num_labeled}]', list(where.shape))
        bad = where[(where < -1) | (where >= num_unlabeled)][:3].tolist()
        _expect(not bad, 'labeled_to_unlabeled', f'-1 or positions below {num_unlabeled}', bad)
        self.register_buffer('labeled_to_unlabeled', where, persistent=False)
        if self.weight_rate > 0:
            del self.weight  # in favour of a buffer
            self.register_buffer('weight', torch.zeros(()))
            self.register_buffer('last_label', torch.full((num_unlabeled,), num_classes))

    def extra_repr(self) -> str:
        return ', '.join(f'{name}={value!r}' for name, value in self.options.items())

    def update(
            self, index: Tensor, label: Tensor, logits: Tensor,
            unlabeled_index: Tensor, pseudo_label: Tensor, unlabeled_logits: Tensor, step: int,
            repeated: tuple[bool | None, bool | None] = (None, None),
    ) -> None:
        """Adds a step's margins to the banks. Wrong arguments raise what `MarginBank.update` raises.

        Args:
            index, unlabeled_index: `[B]` and `[U]` int64, positions in the labeled and in the unlabeled set.
            label, pseudo_label: `[B]` and `[U]` int64.
            logits, unlabeled_logits: `[B, K]` and `[U, K]`, of the weak views, any floating dtype.
            step: Steps done so far, which tells whether the warmup is over.
            repeated: Of the labeled and of the unlabeled batch, as for `MarginBank.update`.
        """
        _expect_int64(index=index, label=label, unlabeled_index=unlabeled_index, pseudo_label=pseudo_label)
        self.aum.update(index, logits, label, repeated[0])
        if self.apm_in_warmup or step >= self.warmup_steps:
            self.apm.update(unlabeled_index, unlabeled_logits, pseudo_label, repeated[1])
        if self.weight_rate > 0 and len(unlabeled_index):
            self.steer(unlabeled_index, pseudo_label, unlabeled_logits, step)

    @torch.no_grad()
    def steer(self, unlabeled_index: Tensor, pseudo_label: Tensor, unlabeled_logits: Tensor, step: int) -> None:
        """Moves w so that the network becomes as sure as it is right; `update` calls it. Ours, not the paper's.

        How often it is right is estimated by how many pseudo-labels differ from those of the images' last visits. With
        U images in the batch, S those of them with an earlier visit, c_i their confidence and k = ERRORS_PER_CHANGE,

            w <- clip(w + r/U * sum_{i in S} (c_i - 1 + k * [pseudo-label of i has changed]), 0, weight)

        Labels are kept from the first step on, w moves after warmup. A row whose logits are not finite is no visit. An
        image that stands twice counts twice, both times against an earlier batch, and its last row is kept.
        """
        none = self.num_classes  # in place of the label of an image that was never visited
        last = self.last_label.gather(0, unlabeled_index) % (none + 1)
        confidence = unlabeled_logits.float().softmax(1).amax(1)
        visit = confidence > 0  # not so where it is NaN
        if step >= self.warmup_steps:
            gap = confidence.add(last != pseudo_label, alpha=ERRORS_PER_CHANGE) - 1
            gap = torch.where(visit & (last < none), gap, 0).mean()
            self.weight = (self.weight + self.weight_rate * gap).clamp(0, self.options['weight'])
        # Of rows with the same index the largest number stays, whatever the order of writing: the last visit's.
        row = torch.arange(1, len(visit) + 1, device=visit.device)
        number = torch.where(visit, row * (none + 1) + pseudo_label, last)
        self.last_label.index_fill_(0, unlabeled_index, -1).scatter_reduce_(0, unlabeled_index, number, 'amax')

    def for_mask(self, logits: Tensor, step: int) -> Tensor:
        """Weak logits `[U, K]` to choose pseudo-labels by: after warmup float32, times `mask_scale`. Not the paper's.

        Mixing takes confidence from all images, and fewer would pass a fixed threshold, right as they are.
        """
        return logits if step < self.warmup_steps or self.mask_scale == 1 else logits.float() * self.mask_scale

    @torch.no_grad()
    def mix(
            self, index: Tensor, label: Tensor, images: Tensor, features: Tensor,
            unlabeled_index: Tensor, pseudo_label: Tensor, unlabeled_images: Tensor, unlabeled_features: Tensor,
            confidence: Tensor | None = None, easy: tuple[Tensor, Tensor] | None = None,
    ) -> Mixed:
        """Mixes easy labeled with hard unlabeled and hard labeled with easy unlabeled images.

        A row is `g * labeled + (1 - g) * unlabeled`, its target `g * onehot(label) + (1 - g) * onehot(pseudo_label)`.
        There is a row for each labeled image, but none if the unlabeled batch is empty.

        Args:
            index, label, unlabeled_index, pseudo_label: As for `update`.
            images, unlabeled_images: `[B, C, H, W]` and `[U, C, H, W]`, any floating dtype; the weak views.
            features, unlabeled_features: `[B, D]` and `[U, D]`; not read where the similarity is one of pixels.
            confidence: `[U]`, needed only with min_confidence.
            easy: `[B]` and `[U]` bool, this batch's rows of what `find_easy` gave for a larger one. None: it splits.

        A TypeError names an index or label that is not int64, a ValueError images that are not floating point.
        """
        _expect_int64(index=index, label=label, unlabeled_index=unlabeled_index, pseudo_label=pseudo_label)
        floating = images.is_floating_point() and unlabeled_images.is_floating_point()
        _expect(floating, 'images', 'floating dtypes', f'{images.dtype} and {unlabeled_images.dtype}')
        if len(unlabeled_index) == 0:
            index, label, images = index[:0], label[:0], images[:0]
        easy, unlabeled_easy = easy or self.find_easy(index, unlabeled_index, pseudo_label)
        easy = easy[:len(index)]
        allowed = easy[:, None] != unlabeled_easy
        allowed &= self.labeled_to_unlabeled[index][:, None] != unlabeled_index
        if self.min_confidence > 0:
            if confidence is None:
                raise ValueError(f'confidence: needed with min_confidence={self.min_confidence}')
            allowed &= confidence >= self.min_confidence
        if self.pairing == 'random' or self.topk == 0:
            partner, paired = pair_dissimilar(allowed, allowed, topk=0)
        else:
            a, b = (features, unlabeled_features) if self.space == 'feature' else (images, unlabeled_images)
            partner, paired = pair_dissimilar(self._similarity(a, b), allowed, self.topk)

        gamma = torch.where(paired, self._draw_gamma(easy), 1)
        g = gamma.view(-1, *[1] * (images.ndim - 1))  # float32, so that half-precision images and targets weigh alike
        rest = 1 - g
        mixed = (g * images + rest * unlabeled_images[partner]).to(images.dtype)
        target = torch.zeros(len(gamma), self.num_classes, device=gamma.device)
        target.scatter_(1, label[:, None], gamma[:, None])
        target.scatter_add_(1, pseudo_label[partner, None], rest.view(-1, 1))
        weight = paired / ((easy[:, None] == easy) & paired).sum(1).clamp(min=1)
        return Mixed(mixed, target, gamma, partner, paired, easy, weight)

    def find_easy(
            self, index: Tensor, unlabeled_index: Tensor, pseudo_label: Tensor, apm: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Splits labeled and unlabeled images into easy (True) and hard: `[B]` and `[U]` bool.

        apm: `[U]` float32, margins of the unlabeled images that you looked up yourself.
        """
        if self.pairing == 'random':
            aum, apm = (torch.rand(len(i), device=i.device) for i in (index, unlabeled_index))
            return split_easy_hard(aum), split_easy_hard(apm)
        aum, apm = self.aum.lookup(index), self.apm.lookup(unlabeled_index, pseudo_label) if apm is None else apm
        aum_median, apm_median = (b.median() if self.split == 'bank' else None for b in (self.aum, self.apm))
        return split_easy_hard(aum, aum_median), split_easy_hard(apm, apm_median)

    def loss(self, logits: Tensor, mixed: Mixed) -> Tensor:
        """Sum of the two groups' mean losses, without the factor `weight`.

        Logits of `mixed.images`, `[P, K]` of any floating dtype -> float32 scalar. Groups without pairs add 0.
        """
        logits = logits.float()
        if self.loss_type == 'ce':
            loss = -(mixed.target * logits.log_softmax(1)).sum(1)
        else:
            loss = F.binary_cross_entropy_with_logits(logits, mixed.target, reduction='none').mean(1)
        return (loss * mixed.weight).sum()

    def _similarity(self, a: Tensor, b: Tensor) -> Tensor:
        """`[P, ...]` and `[Q, ...]` to `[P, Q]` float32."""
        with torch.autocast(a.device.type, enabled=False):
            a, b = a.flatten(1).float(), b.flatten(1).float()
            if self.similarity == 'cosine':
                a, b = F.normalize(torch.cat([a, b])).split([len(a), len(b)])
            return -torch.cdist(a, b) if self.similarity == 'euclidean' else a @ b.T

    def _draw_gamma(self, easy: Tensor) -> Tensor:
        """Weight of the labeled image, `[P]` float32."""
        if self.gamma_dist == 'fixed':
            return torch.full(easy.shape, float(self.gamma), device=easy.device)
        # Drawn on the CPU, so that the draw does not depend on the device. A copy of this size does not wait for it.
        beta = torch.distributions.Beta(float(self.gamma), float(self.gamma), validate_args=False)
        drawn = beta.sample(easy.shape if self.gamma_dist == 'beta-pair' else (2,)).to(easy.device, non_blocking=True)
        return drawn if self.gamma_dist == 'beta-pair' else drawn[easy.long()]
