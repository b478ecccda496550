#!/usr/bin/env bash
# Open question of the paper: what makes images unlike each other. Cosine similarity, negative euclidean distance and
# dot product, of penultimate features and of pixels.
# Settings: as table1_cifar10.sh, FixMatch with CalibrateMix. CIFAR-10 with 250 labels is our choice.
# The paper's figures: none.
# Measured by us: at SCALE=cpu, in results/README.md; the full recipe was not run.
# Time: in that setting with --amp three minutes a run on one core of a busy AMD EPYC server.
# The environment that it takes, and its scales: _common.sh.
. "$(dirname -- "${BASH_SOURCE[0]}")/_common.sh"

dataset cifar10 --model wide_resnet28_2 --weight-decay 5e-4
labels=$(labels 250)
for space in feature pixel; do
    for similarity in cosine euclidean dot; do
        for seed in $SEEDS; do
            run "$space-$similarity-seed$seed" --num-labels "$labels" --algorithm fixmatch --seed "$seed" \
                --calibratemix --calmix-space "$space" --calmix-similarity "$similarity"
        done
    done
done
report --rows calmix-space
