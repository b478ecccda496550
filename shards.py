"""CalibrateMix on several processes: a bank in parts, one on each process, and the split of their joined batch.

`calibratemix.py` knows of none of this. What is given here as joined is what `accelerator.gather` returns: the batches
of all processes, one after the other.
"""
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast

from calibratemix import CalibrateMix, MarginBank, Mixed

__all__ = ['BankShard', 'find_easy', 'joined_weight', 'load_whole', 'whole_bank']


class BankShard(MarginBank):
    """One of n parts of a bank, one on each of n processes: the r-th holds every n-th sample, from r on.

    Each part takes the same updates, those of the joined batch. In `lookup` it has 0 for the samples of the others, so
    that the sum over the parts is what the whole bank would give.

    Args:
        num_samples: N, of the whole bank.
        num_classes: K; the margin of every class is kept.
        part: `(r, n)`.
        smoothing, dtype: As for `MarginBank`.

    Raises:
        ValueError: If the part is none, or if there are fewer samples than parts.
    """

    def __init__(
            self,
            num_samples: int,
            num_classes: int,
            part: tuple[int, int],
            smoothing: float = 1.0,
            dtype: torch.dtype = torch.float32,
    ):
        rank, parts = part
        if not 0 <= rank < parts:
            raise ValueError(f'part: expected (r, n) with r from 0 to n - 1, got {part}')
        if num_samples < parts:
            raise ValueError(f'bank_shards: expected a sample for each of the {parts} parts, got {num_samples}')
        super().__init__(len(range(rank, num_samples, parts)), num_classes, smoothing, dtype)
        self.num_samples, self.part = num_samples, part

    def _own(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Row of each index in this part's tables, `[B]`, and whether it is of this part, `[B]` (else the row is 0)."""
        rank, parts = self.part
        own = index % parts == rank
        return torch.where(own, index // parts, 0), own

    def _add(self, row: torch.Tensor, m: torch.Tensor, label: torch.Tensor, repeated: bool | None) -> None:
        row, own = self._own(row)
        if row.is_cuda:  # shapes must not depend on values there; what is not finite is no visit
            super()._add(row, m.masked_fill(~own[:, None], torch.nan), label, True)
        else:
            super()._add(row[own], m[own], label[own], repeated)

    def lookup(self, index: torch.Tensor, label: torch.Tensor | None = None) -> torch.Tensor:
        self._check(index)
        row, own = self._own(index)
        return torch.where(own, super().lookup(row, label), 0)

    def median(self) -> torch.Tensor:
        """There is none: a ValueError says so."""
        raise ValueError(f'split: bank needs the median of the whole bank, and this one holds part {self.part} of it')


def whole_bank(bank: MarginBank, accelerator: Accelerator) -> MarginBank:
    """The main process's copy, in its memory, of a bank that the processes hold in parts; a whole bank is its own.

    All processes take part; what the others return has no rows.
    """
    if not isinstance(bank, BankShard):
        return bank
    rank, parts = bank.part
    num_samples = bank.num_samples if accelerator.is_main_process else 0
    whole = MarginBank(num_samples, bank.value.shape[1], bank.smoothing, bank.value.dtype)
    for name, buffer in bank.named_buffers():
        for source in range(parts):  # one after the other, so that no process needs the memory for all at once
            rows = len(range(source, bank.num_samples, parts))
            rows = buffer if source == rank else buffer.new_empty(rows, *buffer.shape[1:])
            rows = broadcast(rows, from_process=source)
            if accelerator.is_main_process:
                getattr(whole, name)[source::parts] = rows.cpu()
    return whole


def load_whole(calmix: CalibrateMix, state: dict[str, torch.Tensor]) -> None:
    """Loads a state dict with the whole unlabeled bank; of a bank in parts each process takes its own rows."""
    rank, parts = calmix.apm.part if isinstance(calmix.apm, BankShard) else (0, 1)
    steered = ('weight', 'last_label')  # only where the weight is steered, which a resume may turn on or off
    fresh = calmix.state_dict()
    found = {key: table for key, table in state.items() if key in fresh or key not in steered}
    missing = {key: fresh[key] for key in steered if key in fresh and key not in state}
    calmix.load_state_dict({
        key: table[rank::parts] if key.startswith('apm.') else table for key, table in {**found, **missing}.items()
    })


def find_easy(
        calmix: CalibrateMix,
        index: torch.Tensor,
        unlabeled_index: torch.Tensor,
        pseudo_label: torch.Tensor,
        accelerator: Accelerator,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Splits a process's own images into easy and hard where that takes the others.

    It does where the joined batch is split, or where the margins are in several parts of the bank. Else `mix` does it
    alone.

    Args:
        calmix: Its split and its banks are used.
        index, unlabeled_index: `[n * B]` and `[n * U]` int64, positions of the joined batch.
        pseudo_label: `[n * U]` int64, of the joined batch.
        accelerator: Of n processes, all of which take part.

    Returns:
        Easy ones of the process's own labeled and unlabeled images, `[B]` and `[U]` bool, or None.
    """
    def own(joined: torch.Tensor) -> torch.Tensor:
        return joined.chunk(accelerator.num_processes)[accelerator.process_index]

    in_parts = isinstance(calmix.apm, BankShard)
    if calmix.split != 'joined' and not in_parts:
        return None
    apm = calmix.apm.lookup(unlabeled_index, pseudo_label)
    if in_parts:
        apm = accelerator.reduce(apm, 'sum')
    if calmix.split == 'joined':
        easy, unlabeled_easy = calmix.find_easy(index, unlabeled_index, pseudo_label, apm)
        return own(easy), own(unlabeled_easy)
    return calmix.find_easy(own(index), own(unlabeled_index), own(pseudo_label), own(apm))


def joined_weight(mixed: Mixed, accelerator: Accelerator) -> torch.Tensor:
    """Weights `[P]` of the mixed images for means over the joined batch, whose gradients are averaged over processes.

    A process's own groups may then differ in size, and its weights need not add up to 1.
    """
    group = torch.stack([mixed.easy & mixed.paired, ~mixed.easy & mixed.paired]).float()
    size = accelerator.reduce(group.sum(1, keepdim=True), 'sum').clamp(min=1)
    return accelerator.num_processes * (group / size).sum(0)
