#!/usr/bin/env bash
# Every base method, alone and with CalibrateMix; the supervised one alone.
# Settings: as table1_cifar10.sh. CIFAR-10 with 250 labels is our choice; --dataset and --num-labels change it.
# The paper's figures: it has the first three only, in table1_cifar10.sh.
# Measured by us: at SCALE=cpu, in results/README.md; the full recipe was not run.
# Time: at SCALE=cpu three minutes a run on one core of an AMD EPYC server.
# The environment that it takes, and its scales: _common.sh.
. "$(dirname -- "${BASH_SOURCE[0]}")/_common.sh"

dataset cifar10 --model wide_resnet28_2 --weight-decay 5e-4
labels=$(labels 250)
for algorithm in fixmatch flexmatch softmatch pseudo_label freematch marginmatch supervised; do
    for variant in alone calibratemix; do
        case $algorithm-$variant in
            supervised-calibratemix) continue ;;  # it has no pseudo-labels
            *-alone) flags=() ;;
            *) flags=(--calibratemix) ;;
        esac
        for seed in $SEEDS; do
            run "$algorithm-$variant-seed$seed" --num-labels "$labels" --algorithm "$algorithm" --seed "$seed" \
                ${flags[@]+"${flags[@]}"}
        done
    done
done
report
