"""Three updates by each named method, on as many processes as there are; the first process saves states and weights.

    python -m torch.distributed.run --nproc_per_node 2 tests/step_on_processes.py OUTPUT METHOD[,FLAG...] ...

Every process takes its part of the same joined batches. The network is linear: what it says of an image does not depend
on the others of the batch. With --calibratemix among the flags the banks are saved too, whole.
"""
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from torch import nn  # noqa: E402

import train_ssl  # noqa: E402
from data import Datasets  # noqa: E402
from methods import ALGORITHMS, num_outputs  # noqa: E402
from shards import whole_bank  # noqa: E402


class Linear(nn.Module):
    def __init__(self, num_outputs: int):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.Tanh())
        self.head = nn.Linear(8, num_outputs)

    def forward(self, x):
        features = self.body(x)
        return features, 4 * self.head(features)


def joined_batches(step: int) -> tuple[dict, dict]:
    """The batches of all processes, with every view that a method may ask for."""
    generator = torch.Generator().manual_seed(step)

    def images(number):
        return torch.randn(number, 3, 4, 4, generator=generator)

    labeled = dict(image=images(8), strong=images(8), target=torch.randint(4, (8,), generator=generator),
                   index=torch.arange(8))
    unlabeled = dict(weak=images(16), strong=images(16), first=images(16), second=images(16),
                     target=torch.zeros(16).long(), index=torch.randint(40, (16,), generator=generator))
    return labeled, unlabeled


def run(name: str, flags: list[str], accelerator: Accelerator) -> dict[str, torch.Tensor]:
    args = train_ssl._parse_args(['--algorithm', name, '--epochs', '1', '--train-steps-per-epoch', '4', *flags])
    torch.manual_seed(0)
    network = Linear(num_outputs(args, 4))
    average = Linear(num_outputs(args, 4))  # of other weights than the network's, and never moved
    model = accelerator.prepare(network)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = ALGORITHMS[name](40, 4, args)
    datasets = Datasets(range(8), range(40), None, None, torch.arange(8), None, None, None)
    calmix = train_ssl.build_calmix(args, datasets, 4, accelerator)
    rank, world = accelerator.process_index, accelerator.num_processes
    for step in range(3):
        torch.manual_seed(100 * rank + step)
        views = (method.labeled_views, method.views)
        labeled, unlabeled = (
            {key: value.chunk(world)[rank] for key, value in batch.items() if key in {*kinds, 'target', 'index'}}
            for batch, kinds in zip(joined_batches(step), views)
        )
        terms = train_ssl.semi_supervised_step(
            model, labeled, unlabeled, method, calmix, step, accelerator, args,
            average=average if method.takes_average else None,
        )
        accelerator.backward(terms['loss'])
        optimizer.step()
        optimizer.zero_grad()
    own = torch.cat([parameter.flatten() for parameter in network.parameters()]).detach()
    for other in accelerator.gather(own[None]):
        assert torch.equal(other, own), f'{name}: the processes have other weights'
    parts = dict(method=method)
    if calmix is not None:
        parts.update(aum=calmix.aum, apm=whole_bank(calmix.apm, accelerator))
        assert (calmix.apm.part == (rank, world)) if args.calmix_bank_shards else (len(calmix.apm.value) == 40)
    states = {f'{part}.{key}': v for part, module in parts.items() for key, v in module.state_dict().items()}
    return {**network.state_dict(), **states}


def main(output: str, *runs: str) -> None:
    accelerator = Accelerator(cpu=True)
    states = {}
    for text in runs:
        name, *flags = text.split(',')
        states[text] = run(name, flags, accelerator)
    if accelerator.is_main_process:
        torch.save(states, output)


if __name__ == '__main__':
    main(*sys.argv[1:])
