#!/usr/bin/env bash
# Table 3: CalibrateMix against random mixup (the same code, with pairs and split drawn at random) and label smoothing
# (0.1, of the labeled loss), on FixMatch, FlexMatch and SoftMatch.
# Settings: as table1_cifar10.sh. CIFAR-10 with 250 labels is our choice; --dataset and --num-labels change it.
# The paper's figures: not at hand.
# Measured by us: at SCALE=cpu, in results/README.md, with one row more: our own preset. The full recipe was not run.
# Time: at SCALE=cpu three minutes a run on one core of an AMD EPYC server.
# The environment that it takes, and its scales: _common.sh.
. "$(dirname -- "${BASH_SOURCE[0]}")/_common.sh"

dataset cifar10 --model wide_resnet28_2 --weight-decay 5e-4
labels=$(labels 250)
for algorithm in fixmatch flexmatch softmatch; do
    for variant in alone random-mixup label-smoothing calibratemix ours; do
        case $variant in
            alone) flags=() ;;
            random-mixup) flags=(--calibratemix --calmix-pairing random) ;;
            label-smoothing) flags=(--label-smoothing 0.1) ;;
            calibratemix) flags=(--calibratemix) ;;
            ours) flags=(--calibratemix --calmix-preset ours) ;;
        esac
        run_seeds "$algorithm-$variant" --num-labels "$labels" --algorithm "$algorithm" ${flags[@]+"${flags[@]}"}
    done
done
report
