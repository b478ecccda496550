#!/usr/bin/env bash
# Every base method, alone and with CalibrateMix; the supervised one alone.
# Settings: as table1_cifar10.sh. CIFAR-10 with 250 labels is our choice; --dataset and --num-labels change it.
# Consistency methods (from pi_model on) get as many unlabeled as labeled images, as in their published recipes.
# The paper's figures: it has the first three only, in table1_cifar10.sh.
# Measured by us: at SCALE=cpu with one seed, in results/README.md; the full recipe was not run.
# Time: at SCALE=cpu three minutes a run in bfloat16 on one busy core of an Intel Xeon with AMX.
# The environment that it takes, and its scales: _common.sh.
. "$(dirname -- "${BASH_SOURCE[0]}")/_common.sh"

dataset cifar10 --model wide_resnet28_2 --weight-decay 5e-4
labels=$(labels 250)
for algorithm in fixmatch flexmatch softmatch pseudo_label freematch marginmatch supervised uda adamatch dash \
    defixmatch pi_model meanteacher vat mixmatch remixmatch; do
    case $algorithm in
        pi_model | meanteacher | vat | mixmatch | remixmatch) mu=(--mu 1) ;;
        *) mu=() ;;
    esac
    for variant in alone calibratemix; do
        case $algorithm-$variant in
            supervised-calibratemix) continue ;;  # it has no pseudo-labels
            *-alone) flags=() ;;
            *) flags=(--calibratemix) ;;
        esac
        run_seeds "$algorithm-$variant" --num-labels "$labels" --algorithm "$algorithm" \
            ${mu[@]+"${mu[@]}"} ${flags[@]+"${flags[@]}"}
    done
done
report
