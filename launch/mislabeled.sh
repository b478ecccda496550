#!/usr/bin/env bash
# Mislabeled samples: 20 and 40 % of the labels are flipped, and mislabeled.py ranks the labeled images by AUM, flags
# those below the threshold samples' AUM and tells how many flipped ones it finds (into OUTPUT/found-*). FixMatch with
# CalibrateMix on CIFAR-10. Two runs for each noise and seed, with disjoint threshold samples: every image is judged.
# Settings: as table1_cifar10.sh, with 4,000 labels (at SCALE=cpu 1,000, at SCALE=smoke 100). Noise and number of labels
# are our choice.
# The paper's figures: not at hand. Measured by us: not run. Time: not measured.
# The environment that it takes, and its scales: _common.sh.
. "$(dirname -- "${BASH_SOURCE[0]}")/_common.sh"

dataset cifar10 --model wide_resnet28_2 --weight-decay 5e-4
labels=$(labels 4000)
if [ "$SCALE" = smoke ]; then labels=100; fi
for noise in 0.2 0.4; do
    for threshold_samples in 1 2; do
        for seed in $SEEDS; do
            run "noise$noise-seed$seed-$threshold_samples" --num-labels "$labels" --algorithm fixmatch --seed "$seed" \
                --calibratemix --label-noise "$noise" --save-margins --aum-threshold-samples "$threshold_samples"
        done
    done
done
report --rows label-noise
for noise in 0.2 0.4; do
    for seed in $SEEDS; do
        pair="$OUTPUT/noise$noise-seed$seed"
        after python "$here/mislabeled.py" "$pair-1" "$pair-2" --results-dir "$OUTPUT/found-noise$noise-seed$seed"
    done
done
