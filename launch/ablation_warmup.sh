#!/usr/bin/env bash
# Ablation of the warmup: 0, 50, 100 and 200 of 1,024 epochs of FixMatch alone before CalibrateMix joins, on CIFAR-100
# with 2,500 labels. Other scales, and --epochs, keep the proportion.
# Settings: as table1_cifar100.sh.
# The paper's finding: 100 epochs are best; figures not at hand.
# Measured by us: at SCALE=cpu with --dataset cifar10, in results/README.md; the full recipe was not run.
# Time: at SCALE=cpu and --amp two and a half minutes a run on one core of an AMD EPYC server.
# The environment that it takes, and its scales: _common.sh.
. "$(dirname -- "${BASH_SOURCE[0]}")/_common.sh"

dataset cifar100 --model wide_resnet28_8 --weight-decay 1e-3
labels=$(labels 2500)
for warmup in 0 50 100 200; do
    epochs=$(of_1024 "$warmup")
    for seed in $SEEDS; do
        run "warmup$warmup-seed$seed" --num-labels "$labels" --algorithm fixmatch --seed "$seed" --calibratemix \
            --calmix-warmup-epochs "$epochs"
    done
done
report
