#!/usr/bin/env bash
# The strength of the mixing: the factor of the mixup loss, 0.1 to 2, with the paper's preset and with ours, and the
# base method alone. Evaluated on a part of the training set that no run trains on, so that a strength can be chosen
# here and confirmed on the test images.
# Settings: as table1_cifar10.sh, FixMatch, train[:90%], evaluated on train[90%:]. CIFAR-10 with 250 labels is our
# choice; --algorithm changes the method, --dataset and --num-labels the images.
# The paper's figures: none; it gives no factor. Measured by us: not run. Time: not measured.
# The environment that it takes, and its scales: _common.sh.
. "$(dirname -- "${BASH_SOURCE[0]}")/_common.sh"

dataset cifar10 --model wide_resnet28_2 --weight-decay 5e-4
labels=$(labels 250)
held_out=(--num-labels "$labels" --train-split 'train[:90%]' --val-split 'train[90%:]' --algorithm fixmatch)
for seed in $SEEDS; do
    run "alone-seed$seed" "${held_out[@]}" --seed "$seed"
done
for preset in paper ours; do
    for weight in 0.1 0.25 0.5 1 2; do
        for seed in $SEEDS; do
            run "$preset-weight$weight-seed$seed" "${held_out[@]}" --seed "$seed" --calibratemix \
                --calmix-preset "$preset" --calmix-weight "$weight"
        done
    done
done
report
