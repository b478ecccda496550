#!/usr/bin/env bash
# CalibrateMix's own options, one or two changed at a time, beside the base method and random mixup. Evaluated on a part
# of the training set that no run trains on, so that an option can be chosen here and confirmed on the test images.
# Settings: as table1_cifar10.sh, FixMatch, train[:90%], evaluated on train[90%:]. CIFAR-10 with 250 labels is our
# choice; --algorithm changes the method.
# The paper's figures: none. Measured by us: at SCALE=cpu, in results/README.md; the full recipe was not run.
# Time: at SCALE=cpu and --amp two minutes a run on one core of an AMD EPYC server.
# The environment that it takes, and its scales: _common.sh.
. "$(dirname -- "${BASH_SOURCE[0]}")/_common.sh"

dataset cifar10 --model wide_resnet28_2 --weight-decay 5e-4
labels=$(labels 250)
while read -r variant flags; do
    for seed in $SEEDS; do
        # shellcheck disable=SC2086
        run "$variant-seed$seed" --num-labels "$labels" --train-split 'train[:90%]' --val-split 'train[90%:]' \
            --algorithm fixmatch --seed "$seed" $flags
    done
done << 'VARIANTS'
alone
paper --calibratemix
random-mixup --calibratemix --calmix-pairing random
random-mixup-weight2 --calibratemix --calmix-pairing random --calmix-weight 2
topk0 --calibratemix --calmix-topk 0
topk0-weight2 --calibratemix --calmix-topk 0 --calmix-weight 2
topk0-weight3 --calibratemix --calmix-topk 0 --calmix-weight 3
topk0-gamma0.5 --calibratemix --calmix-topk 0 --calmix-gamma 0.5
topk0.25 --calibratemix --calmix-topk 0.25
topk0.5 --calibratemix --calmix-topk 0.5
topk0.5-weight2 --calibratemix --calmix-topk 0.5 --calmix-weight 2
gamma0.5 --calibratemix --calmix-gamma 0.5
gamma0.6 --calibratemix --calmix-gamma 0.6
confident --calibratemix --calmix-min-confidence 0.5
bank --calibratemix --calmix-split bank
pixel --calibratemix --calmix-space pixel
topk0.5-gamma0.5 --calibratemix --calmix-topk 0.5 --calmix-gamma 0.5
topk0.5-gamma0.6 --calibratemix --calmix-topk 0.5 --calmix-gamma 0.6
random-mixup-gamma0.5 --calibratemix --calmix-pairing random --calmix-gamma 0.5
VARIANTS
report
