"""CalibrateMix: mixup guided by training dynamics, for calibrated semi-supervised image classifiers.

Rahman, Mohan, Sosea, Caragea, "CalibrateMix: Guided-Mixup Calibration of Image Semi-Supervised Models",
arXiv 2511.12964. This file stands alone: it needs torch, never calls a model and never talks to other processes.
Copy it into your own repository. A complete FixMatch loop with CalibrateMix:

    import torch
    import torch.nn.functional as F
    from torch import nn
    from calibratemix import CalibrateMix
    x, y, u = torch.rand(40, 3, 32, 32), torch.arange(40) % 10, torch.rand(400, 3, 32, 32)  # your images and labels
    backbone = nn.Sequential(nn.Conv2d(3, 32, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    head = nn.Linear(32, 10)
    optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=0.03, momentum=0.9, nesterov=True)
    calmix = CalibrateMix(num_labeled=40, num_unlabeled=400, num_classes=10, warmup_steps=5)
    for step in range(20):
        i, j = torch.randint(40, (8,)), torch.randint(400, (56,))  # indices into the labeled and the unlabeled set
        weak, strong = u[j], (u[j] + 0.1 * torch.randn(56, 3, 32, 32)).clamp(0, 1)  # your weak and strong augmentation
        features = backbone(torch.cat([x[i], weak, strong]))
        (f, f_weak, _), (z, z_weak, z_strong) = (t.split([8, 56, 56]) for t in (features, head(features)))
        confidence, pseudo = z_weak.detach().softmax(1).max(1)
        loss_u = (F.cross_entropy(z_strong, pseudo, reduction='none') * (confidence >= 0.95)).mean()
        loss = F.cross_entropy(z, y[i]) + loss_u
        calmix.update(i, y[i], z, j, pseudo, z_weak, step)
        if step >= calmix.warmup_steps:
            mixed = calmix.mix(i, y[i], x[i], f, j, pseudo, weak, f_weak)
            loss = loss + calmix.weight * calmix.loss(head(backbone(mixed.images)), mixed)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

A second forward pass sees the mixed images only, one for each labeled image. On several processes, gather the arguments
of `update` first (every process then holds the same tables); `mix` and `loss` work on a process's own batch.

Random numbers (partners, Beta coefficients) come from torch's global generators, so `torch.manual_seed` governs them.
Nothing here waits for the device: shapes never depend on values, and checks of values are made where they are free,
on the CPU; on CUDA a wrong index fails in the kernel.
"""
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ['PRESETS', 'CalibrateMix', 'MarginBank', 'Mixed', 'margin', 'margins', 'pair_dissimilar', 'split_easy_hard']

# The paper counts a warmup of 100 of its 1024 epochs of 1024 steps; the authors' code 150,000 steps of 2^20.
PRESETS = {
    'paper': dict(
        gamma=0.4,
        gamma_dist='fixed',
        topk=0.05,
        similarity='cosine',
        space='feature',
        loss='ce',
        weight=1.0,
        split='batch',
        pairing='targeted',
        min_confidence=0.0,
        warmup_steps=100 * 1024,
        apm_in_warmup=True,
    ),
    'authors-code': dict(
        gamma=0.4,
        gamma_dist='beta-batch',
        topk=15 / 224,
        similarity='cosine',
        space='pixel',
        loss='bce',
        weight=1.0,
        split='batch',
        pairing='targeted',
        min_confidence=0.0,
        warmup_steps=150_000,
        apm_in_warmup=False,
    ),
}
# Not the paper's: equal weights and no ranking, chosen by error and ECE on validation images of CIFAR-10.
PRESETS['ours'] = dict(PRESETS['paper'], gamma=0.5, topk=0.0)
CHOICES = {
    'gamma_dist': ('fixed', 'beta-batch', 'beta-pair'),
    'similarity': ('cosine', 'euclidean', 'dot'),
    'space': ('feature', 'pixel'),
    'loss': ('ce', 'bce'),
    'split': ('batch', 'joined', 'bank'),
    'pairing': ('targeted', 'random'),
}


def margins(logits: torch.Tensor) -> torch.Tensor:
    """Margin of every class, `z_c - max_{j != c} z_j` (Pleiss et al. 2020, arXiv 2001.10528, eq. 1).

    Args:
        logits: `[B, K]`, any floating dtype, K >= 2. Logits, not probabilities.

    Returns:
        `[B, K]` float32, detached. Positive for the top class only.

    Raises:
        ValueError: If logits are not `[B, K]` with at least two classes.
    """
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(f'logits: expected [B, K] with K >= 2, got {list(logits.shape)}')
    logits = logits.detach().float()
    first, top = logits.max(1, keepdim=True)
    second = logits.scatter(1, top, -torch.inf).amax(1, keepdim=True)
    # The strongest rival of every class is the top one, but of the top one the second.
    return (logits - first).scatter_(1, top, first - second)


def margin(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Margin of one class per row, `z_y - max_{j != y} z_j`: logits `[B, K]`, label `[B]` int64 -> `[B]` float32."""
    return margins(logits).gather(1, label[:, None]).squeeze(1)


class MarginBank(nn.Module):
    """Running margins of a whole set, updated by index.

    A visit with margin m at the t-th earlier visits updates `v <- m * d/(1+t) + v * (1 - d/(1+t))`. With d = 1 that is
    the plain mean over all visits, the AUM of the labeled set (Pleiss et al. 2020); with d = 0.997 it is the APM of
    the unlabeled set (MarginMatch, CVPR 2023), kept for every class because the pseudo-label may change. An index that
    stands twice in a batch is two visits, one after the other. An update costs O(B^2 + B * K) whatever N is.

    The tables are buffers (`value`, `count`, `label`), so `state_dict`, `.to(device)` and safetensors cover them.

    Args:
        num_samples: N, the size of the set.
        num_classes: K to keep the margin of every class, `[N, K]`; None to keep that of the given label, `[N]`.
        smoothing: d, in (0, 1].
        dtype: Storage, torch.float32 or torch.float16; arithmetic is float32. A float16 entry has 11 bits: it stops
            following its mean when a visit moves it by less than about 1/2000 of itself, so after some thousand
            visits to a sample. It saturates at 65504.
        part: `(r, n)`: this bank is the r-th of n, on as many processes, and holds every n-th sample, from r on. It
            takes the same updates as the whole would; its values in `lookup` are to be summed over the parts.

    Raises:
        ValueError: If an argument is outside of what is named above.
    """

    def __init__(
            self,
            num_samples: int,
            num_classes: int | None = None,
            smoothing: float = 1.0,
            dtype: torch.dtype = torch.float32,
            part: tuple[int, int] = (0, 1),
    ):
        super().__init__()
        if num_samples < 0:
            raise ValueError(f'num_samples: expected 0 or more, got {num_samples}')
        if num_classes is not None and num_classes < 2:
            raise ValueError(f'num_classes: expected None or at least 2, got {num_classes}')
        if not 0 < smoothing <= 1:
            raise ValueError(f'smoothing: expected a number in (0, 1], got {smoothing}')
        if dtype not in (torch.float32, torch.float16):
            raise ValueError(f'dtype: expected torch.float32 or torch.float16, got {dtype}')
        if not 0 <= part[0] < part[1] or (part[1] > 1 and num_samples < part[1]):
            raise ValueError(f'part: expected (r, n) with r < n and n <= {num_samples} samples, got {part}')
        self.num_samples, self.smoothing, self.part = num_samples, smoothing, part
        rows = len(range(part[0], num_samples, part[1]))
        self.register_buffer('value', torch.zeros((rows,) if num_classes is None else (rows, num_classes), dtype=dtype))
        self.register_buffer('count', torch.zeros(rows, dtype=torch.int32))
        self.register_buffer('label', torch.full((rows,), -1, dtype=torch.int32))

    def _check(self, index: torch.Tensor) -> None:
        """The one place where an index is checked, -1 included; a GPU does it by itself."""
        if not index.is_cuda:
            bad = index[(index < 0) | (index >= self.num_samples)]
            if len(bad):
                raise IndexError(f'index {int(bad[0])} is outside of the bank of {self.num_samples} samples')

    def _own(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Row of each index in this part's tables, `[B]`, and whether it is of this part, `[B]` (else the row is 0)."""
        rank, parts = self.part
        own = index % parts == rank
        return torch.where(own, index // parts, 0), own

    @torch.no_grad()
    def update(self, index: torch.Tensor, logits: torch.Tensor, label: torch.Tensor) -> None:
        """Adds one visit per row.

        Rows whose margins are not finite (a float16 forward pass that overflowed) are no visit: they change nothing.

        Args:
            index: `[B]` int64 in [0, N); may repeat.
            logits: `[B, K]` of the weak view, any floating dtype.
            label: `[B]` int64, the labels or the current pseudo-labels.

        Raises:
            IndexError: If an index is outside of [0, N) (on CUDA: a device-side assertion).
            ValueError: If the shapes do not fit together.
        """
        if not len(index) == len(logits) == len(label):
            raise ValueError(f'index, logits, label: {len(index)}, {len(logits)} and {len(label)} rows')
        m = margins(logits) if self.value.ndim == 2 else margin(logits, label)[:, None]
        if self.value.ndim == 2 and m.shape[1] != self.value.shape[1]:
            raise ValueError(f'logits: expected {self.value.shape[1]} classes, got {m.shape[1]}')
        self._check(index)
        if self.part[1] > 1:
            index, own = self._own(index)
            if index.is_cuda:  # shapes must not depend on values there; what is not finite is no visit
                m = m.masked_fill(~own[:, None], torch.nan)
            else:
                index, m, label = index[own], m[own], label[own]
        if len(index) == 0:
            return
        count = self.count.gather(0, index)
        # A bound far below the largest float32, so that no difference of two margins overflows either. NaN fails it.
        visit = (m.amin(1) > -1e19) & (m.amax(1) < 1e19)
        t, fade, visits = count, 1, visit[:, None]
        # Work for cases that most batches are not is left out where asking is free; a GPU would have to be waited for.
        if index.is_cuda or not visit.all():
            m.masked_fill_(~visits, 0)
        repeated = index.is_cuda or len(index.unique()) < len(index)
        if repeated:
            # The recursion unrolled, without a loop over repeated indices: row b is the t_b-th visit to its sample,
            # and what it leaves in the table is faded by the visits of later rows to the same sample.
            row = torch.arange(len(index), device=index.device, dtype=torch.int32)
            same = index[:, None] == index  # [B, B], symmetric
            visits = same & visit
            t = count + visits.float().tril(-1).sum(1)
            fade = torch.where(visits & (row[:, None] < row), 1 - self.smoothing / (1 + t), 1).prod(1)
            first = torch.where(same, row, len(index)).amin(1).long()
            last = torch.where(visits, row, -1).amax(1).long()
            label = label[last.clamp(min=0)]
        old = self.value.index_select(0, index).float().view(m.shape)
        # As a step from the old value: after many visits 1 - rate is too coarse in float32, and its error adds up.
        step = m.sub_(old).mul_((visit * self.smoothing / (1 + t) * fade)[:, None])
        if repeated:
            step = torch.zeros_like(step).index_add_(0, first, step).index_select(0, first)
        new = old.add_(step).view(-1, *self.value.shape[1:])
        largest = torch.finfo(self.value.dtype).max  # beyond it float16 would store inf, for good
        # Repeated indices write equal values, so the order of writing does not matter.
        self.value.index_copy_(0, index, new.clamp_(-largest, largest).to(self.value.dtype))
        self.count.index_copy_(0, index, count + visits.sum(1, dtype=torch.int32))
        self.label.index_copy_(0, index, torch.where(visits.any(1), label.int(), self.label[index]))

    def lookup(self, index: torch.Tensor, label: torch.Tensor | None = None) -> torch.Tensor:
        """Current values, `[B]` float32: AUM, or with a table per class the APM of `label` `[B]`. Never seen: -inf.

        One of several parts has 0 for the samples of the others.
        """
        self._check(index)
        own = None
        if self.part[1] > 1:
            index, own = self._own(index)
        value = self.value[index] if self.value.ndim == 1 else self.value[index, label]
        value = torch.where(self.count.gather(0, index) > 0, value.float(), -torch.inf)
        return value if own is None else torch.where(own, value, 0)

    def median(self) -> torch.Tensor:
        """Median over the samples seen so far, each at its last label: scalar float32, NaN when none was seen. O(N).

        Raises:
            ValueError: If this is one of several parts.
        """
        if self.part[1] > 1:
            raise ValueError(f'part: the median needs the whole bank, and this is part {self.part}')
        if self.value.ndim == 1:
            value = self.value
        else:
            value = self.value.gather(1, self.label.long().clamp(min=0)[:, None]).squeeze(1)
        return torch.where(self.count > 0, value.float(), torch.nan).nanmedian()


def split_easy_hard(score: torch.Tensor, threshold: torch.Tensor | None = None) -> torch.Tensor:
    """Splits a batch into easy (large AUM or APM) and hard.

    Without a threshold the split is at the batch's own median, by rank: two halves that differ by at most one, the
    odd sample being hard, ties going by position. With a threshold (of the whole bank) samples above it are easy, and
    those equal to it alternate, so that equal margins never all fall on one side.

    Args:
        score: `[B]`; -inf (never seen) ranks hardest.
        threshold: Scalar.

    Returns:
        `[B]` bool, True for easy.

    Raises:
        ValueError: If a score is NaN, naming its position (on CUDA: a device-side assertion).
    """
    nan = score.isnan()
    if score.is_cuda:
        torch._assert_async(~nan.any())  # reading the flag here would stall the device in every step
    elif nan.any():
        raise ValueError(f'score: NaN at position {int(nan.nonzero()[0])}')
    if threshold is None:
        rank = score.argsort(descending=True, stable=True).argsort()
        return rank < len(score) // 2
    tie = score == threshold
    return (score > threshold) | (tie & (tie.cumsum(0) % 2 == 0))


@lru_cache
def _counts(topk: float, num: int) -> list[int]:
    """`max(1, round(topk * n))` for n from 0 to num, in Python: float32 falls on the wrong side of some halves."""
    return [max(1, round(topk * n)) for n in range(num + 1)]


def pair_dissimilar(similarity: torch.Tensor, allowed: torch.Tensor, topk: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws for each row one of the allowed columns, uniformly among the `max(1, round(topk * n))` least similar.

    Args:
        similarity: `[P, Q]` float, NaN counting as most similar. Not read where topk is 0.
        allowed: `[P, Q]` bool; n is a row's number of allowed columns.
        topk: Share in [0, 1]; 0 means any allowed column.

    Returns:
        partner: `[P]` int64, arbitrary where there is none.
        paired: `[P]` bool, False for rows with no allowed column.
    """
    num, candidates = allowed.shape[1], allowed.sum(1)
    if num == 0:
        return candidates, candidates > 0
    if topk == 0:
        partner = torch.rand(allowed.shape, device=allowed.device).masked_fill(~allowed, 2).argmin(1)
        return partner, candidates > 0
    k_of = _counts(topk, num)
    k = torch.tensor(k_of).to(candidates.device, non_blocking=True)[candidates]
    # Sorted, so that a row's first k columns are its k least similar; no row needs more than k of all columns.
    # torch sorts NaN after inf: features that overflowed would bring in columns that are not allowed.
    similarity = similarity.nan_to_num(nan=torch.finfo(similarity.dtype).max).masked_fill(~allowed, torch.inf)
    lowest = similarity.topk(k_of[-1], largest=False).indices
    pick = (torch.rand(len(k), device=k.device) * k).long().minimum(k - 1)
    return lowest.gather(1, pick[:, None]).squeeze(1), candidates > 0


class Mixed(NamedTuple):
    """What `CalibrateMix.mix` returns: one row per labeled image."""
    images: torch.Tensor  # [P, C, H, W], dtype of the labeled images
    target: torch.Tensor  # [P, K] float32, rows add up to 1
    gamma: torch.Tensor  # [P] float32, weight of the labeled image; 1 where there is no partner
    partner: torch.Tensor  # [P] int64, row of the unlabeled batch
    paired: torch.Tensor  # [P] bool, False where the other side has no candidate
    easy: torch.Tensor  # [P] bool, the labeled image is of the easy half (its partner then of the hard one)
    weight: torch.Tensor  # [P] float32, of the row in the loss: adds up to 1 over each group that has a pair


class CalibrateMix(nn.Module):
    """Margin banks, split, pairing, mixup and its loss, for a training loop: `update`, then `mix`, then `loss`.

    Options left at None take the preset's value: 'paper' (arXiv 2511.12964), 'authors-code' (their public code) or
    'ours' (the paper's with equal weights and without ranking: less error in our short runs).

    Args:
        num_labeled: Size of the labeled set.
        num_unlabeled: Size of the unlabeled set.
        num_classes: K.
        preset: 'paper', 'authors-code' or 'ours'.
        gamma: Weight g of the labeled image in [0, 1] (gamma_dist 'fixed'), else the parameter of Beta(gamma, gamma).
        gamma_dist: 'fixed'; 'beta-batch', one draw per group and step; 'beta-pair', one draw per pair.
        topk: Share of the candidates among which the partner is drawn, the least similar ones; 0 draws among all.
        similarity: 'cosine', 'euclidean' (negative distance) or 'dot'.
        space: 'feature' (penultimate features) or 'pixel' compares the images.
        loss: 'ce', cross-entropy with soft targets; 'bce', binary cross-entropy averaged over the classes.
        weight: w, the factor of the mixup loss in the total; kept here for the training loop, not applied by `loss`.
        split: Median of the 'batch' or of the whole 'bank' (O(N) a step). 'joined' is 'batch' for a caller on several
            processes who gives `mix` the split of their joined batch.
        pairing: 'targeted', or 'random' split and partners: the paper's random-mixup baseline through the same code.
        min_confidence: Unlabeled images with less confidence are no candidates; 0 takes all, as the paper does.
        warmup_steps: Steps in which the base method runs alone; kept here for the training loop.
        apm_in_warmup: Margins of unlabeled images count from the first step on, not only after warmup.
        apm_smoothing: d of the APM.
        bank_dtype: Storage of the `[num_unlabeled, K]` table, torch.float32 or torch.float16.
        part: `(r, n)`: hold the r-th of n parts of the unlabeled images' bank, as `MarginBank` does.
        labeled_to_unlabeled: `[num_labeled]` int64, where a labeled image stands in the unlabeled set, -1 if it does
            not: an image is never mixed with itself. None if the sets are disjoint.

    Raises:
        ValueError: If an option is unknown or out of range; the message names the argument, the value and what is
            allowed.
    """

    def __init__(
            self,
            num_labeled: int,
            num_unlabeled: int,
            num_classes: int,
            preset: str = 'paper',
            *,
            gamma: float | None = None,
            gamma_dist: str | None = None,
            topk: float | None = None,
            similarity: str | None = None,
            space: str | None = None,
            loss: str | None = None,
            weight: float | None = None,
            split: str | None = None,
            pairing: str | None = None,
            min_confidence: float | None = None,
            warmup_steps: int | None = None,
            apm_in_warmup: bool | None = None,
            apm_smoothing: float = 0.997,
            bank_dtype: torch.dtype = torch.float32,
            part: tuple[int, int] = (0, 1),
            labeled_to_unlabeled: torch.Tensor | None = None,
    ):
        super().__init__()
        if preset not in PRESETS:
            raise ValueError(f'preset: expected one of {", ".join(PRESETS)}, got {preset!r}')
        defaults = PRESETS[preset]

        def option(name, value):
            value = defaults[name] if value is None else value
            if name in CHOICES and value not in CHOICES[name]:
                raise ValueError(f'{name}: expected one of {", ".join(CHOICES[name])}, got {value!r}')
            return value

        self.num_classes = num_classes
        self.gamma = option('gamma', gamma)
        self.gamma_dist = option('gamma_dist', gamma_dist)
        self.topk = option('topk', topk)
        self.similarity = option('similarity', similarity)
        self.space = option('space', space)
        self.loss_type = option('loss', loss)
        self.weight = option('weight', weight)
        self.split = option('split', split)
        self.pairing = option('pairing', pairing)
        self.min_confidence = option('min_confidence', min_confidence)
        self.warmup_steps = option('warmup_steps', warmup_steps)
        self.apm_in_warmup = option('apm_in_warmup', apm_in_warmup)
        for name in ('topk', 'min_confidence'):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f'{name}: expected a share in [0, 1], got {getattr(self, name)}')
        if self.gamma_dist == 'fixed' and not 0 <= self.gamma <= 1:
            raise ValueError(f'gamma: expected a number in [0, 1], got {self.gamma}')
        if self.gamma_dist != 'fixed' and not 0 < self.gamma < torch.inf:
            raise ValueError(f'gamma: expected a positive Beta parameter, got {self.gamma}')
        for name in ('weight', 'warmup_steps'):
            if not getattr(self, name) >= 0:
                raise ValueError(f'{name}: expected 0 or more, got {getattr(self, name)}')
        for name, size in (('num_labeled', num_labeled), ('num_unlabeled', num_unlabeled)):
            if size < 0:
                raise ValueError(f'{name}: expected 0 or more, got {size}')

        if self.split == 'bank' and part[1] > 1:
            raise ValueError('split: bank needs the median of the whole bank, and this one is to hold a part of it')

        self.aum = MarginBank(num_labeled)
        self.apm = MarginBank(num_unlabeled, num_classes, smoothing=apm_smoothing, dtype=bank_dtype, part=part)
        if labeled_to_unlabeled is None:
            labeled_to_unlabeled = torch.full((num_labeled,), -1)
        if labeled_to_unlabeled.shape != (num_labeled,):
            raise ValueError(f'labeled_to_unlabeled: expected [{num_labeled}], got {list(labeled_to_unlabeled.shape)}')
        if ((labeled_to_unlabeled < -1) | (labeled_to_unlabeled >= num_unlabeled)).any():
            raise ValueError(f'labeled_to_unlabeled: expected -1 or positions below {num_unlabeled}, got '
                             f'{labeled_to_unlabeled.min()} to {labeled_to_unlabeled.max()}')
        self.register_buffer('labeled_to_unlabeled', labeled_to_unlabeled.long(), persistent=False)

    def extra_repr(self) -> str:
        names = [name for name in PRESETS['paper'] if name != 'loss']
        return ', '.join(f'{name}={getattr(self, name)!r}' for name in names) + f', loss={self.loss_type!r}'

    def update(
            self,
            index: torch.Tensor,
            label: torch.Tensor,
            logits: torch.Tensor,
            unlabeled_index: torch.Tensor,
            pseudo_label: torch.Tensor,
            unlabeled_logits: torch.Tensor,
            step: int,
    ) -> None:
        """Adds a step's margins to the banks (AUM of the labeled set, APM of the unlabeled set).

        Args:
            index: `[B]` int64, positions in the labeled set.
            label: `[B]` int64.
            logits: `[B, K]`.
            unlabeled_index: `[U]` int64, positions in the unlabeled set.
            pseudo_label: `[U]` int64.
            unlabeled_logits: `[U, K]`, of the weak view.
            step: Steps done so far; matters where the APM counts only after warmup.
        """
        self.aum.update(index, logits, label)
        if self.apm_in_warmup or step >= self.warmup_steps:
            self.apm.update(unlabeled_index, unlabeled_logits, pseudo_label)

    @torch.no_grad()
    def mix(
            self,
            index: torch.Tensor,
            label: torch.Tensor,
            images: torch.Tensor,
            features: torch.Tensor,
            unlabeled_index: torch.Tensor,
            pseudo_label: torch.Tensor,
            unlabeled_images: torch.Tensor,
            unlabeled_features: torch.Tensor,
            confidence: torch.Tensor | None = None,
            easy: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> Mixed:
        """Mixes easy labeled with hard unlabeled and hard labeled with easy unlabeled images.

        Every mixed image has exactly one labeled parent, so two pseudo-labels never meet.

        Args:
            index: `[B]` int64, positions in the labeled set.
            label: `[B]` int64.
            images: `[B, C, H, W]`, any floating dtype.
            features: `[B, D]`; not read where the similarity is one of pixels.
            unlabeled_index: `[U]` int64, positions in the unlabeled set.
            pseudo_label: `[U]` int64.
            unlabeled_images: `[U, C, H, W]`, the weak view.
            unlabeled_features: `[U, D]`.
            confidence: `[U]`, needed only with min_confidence.
            easy: `[B]` and `[U]` bool, this batch's rows of what `find_easy` gave for a larger one. Default: the batch
                is split by itself.

        Returns:
            The mixed batch, B rows, or none if the unlabeled batch is empty. The inputs are left as they are.

        Raises:
            ValueError: If min_confidence is set and confidence is missing, or if images are not floating point.
        """
        if not (images.is_floating_point() and unlabeled_images.is_floating_point()):
            raise ValueError(f'images: expected floating dtypes, got {images.dtype} and {unlabeled_images.dtype}')
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
        elif self.space == 'feature':
            partner, paired = pair_dissimilar(self._similarity(features, unlabeled_features), allowed, self.topk)
        else:
            partner, paired = pair_dissimilar(self._similarity(images, unlabeled_images), allowed, self.topk)

        gamma = torch.where(paired, self._draw_gamma(easy), 1)
        g = gamma.view(-1, *[1] * (images.ndim - 1))  # float32, so that half-precision images and targets weigh alike
        mixed = (g * images + (1 - g) * unlabeled_images[partner]).to(images.dtype)
        target = F.one_hot(label, self.num_classes) * gamma[:, None]
        target += F.one_hot(pseudo_label[partner], self.num_classes) * (1 - gamma)[:, None]
        group = torch.stack([easy & paired, ~easy & paired]).float()
        weight = (group / group.sum(1, keepdim=True).clamp(min=1)).sum(0)
        return Mixed(mixed, target, gamma, partner, paired, easy, weight)

    def find_easy(
            self,
            index: torch.Tensor,
            unlabeled_index: torch.Tensor,
            pseudo_label: torch.Tensor,
            apm: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Splits labeled images `[B]` and unlabeled ones `[U]` into easy (True) and hard: `[B]` and `[U]` bool.

        A caller whose processes hold a part of the bank each gives the sum of their `apm.lookup`, `[U]`.
        """
        if self.pairing == 'random':
            aum, apm = (torch.rand(len(i), device=i.device) for i in (index, unlabeled_index))
            return split_easy_hard(aum), split_easy_hard(apm)
        aum, apm = self.aum.lookup(index), self.apm.lookup(unlabeled_index, pseudo_label) if apm is None else apm
        if self.split == 'bank':
            return split_easy_hard(aum, self.aum.median()), split_easy_hard(apm, self.apm.median())
        return split_easy_hard(aum), split_easy_hard(apm)

    def loss(self, logits: torch.Tensor, mixed: Mixed) -> torch.Tensor:
        """Sum of the two groups' mean losses, without the factor `weight`.

        Args:
            logits: `[P, K]` of `mixed.images`, any floating dtype; the loss is computed in float32.
            mixed: As returned by `mix`.

        Returns:
            Scalar float32. A group without pairs adds 0; without any pair the result is 0 and still has its graph.
        """
        logits = logits.float()
        if self.loss_type == 'ce':
            loss = -(mixed.target * logits.log_softmax(1)).sum(1)
        else:
            loss = F.binary_cross_entropy_with_logits(logits, mixed.target, reduction='none').mean(1)
        return (loss * mixed.weight).sum()

    def _similarity(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """`[P, ...]` and `[Q, ...]` to `[P, Q]` float32."""
        with torch.autocast(a.device.type, enabled=False):
            a, b = a.flatten(1).float(), b.flatten(1).float()
            if self.similarity == 'euclidean':
                return -torch.cdist(a, b)
            if self.similarity == 'cosine':
                a, b = F.normalize(a), F.normalize(b)
            return a @ b.T

    def _draw_gamma(self, easy: torch.Tensor) -> torch.Tensor:
        """Weight of the labeled image, `[P]` float32."""
        if self.gamma_dist == 'fixed':
            return torch.full(easy.shape, float(self.gamma), device=easy.device)
        # torch draws Beta variates from its global generator only; on the CPU, so that the draw does not depend on
        # the device. A copy of this size goes to the device without waiting for it.
        beta = torch.distributions.Beta(float(self.gamma), float(self.gamma), validate_args=False)
        if self.gamma_dist == 'beta-pair':
            return beta.sample(easy.shape).to(easy.device, non_blocking=True)
        of_hard, of_easy = beta.sample((2,)).to(easy.device, non_blocking=True)
        return torch.where(easy, of_easy, of_hard)
