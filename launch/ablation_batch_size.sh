#!/usr/bin/env bash
# Open question of the paper: the batch size, 16 to 256 labeled images, where easy and hard are split at the median of
# the batch or of the whole bank. The learning rate stays.
# Settings: as table1_cifar10.sh, FixMatch with CalibrateMix. CIFAR-10 with 250 labels is our choice. At SCALE=smoke an
# eighth of each batch.
# The paper's figures: none.
# Measured by us: at SCALE=cpu for 1,000 updates, in results/README.md; the full recipe was not run.
# Time: in that setting with --amp one minute (16) to five and a half (256) a run on one core of an AMD EPYC server.
# The environment that it takes, and its scales: _common.sh.
. "$(dirname -- "${BASH_SOURCE[0]}")/_common.sh"

dataset cifar10 --model wide_resnet28_2 --weight-decay 5e-4
labels=$(labels 250)
for split in batch bank; do
    for size in 16 32 64 128 256; do
        if [ "$SCALE" = smoke ]; then size=$((size / 8)); fi
        for seed in $SEEDS; do
            run "$split-b$size-seed$seed" --num-labels "$labels" --algorithm fixmatch --seed "$seed" --calibratemix \
                --calmix-split "$split" -b "$size"
        done
    done
done
report --rows calmix-split
