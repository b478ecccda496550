#!/usr/bin/env bash
# Ours, not the paper's: a weight of the mixup loss that finds itself (--calmix-preset steered). FixMatch, FlexMatch and
# SoftMatch alone, with random mixup at equal weights (as steered, but the weight stays 1), and steered.
# Settings: as table1_cifar10.sh. CIFAR-10 with 250 labels is our choice; --dataset and --num-labels change it.
# The paper's figures: none. Measured by us: at SCALE=cpu, and on small sets, in results/README.md.
# Time: at SCALE=cpu three minutes a run on one core of an AMD EPYC server.
# The environment that it takes, and its scales: _common.sh.
. "$(dirname -- "${BASH_SOURCE[0]}")/_common.sh"

dataset cifar10 --model wide_resnet28_2 --weight-decay 5e-4
labels=$(labels 250)
for algorithm in fixmatch flexmatch softmatch; do
    for variant in alone random-mixup steered; do
        case $variant in
            alone) flags=() ;;
            random-mixup) flags=(--calibratemix --calmix-pairing random --calmix-gamma 0.5) ;;
            steered) flags=(--calibratemix --calmix-preset steered) ;;
        esac
        run_seeds "$algorithm-$variant" --num-labels "$labels" --algorithm "$algorithm" ${flags[@]+"${flags[@]}"}
    done
done
report
